"""The parts of a run, each built by its section of the configuration: data, model, engine, callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from statex_dist.data.loader import PackedLoader
from statex_dist.data.store import ShardStore
from statex_dist.distributed.env import ProcessEnv
from statex_dist.engine.base import TrainEngine
from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.flops import training_flops_per_pair, training_flops_per_token
from statex_dist.models.lm import RecurrentLM
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


def build_model(config: RunConfig) -> RecurrentLM:
    """Load or make the model, and freeze the parameters that are not trained."""
    model = config.model.build(dtype=config.engine.dtype, seed=config.seed)
    if config.train.state_passing and any(kind == "attention" for _, kind in model.state_places):
        raise ConfigError(
            f"train.state_passing does not go with attention, and this {model.config.MODEL_TYPE} model has layers of "
            "it: keys and values of an unrelated sequence are no state that a text could leave; set it to 0"
        )
    config.optimizer.freeze_in(model.named_parameters(), roles=model.roles())
    config.engine.prepare(model)
    return model


def build_engine(config: RunConfig, model: RecurrentLM, env: ProcessEnv) -> TrainEngine:
    """Return the engine that the configuration names, around ``model``."""
    config.engine.join(env, config.shared_settings())
    device = env.device if config.engine.offload_optimizer == "none" else None
    optimizer = config.optimizer.build(
        model.named_parameters(), no_decay=model.no_decay(), roles=model.roles(), device=device
    )
    return config.engine.build(
        model,
        optimizer,
        config.schedule.build(optimizer, num_steps=config.train.num_steps),
        env=env,
        gradient_clipping=config.optimizer.gradient_clipping,
        accumulation_steps=config.accumulation_steps(env.world_size),
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
