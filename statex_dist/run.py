"""The composition root: a configuration becomes a model, data, an engine and a loop."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from statex_dist.checkpoint.formats.places import check_link
from statex_dist.checkpoint.json_file import config_text
from statex_dist.checkpoint.layout import CHECKPOINTS_DIR, STACKS_DIR, TRAIN_LENGTH_KEY
from statex_dist.config import flat, to_dict
from statex_dist.data.forecast import warn_of_repeats
from statex_dist.data.loader import PackedLoader
from statex_dist.data.store import ShardStore
from statex_dist.data.tokenizer import has_tokenizer, load_tokenizer
from statex_dist.distributed.context_group import ContextGroup
from statex_dist.distributed.env import ProcessEnv, read_env, require_device, require_launcher, share_cores
from statex_dist.distributed.error_sync import fail_together
from statex_dist.distributed.ranks import Ranks
from statex_dist.engine.base import TrainEngine
from statex_dist.engine.checkpoints import Checkpoints, Fit
from statex_dist.engine.documents import Documents
from statex_dist.engine.plain import PlainEngine
from statex_dist.engine.state_passing import StatePassing
from statex_dist.errors import ConfigError, StateXError, failure_text
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.hf import from_pretrained
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import config_from_dict, family_of, parameter_roles, training_flops_per_token
from statex_dist.models.source import find_model
from statex_dist.optim.groups import build_optimizer, freeze_parameters
from statex_dist.optim.schedule import build_schedule, log_schedule, schedule_facts, warn_of_changed_rates
from statex_dist.redact import redact, redacted
from statex_dist.run_config import RunConfig
from statex_dist.train.guard import BadStepsError, Guard, NoTargetsError
from statex_dist.train.loop import Observers, Trainer
from statex_dist.train.metrics import Metrics
from statex_dist.train.mfu import utilisation
from statex_dist.train.profile import Profiler
from statex_dist.train.run_lock import LOCK_NAME
from statex_dist.train.settings import write_settings
from statex_dist.train.shared_dir import claim_together, require_shared
from statex_dist.train.signals import EXIT_PREEMPTED, StopRequest
from statex_dist.train.status import RunStatus, State, write_failure, write_status
from statex_dist.train.watchdog import Watchdog

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenization_statex.py",
    "generation_config.json",
)


def train(config: RunConfig, fit: Fit | None = None) -> bool:
    """Run, or resume, a training run on this process and its peers.

    Args:
        config: The run.
        fit: Makes a checkpoint of another number of ranks one of this; None refuses such a one.

    Returns:
        Whether the run is complete (False: told to stop, and saved).

    Raises:
        StateXError: The configuration, the data or a checkpoint is wrong.
    """
    require_launcher()
    env = read_env()
    require_device(env)
    share_cores(env)
    if config.engine.name == "plain" and env.world_size > 1:
        raise ConfigError(f"engine.name plain runs in one process, not {env.world_size}; use engine.name zero3")
    accumulation_steps = config.accumulation_steps(env.world_size)
    stop = StopRequest()
    stop.install()

    if config.engine.name == "zero3":
        from statex_dist.engine.zero3 import init_process_group

        init_process_group(env, config.engine, _shared_settings(config))
    try:
        # Before weights are read: a rank with another directory must not find that out at its first checkpoint.
        require_shared(Path(config.run_dir), Ranks(env.rank, env.world_size))
        return _build_and_train(config, env, accumulation_steps, stop, fit)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _build_and_train(
    config: RunConfig,
    env: ProcessEnv,
    accumulation_steps: int,
    stop: StopRequest,
    fit: Fit | None,
) -> bool:
    ranks, run_dir = Ranks(env.rank, env.world_size), Path(config.run_dir)
    # No rank claims the directory before all are ready: one that fails up to here knows that it is not its own.
    with fail_together(ranks.rank, ranks.gather, place=config.run_dir):
        stores = config.data.open_stores()
        model = build_model(config)
        loader = build_loader(config, stores, model.config, env)
        documents = Documents(
            model=describe_model(config, stores, model.config, rank=env.rank),
            settings=resolved(config),
            trained_length=config.data.trained_length(stores),
        )
    logger.info(
        "%s: %d parameters, %d state numbers; %d tokens per step on %d ranks",
        model.config.MODEL_TYPE,
        sum(p.numel() for p in model.parameters()),
        model.config.state_numbers,
        config.data.packs_per_step * config.data.seq_len,
        env.world_size,
    )
    if any(ranks.gather(stop.received)):
        logger.info("stopped by a signal before the first step; there is nothing to save")
        return False
    # Only now, so that a start that is refused leaves no directory behind.
    with claim_together(run_dir, ranks):
        try:
            engine = build_engine(config, model, env, accumulation_steps)
            try:
                return _train(config, engine, model.config, loader, documents, stop, fit)
            finally:
                engine.close()
        except Exception as error:
            # Here, where the directory is this job's: behind the claim another one may have it.
            if not getattr(error, "agreed", False):
                text, code = failure_text(error, run_dir), getattr(error, "exit_code", 1)
                write_failure(run_dir, text, exit_code=code, world_size=env.world_size)
            raise


def _train(
    config: RunConfig,
    engine: TrainEngine,
    model: ModelConfig,
    loader: PackedLoader,
    documents: Documents,
    stop: StopRequest,
    fit: Fit | None,
) -> bool:
    run_dir = Path(config.run_dir)
    mark = run_dir / LOCK_NAME
    checkpoints = Checkpoints(engine, run_dir / CHECKPOINTS_DIR, documents, config.train.save_policy, mark=mark)
    guard = Guard(config.guard, run_dir, rank=engine.rank)
    client_state = checkpoints.resume(fit)
    start_step = 0
    if client_state is not None:
        start_step = client_state["step"]
        if "loader" in client_state:  # a checkpoint made of weights alone begins with the first sequence
            loader.load_state_dict(client_state["loader"])
        if "guard" in client_state:
            guard.load_state_dict(client_state["guard"])
    num_steps, epochs = config.train.num_steps, loader.passes()
    if start_step >= num_steps:
        logger.info("%s has %d steps already, train.num_steps is %d", run_dir, start_step, num_steps)
    facts = schedule_facts(config.schedule, lr=config.optimizer.lr, num_steps=num_steps)
    observers = Observers(
        profiler=Profiler(config.profile, run_dir, rank=engine.rank, world_size=engine.world_size),
        states_every=config.metrics.states_every,
    )
    if engine.rank == 0:
        documents.tell_length(num_steps)
        write_settings(run_dir, documents.settings, start_step)
        _write_status(run_dir, engine, "running", start_step, epochs)
        if start_step < num_steps:
            log_schedule(config.schedule, num_steps=num_steps)
            limit = config.data.warn_epochs
            warn_of_repeats(loader.forecast(num_steps, above=limit), num_steps=num_steps, limit=limit)
            # A checkpoint of step 0 was made from weights alone: it has no learning rate to compare with.
            if client_state is not None and start_step > 0:
                warn_of_changed_rates(
                    engine.optimizer.param_groups,
                    engine.saved_rates,
                    saved_facts=client_state.get("schedule"),
                    facts=facts,
                )
        observers.metrics = Metrics(
            run_dir,
            config.metrics,
            start_step=start_step,
            settings=dict(documents.settings),
            num_steps=num_steps,
            utilisation=utilisation(
                training_flops_per_token(model),
                device=engine.device,
                ranks=engine.world_size,
                given_tflops=config.metrics.peak_tflops,
            ),
        )
        for name, report in loader.report(max_windows=1).items() if start_step == 0 else ():
            logger.info(
                "%s: %.2f %% padding, %.1f %% of the documents cut, %.1f documents in a sequence of %d (first window)",
                redact(config.data.paths[name]),
                100 * report.waste,
                100 * report.cut_documents / max(report.documents, 1),
                report.documents_per_pack,
                report.seq_len,
            )
    minutes, limit = config.train.hang_minutes, config.engine.timeout_minutes
    if minutes is None or minutes > 0:
        if minutes is not None and minutes >= limit:
            logger.warning(
                "train.hang_minutes=%g is not below engine.timeout_minutes=%g: collectives give up before the "
                "stacks of a hung rank are written",
                *(minutes, limit),
            )
        seconds = 60 * (limit * 2 / 3 if minutes is None else minutes)
        observers.watchdog = Watchdog(seconds, run_dir / STACKS_DIR, engine.rank)
    batches = iter(loader)
    trainer = Trainer(
        engine,
        batches,
        config.train,
        checkpoints=checkpoints,
        guard=guard,
        observers=observers,
        stop=stop,
        start_step=start_step,
        facts=facts,
    )
    try:
        with observers.looking():
            done = trainer.run()
        if done and guard.without_targets == trainer.step:
            raise NoTargetsError(
                f"none of the {trainer.step} steps had a target: the model is as it was; look at the data's loss masks"
            ).on_all_ranks(engine.rank)
        if engine.rank == 0:
            state: State = "complete" if done else "preempted"
            _write_status(run_dir, engine, state, trainer.step, trainer.epochs or epochs)
        if engine.rank == 0 and guard.without_targets:
            logger.warning("%d of %d steps had no target and updated nothing", guard.without_targets, trainer.step)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):  # the second one: the user does not want to wait for the save
            error = StateXError(
                f"interrupted again at step {trainer.step}, before it was saved; the same command resumes "
                "from the last checkpoint"
            )
        exit_code = error.exit_code if isinstance(error, StateXError) else 1
        if not getattr(error, "agreed", False):
            write_failure(
                run_dir,
                failure_text(error, run_dir),
                exit_code=exit_code,
                world_size=engine.world_size,
                step=trainer.step,
                epochs=trainer.epochs or epochs,
                restart=not isinstance(error, BadStepsError | NoTargetsError),
            )
        raise error
    finally:
        batches.close()
        if observers.metrics is not None:
            observers.metrics.close()
    if not done:
        logger.info("stopped at step %d of %d; the same command continues", trainer.step, num_steps)
    return done


def _write_status(run_dir: Path, engine: TrainEngine, state: State, step: int, epochs: Mapping[str, float]) -> None:
    exit_code = {"complete": 0, "preempted": EXIT_PREEMPTED}.get(state)
    ranks = engine.world_size
    try:
        write_status(
            run_dir, RunStatus(state=state, step=step, world_size=ranks, exit_code=exit_code, epochs=dict(epochs))
        )
    except OSError as error:
        logger.warning("the status of %s is not written: %s", run_dir, error)


def resolved(config: RunConfig) -> dict[str, Any]:
    """Return the run's configuration as ``config.yaml``, checkpoints and wandb have it."""
    return redacted(to_dict(config))


