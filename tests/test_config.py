from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from statex_dist.config import check_keys, dump_yaml, parse_config, parse_size, to_dict
from statex_dist.errors import ConfigError
from tests.raising import raises


@dataclass(kw_only=True)
class Schedule:
    kind: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0


@dataclass(kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Schedule = field(default_factory=Schedule)


@dataclass(kw_only=True)
class Extra:
    note: str = ""


@dataclass(kw_only=True)
class Run:
    out: Path
    steps: int = 10
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    resume: bool = False
    optim: Optim = field(default_factory=Optim)
    extra: Extra | None = None


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def parse(*argv):
    return parse_config(Run, list(argv), prog="train")


def refused(*argv):
    with pytest.raises(ConfigError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_types_and_nesting(write):
    run = parse("--config", write("out: a/b\noptim:\n  schedule:\n    warmup: 3\n"))
    assert run == Run(out=Path("a/b"), optim=Optim(schedule=Schedule(warmup=3)))
    assert isinstance(run.out, Path)
    assert isinstance(run.optim, Optim)
    assert isinstance(run.optim.schedule, Schedule)
    assert run.optim.betas == (0.9, 0.95)


def test_an_optional_section(write):
    assert parse("--out", "x").extra is None
    assert parse("--config", write("out: x\nextra:\n  note: hi\n")).extra == Extra(note="hi")


def test_later_wins(write):
    first, second = write("out: x\nsteps: 1\noptim:\n  lr: 1.0\n"), write("steps: 2\n", "second.yaml")
    assert parse("--config", first, "--steps", "7").steps == 7
    assert parse("--steps", "7", "--config", first).steps == 1
    both = parse("--config", first, "--config", second)
    assert (both.steps, both.optim.lr) == (2, 1.0)
    assert parse(f"--config={first}", "--optim.schedule.kind", "constant").optim.schedule.kind == "constant"


@dataclass(kw_only=True)
class Part:
    free: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Whole:
    part: Part = field(default_factory=Part)


def test_nested_keys_of_a_free_mapping_keep_their_neighbours(write):
    """As numbers and booleans, in the order given, in ``--print_config`` too."""
    first = write("part:\n  free:\n    a: {b: 1, c: 2}\n    d: 3\n")
    second = write("part: {}\n", "second.yaml")

    def free(*argv):
        return parse_config(Whole, ["--config", first, *argv], prog="train").part.free

    assert free("--part.free.a.b", "7", "--part.free.a.e.f=true") == {"a": {"b": 7, "c": 2, "e": {"f": True}}, "d": 3}
    assert free("--config", second, "--part.free.a.c", "x") == {"a": {"b": 1, "c": "x"}, "d": 3}
    assert free("--part.free", "{a: {b: 5}}", "--part.free.a.c", "[6]") == {"a": {"b": 5, "c": [6]}}
    assert free("--part.free.d.x", "1") == {"a": {"b": 1, "c": 2}, "d": {"x": 1}}


@pytest.mark.parametrize(
    ("text", "key", "allowed"),
    [
        ("stepz: 1\n", "'stepz'", "extra, optim, out, resume, sizes, steps"),
        ("optim:\n  learning_rate: 1\n", "'optim.learning_rate'", "betas, lr, schedule"),
        ("optim:\n  schedule:\n    warm_up: 1\n", "'optim.schedule.warm_up'", "kind, warmup"),
        ("extra:\n  notes: a\n", "'extra.notes'", "note"),
        ("1: 2\n", "'1'", "extra, optim, out, resume, sizes, steps"),
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_an_unknown_key_is_named_by_its_full_path(write, form, text, key, allowed):
    path = write("out: x\n" + text)
    assert refused(*form.format(path).split(" ")) == f"{path}: unknown key {key}; allowed here: {allowed}"


def test_an_unknown_option_is_named_with_advice():
    said = refused("--out", "x", "--optim.lrr", "3")
    assert said == "train: unrecognized arguments: --optim.lrr 3; --print_config shows every setting"


@pytest.mark.parametrize("text", ["optim: 3\n", "optim:\n  schedule: [1]\n", "[1, 2]\n", "just words\n"])
def test_a_section_must_be_a_mapping(write, text):
    assert "a mapping" in refused("--out", "x", "--config", write(text))


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("steps: many\n", "steps", "many"),
        ("steps: 1.5\n", "steps", "1.5"),
        ("optim:\n  lr: fast\n", "optim.lr", "fast"),
        ("optim:\n  betas: [0.9]\n", "optim.betas", "0.9"),
        ("optim:\n  schedule:\n    warmup: x\n", "optim.schedule.warmup", "x"),
        ("optim:\n  schedule:\n    kind: linear\n", "optim.schedule.kind", "linear"),
        ("resume: perhaps\n", "resume", "perhaps"),
        ("sizes: 3\n", "sizes", "3"),
    ],
)
def test_a_wrong_type_names_key_and_value(write, text, key, value):
    message = refused("--out", "x", "--config", write(text))
    assert key in message
    assert value in message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "x", "--stepz", "1"], "--stepz"),
        (["--out", "x", "--optim.lrr", "1"], "optim.lrr"),
        (["--out", "x", "--steps", "many"], "steps"),
        (["--out", "x", "--optim.lr", "fast"], "optim.lr"),
        (["--steps", "1"], "out"),
        (["--out"], "out"),
        (["--config"], "config"),
        (["--out", "x", "stray"], "stray"),
    ],
)
def test_wrong_command_lines(argv, words):
    assert words in refused(*argv)


