"""The configuration: the keys of ``config.json``, and what the expansion plan in it says of a layer."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class PlannedConfig(PretrainedConfig):
    """A family's configuration with an expansion plan under ``statex``.

    Every key of ``config.json`` is an attribute under its own name.
    """

    def __init__(self, tie_word_embeddings: bool = False, statex: dict[str, Any] | None = None, **kwargs: Any):
        self.statex = statex
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    def expansion(self, layer: int) -> tuple[str | None, int]:
        """Return what was done to a layer, and the factor by which its state grew (None and 1 for nothing)."""
        for entry in (self.statex or {}).get("layers", ()):
            if entry["layer"] == layer:
                return entry["op"], entry["factor"]
        return None, 1

    def before_plan(self, key: str) -> Any:
        """Return a key as it was before a plan that grew every layer alike and that the key itself expresses."""
        return (self.statex or {}).get("base", {}).get(key, getattr(self, key))

    def heads_and_partners(self, layer: int, num_heads: int) -> tuple[int, int]:
        """Return the heads of a layer that had ``num_heads``, and how many heads' values each of them stores."""
        op, factor = self.expansion(layer)
        return num_heads // (factor if op == "merge_heads" else 1), factor if op == "mix_heads" else 1

    def key_growth(self, layer: int) -> int:
        """Return how many times more key channels a layer has than before the plan."""
        op, factor = self.expansion(layer)
        return factor if op == "grow_state" else 1
