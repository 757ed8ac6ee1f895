"""Whatever a file of a checkpoint holds, a command answers in one line, within bounded memory and time."""

import json
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints_tools.reshard.reshard import reshard
from tests.checkpoint.hostile_pickles import hostile_pickles
from tests.checkpoints_tools.builders import GLA, run_expand, write_model
from tests.launch.limited import run_limited

DAMAGED = {
    "nested": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 900 + b"1" + b"}" * 900,
    "bad UTF-8": b'{"' + b"a" * 300_000 + b'\xff"}',
    "a number of 5,000 digits": b'{"version": ' + b"9" * 5000 + b"}",
    "a long key": json.dumps({"x" * 2_000_000: 1}).encode(),
    "control characters": b'{"version": 1, "kind": "\\u001b[31m", "info": {}, "files": {"\\n\\u001b": {"size": -1}}}',
    "nothing": b"",
    "null": b"null",
}
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
HEADERS = {
    "negative offsets": {"a": {**ENTRY, "data_offsets": [-4, 0]}},
    "overlap": {"a": ENTRY, "b": ENTRY},
    "large axes": {"a": {**ENTRY, "shape": [2**60] * 60}},
    "many axes": {"a": {**ENTRY, "shape": [1] * 1_000_000}},
    "axes of 4,000 digits": {"a": {**ENTRY, "shape": [10**4000] * 3}},
    "control characters": {"a\n\x1b[31m": {**ENTRY, "shape": [2]}},
    "a long name": {"x" * 5_000_000: ENTRY},
    "a long dtype": {"a": {**ENTRY, "dtype": "x" * 1_000_000}},
}


def check(names: list[str], results: list[dict]) -> None:
    for name, result in zip(names, results, strict=True):
        assert result["code"] in (0, 1, 2), (name, result)
        lines = result["err"].splitlines()
        assert all(len(line) <= 400 and line.isprintable() for line in lines), (name, result)
        assert (result["code"] == 2) == bool(lines and lines[-1].startswith("error: ")), (name, result)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write_model(root / "hf", GLA)
    write_model(root / "shards", GLA, shards=2)
    run_expand(root / "hf", root / "expanded", layers="0")
    reshard(root / "hf", root / "tp", to="tp", tp=2)
    reshard(root / "hf", root / "megatron", to="megatron")
    reshard(root / "hf", root / "zero3", to="zero3", world_size=2)
    return root


@pytest.mark.parametrize("layout", ["shards", "expanded", "tp", "megatron", "zero3"])
def test_damaged_json(checkpoints, layout, tmp_path):
    source = checkpoints / layout
    small = [path.relative_to(source) for path in source.rglob("*.json")]
    assert len(small) > 1
    names, commands = [], []
    for file in small:
        for damage, data in DAMAGED.items():
            copy = tmp_path / str(len(names))
            shutil.copytree(source, copy)
            (copy / file).write_bytes(data)
            found = [["inspect", copy], ["reshard", "--source", copy, "--target", f"{copy}-target", "--to", "hf"]]
            if layout == "expanded":
                found.append(["verify", checkpoints / "hf", copy, "--as-expansion"])
                found.append(["report", copy, "--out", f"{copy}.html"])
            names += [f"{file}, {damage}: {command[0]}" for command in found]
            commands += found
    check(names, run_limited(commands, tmp_path, memory=1 << 30))


def safetensors(header: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        text = json.dumps(header).encode()
        (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))

    return write


def index(weight_map: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return write


def archive(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        with zipfile.ZipFile(directory / "pytorch_model.bin", "w", method) as file:
            for name, data in entries.items():
                file.writestr(f"archive/{name}", data)

    return write


def sparse(name: str, size: int) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        with (directory / name).open("wb") as file:
            file.truncate(size)

    return write


VERSION = {"version": b"3\n"}
WEIGHTS: dict[str, Callable[[Path], None]] = {
    **{f"header: {name}": safetensors(header) for name, header in HEADERS.items()},
    **{f"pickle: {name}": archive({"data.pkl": data, **VERSION}) for name, data in hostile_pickles().items()},
    "a million names": index({f"t{number}": "a.safetensors" for number in range(1_000_000)}),
    "many files": index({f"t{number}": f"f{number}" for number in range(100_000)}),
    "a line break in a name": index({"a\nb": "a.safetensors\n"}),
    "another directory": index({"a": "../weights/model.safetensors"}),
    "zip bomb": archive({"data.pkl": bytes(200_000_000), **VERSION}, zipfile.ZIP_DEFLATED),
    "zip bomb of a storage": archive(
        {"data.pkl": b"\x80\x02}.", "data/0": bytes(200_000_000), **VERSION}, zipfile.ZIP_DEFLATED
    ),
    "sparse weights": sparse("model.safetensors", 1 << 36),
    "sparse archive": sparse("pytorch_model.bin", 1 << 34),
    "sparse config": sparse("config.json", 1 << 30),
    "sparse manifest": sparse("MANIFEST.json", 1 << 30),
}


def test_hostile_weights(tmp_path):
    names, commands = [], []
    for number, (name, write) in enumerate(WEIGHTS.items()):
        model = tmp_path / str(number)
        model.mkdir()
        (model / "config.json").write_text(json.dumps(GLA))
        if name in ("sparse config", "sparse manifest"):
            safetensors({"a": ENTRY})(model)
        write(model)
        commands += [["inspect", model], ["expand", "--source", model, "--target", tmp_path / f"{number}-target"]]
        names += [f"{name}: inspect", f"{name}: expand"]
    results = run_limited(commands, tmp_path, memory=700 << 20)
    check(names, results)
    assert all(result["code"] == 2 for result in results[1::2])
