"""A dataset's figures against an oracle that counts by hand, and the command that shows them."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch.cli import main
from launch.cmd_data_stats import parse_lengths
from statex_dist.data.stats import draw_stats, length_stats, packing_modes, packing_stats
from statex_dist.errors import ConfigError, DataError
from tests.data.options import make_plan, prepare
from tests.data.synthetic import MemoryStore, make_documents, memory_store, write_mds

LENGTHS = [2, 3, 3, 4, 7, 8, 9, 15, 16, 17, 40, 64, 100, 129, 500]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_mds(tmp_path / "shards", make_documents(LENGTHS), shard_bytes=400)


def nearest_rank(lengths: list[int], percent: int) -> int:
    """The smallest length such that at least ``percent`` percent of the documents are not longer."""
    return next(n for n in sorted(lengths) if sum(m <= n for m in lengths) * 100 >= percent * len(lengths))


def test_lengths_are_those_counted_by_hand():
    stats = length_stats(memory_store(LENGTHS))
    assert (stats.documents, stats.tokens) == (len(LENGTHS), sum(LENGTHS))
    assert stats.mean == pytest.approx(sum(LENGTHS) / len(LENGTHS))
    assert list(stats.percentiles) == ["min", "p5", "p25", "p50", "p75", "p90", "p95", "p99", "max"]
    assert (stats.percentiles["min"], stats.percentiles["max"]) == (2, 500)
    for percent in (5, 25, 50, 75, 90, 95, 99):
        assert stats.percentiles[f"p{percent}"] == nearest_rank(LENGTHS, percent)
    for bucket in stats.buckets:
        inside = [n for n in LENGTHS if bucket.start <= n < bucket.stop]
        assert (bucket.documents, bucket.tokens) == (len(inside), sum(inside))
    assert [bucket.start for bucket in stats.buckets] == [2, 4, 8, 16, 32, 64, 128, 256]
    assert all(bucket.stop == 2 * bucket.start for bucket in stats.buckets)


def test_empty_documents_have_a_bucket_of_their_own():
    store = MemoryStore([[np.zeros(0, np.uint16), np.array([1], np.uint16), np.array([1, 2, 3], np.uint16)]])
    stats = length_stats(store)
    assert [(b.start, b.stop, b.documents, b.tokens) for b in stats.buckets] == [
        (0, 1, 1, 0),
        (1, 2, 1, 1),
        (2, 4, 1, 3),
    ]
    with pytest.raises(DataError, match="holds no documents"):
        length_stats(MemoryStore([]))


@pytest.mark.parametrize("seq_len", [8, 64, 1024])
def test_packings_are_those_counted_by_hand(seq_len: int):
    found = packing_stats(memory_store(LENGTHS), [seq_len])
    assert [packing.mode for packing in found] == packing_modes()
    figures = {packing.mode.title: packing for packing in found}
    longer = sum(n > seq_len for n in LENGTHS)
    assert all(packing.report.tokens == sum(LENGTHS) for packing in found)
    assert all(packing.long_documents == longer for packing in found)
    assert figures["concat"].report.packs == -(-sum(LENGTHS) // seq_len)
    packs = sum(-(-n // seq_len) for n in LENGTHS)
    alone = figures["one_document"]
    assert (alone.report.packs, alone.report.cut_documents) == (packs, longer)
    assert alone.to_dict()["padding"] == pytest.approx(1 - sum(LENGTHS) / (packs * seq_len))
    assert alone.to_dict()["cut_share"] == pytest.approx(longer / len(LENGTHS))
    assert figures["best_fit"].report.cut_documents == longer
    split = figures["best_fit, tail split"].report
    assert split.cut_documents >= longer
    assert split.packs <= figures["best_fit"].report.packs


def test_only_the_windows_asked_for_are_packed():
    store = memory_store(LENGTHS, shards=5)
    windows = make_plan(store, window_tokens=1).windows(0)
    expected = sum(store.num_tokens(int(shard)) for window in windows[:2] for shard in window)
    found = packing_stats(store, [16], windows=2, window_tokens=1)
    assert all(packing.report.tokens == expected for packing in found)
    shards = [int(shard) for window in windows[:2] for shard in window]
    assert found[0].long_documents == sum(int((store.lengths(shard) > 16).sum()) for shard in shards)


@pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_plots_are_files_of_their_type(suffix: str, begin: bytes, tmp_path: Path):
    store = memory_store(LENGTHS)
    path = tmp_path / f"plot{suffix}"
    draw_stats(length_stats(store), packing_stats(store, [16, 64]), path, title="small")
    content = path.read_bytes()
    assert content.startswith(begin)
    assert len(content) > 5000


def test_the_command_prints_what_json_says(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plot = tmp_path / "plot.svg"
    arguments = ["data-stats", str(dataset), "--seq-len", "16,64", "--seq-len", "16"]
    assert main([*arguments, "--json", "--plot", str(plot)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert plot.stat().st_size > 0
    assert set(figures) == {
        *("dataset", "format", "shards", "documents", "tokens", "dtype", "tokenizer", "loss_mask", "left_out"),
        *("lengths", "histogram", "packings"),
    }
    assert (figures["format"], figures["documents"], figures["tokens"]) == ("mds", len(LENGTHS), sum(LENGTHS))
    assert figures["shards"] == len(list(dataset.glob("*.mds")))
    assert figures["tokenizer"] is None
    assert figures["lengths"]["max"] == 500
    assert sum(bucket["tokens"] for bucket in figures["histogram"]) == sum(LENGTHS)
    assert [(p["seq_len"], p["packing"], p["tail"]) for p in figures["packings"]] == [
        (seq_len, *mode) for seq_len in (16, 64) for mode in packing_modes()
    ]
    assert {"padding", "cut_documents", "cut_share", "long_documents", "documents_per_pack", "packs"} <= set(
        figures["packings"][0]
    )
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for text in ("Histogram of lengths", "best_fit, tail split", "256..511"):
        assert text in shown


@pytest.mark.parametrize("format", ["mds", "wds"])
def test_a_prepared_dataset_says_what_is_in_it(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "long.txt").write_text("x" * 99)
    (tmp_path / "short.txt").write_text("")
    out = tmp_path / "out"
    prepare([tmp_path / "long.txt", tmp_path / "short.txt"], out, format=format)
    for shard in (*out.glob("*.mds"), *out.glob("*.tar")):
        shard.unlink()  # the lengths are in a file of their own
    assert main(["data-stats", str(out), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    facts = {name: figures[name] for name in ("format", "documents", "tokens", "dtype", "tokenizer")}
    assert facts == {"format": format, "documents": 1, "tokens": 100, "dtype": "uint16", "tokenizer": "bytes"}
    assert figures["left_out"]["short"] == 1
    assert main(["data-stats", str(out)]) == 0
    assert "1 short" in capsys.readouterr().out


def test_no_shard_is_opened_where_the_lengths_are_known(dataset: Path, capsys: pytest.CaptureFixture[str]):
    # Shards that `prepare` did not make are opened once; then their lengths are kept.
    assert main(["data-stats", str(dataset), "--json"]) == 0
    first = capsys.readouterr().out
    for shard in dataset.glob("*.mds"):
        shard.unlink()
    assert main(["data-stats", str(dataset), "--json"]) == 0
    assert capsys.readouterr().out == first


def test_bad_input_is_one_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["nowhere"], "nowhere does not exist"),
        ([str(tmp_path / "empty")], "is empty"),
        ([str(dataset), "--seq-len", "0"], "--seq-len '0' is not a length"),
        ([str(dataset), "--seq-len", str(1 << 31)], "whole numbers from 1 to 2147483647"),
        ([str(dataset), "--seq-len", "16,,32"], "--seq-len '' is not a length"),
        ([str(dataset), "--windows", "0"], "--windows is 0; it must be at least 1"),
        ([str(dataset), "--window-tokens", "-5"], "--window-tokens is -5"),
        ([str(dataset), "--plot", "plot.pdf"], "plot.pdf has no known suffix; allowed: .png, .svg"),
        ([str(dataset), "--plot", str(tmp_path / "no" / "plot.png")], "does not exist; make it first"),
    ):
        assert main(["data-stats", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error


def test_lengths_of_packs_are_never_guessed():
    assert parse_lengths(["4096, 64", "64", "8"]) == [4096, 64, 8]
    with pytest.raises(ConfigError, match="'64K'"):
        parse_lengths(["64K"])
    with pytest.raises(ConfigError, match="seq_len is 0"):
        packing_stats(memory_store([4]), [0])
    with pytest.raises(ConfigError, match="windows is 0"):
        packing_stats(memory_store([4]), [4], windows=0)
