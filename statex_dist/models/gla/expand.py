"""Expansion of a GLA layer: pure functions from tensors to tensors.

*merge_heads* is StateX's (arXiv 2509.22630): groups of heads become one head, whose state is as many times larger. No
projection changes its shape, because a head is only a way to read rows; only the per-head output norm must cover the
merged values. *mix_heads* is ours (docs/method.md): every key head also stores other heads' values, and a matrix M,
which starts as the identity, learns to read them.
"""

from __future__ import annotations

import torch

from statex_dist.models.gla.config import GLAConfig
from statex_dist.models.gla.init import initial_value
from statex_dist.models.gla.layout import MIX_NAME, gate_norm_name
from statex_dist.models.random_init import generator_for
from statex_dist.state.plan import LayerExpansion

OPS = ("merge_heads", "mix_heads")
DEFAULT_OP = "merge_heads"
TOKEN_MIXING = ("q_proj", "k_proj", "v_proj", "g_proj", "o_proj", "gk_proj", "q_conv1d", "k_conv1d", "v_conv1d")


def expand_tensor(
    suffix: str, tensor: torch.Tensor, *, config: GLAConfig, expansion: LayerExpansion, name: str
) -> torch.Tensor:
    """Return one tensor of an expanded layer.

    Args:
        suffix: Name without the layer's prefix, for example ``attn.q_proj.weight``.
        tensor: The original values.
        config: Configuration of the *original* model.
        expansion: What is done to the layer.
        name: Full name, which with the expansion's seed fixes the random values.

    Returns:
        The new values, in ``tensor``'s dtype; ``tensor`` itself where nothing changes.
    """
    if expansion.op == "merge_heads" and suffix == gate_norm_name(config):
        return tensor.repeat(expansion.factor)
    part = suffix.split(".")[1] if suffix.startswith("attn.") else ""
    if expansion.init == "reinit" and part in TOKEN_MIXING:
        return initial_value(
            suffix, tensor.shape, config=config, dtype=tensor.dtype, rng=generator_for(expansion.seed, name)
        )
    return tensor


def new_tensors(
    *, config: GLAConfig, expansion: LayerExpansion, prefix: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return tensors that the expanded layer has and the original had not, by full name.

    A ``mix_heads`` layer gets ``M [num_heads, factor]``: column 0 reads a head's own values, column ``s`` those of the
    head ``s`` places on (cyclically). ``lossless`` starts at the identity, other modes at ``1/sqrt(factor)``, StateX's
    merge expressed in M.
    """
    if expansion.op != "mix_heads":
        return {}
    name, shape = prefix + MIX_NAME, (config.num_heads, expansion.factor)
    if expansion.init == "lossless":
        mix = torch.zeros(shape, dtype=dtype)
        mix[:, 0] = 1.0
    else:
        rng = generator_for(expansion.seed, name)
        mix = initial_value(MIX_NAME, shape, config=config, dtype=dtype, rng=rng)
    return {name: mix}
