"""Bytes that the tensors of a forward and a backward pass take at most, counted on tensors without data.

The model is run on torch's ``meta`` device: every operator is called with shapes alone, and every storage it makes is
counted from its birth to its death. What is found is therefore what the code does, whatever family, expansion,
checkpointing or loss chunk: tensors saved for the backward pass, the intermediates of the PyTorch scan, logits, and the
gradient of one parameter at a time (ZeRO-3 takes it over as soon as it is there). Parameters are not counted, nor what
an operator uses inside itself. Kernels (flash-linear-attention, mamba_ssm) do not run on shapes: the scan is always the
PyTorch one, which is what runs on a CPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from statex_dist.models.build import build_lm
from statex_dist.models.config import ModelConfig
from statex_dist.models.lm import Recompute


def activation_bytes(
    config: ModelConfig,
    *,
    num_tokens: int,
    precision: str,
    recompute: Recompute = "none",
    loss_chunk_tokens: int = 0,
    carried: bool = False,
) -> int:
    """Return the most bytes that activations take during one forward and backward pass.

    Args:
        config: The model with its plan.
        num_tokens: Length of the one sequence that is run. Packed short ones pad their last chunks, which costs the
            scan up to a quarter more.
        precision: ``bf16`` or ``fp32``.
        recompute: Layers that are computed again in the backward pass.
        loss_chunk_tokens: Tokens whose logits are held at once; 0 for all.
        carried: Whether states pass from one segment to the next.
    """
    with torch.device("meta"):
        model = build_lm(config).to(torch.bfloat16 if precision == "bf16" else torch.float32)
        tokens = torch.zeros(1, num_tokens, dtype=torch.int64)
    model.train()
    model.recompute = recompute
    model.lm_head.chunk_tokens = loss_chunk_tokens
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with _LiveStorages([*model.parameters(), tokens], experts=getattr(config, "num_local_experts", 1)) as live:
        states = None
        # A second segment starts from the states of the first.
        for _ in range(2 if carried else 1):
            output = model(tokens, labels=tokens, states=states, output_states=carried)
            output.loss_sum.backward()
            states = [tuple(part.detach() for part in layer) for layer in output.states] if carried else None
            del output
    return live.peak


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that live, but for those of ``apart``, and keeps the highest count.

    Each of ``experts`` is counted with an equal share of the tokens: which it gets is not known of shapes.
    """

    def __init__(self, apart: Iterable[torch.Tensor], *, experts: int):
        super().__init__()
        self._experts = experts
        self.live = self.peak = 0
        self._apart = [tensor.untyped_storage() for tensor in apart]
        self._known = {id(storage): 0 for storage in self._apart}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype is torch.bool:
            return True  # a host asks whether the positions are those of one document
        if func is torch.ops.aten.nonzero.default:
            mask = args[0]
            made = mask.new_empty((-(-mask.numel() // self._experts), mask.dim()), dtype=torch.int64)
        else:
            made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known:
                    self._known[id(storage)] = storage.nbytes()
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self._forget, id(storage))
        self.peak = max(self.peak, self.live)
        return made

    def _forget(self, identity: int) -> None:
        self.live -= self._known.pop(identity)