def test_a_missing_file(tmp_path):
    path = tmp_path / "none.yaml"
    assert refused("--config", str(path)) == f"config file not found: {path}"


def test_a_directory_or_bytes_in_place_of_a_file(tmp_path):
    assert f"config file {tmp_path}" in refused("--config", str(tmp_path))
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused("--config", str(tmp_path / "b.yaml"))


@pytest.mark.parametrize("text", ["a: [1\n", "a: b: c\n", "\ta: 1\n", "a: !!python/object:os.system {}\n"])
def test_bad_yaml(write, text):
    path = write(text)
    assert refused("--config", path).startswith(f"config file {path} is not valid YAML: ")


@pytest.mark.parametrize("text", ["", "# steps: 3\n", "null\n"])
def test_an_empty_file(write, text):
    path = write(text)
    assert refused("--out", "x", "--config", path) == f"config file {path} holds no keys"


def test_dump_and_read_back(write):
    run = Run(
        out=Path("a"),
        steps=3,
        sizes=[4],
        optim=Optim(lr=1e-5, betas=(0.5, 0.6), schedule=Schedule(kind="constant")),
        extra=Extra(note="x: y"),
    )
    text = dump_yaml(run)
    assert list(yaml.safe_load(text)) == ["out", "steps", "sizes", "resume", "optim", "extra"]
    assert parse("--config", write(text)) == run
    assert to_dict(run)["optim"]["betas"] == [0.5, 0.6]
    assert parse("--config", write(dump_yaml(Run(out=Path("b"))), "c.yaml")) == Run(out=Path("b"))


def test_check_keys_takes_what_yaml_gives():
    check_keys(Run, None)
    check_keys(Run, {"optim": None, "steps": "wrong types are the parser's business"})
    with raises(ConfigError, "the file"):
        check_keys(Run, [])


@pytest.mark.parametrize(("text", "count"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 << 19), ("700", 700), ("2 kb", 2000)])
def test_sizes(text: str, count: int):
    assert parse_size(text, option="--size") == count


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "5 parsecs"])
def test_sizes_that_are_none_are_refused(text: str):
    with raises(ConfigError, "--size", "5GB"):
        parse_size(text, option="--size")
