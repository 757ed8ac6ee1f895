import json

import pytest

from statex_dist.data.mixture import Mixture, Stage
from statex_dist.errors import CheckpointError, ConfigError
from tests.raising import raises

from .options import make_loader, make_plan
from .synthetic import PAD, memory_store

LENGTHS = [3, 40, 7, 16, 2, 9, 30, 5, 12, 17, 33, 4, 8, 21, 6, 11, 2, 14, 19, 10]


def mixture(stages, names=("books", "code"), **options) -> Mixture:
    plans = {
        name: make_plan(memory_store(LENGTHS[i:] * 3, shards=4), window_tokens=200, **options)
        for i, name in enumerate(names)
    }
    return Mixture(plans, stages)


def steps(mix: Mixture, count: int, place=None, packs: int = 4):
    place = place or mix.begin()
    found = []
    for _ in range(count):
        taken, place = mix.take(place, packs)
        found.append([(p.source, p.window.seq_len, p.window.pieces(p.pack)) for p in taken])
    return found, place


def tokens_by_source(found) -> dict[str, int]:
    total: dict[str, int] = {}
    for step in found:
        for source, _, pieces in step:
            total[source] = total.get(source, 0) + sum(stop - start for _, _, start, stop, _ in pieces)
    return total


@pytest.mark.parametrize("weights", [{"books": 3, "code": 1}, {"books": 0.1, "code": 0.9}, {"books": 1, "code": 1}])
def test_any_stretch_holds_the_sources_by_their_tokens(weights):
    mix = mixture([Stage(seq_len=16, weights=weights)], packing="one_document")  # packs of very unequal fill
    for count in (10, 50, 200):
        found, _ = steps(mix, count)
        total = tokens_by_source(found)
        share = total["books"] / sum(total.values())
        wanted = weights["books"] / sum(weights.values())
        assert abs(share - wanted) * sum(total.values()) <= 16  # never further off than a pack


def test_a_source_without_weight_rests_and_comes_back_where_it_was():
    mix = mixture([Stage(seq_len=16, weights={"books": 1}), Stage(from_step=5, seq_len=16, weights={"code": 1})])
    found, place = steps(mix, 5)
    assert set(tokens_by_source(found)) == {"books"}
    after, _ = steps(mix, 5, place)
    assert set(tokens_by_source(after)) == {"code"}
    alone, _ = steps(Mixture({"code": mix.plans["code"]}, [Stage(seq_len=16)]), 5)
    assert after == alone


def test_curriculum_of_lengths_then_proportions():
    mix = mixture(
        [
            Stage(seq_len=8, weights={"books": 1, "code": 1}),
            Stage(from_step=3, seq_len=32, weights={"books": 1, "code": 1}),
            Stage(from_step=6, seq_len=32, weights={"books": 9, "code": 1}),
        ]
    )
    found, place = steps(mix, 60)
    assert [{seq_len for _, seq_len, _ in step} for step in found] == [{8}] * 3 + [{32}] * 57
    total = tokens_by_source(found[6:])
    assert total["books"] / sum(total.values()) == pytest.approx(0.9, abs=0.01)
    assert place.step == 60


def test_resume_at_every_step_twice_goes_on_exactly():
    mix = mixture(
        [
            Stage(seq_len=8, weights={"books": 2, "code": 1}),
            Stage(from_step=7, seq_len=24, weights={"books": 1, "code": 3}),
        ],
        tail="split",
    )
    whole, _ = steps(mix, 24)
    for cut in range(20):
        fresh = mixture(mix.stages, tail="split")
        _, place = steps(fresh, cut)
        state = json.loads(json.dumps(fresh.state(place)))
        again = mixture(mix.stages, tail="split")
        found, place = steps(again, 2, again.place(state))
        third = mixture(mix.stages, tail="split")
        rest, _ = steps(third, 2, third.place(again.state(place)))
        assert found + rest == whole[cut : cut + 4]


def test_a_new_source_begins_at_its_beginning_and_a_lost_one_is_refused():
    stages = [Stage(seq_len=16)]
    one = Mixture({"books": mixture(stages).plans["books"]}, stages)
    _, place = steps(one, 3)
    two = mixture(stages)
    restored = two.place(one.state(place))
    assert restored.cursors["books"] == place.cursors["books"]
    assert restored.cursors["code"].epoch == restored.tokens["code"] == 0
    with pytest.raises(ConfigError, match=r"'code' .*books"):
        one.place(two.state(two.begin()))


@pytest.mark.parametrize(
    ("names", "stages"),
    [
        (("books", "code", "poems"), [Stage(seq_len=16)]),
        (("books", "code"), [Stage(seq_len=16, weights={"books": 1, "code": 9})]),
        (("books", "code"), [Stage(seq_len=16), Stage(from_step=100, seq_len=16, weights={"books": 9, "code": 1})]),
    ],
    ids=["a new source", "other weights", "a stage that has begun already"],
)
def test_other_shares_on_resume_hold_at_once(names, stages):
    """No source has to catch up with its old share."""
    before = mixture([Stage(seq_len=16)])
    _, place = steps(before, 200)
    after = mixture(stages, names)
    found, _ = steps(after, 100, after.place(before.state(place)))
    total = tokens_by_source(found)
    wanted = after.weights(stages[-1])
    for name in names:
        assert abs(total[name] / sum(total.values()) - wanted[name]) * sum(total.values()) <= 16 * len(names)


