"""The composition root: a configuration becomes a model, data, an engine, callbacks and a loop."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, LOGS_DIR, STACKS_DIR, complete_tags
from statex_dist.distributed import flight_recorder
from statex_dist.distributed.disks import Disks
from statex_dist.distributed.env import (
    ProcessEnv,
    local_world_size,
    read_env,
    require_device,
    require_launcher,
    share_cores,
)
from statex_dist.distributed.error_sync import fail_together
from statex_dist.distributed.ranks import Ranks
from statex_dist.engine.checkpoints import Checkpoints
from statex_dist.engine.documents import Documents
from statex_dist.errors import CheckpointError, failure_text
from statex_dist.rank_log import rank_log
from statex_dist.redact import redact
from statex_dist.run_config import RunConfig
from statex_dist.run_parts import build_engine, build_loader, build_model, open_values, own_callbacks
from statex_dist.train.callback import Callbacks, build_callbacks
from statex_dist.train.guard import Guard
from statex_dist.train.loop import Trainer
from statex_dist.train.model_files import describe_model
from statex_dist.train.run_files import report_start
from statex_dist.train.run_lock import LOCK_NAME
from statex_dist.train.shared_dir import claim_together, require_shared
from statex_dist.train.status import StopRequest, write_failure

logger = logging.getLogger(__name__)


def train(config: RunConfig) -> bool:
    """Run, or resume, a training run on this process and its peers.

    Args:
        config: The run.

    Returns:
        Whether the run is complete (False: told to stop, and saved).

    Raises:
        StateXError: The configuration, the data or a checkpoint is wrong.
    """
    require_launcher()
    env = read_env()
    require_device(env)
    share_cores(env)
    config.check_ranks(env.world_size)
    if env.rank == 0 and not config.parallel.lies_within_hosts(local_world_size(), env.world_size):
        logger.warning(
            "parallel.context=%d: groups exchange states between hosts, because %d ranks of this one are no multiple",
            *(config.parallel.context, local_world_size()),
        )
    stop = StopRequest()
    stop.install()
    flight_recorder.enable(Path(config.run_dir) / STACKS_DIR)
    config.engine.join(env, config.shared_settings())
    try:
        # Before weights are read: a rank with another directory must not find that out at its first checkpoint.
        if config.train.shared_run_dir:
            patience = 0.8 * 60 * config.engine.timeout_minutes  # the other ranks wait no longer
            require_shared(Path(config.run_dir), Ranks(env.rank, env.world_size), patience=patience)
        return _build_and_train(config, env, stop)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _build_and_train(config: RunConfig, env: ProcessEnv, stop: StopRequest) -> bool:
    ranks, run_dir, settings = Ranks(env.rank, env.world_size), Path(config.run_dir), config.resolved()
    # No rank claims the directory before all are ready: one that fails up to here knows that it is not its own.
    with fail_together(ranks.rank, ranks.gather, place=config.run_dir):
        stores, held = config.eval.divide(config.data.open_stores(), config.data.open_stores)
        values = open_values(config)
        model = build_model(config, values)
        loader = build_loader(config, stores, model.config, env)
        documents = Documents(
            model=describe_model(model.config, config.model.directory, stores, rank=env.rank),
            settings=settings,
            trained_length=config.data.trained_length(stores),
        )
        config.import_parts()
        callbacks = [*build_callbacks(config.callbacks), *own_callbacks(config, model.config, held, env)]
    logger.info(
        "%s: %d parameters, %d state elements; %d tokens per step on %d ranks",
        model.config.MODEL_TYPE,
        sum(p.numel() for p in model.parameters()),
        model.config.state_elements,
        config.data.packs_per_step * config.data.seq_len,
        env.world_size,
    )
    if any(ranks.gather(stop.received)):
        logger.info("stopped by a signal before the first step; there is nothing to save")
        return False
    # Only now, so that a refused start makes no directory.
    disks = config.train.find_disks(run_dir, ranks)
    log = rank_log(run_dir / LOGS_DIR / f"rank{env.rank}.log", rank=env.rank, world_size=env.world_size)
    with claim_together(run_dir, ranks, disks or Disks.one(ranks.rank, ranks.world_size)), log:
        try:
            checkpoints = run_dir / CHECKPOINTS_DIR
            resumes = any(ranks.gather(bool(complete_tags(checkpoints))))  # hosts may have disks of their own
            engine = build_engine(config, model, env, values, resumes=resumes)
            try:
                mark, policy = run_dir / LOCK_NAME, config.train.save_policy
                facts = {"optimizer.lr": config.optimizer.lr, **config.schedule.facts(num_steps=config.train.num_steps)}
                trainer = Trainer(
                    engine,
                    loader,
                    config.train,
                    run_dir=run_dir,
                    checkpoints=Checkpoints(
                        *(engine, checkpoints, documents, policy),
                        mark=mark,
                        disks=disks,
                        neighbor_copy=config.train.neighbor_copy,
                    ),
                    guard=Guard(config.guard, run_dir, rank=engine.rank),
                    callbacks=Callbacks(callbacks, rank=engine.rank),
                    stop=stop,
                    facts=facts,
                    settings=settings,
                )
                state = trainer.resume()
                if resumes and state is None:  # the parameters of this start have no values
                    raise CheckpointError(
                        f"the checkpoints of {checkpoints} have gone since this start began; restore them, or start in "
                        "another run directory"
                    ).on_all_ranks(engine.rank)
                if engine.rank == 0:
                    names = {name: redact(path) for name, path in config.data.paths.items()}
                    limit = config.data.warn_epochs
                    report_start(trainer, loader, state, schedule=config.schedule, warn_epochs=limit, names=names)
                return trainer.run()
            finally:
                engine.close()
        except Exception as error:
            # Here, while this job holds the claim on the directory: after it another job may have the directory.
            if not getattr(error, "agreed", False):
                text, code = failure_text(error, run_dir), getattr(error, "exit_code", 1)
                write_failure(run_dir, text, exit_code=code, world_size=env.world_size)
            raise
