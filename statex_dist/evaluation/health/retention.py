"""Retention: the share of a state that is left after a stretch of text, measured for any form of a family's decays.

A layer's state is linear in the previous state: ``S_t = P_t S_0 + R_t``. ``P_t`` is the product of the transitions;
``R_t`` is the part that was written during the stretch. The probe runs a layer a second time on the same input, from a
state ``c E``. ``c`` is so large that ``R_t`` vanishes beside it, so the result is ``P_t E`` to single precision. The
probe needs nothing of a family's gates.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.hooks import RemovableHandle

from statex_dist.models.core.mixer import RecurrentMixer, mixer_of
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.mitigation import ForgetMore

_BESIDE = 1e12
"""Ratio of the probe to the values written to the state: a retention below about its inverse is lost in rounding."""
_SMALLEST = 1e-9


class RetentionProbe:
    """Carries ``P_t E`` of every recurrent layer while it is entered; ``E`` holds random signs.

    While the probe is entered, each recurrent mixer runs twice.

    Args:
        model: The model, in evaluation mode, fed from its first token on with a carried state.
    """

    def __init__(self, model: RecurrentLM):
        found = [mixer_of(model.layers[index]) for index in model.config.recurrent_layers]
        self._layers = [mixer for mixer in found if mixer is not None]
        self._probes: list[torch.Tensor | None] = [None] * len(self._layers)
        self._signs: list[torch.Tensor | None] = [None] * len(self._layers)
        self._handles: list[RemovableHandle] = []

    @staticmethod
    def fits(model: Any) -> bool:
        """Return whether a model's states are linear in the previous ones: without a mitigation, or with ForgetMore."""
        return isinstance(model, RecurrentLM) and isinstance(model.mitigation, ForgetMore | None)

    def __enter__(self) -> RetentionProbe:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_hook(self._hook(index), with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, index: int) -> Any:
        def run_again(mixer: RecurrentMixer, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            (hidden, sequences, before, *shared), after = mixer.observed(args, kwargs, output)
            probe = self._probes[index]
            if probe is None:
                # Signs from a fixed seed: the same probe whatever else is drawn, and whatever the device.
                generator = torch.Generator().manual_seed(index)
                signs = torch.randint(0, 2, after[0].shape[1:], generator=generator) * 2 - 1
                self._signs[index] = signs.to(after[0]).expand_as(after[0])
                probe = self._signs[index]
            assert probe is not None
            factor = _BESIDE * max(1.0, float(after[0].abs().amax().nan_to_num(1.0, 1.0, 1.0)))
            rest = before[1:] if before is not None else tuple(torch.zeros_like(tensor) for tensor in after[1:])
            # Not by a call of the module: its hooks, this one among them, are for the first run.
            _, probed = mixer.mix_tokens(hidden, sequences, (probe * factor, *rest), *shared)
            assert probed is not None
            self._probes[index] = probed[0] / factor

        return run_again

    def retention(self) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
        """Return, for each recurrent layer, what its heads have kept: ``[B, H]`` of the whole state and of one row.

        The first is ``|P E| / |E|`` (Frobenius norms), for decays by channel the root mean square of their products;
        the second the largest such ratio of one row of the matrix, for GLA the channel that forgets slowest. Ratios
        below 1e-9 are given as 0.
        """
        kept = []
        for probe, signs in zip(self._probes, self._signs, strict=True):
            assert probe is not None
            assert signs is not None
            squares, full = probe.double().square(), signs.double().square()
            whole = (squares.sum((-2, -1)) / full.sum((-2, -1))).sqrt()
            slowest = (squares.sum(-1) / full.sum(-1)).sqrt().amax(-1)
            pair = [torch.where(value < _SMALLEST, 0.0, value).cpu().numpy() for value in (whole, slowest)]
            kept.append((pair[0], pair[1]))
        return kept
