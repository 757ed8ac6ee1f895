import contextlib
import io
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.cmd_prepare import add_arguments, run
from statex_dist.data.corpus.documents import WorkUnit, read_unit, split_units
from statex_dist.data.corpus.tokenize_units import _as_finished
from statex_dist.data.formats import open_store
from statex_dist.data.prepare import _WRITERS
from statex_dist.data.storage.mds import MdsShardWriter
from statex_dist.data.store import sequential_documents
from statex_dist.durable.progress import ProgressLine
from statex_dist.errors import ConfigError, DataError
from tests.data.options import prepare
from tests.data.prepared import EOS, files_of, json_lines, put, split_small, texts_of
from tests.raising import raises


@pytest.fixture
def corpus(tmp_path) -> Path:
    root = tmp_path / "corpus"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "hidden.txt").write_text("hidden")
    (root / "image.png").write_bytes(b"\x89PNG")
    for i in range(30):
        (root / "sub" / f"{i:02}.txt").write_text(f"file {i} ∑ " * (i + 1), encoding="utf-8")
    (root / "readme.md").write_text("# read me\r\n")
    lines = [json.dumps({"text": f"line {i}", "id": i}) for i in range(200)]
    (root / "lines.jsonl").write_text("\n".join(lines[:100]) + "\n\n" + "\n".join(lines[100:]))
    return root


def expected_texts(corpus: Path) -> list[str]:
    lines = (json.loads(line)["text"] for line in (corpus / "lines.jsonl").read_text().splitlines() if line)
    files = [file.read_bytes().decode() for file in corpus.glob("**/*.txt") if ".git" not in file.parts]
    return sorted([*lines, *files, "# read me\r\n"])


def test_prepare_directory(corpus, tmp_path):
    summary = prepare([corpus], tmp_path / "out", shard_bytes=4096)
    assert sorted(texts_of(tmp_path / "out")) == expected_texts(corpus)
    store = open_store(tmp_path / "out")
    manifest = store.manifest
    assert (
        (manifest.documents, manifest.tokens)
        == (summary.documents, summary.tokens)
        == (231, sum(manifest.shard_tokens))
    )
    assert (manifest.vocab_size, manifest.eos_token_id, manifest.dtype) == (258, 256, "uint16")
    assert sum(manifest.length_histogram) == 231
    assert manifest.length_histogram[2:4] == [10, 190 + 2]  # lines 0-9 have 7 tokens; two short files have 8..15
    assert store.num_shards == summary.shards > 1
    assert [store.num_tokens(s) for s in range(store.num_shards)] == [
        store.lengths(s).sum() for s in range(store.num_shards)
    ]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_same_bytes_for_any_number_of_workers(corpus, tmp_path, monkeypatch):
    split_small(monkeypatch, 700)
    for workers in (1, 2, 3):
        prepare([corpus], tmp_path / f"out{workers}", workers=workers)
    assert files_of(tmp_path / "out1") == files_of(tmp_path / "out2") == files_of(tmp_path / "out3")
    prepare([corpus], tmp_path / "other", seed=1)
    assert files_of(tmp_path / "other") != files_of(tmp_path / "out1")


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_jsonl_ranges_read_every_line_once(tmp_path, unit_bytes, ending):
    path = tmp_path / "a.jsonl"
    texts = ["x" * (i % 40) for i in range(60)]
    path.write_bytes(ending.join(json.dumps({"text": t}) for t in texts).encode())
    units, size = split_units([path], unit_bytes)
    assert size == path.stat().st_size
    assert [record.text for unit in units for record in read_unit(unit, 258)] == texts


def test_ranges_inside_a_long_line_read_only_their_own_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr("statex_dist.data.corpus.json_lines._CHUNK_BYTES", 64)
    path = put(tmp_path / "a.jsonl", json_lines({"text": "x" * 5000}, {"text": "y"}))
    units, size = split_units([path], 300)
    assert [record.text for unit in units for record in read_unit(unit, 258)] == ["x" * 5000, "y"]
    monkeypatch.setattr("statex_dist.data.corpus.json_lines.Path.open", lambda *_: Counting(path))
    assert list(read_unit(units[3], 258)) == []
    assert 300 <= Counting.read_bytes < 300 + 64 < size


class Counting(io.FileIO):
    read_bytes = 0

    def readline(self, size=-1):
        line = super().readline(size)
        Counting.read_bytes += len(line)
        return line


