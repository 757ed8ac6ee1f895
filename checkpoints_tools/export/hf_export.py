"""Files that transformers needs besides an export's weights: configuration, code, tokenizer, generation settings.

transformers' own class opens a model that ``config.json`` describes completely: an un-expanded model of a family that
transformers has, or one of Mamba2 layers in which all grew equally. The export of any other model contains its code
(:mod:`checkpoints_tools.export.modeling_code`): of a hybrid that transformers hosts, classes that derive from the
host's. Multimodal models, and others with attention layers, are exported without code. With a plan that no key of
their own expresses, no other software can open them; :mod:`statex_dist.models.config_keys` ensures this.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from checkpoints_tools.export.hf_tokenizer import (
    BYTES_CLASS,
    GivenTokenizer,
    bytes_tokenizer_documents,
    read_tokenizer_config,
)
from checkpoints_tools.export.modeling_code import has_features, modeling_code, with_our_type
from statex_dist.models.config import CONFIG_NAME, ModelConfig
from statex_dist.models.config_keys import ARCHITECTURE, AUTO_MAP, MODULE_NAME, OUR_CODE_PREFIX
from statex_dist.models.mamba2.config import Mamba2Config
from statex_dist.models.registry import family_of
from statex_dist.state.geometry import FeatureMap

Form = Literal["plain", "remote_code", "none"]
"""How transformers opens a model: with its own class, with the code beside the weights, or not at all."""

_RESCALES = "rescale_prenorm_residual"
_REFUSED_BY_MAMBA_SSM = ("statex", "torch_dtype", "dtype")
"""Keys of ours and of transformers with which its ``MambaConfig`` cannot be made."""
_GROUPED_NORMS = ("mamba2", "bamba", "granitemoehybrid")
"""Models with ``n_groups`` whose output norm transformers took over all groups before 5.23."""
CODE_NAME = f"{MODULE_NAME}.py"
GENERATION_NAME = "generation_config.json"


def form_of(config: ModelConfig) -> Form:
    """Return how transformers opens a model."""
    if plain_class(config) is not None and (config.statex is None or config.plain_keys()):
        return "plain"
    if (host := _host(config)) is not None:
        return "none" if host.text is not None else "remote_code"
    others = config.is_mixed or config.attention_layers or config.own_block
    return "none" if others or family_of(config.MODEL_TYPE).block is None else "remote_code"


def plain_class(config: ModelConfig) -> str | None:
    """Return the name of transformers' class of an unexpanded model, or None where it has no class."""
    if host := _host(config):
        return host.model.partition(":")[2].removesuffix("Model").removesuffix("Text") + "ForCausalLM"
    return {"mamba2": "Mamba2ForCausalLM", "minimax": "MiniMaxForCausalLM"}.get(config.MODEL_TYPE)


def _host(config: ModelConfig) -> Any:
    """Return the row of the model of transformers that runs this one, or None."""
    return getattr(config, "HOST", None)


def export_notes(config: ModelConfig) -> list[str]:
    """Return what has to be said of how transformers opens an export."""
    if form_of(config) == "none":
        return [closed_note(config)]
    notes = []
    if _plain_minimax(config):
        notes.append(
            "transformers' MiniMax does not move the cache with the beams (seen in 5.17 and 5.24): generate with "
            "num_beams above 1 needs use_cache=False"
        )
    if form_of(config) == "remote_code":
        return notes
    if getattr(config, _RESCALES, False):
        notes.append(
            f"{_RESCALES} is written as false: it is of first values alone, but transformers 5 (seen in 5.24) also "
            "divides the weights that it loads where it is true"
        )
    if config.MODEL_TYPE in _GROUPED_NORMS and _groups(config) > 1:
        notes.append(
            "n_groups is above 1: open it with transformers 5.23 or newer, which normalises each group by itself, as "
            "we and mamba_ssm do; earlier releases normalise all groups together, which gives other logits"
        )
    return notes


def _plain_minimax(config: ModelConfig) -> bool:
    """Return whether an export has the cache of transformers' MiniMax."""
    return config.MODEL_TYPE == "minimax" and (_host(config) is not None or form_of(config) == "plain")


def _groups(config: ModelConfig) -> int:
    """Return the groups of Mamba2 layers."""
    layers: Any = config if _host(config) is None else config.mixer_config()  # type: ignore[attr-defined]
    return int(layers.n_groups)


