"""A corpus of web-like text with every defect at once, through the command line.

What must come out is written down while the corpus is made: documents by the tokenizers library alone, masks by hand,
bad records by the place where they were put.
"""

import codecs
import gzip
import json
import os
import signal
import socket

import pyarrow as pa
import pytest
import zstd
from pyarrow import parquet
from tokenizers import Tokenizer

from launch.cli import main
from statex_dist.data.formats import open_store
from statex_dist.data.store import sequential_documents
from tests.data.fast_tokenizers import NAMES, backend, save
from tests.data.prepared import files_of, put, split_small

BOS, EOS = 1, 2
LIMIT = 4000
GOOD = [
    "plain text",
    "about <|endoftext|> and <s>, </s> or [MASK]",
    "<|endoftext|><|endoftext|>",
    "a marker <|endof\ntext|> over two lines",
    "full width \uff1c|endoftext|\uff1e",
    "\u2211 \U0001f600 \u2028 line \x85 and \x1c separators \ufeff inside",
    "carriage\r\nreturns\r and a NUL \x00",
    "  spaces   before and behind  ",
    "<unk>",
    "long " * 700,
    '{"text": "json in text", "text": 1}',
]
LARGE = "x" * (LIMIT + 1)
BAD_LINES = [
    b'{"page": {"text": null}}',
    b'{"page": {"text": "\\ud800"}}',
    b'{"page": {"text": "\xff"}}',
    b'{"page": {"text": "\xed\xa0\x80"}}',
    b'{"page": {"text": ',
    b'["page"]',
    b'{"page": {"text": ["a"]}}',
    b'{"page": {"body": "x"}}',
    b'{"page": "x"}',
    b'{"page": {"text": "x"}, "page": {"text": "y"}}',
    b'{"page": {"text": "x"}, "n": ' + b"9" * 3990 + b"}",
    b'{"page": {"text": "x"}, "n": ' + b"[" * 150 + b"]" * 150 + b"}",
    b'{"page": {"text": "' + LARGE.encode() + b'"}}',
    b"<html>404</html>",
    b"\0\0\0\0",
]
# Row, and the documents in it: ids with their mask.
TOKEN_ROWS = [
    ({"input_ids": [10, 11, 12]}, [([10, 11, 12], None)]),
    ({"input_ids": [BOS, 10, 11, EOS]}, [([BOS, 10, 11, EOS], None)]),
    (
        {"input_ids": [0, 0, 10, 11, 12], "attention_mask": [0, 0, 1, 1, 1], "labels": [-100, -100, -100, 11, 12]},
        [([10, 11, 12], [0, 1, 1])],
    ),
    (
        {
            "input_ids": [20, 21, 22, 23, 24, 0, 0],
            "position_ids": [0, 1, 0, 1, 2, 0, 0],
            "loss_mask": [1] * 5 + [0] * 2,
        },
        [([20, 21], [1, 1]), ([22, 23, 24], [1, 1, 1])],
    ),
    (
        {"input_ids": [30, 31, 32, 33, 0], "attention_mask": [1, 1, 2, 2, 0], "labels": [-100, 31, 32, -100, -100]},
        [([30, 31], [0, 1]), ([32, 33], [1, 0])],
    ),
]
BAD_ROWS = [
    {"input_ids": [10, 1.5]},
    {"input_ids": ["10", "11"]},
    {"input_ids": [10, 100_000]},
    {"input_ids": [10, -1]},
    {"input_ids": [True, False]},
    {"input_ids": None},
    {"input_ids": [10, 11], "labels": [10]},
    {"input_ids": [10, 11], "labels": [11, -100]},
    {"input_ids": [10, 11], "labels": None},
    {"input_ids": [10, 11, 12], "attention_mask": [1, 0, 1]},
    {"input_ids": [10, 11, 12], "position_ids": [0, 2, 3]},
    {"input_ids": [10, 11, 12], "position_ids": [0, 0, 0]},
    {"input_ids": [10, 11], "loss_mask": [1, 2]},
    {"input_ids": [10, 11, 12], "position_ids": [0, 1, 2], "seq_lengths": [1, 2]},
]