def build_model(config: RunConfig) -> RecurrentLM:
    """Load or make the model, in the run's precision, with what is not trained frozen."""
    dtype = torch.bfloat16 if config.engine.precision == "bf16" else torch.float32
    if config.model.path is not None:
        model = from_pretrained(Path(config.model.path), dtype=dtype, digests=config.model.check_digests)
    else:
        assert config.model.config is not None
        settings = config_from_dict(config.model.config)
        settings.extra.pop(TRAIN_LENGTH_KEY, None)  # the config.json of a checkpoint may be given here
        if settings.extra:
            allowed = sorted({f.name for f in dataclasses.fields(settings)} - {"extra"})
            unknown = ", ".join(f"model.config.{key}" for key in sorted(settings.extra))
            raise ConfigError(f"unknown key {unknown}; allowed in model.config: model_type, {', '.join(allowed)}")
        model = RecurrentLM(settings)
        model.init_parameters(config.seed)
        model = model.to(dtype)
    prepare_model(model, config)
    return model


def prepare_model(model: RecurrentLM, config: RunConfig) -> None:
    """Freeze what is not trained, and set what the run's configuration says of memory."""
    freeze_parameters(model.named_parameters(), roles=parameter_roles(model.config), config=config.optimizer)
    model.trunk.recompute = config.engine.activation_checkpointing
    model.lm_head.chunk_tokens = config.engine.loss_chunk_tokens
    model.max_state_bytes = config.engine.max_state_bytes


