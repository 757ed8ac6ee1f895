"""Tiny models of transformers with recurrent layers, made and saved by transformers itself: the oracle of our hosts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 97

_ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
_GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

_MAMBA2: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2}

_QWEN3_5: dict[str, Any] = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "mrope_section": [1, 1, 2],
    },
}

MAMBA2_HOSTS: dict[str, dict[str, Any]] = {
    "bamba": {**_ATTENTION, **_MAMBA2, "num_hidden_layers": 3, "attn_layer_indices": [1], "mamba_proj_bias": True},
    "granitemoehybrid": {
        **_ATTENTION,
        **_MAMBA2,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_local_experts": 4,
        "shared_intermediate_size": 16,
        "tie_word_embeddings": True,
        "position_embedding_type": "rope",
        "logits_scaling": 8.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
    },
    "falcon_h1": {
        **_ATTENTION,
        **_MAMBA2,
        "num_hidden_layers": 2,
        "mamba_d_ssm": 64,
        "projectors_bias": True,
        "ssm_multipliers": [0.5, 1.5, 0.75, 1.25, 0.875],  # the host keeps them in fp32
        "mlp_multipliers": [0.8, 1.2],
        "ssm_in_multiplier": 1.4,
        "ssm_out_multiplier": 0.6,
        "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 1.1,
        "key_multiplier": 0.7,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 1.7,
    },
    "zamba2": {
        **{"num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 5},
        "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid"],
        **{"n_mamba_heads": 8, "mamba_d_state": 8, "mamba_ngroups": 2, "time_step_min": 0.3},
        **{"num_mem_blocks": 2, "adapter_rank": 4, "use_shared_attention_adapter": True, "use_mem_rope": True},
    },
    "nemotron_h": {
        **_ATTENTION,
        "num_hidden_layers": 5,
        "hybrid_override_pattern": "M*EM-",
        "head_dim": 8,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "time_step_min": 0.3,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
    },
}
DELTA_HOSTS: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_ATTENTION, **_GATED_DELTA, **_QWEN_EXPERTS, "num_hidden_layers": 4, "head_dim": 8},
    "qwen3_5_text": {**_ATTENTION, **_GATED_DELTA, **_QWEN3_5, "num_hidden_layers": 4},
    "qwen3_5_moe_text": {**_ATTENTION, **_GATED_DELTA, **_QWEN_EXPERTS, **_QWEN3_5, "num_hidden_layers": 4},
    "olmo_hybrid": {
        **_ATTENTION,
        **_GATED_DELTA,
        "num_hidden_layers": 4,
        "linear_value_head_dim": 16,
        "pad_token_id": None,
        "eos_token_id": None,
    },
    "kimi_linear": {
        **_ATTENTION,
        "num_hidden_layers": 5,
        "num_key_value_heads": 4,
        "linear_num_heads": 4,
        "linear_head_dim": 8,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "minimax": {
        **_ATTENTION,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_local_experts": 4,
        "block_size": 8,
        "linear_attn_alpha_factor": 1.5,
        "linear_attn_beta_factor": 0.75,
        "full_attn_alpha_factor": 1.25,
        "mlp_alpha_factor": 1.125,
        "mlp_beta_factor": 0.5,
    },
}
HOSTS = MAMBA2_HOSTS | DELTA_HOSTS
"""Settings of a tiny model by its ``model_type``."""

FALCON_NORM: dict[str, Any] = {"mamba_rms_norm": True}
"""Further settings of a Falcon-H1 that has a norm, which comes before the gate unless a key says otherwise."""

_KERNELS = ("fla", "mamba_ssm", "causal_conv1d")


@contextmanager
def without_kernels() -> Iterator[None]:
    """Hide the kernels of other libraries: transformers takes them when it imports a model, also on a CPU."""
    kept = {name: sys.modules.get(name) for name in _KERNELS}
    sys.modules.update(dict.fromkeys(_KERNELS))
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def import_host(name: str) -> None:
    """Import transformers' model of a folder without the kernels of other libraries, which it would keep."""
    with without_kernels():
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")


# Now, when tests are collected: our own code imports these models too, and does not hide the kernels.
for _model_type in HOSTS:
    import_host(_model_type.removesuffix("_text"))


def save_host(
    model_type: str, directory: Path, *, seed: int = 0, module: str | None = None, **changes: Any
) -> PreTrainedModel:
    """Make a model of transformers with random weights, save it, and return it in evaluation mode.

    Args:
        model_type: One of :data:`HOSTS`.
        directory: Where it goes, in the layout of the hub.
        seed: Of its weights.
        module: Folder of transformers' model, where it is not called as its ``model_type``.
        **changes: Further settings.
    """
    import_host(module or model_type.removesuffix("_text"))
    torch.manual_seed(seed)
    settings = {"vocab_size": VOCABULARY, "hidden_size": 32, **HOSTS[model_type], **changes}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    with torch.no_grad():
        for parameter in model.parameters():  # norms, biases and steps that are all alike would hide errors
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(directory)
    if model_type == "olmo_hybrid":
        _as_on_the_hub(directory / "model.safetensors", model)
    return model.eval()


def _as_on_the_hub(path: Path, model: PreTrainedModel) -> None:
    """Cut OLMo-hybrid's convolutions where queries, keys and values end; transformers 5.24 saves equal thirds."""
    tensors = load_file(path)
    for name, module in model.named_modules():
        if name.endswith("linear_attn"):
            sizes = [module.key_dim, module.key_dim, module.value_dim]
            for part, rows in zip("qkv", module.conv1d.weight.detach().split(sizes), strict=True):
                tensors[f"{name}.{part}_conv1d.weight"] = rows.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