class Corpus:
    """Makes the files, and keeps what must come out."""

    def __init__(self, root, tokenizer):
        self.root, self.documents, self.bad, self.marked, self.short = root, [], [], 0, 0
        self._raw = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
        self._raw.encode_special_tokens = True
        root.mkdir()

    def text(self, text):
        ids = self._raw.encode(text, add_special_tokens=False).ids
        assert self._raw.decode(ids, skip_special_tokens=False) == text
        assert min(ids) >= len(NAMES)
        self.documents.append(([BOS, *ids, EOS], None))
        self.marked += any(name in text for name in NAMES)
        return text

    def tokens(self, documents):
        for ids, mask in documents:
            begun, ended = ids[0] == BOS, ids[-1] == EOS
            added = None if mask is None else [0] * (not begun) + mask + [0] * (not ended)
            self.documents.append(([BOS] * (not begun) + ids + [EOS] * (not ended), added))

    def lines(self, name, *, pack=lambda content: content, end=b"\n"):
        """Good and bad lines in turn, with a byte order mark before some and blank lines between."""
        lines = []
        for i in range(max(len(GOOD), len(BAD_LINES))):
            if i < len(GOOD):
                mark = codecs.BOM_UTF8 if i % 3 == 0 else b""
                row = {"url": "http://x/\ud800", "page": {"lang": "en", "text": self.text(GOOD[i])}}
                lines.append(
                    mark + json.dumps(row, ensure_ascii=i % 2 == 0).encode("utf-8", "surrogatepass")
                    if i % 2 == 0
                    else mark + json.dumps({"page": row["page"]}, ensure_ascii=False).encode()
                )
            if i < len(BAD_LINES):
                lines.append(BAD_LINES[i])
                self.bad.append(f"{self.root / name}:{len(lines)}: ")
            lines.append(b"" if i % 2 else codecs.BOM_UTF8)
        lines.append(json.dumps({"page": {"text": ""}}).encode())
        self.short += 1
        put(self.root / name, pack(end.join(lines)))

    def token_lines(self, name):
        lines = []
        for i in range(max(len(TOKEN_ROWS), len(BAD_ROWS))):
            if i < len(TOKEN_ROWS):
                lines.append(TOKEN_ROWS[i][0])
                self.tokens(TOKEN_ROWS[i][1])
            lines.append(BAD_ROWS[i])
            self.bad.append(f"{self.root / name}:{len(lines)}: ")
        lines += [{"input_ids": []}, {"input_ids": [10, 11], "attention_mask": [0, 0]}]
        self.short += 2
        put(self.root / name, "\n".join(map(json.dumps, lines)).encode())

    def text_rows(self, name):
        """A nested binary column with nulls, other encodings and a row that is too large."""
        values = []
        for i, bad in enumerate([None, b"caf\xe9", LARGE.encode(), b"\xed\xa0\x80"]):
            values += [self.text(GOOD[i]).encode(), bad]
            self.bad.append(f"{self.root / name}: row {len(values) - 1}: ")
        column = pa.StructArray.from_arrays([pa.array(values, pa.large_binary())], ["text"])
        parquet.write_table(pa.table({"page": column, "other": range(len(values))}), self.root / name, row_group_size=3)

    def token_rows(self, name):
        table = pa.table(
            {
                "input_ids": pa.array([[10, 11], [10, 999_999], [12, 13]], pa.list_(pa.uint32())),
                "labels": pa.array([[-100, 11], [10, 11], [12, 13]], pa.large_list(pa.int64())),
            }
        )
        parquet.write_table(table, self.root / name)
        self.tokens([([10, 11], [0, 1]), ([12, 13], [1, 1])])
        self.bad.append(f"{self.root / name}: row 1: ")

    def texts(self):
        contents = [
            codecs.BOM_UTF8 + self.text("a mark before").encode(),
            "other".encode("utf-16"),
            self.text(GOOD[5]).encode(),
            b"latin \xe9",
            LARGE.encode(),
            gzip.compress(b"packed under another name"),
        ]
        for i, content in enumerate(contents):
            put(self.root / f"t{i}.txt", content)
            if i in (1, 3, 4, 5):
                self.bad.append(f"{self.root / f't{i}.txt'}: ")


