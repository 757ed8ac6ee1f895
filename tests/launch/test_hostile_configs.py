"""Whatever number a config.json holds, every command answers in one line, within bounded memory and time."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints_tools.builders import random_tensors, write_model
from tests.launch.limited import run_limited
from tests.models.tiny import CONFIGS

STATE_SPACES = {
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 40,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 4, "ngroups": 1},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 8,
}
BAMBA = {
    "model_type": "bamba",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "mamba_n_heads": 4,
    "mamba_d_state": 6,
    "attn_layer_indices": [1],
}
PLAN = {"version": 1, "layers": [{"layer": 0, "op": "grow_state", "factor": 2, "init": "inherit"}]}
FAMILIES = {
    **{name: CONFIGS[name].to_dict() for name in ("gla", "mamba2", "hgrn2", "retnet", "minimax", "kda")},
    "gated_deltanet": CONFIGS["gated_deltanet-mixed"].to_dict(),
    "state-spaces": STATE_SPACES,
    "bamba": BAMBA,
}
NUMBERS = (10**9, 2**62, 10**400, -1, 0, 1e308, 5e-324)
ANYTHING = ([0] * 200_000, list(range(200_000)), "x" * 1_000_000, {"a": [[]] * 100_000}, [], None)


def hostile(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return configs with one value changed, and what was changed."""
    found = []
    for key, value in values.items():
        if key != "architectures":
            found += [(f"{key} {index}", {**values, key: other}) for index, other in enumerate((*NUMBERS, *ANYTHING))]
        if isinstance(value, dict):
            found += [(f"{key}.{text}", {**values, key: inner}) for text, inner in hostile(value)]
    return found


def hostile_plans(values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return configs with a plan that is too large or refers to too much."""
    rows = [{**PLAN["layers"][0], "layer": layer} for layer in range(9_999)]
    large = {**values, "num_hidden_layers": 9_999, "n_layer": 9_999}
    plans = {
        "many rows": rows * 20,
        "one layer": rows[:1] * 9_999,
        "all layers": rows,
        "factor": [{**rows[0], "factor": 10**9}],
        "layer": [{**rows[0], "layer": 10**18}],
        "seed": [{**rows[0], "seed": 10**300}],
        "no rows": [None] * 9_999,
        "texts": [{"x" * 100_000: 1}],
    }
    return [
        (f"{size} plan of {name}", {**base, "statex": {"version": 1, "layers": plan}})
        for size, base in (("small", values), ("large", large))
        for name, plan in plans.items()
    ]


def directory_of(values: dict[str, Any], weights: Path, directory: Path) -> Path:
    """Return a model directory with this config and the weights of another one."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(values))
    for file in ("model.safetensors", "tokenizer_config.json"):
        (directory / file).write_bytes((weights / file).read_bytes())
    return directory


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_of_a_config_takes_memory_or_time(family, tmp_path):
    values = copy.deepcopy(FAMILIES[family])
    weights = tmp_path / "weights"
    write_model(weights, values, None if family != "bamba" else random_tensors(values))
    names, commands = [], []
    for number, (name, changed) in enumerate([*hostile(values), *hostile_plans(values)]):
        model = directory_of(changed, weights, tmp_path / str(number))
        target = tmp_path / f"{number}-target"
        for command in (
            ["inspect", model],
            ["plan", model],
            ["expand", "--source", model, "--target", target, "--dry-run"],
            ["reshard", "--source", model, "--target", target, "--to", "tp", "--tp", "2", "--dry-run"],
        ):
            names.append(f"{command[0]}: {name}")
            commands.append(command)
    for name, result in zip(names, run_limited(commands, tmp_path), strict=True):
        assert result["code"] in (0, 2), (name, result)
        error = [line for line in result["err"].splitlines() if line.startswith("error: ")]
        assert len(error) == (result["code"] == 2), (name, result)
        assert all(len(line) <= 400 for line in result["err"].splitlines()), (name, result)
