"""The demo from end to end with a hundredth of the training: every step is real, only the model learns nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo import CORPORA, Demo
from statex_dist.data.formats import open_store
from tests.runs import REPOSITORY, environment


def test_the_data_of_the_demo_can_be_prepared(tmp_path: Path):
    Demo(str(tmp_path / "demo"), family="gla", scale=1e-4).make_data()
    rows = {name: open_store(str(tmp_path / "demo" / "data" / name)).manifest.rows for name in CORPORA}
    assert {name: {kind: found["files"] for kind, found in kinds.items()} for name, kinds in rows.items()} == {
        name: ({"tokens": 1} if corpus.num_pairs else {}) | ({"text": 1} if corpus.text_pieces else {})
        for name, corpus in CORPORA.items()
    }


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_road(tmp_path: Path):
    out = tmp_path / "demo"
    result = subprocess.run(
        [sys.executable, "-m", "launch.cli", "demo", "--out", str(out), "--scale", "0.01", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
        cwd=REPOSITORY,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed == json.loads((out / "demo.json").read_text())
    assert printed["family"] == "gla"
    base, lpt, statex = (printed["arms"][arm] for arm in ("base", "lpt", "statex"))
    assert base["state_numbers"] == lpt["state_numbers"] == 512
    assert statex["state_numbers"] == 4 * 512
    assert base["parameters"] == lpt["parameters"]
    assert lpt["parameters"] < statex["parameters"] < 1.001 * lpt["parameters"]
    for arm in (base, lpt, statex):
        (record,) = arm["seeds"]
        assert record["seed"] == 0
        assert set(record["recall"]) == {"8", "16", "32", "64"}
        assert all(0 <= accuracy <= 1 for accuracy in record["recall"].values())
        assert 1 < record["perplexity"] < 1e9
        assert record["tokens_per_s"] > 0
    assert (out / "demo.png").read_bytes().startswith(b"\x89PNG")
    for command in (
        "statex prepare",
        "deepspeed --num_accelerators 2",
        "statex expand",
        "statex reshard",
        "statex eval",
    ):
        assert f"$ {command}" in result.stderr