def test_the_loader_mixes_and_ranks_share_the_stream():
    stores = {"a": memory_store(LENGTHS), "b": memory_store(LENGTHS[5:])}
    stages = [Stage(seq_len=8, weights={"a": 1, "b": 2}), Stage(from_step=4, seq_len=16, weights={"a": 2, "b": 1})]

    def stream(world_size, count, state=None):
        loaders = [
            make_loader(
                stores,
                stages=stages,
                global_packs=4,
                pad_id=PAD,
                window_tokens=100,
                rank=r,
                world_size=world_size,
                prefetch_steps=0,
            )
            for r in range(world_size)
        ]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        rows = [
            [b.input_ids.tolist() for batches in ranks for b in batches]
            for _, ranks in zip(range(count), zip(*loaders, strict=True), strict=False)
        ]
        return rows, loaders[0].state_dict()

    whole, _ = stream(1, 10)
    assert stream(4, 10)[0] == whole
    head, state = stream(2, 3)
    assert head + stream(4, 7, state)[0] == whole
    assert {len(ids[0]) for ids in whole[3]} == {8}
    assert {len(ids[0]) for ids in whole[4]} == {16}


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([Stage(from_step=2, seq_len=8)], "first stage.*step 2.* at 0"),
        ([Stage(seq_len=8), Stage(from_step=0, seq_len=8)], "step 0 follows.*step 0"),
        ([Stage(seq_len=0)], "stage.*step 0: seq_len is 0"),
        ([Stage(seq_len=10**14)], "seq_len.*100000000000000.*2147483647"),
        ([Stage(seq_len=8, weights={"poems": 1})], "weight.*'poems'.*books, code"),
        ([Stage(seq_len=8, weights={"books": -1, "code": 1})], "weight of 'books'.* -1"),
        ([Stage(seq_len=8, weights={"books": float("nan")})], "weight of 'books'.* nan"),
        ([Stage(seq_len=8, weights={"books": 0})], "source.*weight above 0"),
    ],
)
def test_bad_stages(stages, message):
    with pytest.raises(ConfigError, match=message):
        mixture(stages)


def test_states_are_not_carried_in_a_mixture():
    with pytest.raises(ConfigError, match="'carry'"):
        mixture([Stage(seq_len=8)], long_documents="carry")


def single(stages=None, lengths=(5, 6, 7), **options) -> Mixture:
    stages = stages or [Stage(seq_len=8)]
    return Mixture({"data": make_plan(memory_store(list(lengths)), **{"seed": 3} | options)}, stages)


def test_state_is_integers_and_hashes_and_is_checked():
    mix = single()
    _, place = mix.take(mix.begin(), 1)
    state = json.loads(json.dumps(mix.state(place)))
    assert len(json.dumps(state)) < 500  # no token buffers
    assert mix.place(state) == place
    for options, message in (
        ({"seed": 4}, "seed was 3, now 4"),
        ({"packing": "concat"}, "packing.*'best_fit'.*'concat'"),
        ({"tail": "split"}, "tail.*'pad'.*'split'"),
        ({"window_tokens": 5}, "window_tokens was"),
        ({"long_documents": "carry"}, "long_documents was 'restart', now 'carry'"),
        ({"lengths": (5, 6, 8)}, "data was"),
    ):
        with pytest.raises(ConfigError, match=message):
            single(**options).place(state)
    for change, message in (
        ({"epoch": "1"}, "epoch is '1'"),
        ({"window": 7}, "points outside the data"),
        ({"epoch": -1}, "points outside the data"),
        ({"taken": [[8]]}, r"taken is \[\[8\]\]"),
    ):
        damaged = state | {"sources": {"data": state["sources"]["data"] | change}}
        with pytest.raises(CheckpointError, match=message):
            mix.place(damaged)
    lacking = {key: value for key, value in state["sources"]["data"].items() if key != "taken"}
    with pytest.raises(CheckpointError, match="lacks taken"):
        mix.place(state | {"sources": {"data": lacking}})
    with pytest.raises(CheckpointError, match="version 99"):
        mix.place(state | {"version": 99})
    with raises(CheckpointError, "version, step, weights", "sources"):
        mix.place({"epoch": 1})


def test_a_longer_sequence_on_resume_goes_on_with_what_is_left():
    short = single(lengths=[5] * 20)
    taken, place = short.take(short.begin(), 3)
    longer = single(stages=[Stage(seq_len=20)], lengths=[5] * 20)
    rest, after = longer.take(longer.place(short.state(place)), 5)
    seen = [tuple(piece[:2]) for pack in (*taken, *rest) for piece in pack.window.pieces(pack.pack)]
    assert after.cursors["data"].epoch == 1
    assert len(seen) == len(set(seen)) == 20
