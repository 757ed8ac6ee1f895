"""The inference benchmark measures what it says: the same tokens as the peer, the bytes of states, the tables."""

import json

import pytest
import torch

from benchmarks import inference, serving
from benchmarks.measure import Record
from statex_dist.state.geometry import StateGeometry

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "state_size": 4}


def test_ours_and_the_peer_write_the_same_tokens(monkeypatch):
    monkeypatch.setattr(inference, "_PEER", SMALL)
    monkeypatch.setattr(inference, "NEW_TOKENS", 5)
    monkeypatch.setattr(inference, "STEPS", 2)
    ours, theirs = (inference.generate(mine, 2, 9) for mine in (True, False))
    assert ours["tokens"] == theirs["tokens"]
    assert [len(tokens) for tokens in ours["tokens"]] == [5, 5]
    assert min(ours[name] for name in ("first", "step", "whole")) > 0


@pytest.mark.parametrize(
    ("label", "factor"), [("GLA", 1), ("GLA, every layer merged x4", 4), ("Mamba2, d_state x4", 4)]
)
def test_the_models_grow_as_their_labels_say(label, factor):
    model = inference.build(inference.MODELS[label])
    plain = inference.build(inference.MODELS[label.split(",")[0]])
    numbers = [sum(layer.elements for layer in _geometries(m)) for m in (plain, model)]
    assert numbers[1] == factor * numbers[0]


def _geometries(model) -> list[StateGeometry]:
    return [model.config.layer_geometry(layer) for layer in model.config.recurrent_layers]


def test_bytes_of_states_are_those_of_the_geometry(monkeypatch):
    monkeypatch.setattr(inference, "STEPS", 1)
    values = {"model_type": "gla", "num_heads": 2, "hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 64}
    found = inference.decode(values, 2)
    assert found["state_bytes"] == 3 * 2 * 4 * 8 * 4
    assert inference.read(values, 4096)["seconds"] > 0


def test_tables(tmp_path):
    torch.set_num_threads(1)
    record = Record({"load": 1.0}, out=tmp_path / "rows.json")
    record.add({"part": "decode", "model": "GLA", "batch": 8, "seconds": 0.004, "state_bytes": 2048})
    record.add({"part": "decode", "model": "GLA, grown", "batch": 8, "seconds": 0.008, "state_bytes": 4096})
    record.add({"part": "prefill", "model": "GLA", "length": 4096, "seconds": 2.0, "bytes": 2**21})
    sides = {"ours": {"first": 0.1, "step": 0.01, "whole": 1.0}, "theirs": {"first": 0.4, "step": 0.02, "whole": 5.0}}
    record.add({"part": "peer", "batch": 1, "prompt": 64, **sides, "same": False})
    text = inference.render(json.loads((tmp_path / "rows.json").read_text()))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["GLA, grown", "8", "1000", "8", "0.5x", "4"] in rows
    assert ["GLA", "4,096", "2048", "2", "2"] in rows
    assert ["1 x 64", "100", "400", "4x", "10", "20", "2x", "5x", ">= 3x", "NO"] in rows


def test_table_of_the_server():
    kinds = {name: {"tokens_per_s": 50.0, "requests_per_s": 0.5, "first_s": 0.02} for name in ("whole", "stream")}
    text = serving.render(Record({}, rows=[{"model": "m", "clients": 4, "bare": 100.0, **kinds}]).document())
    assert [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")] == [
        *("m", "4", "100", "50", "0.5x", "0.5", "50", "20")
    ]
