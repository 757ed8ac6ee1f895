"""``modeling_statex.py``: a model's own code, with which transformers opens it where nothing of ours is installed.

The file is put together (:mod:`checkpoints_tools.export.bundle`) from our own layers and scans and from
:mod:`checkpoints_tools.export.remote_code`, which makes a model of transformers of them. The tables here leave
out what an export does not need: kernels of a GPU, context and tensor parallelism, mitigations, and checks of the
configuration, which was checked when the file was written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from math import isfinite
from pathlib import Path
from typing import Any

from statex_dist import __version__, models
from statex_dist.models.config import ModelConfig
from statex_dist.models.config_keys import AUTO_MAP, OUR_CODE_PREFIX
from statex_dist.models.registry import family_of

_MODELS = Path(models.__file__).parent

_CODE = "checkpoints_tools.export.remote_code"
_EXAMPLE = "hgrn2"
_WRITTEN_FOR = (f"{_CODE}.model", f"{_CODE}.configuration")
"""The modules that are written for one family; any other takes its place (:func:`_family_texts`)."""

_OWN_CONFIGURATION = {"mamba2_state_spaces": f"{_CODE}.state_spaces"}
"""Families whose files have keys of another form: the module with their configuration."""

_RESULTS = {
    **dict.fromkeys(("has_fla", "has_mamba_ssm", "has_causal_conv1d"), False),
    **dict.fromkeys(("takes_kernels", "_takes_kernel", "_is_expanded"), False),
    **dict.fromkeys(("_check_backend", "PartnerHeads.where_needed"), None),
    "pick_backend": "chunked",
}
"""What calls return in an export."""

_SEQUENCES = {
    **dict.fromkeys(("seq_idx", "chunk_size", "max_state_bytes", "context", "mitigation")),
    **{"output_states": True, "overwrite_states": False, "backend": "auto"},
}
"""Fields of ``Sequences`` with the same value for all layers of an export; the other fields vary."""

_REPLACED = {
    "HeldHeads": f"{_CODE}.heads:WholeHeads",
    **dict.fromkeys(("ConfigError", "CheckpointError"), "ValueError"),
}
_HYBRID = f"{_CODE}.hybrid"
_OPTIONAL = {name: f"{_CODE}.heads:no_{name}" for name in ("shared_tensors", "shared_inputs")}

_FEATURES = frozenset({"features"})
"""What variables, parameters and fields with a layer's features are called."""

_MODEL_TYPE = re.compile(rf'^(    model_type = ")(?!{OUR_CODE_PREFIX})(?=\w+"$)', flags=re.MULTILINE)

_INTRODUCTION = '''"""{title}

Written by statex-dist {version}; torch and transformers are all it needs:

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

The expansion plan under "statex" in config.json says which layers have a larger state, and how it was made.
"""

'''


def _family_texts(model_type: str) -> tuple[list[str], list[str]]:
    """Return what the modules of :data:`_WRITTEN_FOR` say of a family."""
    family = family_of(model_type)
    names, config = family.names, family.config
    assert family.block is not None
    mixer, _, block = family.block.partition(":")
    model = [f"from {config.__module__} import shared_tensors", f"from {mixer} import", block]
    model += [f'TRUNK = "{names.trunk}"', f'EMBEDDING = "{names.embedding}"', f'FINAL_NORM = "{names.final_norm}"']
    return model, [f"from {config.__module__} import", config.__name__, f'model_type = "{model_type}"']


def modeling_code(config: ModelConfig) -> str:
    """Return the contents of ``modeling_statex.py`` for a model: of its family, or of its host in transformers."""
    if getattr(config, "HOST", None) is not None:
        return hybrid_code(config)
    return remote_code(config.MODEL_TYPE, ours_alone=config.ours_alone, features=has_features(config))


def has_features(config: ModelConfig) -> bool:
    """Return whether keys of a layer have features."""
    return config.statex is not None and any(expansion.features for expansion in config.statex.layers)


def remote_code(model_type: str, *, ours_alone: bool, features: bool = False) -> str:
    """Return the contents of ``modeling_statex.py`` for a family.

    Args:
        model_type: That of a family with a ``block``.
        ours_alone: Whether no other software computes the same: the ``model_type`` then has our prefix.
        features: Whether layers have features; code without them refuses a plan with them.
    """
    code = _code(model_type, features)
    return with_our_type(code) if ours_alone else code


