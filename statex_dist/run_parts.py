"""The parts of a run, each built by its section of the configuration: data, model, engine, callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from statex_dist.data.loader import PackedLoader
from statex_dist.data.store import ShardStore
from statex_dist.distributed.env import ProcessEnv
from statex_dist.distributed.error_sync import fail_together
from statex_dist.distributed.ranks import Ranks
from statex_dist.engine.base import TrainEngine
from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.flops import training_flops_per_pair, training_flops_per_token
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.values import ModelValues
from statex_dist.run_config import RunConfig
from statex_dist.train.callback import Callback
from statex_dist.train.model_files import check_data
from statex_dist.train.run_files import RunFiles


def build_loader(
    config: RunConfig, stores: Mapping[str, ShardStore], model: ModelConfig, env: ProcessEnv
) -> PackedLoader:
    """Return this rank's loader; see :meth:`DataConfig.build`."""
    places = {config.data.paths[name]: store for name, store in stores.items()}
    return config.data.build(
        stores,
        vocab_size=model.vocab_size,
        pad_id=check_data(model, config.model.directory, places),
        seed=config.seed,
        rank=env.rank // config.parallel.context,
        world_size=config.parallel.data_parallel_size(env.world_size),
    )


def open_values(config: RunConfig) -> ModelValues | None:
    """Open what :func:`build_model` lays out and :func:`build_engine` reads by ranges.

    Returns:
        The values, or None where the engine takes a whole model.
    """
    if not config.engine.shards_start:
        return None
    return config.model.open_values(dtype=config.engine.dtype, seed=config.seed)


def build_model(config: RunConfig, values: ModelValues | None = None) -> RecurrentLM:
    """Return the model with the parameters frozen that are not trained.

    Args:
        config: The run.
        values: Of :func:`open_values`: the model is then laid out without memory. None loads or makes it whole.
    """
    model = config.model.build(dtype=config.engine.dtype, seed=config.seed) if values is None else values.model
    if config.train.state_passing and any(kind == "attention" for _, kind in model.state_places):
        raise ConfigError(
            f"train.state_passing does not go with attention, and this {model.config.MODEL_TYPE} model has layers of "
            "it: keys and values of an unrelated sequence are no state that a text could leave; set it to 0"
        )
    config.optimizer.freeze_in(model.named_parameters(), roles=model.roles())
    config.engine.prepare(model)
    return model


def build_engine(
    config: RunConfig,
    model: RecurrentLM,
    env: ProcessEnv,
    values: ModelValues | None = None,
    *,
    resumes: bool = False,
) -> TrainEngine:
    """Return the engine that the configuration names, around ``model``.

    Args:
        config: The run.
        model: Of :func:`build_model`.
        env: This process.
        values: What the model was laid out from; None of a whole one.
        resumes: Whether a checkpoint will set every value: none is read or drawn then.
    """
    config.engine.join(env, config.shared_settings())
    accumulation_steps = config.accumulation_steps(env.world_size)
    roles, no_decay = model.roles(), model.no_decay()  # of the shapes, which a partitioned model does not show
    if values is not None:
        ranks = Ranks(env.rank, env.world_size)
        with fail_together(ranks.rank, ranks.gather, place=config.run_dir), closing(values):
            begin = None if resumes else values
            config.engine.partition(model, begin, env, accumulation_steps=accumulation_steps)
    device = env.device if config.engine.offload_optimizer == "none" else None
    optimizer = config.optimizer.build(model.named_parameters(), no_decay=no_decay, roles=roles, device=device)
    return config.engine.build(
        model,
        optimizer,
        config.schedule.build(optimizer, num_steps=config.train.num_steps),
        env=env,
        gradient_clipping=config.optimizer.gradient_clipping,
        accumulation_steps=accumulation_steps,
        context=config.parallel.context,
        passing=config.train.build_passing(seed=config.seed),
    )


def own_callbacks(
    config: RunConfig, model: ModelConfig, held: Mapping[str, ShardStore], env: ProcessEnv
) -> list[Callback]:
    """Return the callbacks that the sections of the configuration make; their ``order`` is the order of the calls."""
    run_dir, rank = Path(config.run_dir), env.rank
    return [
        *config.train.build_watchdog(run_dir, rank=rank, timeout_minutes=config.engine.timeout_minutes),
        *config.profile.build(run_dir, rank=rank, world_size=env.world_size),
        *config.metrics.build(
            flops_per_token=training_flops_per_token(model), flops_per_pair=training_flops_per_pair(model)
        ),
        *config.eval.build(held, model, config.model.directory, seq_len=max(s.seq_len for s in config.data.stages())),
        RunFiles(),
    ]