def build_loader(config: RunConfig, stores: dict[str, ShardStore], model: ModelConfig, env: ProcessEnv) -> PackedLoader:
    """Return this rank's loader; see :meth:`DataConfig.build`."""
    source = find_model(config.model.path) if config.model.path is not None else None
    return config.data.build(
        stores,
        vocab_size=model.vocab_size,
        pad_token_id=model.pad_token_id,
        tokenizer=load_tokenizer(str(source)) if source is not None and has_tokenizer(source) else None,
        seed=config.seed,
        rank=env.rank // config.parallel.context,
        world_size=config.parallel.data_parallel_size(env.world_size),
    )


def build_engine(config: RunConfig, model: RecurrentLM, env: ProcessEnv, accumulation_steps: int) -> TrainEngine:
    """Return the engine that the configuration names, around ``model``."""
    tensors = family_of(model.config.MODEL_TYPE).tensors(model.config)
    no_decay = {name for name, spec in tensors.items() if not spec.decay}
    if config.engine.name == "zero3":
        from statex_dist.engine.zero3 import Zero3Engine, init_process_group

        init_process_group(env, config.engine, _shared_settings(config))
    optimizer = build_optimizer(
        model.named_parameters(), no_decay=no_decay, roles=parameter_roles(model.config), config=config.optimizer
    )
    schedule = build_schedule(optimizer, config.schedule, num_steps=config.train.num_steps)
    clipping, probability = config.optimizer.gradient_clipping, config.train.state_passing
    passing = StatePassing(probability, config.seed) if probability else None
    if config.engine.name == "plain":
        return PlainEngine(
            model,
            optimizer,
            schedule,
            gradient_clipping=clipping,
            device=env.device,
            segment_tokens=config.engine.segment_tokens,
            passing=passing,
        )
    return Zero3Engine(
        model,
        optimizer,
        schedule,
        config=config.engine,
        env=env,
        gradient_clipping=clipping,
        accumulation_steps=accumulation_steps,
        context=ContextGroup.join(config.parallel.context, timeout=timedelta(minutes=config.engine.timeout_minutes)),
        passing=passing,
    )


