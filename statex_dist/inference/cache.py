"""Prompt caches: the states after a text in a file, so that a continuation can be read without reading the text again.

The file is safetensors: each layer's state, the logits after the last token, and a header that names the model of the
states. Another model would accept the states without an error, but its results would be wrong. So the header holds a
digest of the weights themselves, which loading compares with the model's. Layers with attention have their keys and
values in the file, so that it grows with the text.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from statex_dist.checkpoint.layout import STATES_FORMAT
from statex_dist.data.tokenizer import Tokenizer
from statex_dist.durable.files import write_durably
from statex_dist.errors import CheckpointError, bounded_line
from statex_dist.inference.generate import Prefix
from statex_dist.inference.prefill import device_of
from statex_dist.inference.text import text_window
from statex_dist.models.core.sequences import LayerState
from statex_dist.models.lm import RecurrentLM
from statex_dist.ops.attention import KeyValues

log = logging.getLogger(__name__)

VERSION = "2"

_WITHOUT_TOKENS = "1"
"""A version before: it does not hold the last tokens of the text."""

_NO_MATTER = {"statex", "extra", "initializer_range", "embedding_initializer_range", "rescale_prenorm_residual"}
"""Fields of a configuration of which no state depends, and the plan, which is told by layers."""

_NO_MATTER_TO_HOSTS = {"transformers_version", "architectures", "auto_map", "dtype", "torch_dtype", "use_cache"}
"""Further keys of a host's ``config.json`` of which no state depends."""


def save_prefix(path: Path, prefix: Prefix, model: RecurrentLM, tokenizer: Tokenizer) -> None:
    """Write what was read of a text into a file; it replaces one that is there.

    Args:
        path: The file, in an existing directory.
        prefix: The text's states.
        model: The model that read it, with the mitigation that was set.
        tokenizer: The tokenizer that the text was encoded with.

    Raises:
        CheckpointError: The file cannot be written.
    """
    last = torch.tensor(text_window(tokenizer, prefix.tokens), dtype=torch.int64)
    tensors = {"logits": prefix.logits.contiguous(), "last_tokens": last}
    for place, state in zip(model.state_places, prefix.states, strict=True):
        tensors |= {f"{_name(*place)}.{part}": tensor.contiguous() for part, tensor in enumerate(state)}
    tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
    header = {
        "format": STATES_FORMAT,
        "version": VERSION,
        "num_tokens": str(prefix.num_tokens),
        "digest": _digest(sorted(tensors.items())),
        **_facts(model, tokenizer),
    }
    try:
        write_durably(path, save(tensors, header))
    except OSError as error:
        raise CheckpointError(f"the states cannot be written to {path}: {error}") from None


def load_prefix(path: Path, model: RecurrentLM, tokenizer: Tokenizer) -> Prefix:
    """Read a file that :func:`save_prefix` wrote.

    Args:
        path: The file.
        model: The model that continues the text, with its mitigation set.
        tokenizer: Its tokenizer.

    Raises:
        CheckpointError: The file is missing, damaged or no file of states, or holds those of another model.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; give the file that --save-state wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != STATES_FORMAT:
                raise CheckpointError(f"{path} holds no states: it was not written by --save-state")
            if header.get("version") not in (VERSION, _WITHOUT_TOKENS):
                raise CheckpointError(
                    f"{path} has version {header.get('version')!r}; only {_WITHOUT_TOKENS} and {VERSION} can be read"
                )
            facts = _facts(model, tokenizer)
            if header.get("tokenizer") == tokenizer.old_hash:
                header["tokenizer"] = facts["tokenizer"]
            _check_facts(path, header, facts)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
    except FileNotFoundError:
        raise CheckpointError(f"no file of states at {path}; write one with --save-state") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is cut off or no file of states ({error}); write it again with --save-state"
        ) from None
    if _digest(sorted(tensors.items())) != header.get("digest") or not header.get("num_tokens", "").isdigit():
        raise CheckpointError(f"{path} is damaged: its contents are not those that were written")
    device = device_of(model)
    logits = tensors.pop("logits").to(device)
    last = tensors.pop("last_tokens").tolist() if header["version"] == VERSION else []
    if not last:
        log.warning(
            "%s is of version 1 and does not hold its text's last tokens: a space at the beginning of what follows may "
            "be missing; write it again with --save-state",
            path,
        )
    parts = Counter(name.rpartition(".")[0] for name in tensors)
    states: list[LayerState] = []
    for layer, kind in model.state_places:
        name = _name(layer, kind)
        found = [tensors[f"{name}.{part}"].to(device) for part in range(parts[name])]
        states.append(KeyValues(*found) if kind == "attention" else tuple(found))
    num_tokens = int(header["num_tokens"])
    if any(state.lengths.tolist() != [num_tokens] for state in states if isinstance(state, KeyValues)):
        raise CheckpointError(f"{path} is damaged: its keys and values are not those of {num_tokens} tokens")
    return Prefix(logits=logits, states=states, num_tokens=num_tokens, tokens=last)


def _name(layer: int, kind: str) -> str:
    """Return the name in the file of a layer's state of a kind, in front of the number of its part."""
    return f"layers.{layer}" if kind == "recurrent" else f"layers.{layer}.{kind}"


def _check_facts(path: Path, header: dict[str, str], facts: dict[str, str]) -> None:
    for name, value in facts.items():
        if header.get(name) != value:
            both = f": {bounded_line(str(header.get(name)), 80)} there, {bounded_line(value, 80)} here"
            difference = "" if name in ("weights", "tokenizer") else both
            verb = "differ" if name == "weights" else "differs"
            raise CheckpointError(f"{path} holds the states of another model; its {name} {verb}{difference}")


def _facts(model: RecurrentLM, tokenizer: Tokenizer) -> dict[str, str]:
    """Return what tells a model from another, what says most first."""
    config = model.config
    settings: dict[str, str] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in _NO_MATTER:
            settings |= _flat(field.name, value) if isinstance(value, dict) else {field.name: str(value)}
    plan = [f"layer {e.layer} {e.summary}" for e in config.statex.layers] if config.statex else ["none"]
    parameter = next(model.parameters())
    return {
        "model_type": config.MODEL_TYPE,
        **settings,
        "plan": ", ".join(plan),
        "mitigation": "none" if model.mitigation is None else str(model.mitigation),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "weights": _digest((name, tensor.detach()) for name, tensor in sorted(model.stored_tensors().items())),
        "tokenizer": tokenizer.hash,
    }


def _flat(name: str, values: dict[str, Any]) -> dict[str, str]:
    """Return the settings of a host's ``config.json``, those of its sections under their own names."""
    found: dict[str, str] = {}
    for key, value in sorted(values.items()):
        if key in _NO_MATTER | _NO_MATTER_TO_HOSTS:
            continue
        found |= _flat(f"{name}.{key}", value) if isinstance(value, dict) else {f"{name}.{key}": str(value)}
    return found


def _digest(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return the xxh3 digest of named tensors, one at a time."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values: Any = tensor.contiguous().cpu().flatten().view(torch.uint8).numpy()
        digest.update(values)
    return digest.hexdigest()
