"""``statex report`` of a run: the contents of the page and the figures, and the refusals."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from launch.cli import main
from statex_dist.checkpoint.history import Span, history_text
from statex_dist.evaluation.page.run_figures import MAX_POINTS, draw_runs
from statex_dist.evaluation.page.runs import make_page, read_runs, summarise

NOT_DRAWN = {
    **dict.fromkeys(("lr", "grad_norm", "tokens_per_s", "mfu", "memory_bytes")),
    **{"grad_norms": {}, "state_norms": {}, "time": {}, "skipped": 0},
}
"""Changes to a record after which its loss is the only curve: a figure takes a quarter of a second."""

PHASES = {"forward": 0.5, "backward": 1.0, "step": 0.2, "data": 0.1, "save": 0.1}


def make_run(
    directory: Path, steps: int = 5, *, config: str = "seed: 0\n", status: dict | None = None, **changes
) -> Path:
    """Write a run's files, as a run leaves them."""
    (directory / "checkpoints" / "global_step5" / "model").mkdir(parents=True)
    (directory / "checkpoints" / "global_step5" / "MANIFEST.json").write_text("{}")
    expansion = {"layer": 1, "op": "grow_state", "factor": 2, "init": "inherit"}
    plan = {"statex": {"version": 1, "layers": [expansion]}}
    (directory / "checkpoints" / "global_step5" / "model" / "config.json").write_text(json.dumps(plan))
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "loss": 3.0 / step, "lr": 1e-3, "grad_norm": 0.5, "tokens": 100, "seconds": 2.0}
        record |= {"tokens_per_s": 50.0 * step, "mfu": 0.4, "memory_bytes": (1 << 30) + step, "skipped": step // 5}
        record |= {"grad_norms": {"base.decay": 0.4, "new.decay": 0.3}, "time": PHASES}
        record |= {"state_norms": {"0": 0.5, "1": 2.0 * step}} if step % 2 else {}
        lines.append(json.dumps({**record, **changes}) + "\n")
    (directory / "metrics.jsonl").write_text("".join(lines))
    (directory / "config.yaml").write_text(config)
    if status is not None:
        (directory / "status.json").write_text(json.dumps(status))
    return directory


class Page(HTMLParser):
    """Images, links and text of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.images: dict[str, str] = {}
        self.outside: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        for name in ("src", "href"):
            if (target := values.get(name)) is not None and not target.startswith("data:"):
                self.outside.append(target)
        if tag == "img":
            self.images[values["alt"] or ""] = base64.b64decode((values["src"] or "").split(",")[1]).decode()

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_every_figure_is_labelled_and_no_torch_is_loaded(tmp_path: Path):
    run = make_run(tmp_path / "run", status={"state": "failed", "message": "rank 1 <died>"}, config="a: <b>\n")
    code = (
        "import sys; from launch.cli import main\n"
        f"assert main(['report', {str(run)!r}, '--out', {str(tmp_path / 'r.html')!r}]) == 0\n"
        "print([name for name in ('torch', 'wandb', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"
    page = Page((tmp_path / "r.html").read_text())
    assert page.outside == [], "the page must work without a network"
    titles = {
        "Training loss": "loss (nats per token)",
        "Learning rate": "learning rate of the base",
        "Gradient norm before clipping": "global norm",
        "Throughput": "tokens/s, all ranks",
        "Model FLOPs utilisation": "% of the peak",
        "Peak memory of rank 0": "GiB",
        "Skipped steps": "steps since the start",
        "Time of a step": "seconds",
        "Gradient norm by parameter group": "norm before clipping",
        "Size of the recurrent states": "root mean square of a layer's state",
    }
    drawn = [{e.text for e in ElementTree.fromstring(svg).iter() if e.text} for svg in page.images.values()]
    assert len(drawn) == len(titles)
    for words, (title, label) in zip(drawn, titles.items(), strict=True):
        assert {title, label, "optimizer step"} <= words
    assert "new.decay" in drawn[8]
    assert {"layer 1, expanded", "other layers"} <= drawn[9]
    assert any("forward 25.0%" in text and "other 5.0%" in text for text in page.images)
    assert "rank 1 <died>" in page.text
    assert "a: <b>" in page.text
    loss = next(draw_runs(read_runs([run])))
    assert page.images[loss.text] == loss.svg, "the same run gives the same bytes in another process"


def test_figures_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "run", status={"state": "complete"})
    assert main(["report", str(run), "--json"]) == 0
    (values,) = json.loads(capsys.readouterr().out)["runs"]
    assert values == {
        "run": str(run),
        "state": "complete",
        "steps": 5,
        "tokens": 500,
        "hours": pytest.approx(10 / 3600),
        "final_loss": pytest.approx(sum(3.0 / step for step in range(1, 6)) / 5),
        "median_tokens_per_s": 150.0,
        "median_mfu": 0.4,
        "time_shares": {phase: pytest.approx(seconds / 2) for phase, seconds in PHASES.items()},
        "data_wait_share": pytest.approx(0.05),
        "peak_memory_bytes": (1 << 30) + 5,
        "skipped_steps": 1,
        "steps_without_targets": None,
        "epochs": {},
        "validation_loss": None,
        "best_validation_loss": None,
    }


def test_several_runs_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    changes = {**NOT_DRAWN, "time": PHASES}
    paths = [
        make_run(tmp_path / "lpt", config="seed: 0\nmodel: {path: small}\n", **changes),
        make_run(tmp_path / "statex", 400, config="seed: 0\nmodel: {path: big}\n", **changes),
    ]
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "r.html")]) == 0
    said = capsys.readouterr().out
    assert "lpt" in said
    assert "statex" in said
    page = Page((tmp_path / "r.html").read_text())
    loss = next(text for text in page.images if text.startswith("Training loss"))
    assert "lpt from 3 to 0.6, statex from 3 to 0.0075" in loss
    assert [text.split(",")[0] for text in page.images if text.startswith("Time of")] == [
        "Time of a step: lpt",
        "Time of a step: statex",
    ]
    assert "model.path" in page.text
    assert "seed" not in page.text.split("Settings that differ")[1].split("Configuration of")[0]


def test_records_of_an_older_release_are_drawn_as_far_as_they_go(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null, "lr": 0.1}\n{"step": 2, "loss": 2.0, "lr": 0.1}\n{"st'
    )
    runs = read_runs([tmp_path])
    assert [figure.text.split(" over")[0] for figure in draw_runs(runs)] == ["Training loss", "Learning rate"]
    summary = summarise(runs[0])
    assert (summary.steps, summary.final_loss, summary.tokens, summary.data_wait_share) == (2, 2.0, None, None)


def test_a_run_of_one_step_can_be_drawn(tmp_path: Path):
    assert len(list(draw_runs(read_runs([make_run(tmp_path / "run", 1)])))) == 9


def test_long_runs_are_drawn_as_means(tmp_path: Path):
    run = make_run(tmp_path / "run", 3 * MAX_POINTS + 7, **NOT_DRAWN)
    loss = next(draw_runs(read_runs([run])))
    points = max(path.get("d", "").count("L") for path in ElementTree.fromstring(loss.svg).iter() if "path" in path.tag)
    assert points <= MAX_POINTS
    assert f"from {np.mean([3, 1.5, 1]):.4g}" in loss.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "run directory not found: nowhere"),
        (["{empty}"], "holds no metrics.jsonl: not the directory of a training run"),
        (["{torn}"], "holds no record: the run has not finished a step"),
        (["{run}", "{run}/"], "a run is given twice"),
        (["{run}", "--out", "page.pdf"], "--out page.pdf must end in .html"),
        (["{run}", "--out", "no/where/page.html"], "directory no/where does not exist; make it first"),
        (["{bad}"], "status.json is not JSON"),
        (["{run}", "{odd}"], "config.yaml is not valid YAML"),
    ],
)
def test_what_is_no_run_is_refused_in_a_line(tmp_path: Path, capsys, arguments, message):
    places = {name: make_run(tmp_path / name) for name in ("run", "bad", "odd")}
    places |= {name: tmp_path / name for name in ("empty", "torn")}
    (places["bad"] / "status.json").write_text("{")
    (places["odd"] / "config.yaml").write_text("a: [")
    for name in ("empty", "torn"):
        places[name].mkdir()
    (places["torn"] / "metrics.jsonl").write_text('{"step": 1')
    assert main(["report", *(argument.format(**places) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_settings_that_changed_are_told_with_their_steps(tmp_path: Path):
    run = make_run(tmp_path / "run", config="optimizer: {lr: 0.3}\nseed: 0\n")
    spans = [
        Span(first_step=first, last_step=last, settings={"optimizer": {"lr": lr}, "seed": 0})
        for first, last, lr in [(1, 2, 0.1), (3, 5, 0.2)]
    ]
    (run / "checkpoints" / "global_step5" / "training.json").write_text(history_text(spans))
    text = Page(make_page(read_runs([run]))).text
    told = text.split("Settings that changed in run")[1].split("Configuration of")[0]
    for part in ("steps 1 to 2", "steps 3 to 5", "from step 6 on", "optimizer.lr", "0.1", "0.2", "0.3"):
        assert part in told
    assert "seed" not in told
    (run / "checkpoints" / "global_step5" / "training.json").unlink()
    assert "Settings that changed" not in Page(make_page(read_runs([run]))).text