@cache
def _code(model_type: str, features: bool) -> str:
    parts = zip(_family_texts(_EXAMPLE), _family_texts(model_type), strict=True)
    edits = {module: list(zip(old, new, strict=True)) for module, (old, new) in zip(_WRITTEN_FOR, parts, strict=True)}
    if model_type in _OWN_CONFIGURATION:
        edits[_WRITTEN_FOR[0]].append((_WRITTEN_FOR[1], _OWN_CONFIGURATION[model_type]))
    code = _bundled(_WRITTEN_FOR[0], edits, _REPLACED, features=features)
    folder = family_of(model_type).config.__module__.split(".")[-2]
    about = (_MODELS / folder / "__init__.py").read_text(encoding="utf-8")
    return _INTRODUCTION.format(title=about.splitlines()[0].strip('"'), version=__version__) + code


def _bundled(root: str, edits: Mapping[str, Any], replaced: Mapping[str, str], *, features: bool) -> str:
    # Only an export needs these: expansions import this module too.
    from checkpoints_tools.export.bundle import BundleSpec, bundle
    from checkpoints_tools.export.partial_evaluation import Known

    return bundle(
        BundleSpec(
            root=root,
            names=[place.rpartition(".")[2] for place in AUTO_MAP.values()],
            packages=("statex_dist", "checkpoints_tools"),
            edits=edits,
            replaced=replaced,
            optional=_OPTIONAL,
            whole=_CODE,
            dropped=frozenset({"__post_init__", "to_dict"}),
            bare=frozenset({"ModelConfig"}),
            known=Known(calls=_RESULTS, attributes={"all_here": True}, fields={"Sequences": _SEQUENCES}),
            absent=frozenset() if features else _FEATURES,
        )
    )


def hybrid_code(config: Any) -> str:
    """Return the contents of ``modeling_statex.py`` for a model that transformers hosts.

    The classes derive from the host's; the sizes of the recurrent mixers stand in the file, the plan in config.json.

    Args:
        config: The configuration of a host, with a plan.
    """
    host, layers = config.HOST, config.mixer_config()
    module, _, model = host.model.partition(":")
    name, folder = model.removesuffix("Model"), module.partition(".")[0]
    causal, kind = f"{name.removesuffix('Text')}ForCausalLM", type(layers).__name__
    place, _, mixer = host.mixer.rpartition(":")
    place = f"statex_dist.models.{place or 'hybrid.mixers'}"
    mixers = {layer: config.place(layer) for layer in config.recurrent_layers}
    sizes = {f.name: getattr(layers, f.name) for f in fields(layers) if f.name not in ("statex", "extra", "values")}
    derived = tuple(re.escape(name) + "$" for name in config.DERIVED if name not in ModelConfig.DERIVED)
    edits = [
        ("DERIVED: tuple[str, ...] = ()", f"DERIVED: tuple[str, ...] = {derived!r}"),
        ("configuration_bamba import BambaConfig", f"configuration_{folder} import {name}Config"),
        ("models.bamba.", f"models.{folder}."),
        (
            "modeling_bamba import BambaForCausalLM, BambaModel",
            f"modeling_{folder} import {causal}, {model}",
        ),
        ("BambaForCausalLM", causal),
        ("BambaModel", model),
        ("BambaConfig", f"{name}Config"),
        ('"bamba"', f'"{config.MODEL_TYPE}"'),
        ('ACTIVATION = "hidden_act"', f'ACTIVATION = "{host.activation}"'),
        (
            "statex_dist.models.hybrid.mamba2 import Mamba2Layers",
            f"{type(layers).__module__} import {kind}",
        ),
        ("Mamba2Layers", kind),
        ("statex_dist.models.hybrid.mixers import HostedMamba2", f"{place} import {mixer}"),
        ("HostedMamba2", mixer),
        ("PLACES: dict[int, str] = {}", f"PLACES: dict[int, str] = {mixers!r}"),
        ("SIZES: dict[str, Any] = {}", f"SIZES: dict[str, Any] = {_literal(sizes)}"),
    ]
    replaced = {**_REPLACED, "HostedMixer": f"{_CODE}.cached_mixer:CachedMixer"}
    code = _bundled(_HYBRID, {_HYBRID: edits}, replaced, features=has_features(config))
    title = f"{name.removesuffix('Text')} of transformers with larger recurrent states."
    return _INTRODUCTION.format(title=title, version=__version__) + with_our_type(code)


def _literal(value: Any) -> str:
    """Return Python's text of a value of ``config.json``, also of infinities."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(key)}: {_literal(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list | tuple):
        inner = ", ".join(map(_literal, value)) + ("," if isinstance(value, tuple) and value else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    return f'float("{value}")' if isinstance(value, float) and not isfinite(value) else repr(value)


def with_our_type(code: str) -> str:
    """Return a family's code with our prefix in its ``model_type``; code that has it already stays as it is."""
    return _MODEL_TYPE.sub(rf"\1{OUR_CODE_PREFIX}", code)
