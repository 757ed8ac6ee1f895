"""Whatever number a config.json holds, every command answers in one line, within bounded memory and time."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from statex_dist.errors import CheckpointError, ConfigError
from statex_dist.models.registry import config_from_dict
from tests.checkpoints_tools.builders import write_model
from tests.launch.limited import run_limited
from tests.models.hybrid.hosts import HOSTS
from tests.models.tiny import CONFIGS, HYBRIDS

STATE_SPACES = {
    "d_model": 16,
    "n_layer": 2,
    "vocab_size": 40,
    "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 4, "ngroups": 1},
    "d_intermediate": 20,
    "attn_layer_idx": [1],
    "attn_cfg": {"causal": True, "num_heads": 4, "num_heads_kv": 2, "d_conv": 4, "rotary_emb_dim": 2, "head_dim": 6},
    "tie_embeddings": True,
    "pad_vocab_size_multiple": 8,
}
PLAN = {"version": 1, "layers": [{"layer": 0, "op": "grow_state", "factor": 2, "init": "inherit"}]}
HOSTED = {
    host: {"model_type": host, "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, **values}
    for host, values in HOSTS.items()
}
FAMILIES = {
    **{name: CONFIGS[name].to_dict() for name in ("mamba2", "hgrn2", "retnet", "minimax", "kda")},
    "gla": HYBRIDS["gla"].to_dict(),
    "gated_deltanet": CONFIGS["gated_deltanet-mixed"].to_dict(),
    "state-spaces": STATE_SPACES,
    "bamba": HOSTED["bamba"],
}
WRONG = (10**9, 10**400, 1e308, -1, 0, [0], [], ["a"], {"a": 1}, None, "x", True)
VALUES = (10**9, 10**400, 1e308, -1, [0] * 200_000, {"a": [[]] * 100_000})


def hostile(values: dict[str, Any], others: Sequence[Any] = VALUES) -> list[tuple[str, dict[str, Any]]]:
    """Return configs with one changed value each, with the name of the change."""
    found = []
    for key, value in values.items():
        if key != "architectures":
            found += [(f"{key} {index}", {**values, key: other}) for index, other in enumerate(others)]
        if isinstance(value, dict):
            found += [(f"{key}.{text}", {**values, key: inner}) for text, inner in hostile(value, others)]
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
    (directory / "model.safetensors").symlink_to(weights / "model.safetensors")
    return directory


def hosted_module(family: str) -> str:
    host = config_from_dict(HOSTED[family]).HOST
    return f"transformers.models.{host.model.partition(':')[0]}"


def every_command(model: Path, target: Path) -> list[list[object]]:
    return [
        ["inspect", model],
        ["plan", model],
        ["expand", "--source", model, "--target", target, "--dry-run"],
        ["reshard", "--source", model, "--target", target, "--to", "tp", "--tp", 2],
    ]


def check(names: list[str], results: list[dict[str, Any]]) -> None:
    """Hold each command to one line of bounded length where it refuses."""
    for name, result in zip(names, results, strict=True):
        lines = result["err"].splitlines()
        assert result["code"] in (0, 1, 2), (name, result)
        assert sum(line.startswith("error: ") for line in lines) == (result["code"] == 2), (name, result)
        assert all(len(line) <= 400 for line in lines), (name, result)


@pytest.mark.parametrize(
    ("family", "step"),
    [
        *((family, 16) for family in FAMILIES),
        *(pytest.param(family, 1, marks=pytest.mark.slow) for family in FAMILIES | HOSTED),
    ],
)
def test_no_value_of_a_config_takes_memory_or_time(family, step, tmp_path):
    """Check every ``step``-th of the changed configs, beginning at another one for each family."""
    values = (FAMILIES | HOSTED)[family]
    write_model(tmp_path / "weights", values)
    names, commands = [], []
    begin = list(FAMILIES | HOSTED).index(family) % step
    for number, (name, changed) in enumerate(hostile(values)[begin::step]):
        names.append(name)
        commands.append(["plan", directory_of(changed, tmp_path / "weights", tmp_path / str(number))])
    for number, (name, changed) in enumerate(hostile_plans(values)[begin % 4 :: min(step, 4)]):
        model = directory_of(changed, tmp_path / "weights", tmp_path / f"plan{number}")
        names += [name] * 4
        commands += every_command(model, tmp_path / f"{number}-target")
    # The host's tensors are known by transformers' model; its module is imported where they are checked.
    imports = {"imports": hosted_module(family)} if family in HOSTED else {}
    check(names, run_limited(commands, tmp_path, **imports))


@pytest.mark.parametrize("values", HOSTED.values(), ids=HOSTED)
def test_no_value_of_a_hosts_config_gives_a_traceback(values):
    for _, changed in hostile(values, WRONG):
        with contextlib.suppress(CheckpointError, ConfigError):
            config_from_dict(changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_number_of_layers_is_bounded_by_every_command(family, tmp_path):
    write_model(tmp_path / "weights", FAMILIES[family])
    key = "n_layer" if family == "state-spaces" else "num_hidden_layers"
    model = directory_of({**FAMILIES[family], key: 10**9}, tmp_path / "weights", tmp_path / "model")
    results = run_limited(every_command(model, tmp_path / "target"), tmp_path)
    assert [result["code"] for result in results] in ([2] * 4, [1, 2, 2, 2])
    for result in results[1:]:
        assert all(part in result["err"] for part in (key, "10000", "1000000000")), result


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 10**9}, {"vocab_size": 2**40}, {"hidden_size": 2**39}, {"num_heads": 10**9}],
    ids=["layers", "vocabulary", "channels", "heads"],
)
def test_generate_builds_nothing_of_a_hostile_size(changes, tmp_path):
    write_model(tmp_path / "weights", FAMILIES["gla"])
    model = directory_of({**FAMILIES["gla"], **changes}, tmp_path / "weights", tmp_path / "model")
    command = ["generate", "--model", model, "--prompt", "a", "--max-new-tokens", 1]
    results = run_limited([command], tmp_path, memory=6 << 30, seconds=60)
    assert results[0]["code"] == 2
    check(["generate"], results)
