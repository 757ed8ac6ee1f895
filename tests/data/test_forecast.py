"""How often a source has been seen, and will be: counted here token by token."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from statex_dist.data.forecast import warn_of_repeats
from statex_dist.data.loader import PackedLoader
from statex_dist.data.mixture import Stage
from tests.data.options import make_loader
from tests.data.synthetic import MemoryStore

SIZES = {"big": 4000, "small": 150}


def store(tokens: int, seed: int) -> MemoryStore:
    """Shards with ``tokens`` tokens in documents of uneven length."""
    generator = np.random.default_rng(seed)
    documents = []
    while (left := tokens - sum(map(len, documents))) > 0:
        documents.append(generator.integers(0, 200, min(left, int(generator.integers(5, 90)))))
    return MemoryStore([documents[i::3] for i in range(3)])


STORES = {name: store(tokens, seed) for seed, (name, tokens) in enumerate(SIZES.items())}
CURRICULUM = [
    Stage(seq_len=64, weights={"big": 3, "small": 1}),
    Stage(from_step=7, seq_len=40, weights={"big": 1, "small": 1}),
    Stage(from_step=15, seq_len=96, weights={"big": 1}),
]


def loader(stages=CURRICULUM, *, world_size: int = 1, rank: int = 0, stores=STORES, **options) -> PackedLoader:
    return make_loader(
        stores, stages=stages, global_packs=4, pad_id=0, world_size=world_size, rank=rank, window_tokens=900, **options
    )


def count(batches, seen: Counter) -> None:
    for pack in batches:
        assert pack.num_pieces <= 4 or len(pack.origins) == 4
        source = pack.origins[0].source
        padding = int(pack.cu_seqlens[-1] - pack.cu_seqlens[-2]) if pack.num_pieces < len(pack.cu_seqlens) - 1 else 0
        seen[source] += pack.num_tokens - padding


@pytest.mark.parametrize("options", [{}, {"packing": "concat"}, {"tail": "split"}, {"num_workers": 1}], ids=str)
def test_epochs_are_exact_to_the_token_through_a_curriculum_and_resumes(options):
    current, seen = loader(**options), Counter()
    batches = iter(current)
    for step in range(1, 31):
        step_batches = next(batches)
        count(step_batches, seen)
        epochs = step_batches[-1].epochs
        assert epochs == pytest.approx({name: seen[name] / size for name, size in SIZES.items()}, abs=1e-9), step
        assert current.passes() == epochs
        if step in (3, 7, 12, 18):  # within a window, at a stage's begin, and within windows taken at two lengths
            state = current.state_dict()
            batches.close()
            current = loader(**options)
            current.load_state_dict(state)
            assert current.passes() == epochs
            batches = iter(current)
    batches.close()
    assert epochs["small"] > 3


def test_epochs_are_the_same_on_any_number_of_ranks():
    whole = [batch[-1].epochs for batch, _ in zip(loader(), range(12), strict=False)]
    for rank in range(2):
        part = [b[-1].epochs for b, _ in zip(loader(world_size=2, rank=rank), range(12), strict=False)]
        assert part == whole


def test_epochs_of_carried_documents_are_exact():
    single = {"data": store(3000, 5)}
    current, seen = loader([Stage(seq_len=32)], stores=single, long_documents="carry"), Counter()
    for batches, _ in zip(current, range(40), strict=False):
        count(batches, seen)
        assert batches[-1].epochs == pytest.approx({"data": seen["data"] / 3000}, abs=1e-9)


def test_whole_epochs_are_whole_numbers():
    current = loader([Stage(seq_len=64)], stores={"data": store(500, 5)}, epochs=3)
    last = list(current)[-1][-1].epochs["data"]
    assert last >= 3.0
    assert last - 3 < 4 * 64 / 500


def test_a_loader_state_from_before_epochs_were_in_it_is_read():
    current = loader()
    batches = iter(current)
    next(batches)
    state = current.state_dict()
    for source in state["sources"].values():
        del source["passes"]
    again = loader()
    again.load_state_dict(state)
    assert again.passes() == current.passes()
    batches.close()


@pytest.mark.parametrize("begin", [0, 5, 10])
def test_the_forecast_is_what_comes(begin: int):
    current = loader()
    batches = iter(current)
    for _ in range(begin):
        next(batches)
    found = {source.source: source for source in current.forecast(25, above=0.1)}
    for _ in range(25 - begin):
        last = next(batches)[-1].epochs
    batches.close()
    for name, passes in last.items():
        assert found[name].passes == pytest.approx(passes, rel=0.08), name
        assert found[name].tokens == SIZES[name]
    # the third stage has no small source, and stages that are over are none
    stages = [(max(begin, first), end) for first, end in ((0, 7), (7, 15)) if begin < end]
    assert [stage[:2] for stage in found["small"].stages] == stages
    assert found["big"].stages[-1][:2] == (15, 25)


def test_only_sources_above_the_limit_are_named(caplog):
    current = loader()
    above = current.forecast(25, above=3.0)
    assert [source.source for source in above] == ["small"]
    assert not current.forecast(25, above=float("inf"))
    warn_of_repeats(above, num_steps=25, limit=3.0)
    (record,) = caplog.records
    assert "source small (150 tokens)" in record.message
    assert "steps 1 to 7:" in record.message
    assert "steps 8 to 15:" in record.message
    assert "more than data.warn_epochs=3" in record.message


def test_a_source_that_rests_may_be_empty():
    stores = {**STORES, "none": MemoryStore([[]])}
    current = loader([Stage(seq_len=64, weights={"big": 1, "none": 0})], stores=stores)
    assert next(iter(current))[-1].epochs["none"] == 0.0
    assert current.forecast(500, above=1)[0].source == "big"
