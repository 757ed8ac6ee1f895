"""No pickle costs more than its bytes: hostile ones are refused, mutated real ones are read or refused."""

import io
import pickle
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from statex_dist.checkpoint.formats.torch_archive.pickle import Ordered, UnsafePickleError, loads
from statex_dist.checkpoint.formats.torch_archive.scan import MAX_PARTS
from tests.checkpoint.hostile_pickles import hostile_pickles

MUTANTS = 250
HARMLESS = {
    "colliding objects",
    "colliding states",
    "empty dicts",
    "empty ordered dicts",
    "empty sets",
    "large keys many times",
    "methods of a dict hidden",
}
"""What may be read, because it costs little."""


def outcomes(directory: Path, pickles: dict[str, bytes], *, memory: int) -> dict[str, str]:
    """Read pickles in one process that ends where a pickle takes more memory, or more than two seconds."""
    for number, data in enumerate(pickles.values()):
        (directory / f"{number:06d}").write_bytes(data)
    command = [sys.executable, "-m", "tests.checkpoint.hostile_pickles", str(directory), str(memory), "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert result.returncode == 0, f"{[*pickles][len(lines)]}: {result.stderr[-1000:]}"
    return {name: outcome for name, (_, outcome, _) in zip(pickles, lines, strict=True)}


def test_hostile_pickles_of_64_kib_take_neither_time_nor_memory(tmp_path):
    pickles = hostile_pickles()
    assert all(len(data) <= 64 << 10 for data in pickles.values())
    found = outcomes(tmp_path, pickles, memory=100 << 20)
    assert {name for name, outcome in found.items() if outcome == "read"} == HARMLESS
    assert all(len(outcome) < 400 for outcome in found.values())


def saved(value: object, protocol: int) -> bytes:
    """Return the pickle of a file of torch's."""
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    with zipfile.ZipFile(file) as archive:
        return archive.read("archive/data.pkl")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Pickles of torch, of what DeepSpeed keeps, and of a distributed checkpoint."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    state = {
        "module": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": (random.Random(0).getstate(), torch.get_rng_state()),
        "scaler": LossScaler(scale=1.0),
        "stage": ZeroStageEnum.weights,
        "parameter": model[0].weight,
    }
    directory = tmp_path_factory.mktemp("dcp")
    dcp.save({"model": model.state_dict(), "optim": {"lr": 0.1}}, checkpoint_id=directory)
    pickles = {f"torch, protocol {protocol}": saved(state, protocol) for protocol in (2, 4, 5)}
    return {**pickles, ".metadata": (directory / ".metadata").read_bytes()}


def mutant(data: bytes, numbers: random.Random) -> bytes:
    """Return a pickle with a few bytes changed, removed, repeated or moved."""
    changed = bytearray(data)
    for _ in range(numbers.randint(1, 4)):
        start = numbers.randrange(len(changed))
        stop = min(start + numbers.choice((1, 2, 5, 20, 200)), len(changed))
        other = numbers.randrange(len(changed))
        match numbers.randrange(5):
            case 0:
                changed[start] = numbers.randrange(256)
            case 1:
                del changed[start:stop]
            case 2:
                changed[other:other] = changed[start:stop]
            case 3:
                changed[start:start] = bytes(numbers.choice(b"(.0123NRQ]}buetlsdjhqr\x81\x85\x86\x8a\x8b\x93\x94\x95"))
            case 4:
                changed[start:stop] = changed[other : other + stop - start]
        if not changed:
            return data
    return bytes(changed)


def test_mutants_of_real_pickles_are_read_or_refused(real, tmp_path):
    numbers = random.Random(19)
    mutants = {f"{name} {n}": mutant(data, numbers) for name, data in real.items() for n in range(MUTANTS)}
    found = outcomes(tmp_path, {**real, **mutants}, memory=100 << 20)
    assert all(found[name] == "read" for name in real)
    assert all(outcome == "read" or outcome.startswith("refused: ") for outcome in found.values())
    assert sum(outcome != "read" for outcome in found.values()) > MUTANTS


def test_what_is_shared_but_small_is_read():
    shared: list = [1, 2]
    value = {"a": shared, "b": [shared] * 100, ("c", 1): (shared, shared), frozenset({1}): {2}}
    for protocol in (2, 3, 4, 5):
        assert loads(pickle.dumps(value, protocol=protocol))[0]["a"] == shared


def test_a_value_that_is_too_large_once_written_out_is_refused():
    row = [0] * 1000
    within, beyond = ([row] * (MAX_PARTS // 1001 + more) for more in (-1, 1))
    assert loads(pickle.dumps(within, protocol=2))[0] == within
    with pytest.raises(UnsafePickleError, match="too many of them"):
        loads(pickle.dumps(beyond, protocol=2))


def test_attributes_of_a_state_dict_do_not_hide_its_methods():
    found, _ = loads(hostile_pickles()["methods of a dict hidden"])
    assert isinstance(found, Ordered)
    assert list(found.items()) == []


@pytest.mark.parametrize("name", ["tuples as a key", "tuples in a persistent id", "memo index", "tensors of many axes"])
def test_a_refusal_says_why_in_one_line(name):
    with pytest.raises(UnsafePickleError) as caught:
        loads(hostile_pickles()[name])
    assert 10 < len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)
