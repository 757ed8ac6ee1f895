"""Tensor-parallel inference: each rank holds its part of every layer and of its state, and runs the model on it.

A rank reads its own file of ``statex reshard --to tp``, or its part of any other checkpoint. Cut matrices are
megatron-core's parallel layers. What the ranks of a layer exchange: the sums of squares of an output norm over channels
of several ranks, and the sums of the outputs of matrices that are cut along their inputs; at the model's ends the
embeddings, and the logits, which every rank returns whole. Who holds what is the family's table of tensors;
docs/tensor_parallel.md explains it.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statex_dist.errors import ConfigError
from statex_dist.models.config import ModelConfig
from statex_dist.models.core.attention import AttentionMixer
from statex_dist.models.core.layers import Expert, GatedRMSNorm, RMSNorm, SparseExperts
from statex_dist.models.core.mitigation import Mitigation
from statex_dist.models.core.mixer import RecurrentMixer, mixer_of
from statex_dist.models.layout import HeldHeads, TensorSpec
from statex_dist.models.lm import LMHead, RecurrentLM
from statex_dist.models.registry import read_config
from statex_dist.models.source import find_model
from statex_dist.models.tensor_parallel.norms import SplitGatedRMSNorm, SplitRMSNorm
from statex_dist.models.tensor_parallel.shards import check_replicas, read_layout, read_part, read_shard
from statex_dist.models.tensor_parallel.share import TensorShare

with warnings.catch_warnings():
    # Megatron warns of optional GPU libraries that none of these layers uses.
    warnings.simplefilter("ignore")
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding


class TensorParallelLM(RecurrentLM):
    """A rank's part of a language model; it is called as the whole one is, and returns the whole logits.

    States are the rank's own: they have the heads, or the value columns, that the rank holds. Every rank must be called
    with the same tokens, in the same order.

    Args:
        config: The model's configuration with its plan.
        share: This rank.
    """

    def __init__(self, config: ModelConfig, share: TensorShare):
        super().__init__(config)
        self.share = share

    def check_mitigation(self, mitigation: Mitigation) -> None:
        """Raise if a mitigation does not fit the model, or needs the norm of states that several ranks have parts of.

        Raises:
            ConfigError: It does not, or does.
        """
        super().check_mitigation(mitigation)
        mixers = {i: mixer for i, layer in enumerate(self.trunk.layers) if (mixer := mixer_of(layer)) is not None}
        cut = [layer for layer, mixer in mixers.items() if not mixer.heads.whole_states]
        if mitigation.WHOLE_STATES and cut:
            raise ConfigError(
                f"{mitigation.NAME} takes the norm of a head's whole state, and {self.share.size} ranks cut the heads "
                f"of layers {cut}; use forget-more or sliding-window, or fewer ranks"
            )

    def anywhere(self, found: bool) -> bool:
        """Return whether ``found`` holds on any rank: all then act on it, and none waits for another."""
        return any(self.share.gather_objects(found))


class ColumnLinear(ColumnParallelLinear):
    """Megatron's matrix whose outputs the ranks share, as a module of one output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return this rank's outputs ``[..., held]`` of ``x [..., inputs]``."""
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """Megatron's matrix whose inputs the ranks share, as a module of one output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of all ranks' outputs ``[..., outputs]`` of what each has of the inputs ``[..., held]``."""
        return super().forward(x)[0]


class VocabHead(ColumnParallelLinear):
    """The output head over a vocabulary that the ranks share."""

    def __init__(self, *sizes: int, share: TensorShare, **options: Any):
        super().__init__(*sizes, **options)
        self.share = share

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits ``[B, T, vocab]`` of the whole vocabulary, on every rank.

        Megatron's own gathering takes its memory from the current CUDA device, which a CPU has not.
        """
        assert labels is None, "shards are for inference"
        return torch.cat(self.share.all_gather(super().forward(hidden)[0]), dim=-1)


def load_tensor_parallel(
    directory: Path,
    share: TensorShare,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    digests: bool = True,
) -> TensorParallelLM:
    """Load this rank's part of a model; every rank must call this.

    Args:
        directory: What ``statex reshard --to tp`` made for this number of ranks: each reads its own file; or any
            other checkpoint, which each rank reads whole.
        share: This rank.
        dtype: Of the parameters; None takes that of the stored embedding table.
        device: Where the part goes.
        digests: Whether contents are compared with digests and checksums.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged, or its files are of several models.
        ConfigError: This number of ranks cannot share the model, or it cannot be run here.
        OtherRankError: Another rank could not load its part.
    """
    with share.together():
        layout = read_layout(directory, share)
        config = read_config(find_model(directory))
        config.require_runnable()
        if getattr(config, "HOST", None) is not None:
            raise ConfigError(
                f"tensor parallelism does not cut the layers of a {config.MODEL_TYPE} model, which transformers runs; "
                "run it without --tp, on one device"
            )
        if layout is None:
            tensors = read_part(directory, share, dtype=dtype, device=device, digests=digests)
        else:
            tensors = read_shard(directory, config, layout, share, dtype=dtype, device=device, digests=digests)
        with torch.device("meta"):
            model = TensorParallelLM(config, share)
    with share.together():
        check_replicas(directory, config, tensors, layout, share)
    if share.size > 1:
        _make_local(model, tensors, share)
    for name, tensor in tensors.items():
        path, _, leaf = name.rpartition(".")
        model.get_submodule(path).register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embedding_table.weight
    return model.eval()


