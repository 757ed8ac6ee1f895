"""Models of flash-linear-attention and transformers: saved tiny ones, and what their classes say of a directory.

With fla it runs as a test's subprocess (``python -m tests.checkpoints_tools.foreign_classes save|open DIR``), because
importing fla registers its classes with transformers' own. Nothing is run there: building and loading need no kernel.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

COMMON = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3}
_ATTENTION = {"attn": {"layers": [1], "num_heads": 2}}
FLA = {
    "gla": ("GLA", {"num_heads": 4}),
    "hgrn2": ("HGRN2", {"expand_ratio": 4}),
    "retnet": ("RetNet", {"num_heads": 4}),
    "gated_deltanet": ("GatedDeltaNet", {"num_heads": 2, "num_v_heads": 4, "head_dim": 4}),
    "kda": ("KDA", {"num_heads": 4, "head_dim": 4}),
}
"""Class and configuration of flash-linear-attention's models; each also with a layer of softmax attention."""

_MINIMAX = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 3}
_MINIMAX |= {"head_dim": 4, "block_size": 8}
_BAMBA = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 1, "mamba_chunk_size": 8}
_BAMBA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "attn_layer_indices": [1]}
_MAMBA2 = {"num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 1, "chunk_size": 8}
TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "minimax": ("MiniMax", {**_MINIMAX, "layer_types": ["linear_attention"] * 3}),
    "minimax-hybrid": (
        "MiniMax",
        {**_MINIMAX, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "bamba": ("Bamba", _BAMBA),
    "mamba2": ("Mamba2", _MAMBA2),
}


def variants() -> dict[str, tuple[str, dict[str, Any]]]:
    """Return class and configuration of every model of flash-linear-attention, by name."""
    found = {}
    for name, (kind, values) in FLA.items():
        found[name] = kind, {**COMMON, "intermediate_size": 24, **values}
        found[f"{name}-hybrid"] = kind, {**found[name][1], **_ATTENTION}
    return found


def save(library: Any, models: dict[str, tuple[str, dict[str, Any]]], root: Path) -> None:
    """Save a model of each kind with a library's own classes, random where it starts at a constant."""
    for name, (kind, values) in models.items():
        torch.manual_seed(0)
        model = getattr(library, f"{kind}ForCausalLM")(getattr(library, f"{kind}Config")(**values))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(root / name)


def opened(loader: Any, directory: Path) -> tuple[Any, str]:
    """Return the model that a class makes of a directory, or None, and in words what happened."""
    try:
        model, info = loader.from_pretrained(directory, output_loading_info=True, trust_remote_code=False)
    except Exception as error:  # whatever the library raises is a refusal, and the test reads its words
        return None, f"refused by {type(error).__name__}: {error}"
    problems = {key: sorted(map(str, value)) for key, value in info.items() if value}
    return model, f"opened by {type(model).__name__}, {problems or 'all tensors taken'}"


def main(action: str, root: Path) -> None:
    """Save models of flash-linear-attention below a directory, or open every directory below it."""
    import fla.layers.attn
    import fla.models
    from transformers import AutoModelForCausalLM

    fla.layers.attn.flash_attn_func = object()  # asked for when a layer is built; nothing here runs one
    if action == "save":
        save(fla.models, variants(), root)
        return
    classes = {**{name: kind for name, (kind, _) in variants().items()}, "mamba2": "Mamba2"}
    for path in sorted(root.iterdir()):
        kind = classes.get(path.name.split(".")[0])
        if kind is None:
            continue
        found: dict[str, Any] = {"name": path.name}
        for how, loader in (("auto", AutoModelForCausalLM), ("class", getattr(fla.models, f"{kind}ForCausalLM"))):
            model, words = opened(loader, path)
            found[how] = words
            found[f"{how}_state"] = None if model is None else getattr(model.config, "state_size", None)
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
