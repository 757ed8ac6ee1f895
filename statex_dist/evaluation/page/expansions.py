"""Expansions as a part of the report: what each layer's state was and is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from statex_dist.evaluation.page.figures import Figure, add_legend, finish, look_of, new_axes, styled
from statex_dist.evaluation.page.html import Blocks, Section, details, figures, heading, table
from statex_dist.evaluation.page.inputs import ExpandedModel
from statex_dist.models.config import ModelConfig
from statex_dist.models.sequence_memory import sequence_memory

_MOST_BARS = 64


def plan_section(expansions: Sequence[ExpandedModel]) -> Section:
    """Return what a page says of expanded models; those with the same plan are told together."""
    alike: dict[str, list[ExpandedModel]] = {}
    for expansion in expansions:
        alike.setdefault(expansion.config.to_json(), []).append(expansion)
    body: Blocks = []
    for same in alike.values():
        names, first = ", ".join(expansion.name for expansion in same), same[0]
        lines = layer_lines(first.config)
        changed = [lines[0], *(line for line in lines[1:] if line[1])]
        body += heading(names) + table(total_lines(first), caption=f"The model, {first.config.MODEL_TYPE}")
        body += table(changed, caption="Numbers in the recurrent state of each expanded layer (bytes: one sequence)")
        body += details("All layers", table(lines))
        body += figures([draw_states(names, first.config)])
    return Section(title="Expansion plan", body=body)


def total_lines(expansion: ExpandedModel) -> list[list[str]]:
    """Return the model's figures before and after, for :func:`~statex_dist.evaluation.page.html.table`."""
    before, after = expansion.config.replace(statex=None), expansion.config
    rows = [("state elements", before.state_elements, after.state_elements)]
    old_memory, new_memory = sequence_memory(before), sequence_memory(after)
    rows.append((f"state bytes, one sequence ({new_memory.dtype})", old_memory.state_bytes, new_memory.state_bytes))
    if new_memory.kv_bytes_per_token and old_memory.kv_bytes_per_token and new_memory.kv_bytes and old_memory.kv_bytes:
        each = old_memory.kv_bytes_per_token, new_memory.kv_bytes_per_token
        rows.append(("key and value bytes, each token", *each))
        rows.append((f"key and value bytes, {new_memory.tokens:,} tokens", old_memory.kv_bytes, new_memory.kv_bytes))
    if expansion.parameters is not None:
        rows.append(("parameters", *expansion.parameters))
    lines = [
        [name, f"{old:,}", f"{new:,}", f"{100 * (new / old - 1):+.1f} %" if old else ""] for name, old, new in rows
    ]
    assert after.statex is not None
    count = f"{len(after.statex.layers)} of {len(after.recurrent_layers)}"
    return [["", "before", "after", "change"], *lines, ["expanded layers", "", count, ""]]


def layer_lines(config: ModelConfig) -> list[list[str]]:
    """Return each recurrent layer's state before and after its expansion."""
    assert config.statex is not None
    before = config.replace(statex=None)
    lines = [["layer", "expansion", "numbers before", "after", "bytes before", "after"]]
    for layer in config.recurrent_layers:
        expansion, old, new = config.statex.get(layer), before.layer_geometry(layer), config.layer_geometry(layer)
        what = f"{expansion.op} ×{expansion.factor}, {expansion.init}" if expansion else ""
        what += f", {expansion.features.summary}" if expansion and expansion.features else ""
        sizes = (old.elements, new.elements, old.state_bytes, new.state_bytes)
        lines.append([str(layer), what, *(f"{size:,}" for size in sizes)])
    return lines


def draw_states(name: str, config: ModelConfig) -> Figure:
    """Return the states of all layers as bars, what the expansion added on top and hatched."""
    layers = config.recurrent_layers
    before = config.replace(statex=None)
    old = np.array([before.layer_geometry(layer).elements for layer in layers])
    new = np.array([config.layer_geometry(layer).elements for layer in layers])
    x = np.arange(len(layers))
    with styled():
        axes = new_axes(f"State of each layer: {name}", "layer", "numbers in the state", legend_rows=1)
        axes.bar(x, old, color=look_of(0).colour, label="before")
        axes.bar(x, new - old, bottom=old, color=look_of(1).colour, hatch="///", alpha=0.8, label="added")
        step = -(-len(layers) // 12)
        axes.set_xticks(x[::step], [str(layer) for layer in layers[::step]])
        axes.grid(axis="x", visible=False)
        add_legend(axes, columns=2)
        grown = list(_growth(layers, old, new))
        return finish(axes, f"State of each layer: {name}, before and added; {'; '.join(grown[:_MOST_BARS])}")


def _growth(layers: Sequence[int], old: np.ndarray, new: np.ndarray) -> Iterator[str]:
    yield f"{len(layers)} layers, {old.sum():,} numbers before and {new.sum():,} after"
    for layer, a, b in zip(layers, old.tolist(), new.tolist(), strict=True):
        if a != b:
            yield f"layer {layer} from {a:,} to {b:,}"
