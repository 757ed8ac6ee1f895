"""Records of steps: written, read back, cut short; the MFU; the log's lines."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from statex_dist.errors import ConfigError, DataError
from statex_dist.train.metrics import MetricsConfig, MetricsFile, StepLines, duration, read_metrics
from statex_dist.train.mfu import Throughput, Utilisation, peak_tflops, utilisation
from tests.train.observed import Observed


def record(step: int, **changes) -> dict:
    values = {"step": step, "loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "tokens": 1000, "seconds": 2.0, "skipped": 0}
    values |= {"time": {"data": 0.1, "forward": 0.9, "backward": 0.9}, "memory_bytes": 3 << 29, **changes}
    return values | {"tokens_per_s": values["tokens"] / values["seconds"]}


def write(run_dir: Path, *records: dict, start_step: int = 0) -> None:
    metrics = Observed(run_dir, MetricsConfig(log_every=1).build(flops_per_token=0), start_step=start_step)
    for values in records:
        metrics.write(values)
    metrics.close()


def test_what_is_written_is_read(tmp_path: Path):
    write(tmp_path, record(1, grad_norms={"decay": 0.4}), record(2))
    assert read_metrics(tmp_path) == [record(1, grad_norms={"decay": 0.4}), record(2)]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path, caplog):
    with caplog.at_level("INFO"):
        write(tmp_path, record(1, loss=math.nan, grad_norm=math.inf, grad_norms={"decay": math.inf}, skipped=1))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    values = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert (values["loss"], values["grad_norm"], values["grad_norms"]) == (None, None, {"decay": None})
    assert "loss not finite" in caplog.messages[0]
    assert "1 skipped" in caplog.messages[0]


def test_a_resumed_run_goes_on_behind_what_was_saved(tmp_path: Path, caplog):
    write(tmp_path, record(1), record(2), record(3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "lo\xff\xfe')
    write(tmp_path, record(3, loss=9.0), start_step=2)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 2.5), (2, 2.5), (3, 9.0)]
    assert "not a record" in caplog.text


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path):
    write(tmp_path, record(1), record(2))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no metrics\.jsonl"),
        ("", "no record"),
        ('{"step": 1', "holds no record"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', r"metrics\.jsonl.*line 2.*'nonsense'"),
        ('{"step": "1"}\n', "line 1 is no record"),
        ("[1]\n", "line 1 is no record"),
    ],
)
def test_files_that_are_no_records_are_refused(tmp_path: Path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_metrics(tmp_path)


def test_the_share_of_the_peak_is_recorded(tmp_path: Path, caplog, monkeypatch):
    throughput = Throughput(flops_per_token=3_000_000)
    throughput.utilisation = Utilisation(flops_per_token=3_000_000, peak_flops=1e10)
    throughput.run = SimpleNamespace(engine=SimpleNamespace(num_packs=2, peak_memory=lambda: 7))
    clock = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr("statex_dist.train.mfu.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    first, second = {"step": 1}, {"step": 2}
    throughput.pre_step(1, [SimpleNamespace(num_tokens=500)])
    throughput.post_step(first)
    throughput.pre_step(2, [SimpleNamespace(num_tokens=500)])
    throughput.post_step(second)
    assert (second["tokens"], second["seconds"], second["memory_bytes"]) == (1000, 1.0, 7)
    # 500 tokens/s of 3 MFLOP each are 1.5 GFLOP/s of 10.
    assert first["mfu"] == pytest.approx(0.15)
    with caplog.at_level("INFO"):
        write(tmp_path, record(1, mfu=first["mfu"]))
    assert read_metrics(tmp_path)[0]["mfu"] == pytest.approx(0.15)
    assert "MFU 15.0 %" in caplog.text


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.1),
        ("Tesla V100-SXM2-32GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_peaks_go_by_the_name_of_the_device(name, peak):
    assert peak_tflops(name) == peak


def test_an_unknown_device_has_no_utilisation_and_a_given_peak_has_one():
    cpu = torch.device("cpu")
    assert utilisation(10, device=cpu, ranks=4) is None
    assert utilisation(10, device=cpu, ranks=4, given_tflops=0.5) == Utilisation(flops_per_token=10, peak_flops=2e12)


def test_a_line_says_where_the_run_is():
    lines = StepLines(log_every=2, num_steps=100)
    first = lines.line(record(1, seconds=60.0))
    assert first == "step 1/100  loss 2.5000  lr 1.00e-04  grad norm 0.500  17 tokens/s  data 0.2 %  1.50 GiB"
    assert lines.line(record(2, tokens=3000)).endswith("ETA 3 min 16 s"), "the first step's minute must not count"
    assert lines.line(record(3, tokens=500, seconds=1.0)) is None
    # 1500 tokens in 3 s, of which 0.2 were waited; two steps of 2 s and one of 1 s tell that 96 take 160 s.
    assert lines.line(record(4)) == (
        "step 4/100  loss 2.5000  lr 1.00e-04  grad norm 0.500  500 tokens/s  data 6.7 %  1.50 GiB  ETA 2 min 40 s"
    )
    assert "ETA" not in lines.line(record(100))


def test_a_line_needs_no_more_than_a_run_without_an_end_has():
    values = {key: record(7)[key] for key in ("step", "loss", "lr", "grad_norm", "tokens", "seconds")}
    line = StepLines(log_every=5, num_steps=None).line(values)
    assert line == "step 7  loss 2.5000  lr 1.00e-04  grad norm 0.500  500 tokens/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (100_000, "1 d 3 h"), (7265, "2 h 1 min")],
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"log_every": 0}, "metrics.log_every.*not 0"),
        ({"states_every": -1}, "metrics.states_every.*not -1"),
        ({"peak_tflops": 0.0}, "metrics.peak_tflops.*not 0.0"),
        ({"peak_tflops": math.nan}, "metrics.peak_tflops"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        MetricsConfig(**settings)


def test_each_step_has_one_record_in_order_and_gaps_are_named(tmp_path: Path, caplog):
    lines = [record(step, loss=loss) for step, loss in ((1, 1.0), (3, 3.0), (2, 2.0), (3, 3.5), (5, 5.0), (6, 6.0))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(values) + "\n" for values in lines))
    write(tmp_path, record(6, loss=7.0), start_step=5)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 1), (2, 2), (3, 3.5), (5, 5), (6, 7)]
    assert "1 of 5 steps (the first of them: 4)" in caplog.text


def test_records_that_found_no_room_are_written_when_there_is_room(tmp_path: Path, monkeypatch, caplog):
    metrics = Observed(tmp_path, [MetricsFile()])
    metrics.write(record(1))
    with monkeypatch.context() as full:
        full.setattr("statex_dist.train.metrics.os.write", lambda *_: 0)
        metrics.write(record(2))
        metrics.flush()
        metrics.write(record(3))
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
    metrics.flush()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]
    metrics.write(record(4))
    metrics.close()
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert sum("has gaps" in message for message in caplog.messages) == 1
