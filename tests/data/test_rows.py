"""Rows of token ids with the columns that other trainers write beside them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.data.corpus.records import BadRecordError
from statex_dist.data.corpus.rows import token_documents
from statex_dist.errors import DataError

VOCABULARY = 100
IDS = [1, 2, 3, 4, 5, 6]


def read(**row):
    """The documents of a row, as lists of ids and mask."""
    found = token_documents(row, VOCABULARY)
    return [(d.input_ids.tolist(), None if d.loss_mask is None else d.loss_mask.tolist()) for d in found]


DOCUMENT = st.lists(st.tuples(st.integers(0, VOCABULARY - 1), st.booleans()), min_size=1, max_size=6)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(DOCUMENT, min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=5, max_size=5),
    st.sampled_from(["numbers", "positions", "lengths", "all"]),
    st.booleans(),
)
def test_packed_rows_give_back_the_documents_that_they_were_made_of(documents, padding, borders, labelled):
    """Documents are packed as axolotl and TRL do, with padding wherever it is allowed."""
    between = borders in ("numbers", "all")
    ids, numbers, positions, labels, lengths = [], [], [], [], []

    def pad(count):
        for column, value in ((ids, 0), (numbers, 0), (positions, 7), (labels, -100)):
            column += [value] * count
        return count

    front = pad(padding[0])
    for k, document in enumerate(documents):
        ids += [token for token, _ in document]
        labels += [token if learned else -100 for token, learned in document]
        numbers += [k + 1] * len(document)
        positions += range(len(document))
        last = k == len(documents) - 1
        behind = pad(padding[k + 1] if between or last else 0)
        lengths.append(front + len(document) + behind)
        front = 0
    row = {"input_ids": ids}
    if between:
        row["attention_mask"] = numbers
    else:
        row["attention_mask"] = [int(n > 0) for n in numbers]
    if borders in ("positions", "all"):
        row["position_ids"] = positions
    if borders in ("lengths", "all"):
        row["seq_lengths"] = lengths
    if labelled:
        row["labels"] = labels
    expected = [
        ([token for token, _ in document], [int(learned) for _, learned in document] if labelled else None)
        for document in documents
    ]
    assert read(**row) == expected


def naive_documents(ids, attention, positions):
    """The documents of a row by one loop over its tokens; ``None`` where the row contradicts itself."""
    documents: list[list[int]] = []
    number, gap = 0, False
    if positions is not None and attention is None:
        attention = [1] * len(ids)
        tail = len(ids)
        while tail and positions[tail - 1] == 0:
            tail -= 1
        if len(ids) - tail >= 2:
            return None
    packed = any(a > 1 for a in attention)
    for token, a, place in zip(ids, attention, positions or [None] * len(ids), strict=True):
        if a == 0:
            gap = True
            continue
        new_by_number = a != number
        if new_by_number and a != number + 1:
            return None
        if gap and not new_by_number:
            return None
        number, gap = a, False
        new_by_place = place == 0
        if place is not None and ((packed and new_by_number != new_by_place) or (not documents and place != 0)):
            return None
        if new_by_number or new_by_place:
            documents.append([])
        if place is not None and place != len(documents[-1]):
            return None
        documents[-1].append(token)
    return documents or [[]]


COLUMN = st.lists(st.integers(0, 3), min_size=1, max_size=7)


@settings(deadline=None, max_examples=1500)
@given(st.data())
def test_any_mask_and_positions_are_read_as_by_a_loop_or_refused(data):
    attention = data.draw(st.none() | COLUMN)
    n = len(attention) if attention else data.draw(st.integers(1, 7))
    places = data.draw(st.none() | st.lists(st.integers(0, 3), min_size=n, max_size=n))
    if attention is None and places is None:
        return
    ids = list(range(10, 10 + n))
    expected = naive_documents(ids, attention, places)
    row = {"input_ids": ids}
    row |= {} if attention is None else {"attention_mask": attention}
    row |= {} if places is None else {"position_ids": places}
    if expected is None:
        with pytest.raises(BadRecordError):
            read(**row)
    else:
        assert [document for document, _ in read(**row)] == expected


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=8))
def test_a_token_is_learned_where_every_column_says_so(columns):
    ids = list(range(len(columns)))
    labels = [i if learned else -100 for i, (learned, *_) in enumerate(columns)]
    names = ("loss_mask", "completion_mask", "assistant_masks")
    masks = {name: [int(column[k + 1]) for column in columns] for k, name in enumerate(names)}
    assert read(input_ids=ids, labels=labels, **masks) == [(ids, [int(all(column)) for column in columns])]


def test_what_is_cut_has_no_say():
    """Ids, labels and positions under attention 0 are those of padding, whatever they are."""
    row = {"input_ids": [999, 1, 2, -5], "attention_mask": [0, 1, 1, 0], "labels": [7, -100, 2, 8]}
    assert read(**row, position_ids=[1, 0, 1, 1]) == [([1, 2], [0, 1])]
    assert read(input_ids=[5, 6], attention_mask=[0, 0]) == [([], None)]
    padded = {"input_ids": [1, 2, 0, 0], "position_ids": [0, 1, 0, 0], "labels": [1, 2, -100, -100]}
    assert read(**padded) == [([1, 2], [1, 1])]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"labels": [2, 3, 4, 5, 6, -100]}, "labels.*shifted"),
        ({"labels": [-100, -100, 4, 5, 6, 1]}, "labels.*shifted"),
        ({"labels": [1, 2, 3, 9, 5, 6]}, "labels.* 9 at token 3 .*-100"),
        ({"labels": [1, 2, 3]}, "labels has 3 entries, input_ids 6"),
        ({"labels": None}, "'labels' is null"),
        ({"labels": 1}, "labels.*integers"),
        ({"labels": [1.0] * 6}, "labels.*integers"),
        ({"labels": [True, *IDS[1:]]}, "labels.*integers"),
        ({"attention_mask": [1, 1, 0, 0, 1, 1]}, "attention_mask has 0 inside a document"),
        ({"attention_mask": [1, 1, 3, 3, 2, 2]}, r"attention_mask.*\[1, 3, 2\]"),
        ({"attention_mask": [1, -1, 1, 1, 1, 1]}, "attention_mask has the values"),
        ({"attention_mask": [0.5] * 6}, "attention_mask.*integers"),
        ({"position_ids": [3, 4, 5, 6, 7, 8]}, "position_ids has 3 at token 0 .*from 0"),
        ({"position_ids": [0, 1, 2, 4, 5, 6]}, "position_ids has 4 at token 3"),
        ({"position_ids": [0, 1, 2, 0, 0, 0]}, "3 zeros.*padding"),
        ({"position_ids": [0, 1, 2, 3, 4, 5], "attention_mask": [1, 1, 1, 2, 2, 2]}, "contradict each other"),
        ({"position_ids": [0, 1, 2, 0, 1, 2], "seq_lengths": [2, 4]}, "position_ids and seq_lengths contradict"),
        ({"seq_lengths": [2, 5]}, "seq_lengths.*up to 7"),
        ({"seq_lengths": [6, 0]}, "entries from 0"),
        ({"loss_mask": [1, 1, 1, 1, 1, 2]}, "loss_mask.* 0 and 1"),
        ({"completion_mask": [1, 1]}, "completion_mask has 2 entries, input_ids 6"),
    ],
)
def test_rows_that_contradict_themselves(row, message):
    with pytest.raises(BadRecordError, match=message):
        read(input_ids=IDS, **row)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_type_ids", [0, 0, 0, 1, 1, 1]),
        ("weights", [1.0] * 6),
        ("weight", 0.5),
        ("label", False),
        ("cu_seqlens", [0, 2, 6]),
        ("cu_seq_lens_q", [0, 2, 6]),
        ("seq_idx", [0, 0, 1, 1, 1, 1]),
        ("chosen", "text"),
        ("rejected_input_ids", [1]),
        ("target_ids", [2]),
        ("pixel_values", [[0.5]]),
        ("advantages", [0.0] * 6),
        ("some_new_mask", [True] * 6),
        ("some_top_k", [[1, 2]] * 6),
    ],
)
def test_columns_that_could_change_what_is_learned_are_refused_by_name(name, value):
    with pytest.raises(DataError, match=f"'{name}' .*--ignore-field {name}") as refused:
        read(input_ids=IDS, **{name: value})
    assert not isinstance(refused.value, BadRecordError), "of all rows, not of one"
    found = token_documents({"input_ids": IDS, name: value}, VOCABULARY, ignore=(name,))
    assert np.concatenate([d.input_ids for d in found]).tolist() == IDS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("token_type_ids", [0] * 6),
        ("special_tokens_mask", [1, 0, 0, 0, 0, 1]),
        ("offset_mapping", [[0, 1]] * 6),
        ("length", [6]),
        ("tags", ["a", "b", "c", "d", "e", "f"]),
        ("meta", {"weights": [1]}),
        ("weights", None),
        ("id", 5),
    ],
)
def test_columns_that_change_nothing_are_passed_over(name, value):
    assert read(input_ids=IDS, **{name: value}) == [(IDS, None)]
