"""Directories with something broken at random: each is refused in one line or read as it was, within ten seconds."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from launch.cli import main
from statex_dist.checkpoint.formats.detect import recognise
from statex_dist.checkpoint.layout import MANIFEST_NAME
from statex_dist.errors import StateXError
from statex_dist.models.hf import from_pretrained
from tests.checkpoint.directories import GOOD, state_dict, with_manifest

BASES = ["safetensors", "index", "bin", "bin index", "a manifest", "shards for ranks", "megatron", "zero3", "DCP"]
SECONDS = 10
DEFAULT, ALL = 60, 500


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for name in BASES:
        GOOD[name](root / name)
    from checkpoints_tools.io.target_writer import WriteOptions

    with_manifest(root / "a manifest of shards", options=WriteOptions(max_shard_size=8_000))
    return {path.name: path for path in sorted(root.iterdir()) if not path.name.endswith("-source")}


def pick(rng: random.Random, directory: Path, pattern: str = "*") -> Path:
    files = sorted(path for path in directory.rglob(pattern) if path.is_file())
    return rng.choice(files or sorted(path for path in directory.rglob("*") if path.is_file()))


def rewrite(path: Path, change: Callable[[bytearray], bytes]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def truncated(rng: random.Random, directory: Path) -> None:
    rewrite(pick(rng, directory), lambda data: bytes(data[: rng.randrange(len(data) + 1)]))


def flipped(rng: random.Random, directory: Path) -> None:
    def change(data: bytearray) -> bytes:
        for _ in range(rng.choice((1, 1, 3, 20))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)

    rewrite(pick(rng, directory), change)


def zeroed(rng: random.Random, directory: Path) -> None:
    rewrite(pick(rng, directory), lambda data: bytes(data[: len(data) // 2]) + bytes(len(data) - len(data) // 2))


def lengthened(rng: random.Random, directory: Path) -> None:
    rewrite(pick(rng, directory), lambda data: bytes(data) + rng.randbytes(rng.choice((1, 64, 5000))))


def removed(rng: random.Random, directory: Path) -> None:
    pick(rng, directory).unlink()


def exchanged(rng: random.Random, directory: Path) -> None:
    one, other = pick(rng, directory), pick(rng, directory)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def not_a_file(rng: random.Random, directory: Path) -> None:
    path = pick(rng, directory)
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()
    else:
        path.symlink_to("nowhere")


def other_json(rng: random.Random, directory: Path) -> None:
    """Change one value of a JSON file, at any depth."""
    path = pick(rng, directory, "*.json")
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return
    place = content
    while isinstance(place, dict) and place:
        key = rng.choice(sorted(place))
        if isinstance(place[key], dict) and place[key]:
            place = place[key]
            continue
        if rng.random() < 0.3:
            del place[key]
        else:
            place[key] = rng.choice((None, -1, 0, 1, 1e400, 2**70, "", "x" * 3000, [], {}, [[1]], True, "../../etc"))
        break
    path.write_text(json.dumps(content))


def swapped_entries(rng: random.Random, directory: Path) -> None:
    path = pick(rng, directory, "*.index.json")
    try:
        content = json.loads(path.read_text())
        names = sorted(content["weight_map"])
    except (ValueError, KeyError, TypeError):
        return truncated(rng, directory)
    one, other = rng.choice(names), rng.choice(names)
    weights = content["weight_map"]
    weights[one], weights[other] = weights[other], weights[one]
    path.write_text(json.dumps(content))
    return None


def other_header(rng: random.Random, directory: Path) -> None:
    """Give a tensor of a safetensors file another dtype, shape, place or name."""
    path = pick(rng, directory, "*.safetensors")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        name = rng.choice(sorted(set(header) - {"__metadata__"}))
    except (ValueError, IndexError):
        return flipped(rng, directory)
    entry = header[name]
    match rng.randrange(5):
        case 0:
            entry["dtype"] = rng.choice(("I32", "F16", "BF16", "U8", "F99", 3))
        case 1:
            entry["shape"] = rng.choice(([], [0], [1] * 9, entry["shape"][::-1], [-1], [2**62, 4]))
        case 2:
            entry["data_offsets"] = [rng.randrange(99), rng.randrange(2**40)]
        case 3:
            header["renamed"] = header.pop(name)
        case 4:
            others = [other for other in header if other not in (name, "__metadata__")]
            if others:
                other = rng.choice(others)
                header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return None


MUTATIONS = [
    *(truncated, flipped, flipped, zeroed, lengthened, removed, exchanged, not_a_file),
    *(other_json, other_json, swapped_entries, other_header, other_header),
]


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextlib.contextmanager
def listening() -> Iterator[list[str]]:
    handler = _Messages()
    logging.getLogger("statex_dist").addHandler(handler)
    try:
        yield handler.said
    finally:
        logging.getLogger("statex_dist").removeHandler(handler)


def expire(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


@contextlib.contextmanager
def limited() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_commands(directory: Path, out: Path) -> None:
    """Run the tools: whatever they find, they end with a code of theirs and one line of error."""
    path = str(directory)
    for words in (
        ["inspect", path, "--json"],
        ["verify", path],
        ["plan", path, "--factor", "2"],
        ["reshard", "--source", path, "--target", str(out / "hf")],
    ):
        with limited(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(words)
        assert code in (0, 1, 2), words
        errors = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
        assert "Traceback" not in err.getvalue()
        assert code != 2 or len(errors) == 1, err.getvalue()


def check_loader(directory: Path, *, verified: bool, mutations: list[str]) -> str:
    """Load the model; where there is a manifest, what is loaded without a word is what was written."""
    model, refusal = None, ""
    with limited(), listening() as said:
        try:
            model = from_pretrained(directory)
        except StateXError as error:
            refusal = str(error)
    assert "\n" not in refusal
    if model is None:
        return "refused"
    same = all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state_dict().items())
    same = same and model.config.to_dict() == _config(directory.parent / "whole").to_dict()
    if verified:
        assert same or said, f"a difference without a message: {mutations}"
    return "same" if same else "other"


def _config(directory: Path):
    from statex_dist.models.registry import read_config
    from statex_dist.models.source import find_model

    return read_config(find_model(directory))


def mutate(seed: int, bases: dict[str, Path], root: Path) -> str:
    """Break a copy of a directory, run everything on it, and return what became of it."""
    rng = random.Random(seed)
    name = rng.choice(sorted(bases))
    shutil.copytree(bases[name], root / "whole")
    shutil.copytree(bases[name], root / "mutated")
    directory = root / "mutated"
    chosen = [rng.choice(MUTATIONS) for _ in range(rng.choice((1, 1, 2)))]
    # A manifest that was broken itself proves nothing.
    tag = recognise(root / "whole")[1].relative_to(root / "whole")
    before = (directory / tag / MANIFEST_NAME).read_bytes() if (directory / tag / MANIFEST_NAME).is_file() else None
    for change in chosen:
        change(rng, directory)
    manifest = directory / tag / MANIFEST_NAME
    verified = before is not None and manifest.is_file() and manifest.read_bytes() == before
    check_commands(directory, root)
    return check_loader(directory, verified=verified, mutations=[name, *(change.__name__ for change in chosen)])


@pytest.mark.parametrize("seed", range(DEFAULT))
def test_a_broken_directory(tmp_path, bases, seed):
    mutate(seed, bases, tmp_path)


@pytest.mark.slow
def test_many_broken_directories(tmp_path, bases):
    found = []
    for seed in range(DEFAULT, int(os.environ.get("STATEX_MUTATIONS", ALL))):
        root = tmp_path / str(seed)
        found.append(mutate(seed, bases, root))
        shutil.rmtree(root)
    assert found.count("refused") > len(found) / 2