def closed_note(config: ModelConfig) -> str:
    """Return why transformers opens no export of a model, and what does."""
    name, mixed = config.MODEL_TYPE, "and we write no code for mixed models"
    why = config.obstacle or f"there is no code for {name}"
    if config.own_block:
        why = config.obstacle or "layers have an MLP"
    if config.attention_layers:
        why = config.obstacle or f"layers {list(config.attention_layers)} are softmax attention"
    if _is_plain_mamba_ssm(config):
        return (
            f"transformers has no class for this {name} model, {mixed}: {why}; mamba_ssm opens pytorch_model.bin "
            "alone: make its MambaLMHeadModel of config.json and load the tensors of the safetensors into that"
        )
    if _host(config) is not None and config.obstacle is None:
        mixed, why = "and we write no code for multimodal models", f"{name} has other parts than a language model"
    if config.statex is not None:
        return (
            f"no library opens this expanded model, as none knows its plan, {mixed}: {why}; "
            "it can be expanded further, resharded and verified"
        )
    if config.ours_alone:
        return f"no library opens this {name} model, {mixed}: {why}"
    return f"transformers has no class for this {name} model, {mixed}: {why}; the software that it came from opens it"


def _is_plain_mamba_ssm(config: ModelConfig) -> bool:
    """Return whether a file is mamba_ssm's, which have no ``model_type``, and its keys say all, a plan included."""
    return "model_type" not in config.to_dict() and (config.statex is None or bool(config.plain_keys()))


def export_config(values: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return the contents of ``config.json`` of an export.

    Args:
        values: The source's.
        config: The same, typed.
    """
    form, values = form_of(config), config.with_plan(values)
    if form == "none" and _is_plain_mamba_ssm(config):
        values = {key: values[key] for key in values if key not in _REFUSED_BY_MAMBA_SSM}
    if config.ours_alone and "model_type" in values:  # mamba_ssm's files have none
        values = {**values, "model_type": OUR_CODE_PREFIX + config.MODEL_TYPE, "architectures": [ARCHITECTURE]}
    if form == "remote_code":
        # The exported code has no defaults: whatever the source left to a family's defaults is written out.
        defaults = {key: value for key, value in config.to_dict().items() if key not in values}
        return {**values, **defaults, "architectures": [ARCHITECTURE], "auto_map": AUTO_MAP}
    values = {key: value for key, value in values.items() if not (key == "auto_map" and value == AUTO_MAP)}
    if form == "plain":
        if isinstance(config, Mamba2Config):
            values = config.with_all_names(values)
            if _RESCALES in values:
                # transformers 5 divides the output projections that it loads by the root of the number of layers.
                values = {**values, _RESCALES: False}
        if values.get("architectures") in (None, [], [ARCHITECTURE]):
            values["architectures"] = [plain_class(config)]
    return values


def brings_code(values: dict[str, Any], model_dir: Path | None) -> bool:
    """Return whether a source is an export with code, which goes along wherever its weights go."""
    return values.get("auto_map") == AUTO_MAP and model_dir is not None and (model_dir / CODE_NAME).is_file()


def code_of_expansion(model_dir: Path, config: ModelConfig) -> str:
    """Return the code that a base brings, for the expanded model: its ``model_type`` has our prefix.

    Code of a base without features cannot run an expansion with them; the code of this release takes its place.

    Args:
        model_dir: Of the base.
        config: The expanded model's configuration.
    """
    code = (model_dir / CODE_NAME).read_text(encoding="utf-8")
    if has_features(config) and FeatureMap.__name__ not in code:
        return modeling_code(config)
    return with_our_type(code)


def export_documents(
    values: dict[str, Any], config: ModelConfig, model_dir: Path | None, tokenizer: GivenTokenizer | None = None
) -> dict[str, Any]:
    """Return the small files of an export, by name; what the source already has is carried along and not among them.

    Args:
        values: Contents of the source's ``config.json``, with the dtype of the weights.
        config: The same, typed.
        model_dir: Where the source's tokenizer and generation files are.
        tokenizer: One that a source without any is given.

    Raises:
        CheckpointError: ``tokenizer_config.json`` is damaged.
    """
    documents: dict[str, Any] = {CONFIG_NAME: export_config(values, config)}
    if form_of(config) == "remote_code":
        documents[CODE_NAME] = modeling_code(config)
    marker = tokenizer.config if tokenizer is not None else read_tokenizer_config(model_dir)
    is_bytes = marker.get("tokenizer_class") == BYTES_CLASS
    if is_bytes:
        # Also where the source has some of them: a training run, for one, keeps no class of a tokenizer.
        documents |= bytes_tokenizer_documents(marker)
    elif tokenizer is not None:
        documents |= tokenizer.files
    if model_dir is None or not (model_dir / GENERATION_NAME).is_file():
        ids = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        known = {key: marker.get(key) if is_bytes and value in (None, []) else value for key, value in ids.items()}
        if settings := {key: value for key, value in known.items() if value not in (None, [])}:
            documents[GENERATION_NAME] = settings
    return documents