def test_parquet_and_globs_and_text_field(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    texts = [f"row {i}" for i in range(50)]
    parquet.write_table(pa.table({"body": texts, "n": list(range(50))}), tmp_path / "a.parquet", row_group_size=7)
    ids = pa.table({"input_ids": [[1, 2, 3], [4, EOS]], "loss_mask": [[0, 1, 1], [1, 1]]})
    parquet.write_table(ids, tmp_path / "b.parquet")
    prepare([str(tmp_path / "a*.parquet")], tmp_path / "out", text_field="body", workers=2)
    assert sorted(texts_of(tmp_path / "out")) == sorted(texts)
    prepare([tmp_path / "b.parquet"], tmp_path / "ids")
    pieces = list(sequential_documents(open_store(tmp_path / "ids")))
    found = sorted((piece.tokens.tolist(), piece.loss_mask.tolist()) for piece in pieces)
    assert found == [([1, 2, 3, EOS], [0, 1, 1, 0]), ([4, EOS], [1, 1])]
    with raises(DataError, "a.parquet", "text", "input_ids", "body, n"):
        prepare([tmp_path / "a.parquet"], tmp_path / "x")


def test_tokenised_records_and_masks(tmp_path):
    records = [{"input_ids": [7, 8]}, {"input_ids": [9, EOS], "loss_mask": [1, 0]}, {"input_ids": [97, 98]}]
    records.append({"input_ids": [5], "loss_mask": [1]})
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    prepare([path], tmp_path / "out")
    found = {tuple(p.tokens.tolist()): p.loss_mask.tolist() for p in sequential_documents(open_store(tmp_path / "out"))}
    assert found == {(7, 8, EOS): [1, 1, 1], (9, EOS): [1, 0], (97, 98, EOS): [1, 1, 1], (5, EOS): [1, 0]}


def test_min_tokens_and_max_documents(corpus, tmp_path):
    summary = prepare([corpus], tmp_path / "a", max_documents=7, workers=2)
    assert summary.documents == 7
    assert sorted(texts_of(tmp_path / "a")) == sorted(f"line {i}" for i in range(7))
    (corpus / "empty.txt").write_text("")
    summary = prepare([corpus], tmp_path / "b", min_tokens=9)
    assert summary.short_documents == 101  # lines 0-99 have 7 or 8 tokens, the empty file 1
    assert summary.documents == 131


def test_duplicate_inputs_are_taken_once(corpus, tmp_path):
    summary = prepare([corpus, corpus / "readme.md", corpus / "sub"], tmp_path / "a")
    assert summary.documents == 231


def test_existing_output(corpus, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    prepare([corpus / "readme.md"], out)  # an empty directory is fine
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare([corpus], out)
    prepare([corpus], out, overwrite=True)
    assert len(texts_of(out)) == 231
    with pytest.raises(ConfigError, match="not a dataset"):
        prepare([corpus / "readme.md"], corpus / "sub", overwrite=True)
    (out / "more.txt").write_text("more")
    with pytest.raises(ConfigError, match="holds the input"):
        prepare([out / "more.txt"], out, overwrite=True)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\xff", r"a\.txt.*UTF-8.*byte 4"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', r"a\.jsonl:3: not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl:1: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: field 'text'.*lone surrogate"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: .*not list"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1: .*'text' or 'input_ids'.* body"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl:1: field 'text'.* int"),
        ("a.jsonl", b'{"input_ids": [1, 258]}', r"a\.jsonl:1: input_ids has 258, outside .* 0\.\.257"),
        ("a.jsonl", b'{"input_ids": [-1]}', r"input_ids has -1, outside"),
        ("a.jsonl", b'{"input_ids": "12"}', r"input_ids.*integers"),
        ("a.jsonl", b'{"input_ids": [1.5]}', r"input_ids.*integers"),
        ("a.jsonl", b'{"input_ids": [1, [2]]}', r"input_ids.*integers"),
        ("a.jsonl", b'{"input_ids": [1], "loss_mask": [1, 1]}', r"loss_mask has 2 entries, input_ids 1"),
        ("a.jsonl", b'{"input_ids": [1], "loss_mask": [2]}', r"loss_mask.* 0 and 1"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet.*parquet file"),
        ("a.txt", b"", r"1 input file \(1 shorter than 2"),
        ("a.jsonl", b"", r"no documents.*1 input"),
    ],
)
def test_bad_input(tmp_path, name, content, message, workers):
    if workers == 2 and name == "a.parquet":
        pytest.skip("found before workers start")
    with pytest.raises(DataError, match=message):
        prepare([put(tmp_path / name, content)], tmp_path / "out", workers=workers)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_bad_paths_and_arguments(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ([tmp_path / "nowhere"], "nowhere does not exist"),
        ([tmp_path / "empty"], "suffix of .txt"),
        ([str(tmp_path / "*.nothing")], "matches no file"),
        ([], "no input given"),
    ):
        with pytest.raises(DataError, match=message):
            prepare(inputs, tmp_path / "out")
    for options, message in (
        ({"format": "tar"}, "format.*'tar'.*mds, wds"),
        ({"compression": "lzma"}, "compression.*'lzma'.*none, zstd"),
        ({"workers": 0}, "workers is 0"),
        ({"shard_bytes": 1 << 40}, "shard size"),
        ({"tokenizer": "gpt9"}, "no such directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            prepare([corpus], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        prepare([corpus], tmp_path / "file")


def test_undecodable_files_can_be_left_out(corpus, tmp_path):
    put(corpus / "latin.txt", b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt is not UTF-8"):
        prepare([corpus], tmp_path / "out")
    summary = prepare([corpus], tmp_path / "out", skip_undecodable=True)
    assert (summary.documents, summary.undecodable_files) == (231, 1)


def test_wide_vocabulary_needs_uint32(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"w{i}": i for i in range(70000)} | {"<eos>": 70000}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>").save_pretrained(tmp_path / "tok")
    paths = [
        put(tmp_path / "a.jsonl", b'{"text": "w69999"}'),
        put(tmp_path / "b.jsonl", b'{"input_ids": [69998, 70000]}'),
    ]
    summary = prepare(paths, tmp_path / "out", tmp_path / "tok")
    assert summary.dtype == "uint32"
    found = sorted(piece.tokens.tolist() for piece in sequential_documents(open_store(tmp_path / "out")))
    assert found == [[69998, 70000], [69999, 70000]]


KILLED = """
import sys, time
import statex_dist.data.prepare as p
class Slow(p.MdsShardWriter):
    def write(self, *a):
        print("writing", flush=True); time.sleep(60)
if __name__ == "__main__":
    p._WRITERS["mds"] = Slow
    p.prepare([sys.argv[1]], sys.argv[2], options=p.WorkOptions(workers=2))
"""


def test_killed_midway_leaves_no_output(corpus, tmp_path):
    script = put(tmp_path / "killed.py", KILLED.encode())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(corpus), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        while process.stdout.readline().strip() != "writing":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    left = [p.name for p in tmp_path.iterdir() if p.name.startswith(".out.")]
    assert len(left) == 2
    prepare([corpus], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".out.")] == []
    assert len(texts_of(tmp_path / "out")) == 231


def test_killed_between_the_renames_of_an_overwrite_brings_the_old_dataset_back(corpus, tmp_path):
    prepare([corpus / "readme.md"], tmp_path / "out")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "out").rename(tmp_path / f".out.old-{socket.gethostname()}-{gone.pid}")
    with raises(DataError, tmp_path / "out", "was killed"):
        open_store(tmp_path / "out")
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare([corpus], tmp_path / "out")
    assert texts_of(tmp_path / "out") == ["# read me\r\n"]


def test_workers_end_with_a_killed_parent(tmp_path):
    code = (
        "import multiprocessing, time\n"
        "from statex_dist.data.corpus.documents import WorkUnit, file_facts\n"
        "from statex_dist.data.corpus.document_rules import DocumentRules\n"
        "from statex_dist.data.corpus.tokenize_units import TokenizeTask, UnitJob\n"
        "from statex_dist.data.corpus.tokenize_units import tokenize_units\n"
        "if __name__ == '__main__':\n"
        f"    path = {str(tmp_path / 'a.txt')!r}\n"
        "    jobs = [UnitJob(WorkUnit('text', (path,)), (file_facts(path),), f'{path}{i}') for i in range(4)]\n"
        "    for result in tokenize_units(jobs, TokenizeTask('bytes', 'uint16', DocumentRules()), 2):\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True); time.sleep(60)\n"
    )
    put(tmp_path / "a.txt", b"text")
    script = put(tmp_path / "orphans.py", code.encode())
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as process:
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 10
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(worker, 0)
            time.sleep(0.05)
        pytest.fail("the worker outlived its parent")


def test_workers_that_cannot_start_are_an_error_not_a_hang(corpus, tmp_path):
    call = f"prepare([{str(corpus)!r}], {str(tmp_path / 'out')!r}, workers=2)"
    code = f"from tests.data.options import prepare; {call}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-"]  # spawned processes cannot import a main module that came from stdin
    done = subprocess.run(command, input=code, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert "DataError: a worker process" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_output_that_appears_meanwhile_is_not_replaced(corpus, tmp_path, monkeypatch):
    out = tmp_path / "out"

    class Interfered(MdsShardWriter):
        def finish(self):
            super().finish()
            with pytest.raises(ConfigError, match="by this process"):
                prepare([corpus], out)
            out.mkdir()
            put(out / "theirs", b"theirs")

    monkeypatch.setitem(_WRITERS, "mds", Interfered)
    with pytest.raises(ConfigError, match="--overwrite"):
        prepare([corpus], out)
    assert files_of(out) == {"theirs": b"theirs"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.work", "corpus", "out"]  # nothing to tokenise again


def command_line(*arguments: str) -> int:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    return run(parser.parse_args(list(arguments)))


def test_command_line(corpus, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert command_line(str(corpus), "--out", out, "--shard-size", "4KB", "--compression", "zstd", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["documents"] == 231
    assert figures["shards"] > 1
    assert list((tmp_path / "out").glob("*.zstd"))
    assert command_line(str(corpus), "--out", out, "--overwrite", "--workers", "2") == 0
    assert "231 documents" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="format is 'tar'"):
        command_line(str(corpus), "--out", out, "--format", "tar")


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_unit_is_the_error_unless_enough_comes_before_it(tmp_path, workers):
    put(tmp_path / "a.jsonl", json_lines(*[{"text": "x" * 20000}] * 100))  # the slowest unit
    for name in "bcd":
        put(tmp_path / f"{name}.jsonl", b"{broken " + name.encode())
    for _ in range(3):
        with pytest.raises(DataError, match=r"b\.jsonl:1: not valid JSON"):
            prepare([tmp_path], tmp_path / "out", workers=workers)
    assert prepare([tmp_path], tmp_path / "out", workers=workers, max_documents=100).documents == 100


def test_results_before_a_bad_unit_are_waited_for(monkeypatch):
    def run(job):
        time.sleep({0: 0.6, 1: 0.4, 3: 0.3}.get(job, 0.0))
        if job in (1, 2):
            raise DataError(f"bad unit {job}")
        return f"result {job}"

    monkeypatch.setattr("statex_dist.data.corpus.tokenize_units._run_job", run)
    found = []

    def collect(pool):
        for item in _as_finished(pool, range(9), 1):
            found.append(item)

    with ThreadPoolExecutor(4) as pool, pytest.raises(DataError, match="bad unit 1"):
        collect(pool)
    assert found == [(3, "result 3"), (0, "result 0")]  # and nothing is begun once a unit is known to be bad


def test_progress_says_how_long_it_will_take(monkeypatch, caplog):
    now = 100.0
    monkeypatch.setattr("statex_dist.durable.progress.time.monotonic", lambda: now)
    monkeypatch.setattr("statex_dist.durable.progress.log.propagate", True)
    monkeypatch.setattr("statex_dist.durable.progress.log.parent", logging.getLogger())
    with (
        caplog.at_level("INFO", "statex_dist.durable.progress"),
        ProgressLine("tokenize", 120, "units", 20) as progress,
    ):
        progress.advance(1, 10)  # too early for a line
        now += 13.0
        progress.advance(9, 54_600_000)
        now += 1.0
        progress.advance(90, 1_000_000)
    assert caplog.messages == [
        "tokenize: 30/120 units, 54.60M tokens, 4.20M tokens/s, 0:01:57 left",
        "tokenize: 120/120 units, 55.60M tokens, 3.97M tokens/s",
    ]


def test_missing_file_between_listing_and_reading():
    with pytest.raises(DataError, match="No such file"):
        list(read_unit(WorkUnit("text", ("/nowhere/a.txt",)), 258))
