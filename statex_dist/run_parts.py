"""The parts of a run, each built by its section of the configuration: data, model, engine, callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from statex_dist.config import parse_size
from statex_dist.data.formats import open_store
from statex_dist.data.loader import PackedLoader
from statex_dist.data.store import ShardStore
from statex_dist.distributed.env import ProcessEnv
from statex_dist.engine.base import TrainEngine
from statex_dist.models.config import ModelConfig
from statex_dist.models.flops import training_flops_per_token
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.registry import family_of
from statex_dist.models.roles import parameter_roles
from statex_dist.run_config import RunConfig
from statex_dist.train.callback import Callback
from statex_dist.train.model_files import check_data
from statex_dist.train.run_files import RunFiles


def open_stores(config: RunConfig, paths: Mapping[str, str] | None = None) -> dict[str, ShardStore]:
    """Open every source of the data, by name; or others in the same way."""
    data = config.data
    limit = None if data.cache_limit is None else parse_size(str(data.cache_limit), option="data.cache_limit")
    return {
        name: open_store(
            path,
            cache_dir=data.cache_dir,
            cache_limit=limit,
            download_retries=data.download_retries,
            download_timeout=data.download_timeout,
        )
        for name, path in (data.paths if paths is None else paths).items()
    }


def build_loader(
    config: RunConfig, stores: Mapping[str, ShardStore], model: ModelConfig, env: ProcessEnv
) -> PackedLoader:
    """Return this rank's loader.

    Raises:
        DataError: The data was tokenized with another tokenizer or for a larger vocabulary than the model's.
    """
    data = config.data
    pad_id = check_data(model, config.model.directory, {data.paths[name]: store for name, store in stores.items()})
    return PackedLoader(
        stores,
        stages=data.stages(),
        global_packs=data.packs_per_step,
        pad_id=pad_id,
        rank=env.rank // config.parallel.context,
        world_size=config.parallel.data_parallel_size(env.world_size),
        seed=config.seed,
        packing=data.packing,
        tail=data.tail,
        window_tokens=data.window_tokens,
        long_documents=data.long_documents,
        num_workers=data.num_workers,
        vocab_size=model.vocab_size,
        skip_corrupt=data.skip_corrupt,
    )


def build_model(config: RunConfig) -> RecurrentLM:
    """Load or make the model, and freeze the parameters that are not trained."""
    model = config.model.build(dtype=config.engine.dtype, seed=config.seed)
    config.optimizer.freeze_in(model.named_parameters(), roles=parameter_roles(model.config))
    config.engine.prepare(model)
    return model


def build_engine(config: RunConfig, model: RecurrentLM, env: ProcessEnv) -> TrainEngine:
    """Return the engine that the configuration names, around ``model``."""
    config.engine.join(env, config.shared_settings())
    tensors = family_of(model.config.MODEL_TYPE).tensors(model.config)
    no_decay = {name for name, spec in tensors.items() if not spec.decay}
    roles = parameter_roles(model.config)
    optimizer = config.optimizer.build(model.named_parameters(), no_decay=no_decay, roles=roles)
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
        *config.metrics.build(flops_per_token=training_flops_per_token(model)),
        *config.eval.build(held, model, config.model.directory, seq_len=max(s.seq_len for s in config.data.stages())),
        RunFiles(),
    ]