@pytest.fixture
def corpus(tmp_path):
    """The corpus; its files in the order in which they are read."""
    tokenizer = save(backend("gpt2"), tmp_path / "tokenizer")
    made = Corpus(tmp_path / "web", tokenizer)
    made.lines("a.jsonl")
    made.lines("b.jsonl.gz", pack=lambda content: gzip.compress(content[:3000]) + gzip.compress(content[3000:]))
    made.lines("c.ndjson.zst", pack=zstd.compress, end=b"\r\n")
    made.token_lines("d.jsonl")
    made.text_rows("e.parquet")
    made.token_rows("f.parquet")
    made.texts()
    parquet.write_table(pa.table({"page": pa.array([], pa.struct([("text", pa.string())]))}), made.root / "g.parquet")
    for name in (".hidden.jsonl", "table.csv", "page.html"):
        put(made.root / name, b"not taken")
    os.mkfifo(made.root / "pipe.txt")
    (made.root / "zero.txt").symlink_to("/dev/zero")
    (made.root / "loop").symlink_to(made.root)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(made.root / "s.txt"))
        yield made


def documents_of(path):
    pieces = sequential_documents(open_store(path))
    return [(p.tokens.tolist(), None if p.loss_mask is None else p.loss_mask.tolist()) for p in pieces]


def ones(documents):
    """The documents with masks: where some have one, the others' is of ones."""
    return sorted((ids, [1] * len(ids) if mask is None else mask) for ids, mask in documents)


def check(corpus, out, figures):
    assert ones(documents_of(out)) == ones(corpus.documents)
    assert figures["documents"] == len(corpus.documents)
    assert figures["bad_records"] == len(corpus.bad) == len(figures["bad_records_listed"])
    for line, place in zip(figures["bad_records_listed"], corpus.bad, strict=True):
        assert line.startswith(place), (line, place)
    assert figures["special_token_documents"] == corpus.marked
    assert figures["short_documents"] == corpus.short


def killed(command, units):
    """Run a command in a child that is killed before it tokenises its ``units``-th unit."""
    if not (child := os.fork()):
        try:
            from statex_dist.data.corpus.tokenize_units import UnitTokenizer

            real, left = UnitTokenizer.run, [units]

            def run(self, job):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(self, job)

            UnitTokenizer.run = run
            main(command)
        finally:
            os._exit(3)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_corpus_with_every_defect_at_once(tmp_path, corpus, monkeypatch, capfd):
    """With one and two workers, in parts, and killed: the same bytes and the expected reports."""
    split_small(monkeypatch, 3000)
    options = ["--tokenizer", str(tmp_path / "tokenizer"), "--bos", "prepend", "--text-field", "page.text"]
    options += ["--skip-bad-records", "--max-document-bytes", str(LIMIT), "--json", "--seed", "3"]

    def command(out, *more):
        return ["prepare", str(corpus.root), "--out", str(tmp_path / out), *options, *more]

    def figures(*arguments):
        capfd.readouterr()
        assert main(command(*arguments)) == 0
        return json.loads(capfd.readouterr().out)

    check(corpus, tmp_path / "one", figures("one", "--workers", "1"))
    whole = files_of(tmp_path / "one")
    check(corpus, tmp_path / "two", figures("two", "--workers", "2"))
    assert files_of(tmp_path / "two") == whole
    parts = [figures("parts", "--workers", "1", "--part", f"{i}/3") for i in (3, 1, 2)]
    assert sum(part["bad_records"] for part in parts) == len(corpus.bad)
    check(corpus, tmp_path / "parts", figures("parts", "--merge"))
    assert files_of(tmp_path / "parts") == whole
    for units in (1, 4, 9):
        assert killed(command("again", "--workers", "1"), units)
    check(corpus, tmp_path / "again", figures("again", "--workers", "1"))
    assert files_of(tmp_path / "again") == whole
    assert not list(tmp_path.glob(".*"))