def _shared_settings(config: RunConfig) -> dict[str, object]:
    """Return the settings that must be equal on all ranks, by dotted name, without secrets."""
    # Each host has a cache of its own, perhaps under another path.
    return {k: v for k, v in flat(resolved(config)).items() if k not in ("data.cache_dir", "data.cache_limit")}


def describe_model(
    config: RunConfig, stores: dict[str, ShardStore], model: ModelConfig, *, rank: int = 0
) -> dict[str, str]:
    """Return the files that make a checkpoint a model: ``config.json`` and those of the tokenizer.

    Only those of rank 0 are written, and only it warns that a tokenizer is missing.
    """
    files = {CONFIG_NAME: config_text(model.to_dict())}
    source = find_model(config.model.path) if config.model.path is not None else None
    if source is not None:
        files |= _read_files(source, TOKENIZER_FILES)
        if has_tokenizer(source):
            return files
    manifest = next((store.manifest for store in stores.values() if store.manifest is not None), None)
    if manifest is not None and (manifest.tokenizer == "bytes" or Path(manifest.tokenizer).is_dir()):
        with tempfile.TemporaryDirectory() as directory:
            load_tokenizer(manifest.tokenizer).save(directory)
            files |= _read_files(Path(directory), TOKENIZER_FILES)
    elif rank == 0:
        logger.warning("no tokenizer found beside the model or the data: checkpoints will hold none")
    return files


def _read_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    found = [directory / name for name in names if (directory / name).is_file()]
    for path in found:
        check_link(path, directory)
    return {str(path.relative_to(directory)): path.read_text(encoding="utf-8") for path in found}