def _make_local(model: TensorParallelLM, tensors: dict[str, torch.Tensor], share: TensorShare) -> None:
    """Put modules for what this rank holds in place of the whole ones; their parameters have no data yet."""
    sizes = set()
    for layer in model.layers:
        for mixer in layer.modules():
            if isinstance(mixer, AttentionMixer):
                mixer.hold(share.size, share.rank)
            elif isinstance(mixer, RecurrentMixer):
                mixer.heads = HeldHeads.of(mixer.geometry, tp=share.size, rank=share.rank)
                sizes.add(mixer.heads.ranks_per_head)
        sizes |= {_ranks_per_group(module, share) for module in layer.modules() if isinstance(module, RMSNorm)}
    # Every rank makes all groups, in one order.
    groups = {size: share.neighbours(size) for size in sorted(sizes)}
    names, specs = model.family.names, model.family.tensors(model.config)
    specs.setdefault(names.head, specs[names.embeddings])  # a tied head is cut as the table is
    for name, spec in specs.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight" and spec.units:
            parent, _, own = path.rpartition(".")
            place = model.get_submodule(parent)
            whole = getattr(place, own)
            ranks = (
                _mixer_with(model, name).heads.ranks_per_head
                if spec.units[0].shared
                else _ranks_per_group(whole, share)
            )
            held = tensors.get(name, tensors[names.embeddings])
            with torch.device("meta"):
                setattr(place, own, _local(place, whole, spec, held, share, groups[ranks]))
    for module in model.modules():
        if isinstance(module, SparseExperts):
            # Once for all experts: their outputs are sums already.
            module.register_forward_hook(lambda module, inputs, output: share.all_reduce(output))


def _ranks_per_group(module: nn.Module, share: TensorShare) -> int:
    """Return how many ranks in a row have channels of one group of a norm; of another module, all."""
    return max(share.size // getattr(module, "num_groups", 1), 1)


def _mixer_with(model: TensorParallelLM, name: str) -> RecurrentMixer:
    """Return the token mixing of the layer that a tensor belongs to."""
    place = model.family.names.split(name)
    assert place is not None, name
    mixer = mixer_of(model.layers[place[0]])
    assert mixer is not None, name
    return mixer


def _local(
    parent: nn.Module,
    whole: nn.Module,
    spec: TensorSpec,
    held: torch.Tensor,
    share: TensorShare,
    norm_share: TensorShare,
) -> nn.Module:
    """Return the module for a rank's share of a whole one.

    Args:
        parent: The module that it is in.
        whole: The module.
        spec: Of its weight.
        held: The weight that is here.
        share: The ranks.
        norm_share: Those that have the other channels, of a norm.
    """
    if tuple(held.shape) == spec.shape:
        return whole
    config = ModelParallelConfig(
        tensor_model_parallel_size=share.size,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=held.dtype,
    )
    options = {"config": config, "init_method": nn.init.zeros_, "tp_group": share.group}
    match whole:
        case nn.Embedding():
            return VocabParallelEmbedding(*spec.shape, **options)
        case nn.Linear():
            return _local_linear(parent, whole, spec, held, share, options)
        case nn.Conv1d():
            channels, _, width = held.shape
            return nn.Conv1d(channels, channels, width, groups=channels, bias=whole.bias is not None)
        case GatedRMSNorm():
            return SplitGatedRMSNorm(whole, len(held), norm_share)
        case RMSNorm():
            return SplitRMSNorm(whole, len(held), norm_share)
    raise AssertionError(f"no local form of {type(whole).__name__}")


def _local_linear(
    parent: nn.Module,
    whole: nn.Linear,
    spec: TensorSpec,
    held: torch.Tensor,
    share: TensorShare,
    options: dict[str, Any],
) -> nn.Module:
    """Return the matrix for a rank's share of a whole one; arguments as for :func:`_local`."""
    outputs, inputs = spec.shape
    bias = whole.bias is not None
    if isinstance(whole, LMHead):
        return VocabHead(inputs, outputs, share=share, bias=False, **options)
    if spec.axis == 1 and not isinstance(parent, Expert):
        return RowLinear(inputs, outputs, bias=bias, input_is_parallel=True, skip_bias_add=False, **options)
    if spec.axis == 0 and len(held) * share.size == outputs:
        return ColumnLinear(inputs, outputs, bias=bias, **options)
    # Megatron's layers add up the outputs of each expert by itself, and know only rows that one rank has; here several
    # have the keys of a head that they cut.
    return nn.Linear(held.shape[1], len(held), bias=bias)
