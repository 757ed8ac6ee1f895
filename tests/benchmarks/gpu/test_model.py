"""Synthetic packs, the models' shapes, and the command with real DeepSpeed at small sizes."""

import itertools
import json

import pytest
import torch

from benchmarks.gpu import model
from benchmarks.gpu.shapes import EXPANSIONS, MODELS, TINY_MODELS, UNEXPANDED, expanded_config, expansions, random_model
from statex_dist.batch import IGNORE_INDEX
from statex_dist.models.lm import RecurrentLM


def test_a_synthetic_pack_is_a_pack():
    pack = model.synthetic_pack(100, vocab_size=50, documents=7, seed=3)
    borders = pack.cu_seqlens.tolist()
    assert (borders[0], borders[-1], len(borders)) == (0, 100, 8)
    assert borders == sorted(set(borders))
    for number, (start, stop) in enumerate(itertools.pairwise(borders)):
        assert pack.position_ids[0, start:stop].tolist() == list(range(stop - start))
        assert pack.seq_idx[0, start:stop].tolist() == [number] * (stop - start)
        assert pack.labels[0, start : stop - 1].tolist() == pack.input_ids[0, start + 1 : stop].tolist()
        assert pack.labels[0, stop - 1] == IGNORE_INDEX
    assert pack.input_ids.max() < 50
    assert not torch.equal(pack.input_ids, model.synthetic_pack(100, 50, 7, seed=4).input_ids)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("GLA 1.3B", 1300, 1400), ("Mamba2 1.3B", 1300, 1400), ("GLA 340M", 320, 380), ("Mamba2 370M", 340, 400)],
)
def test_shapes_are_those_of_their_names(name, least, most):
    plain = expanded_config(MODELS[name], UNEXPANDED)
    with torch.device("meta"):
        assert least <= sum(p.numel() for p in RecurrentLM(plain).parameters()) / 1e6 <= most
    for expansion in expansions(MODELS[name])[1:]:
        grown = expanded_config(MODELS[name], expansion)
        assert len(grown.statex.layers) == plain.num_hidden_layers // 6
        for layer in range(plain.num_hidden_layers):
            ratio = grown.layer_geometry(layer).elements / plain.layer_geometry(layer).elements
            assert ratio == (4 if grown.statex.get(layer) else 1)


def test_random_models_are_finite_and_differ_by_expansion_only():
    for name, values in TINY_MODELS.items():
        for expansion in EXPANSIONS[values["model_type"]]:
            built = random_model(expanded_config(values, expansion), torch.device("cpu"), torch.float32)
            pack = model.synthetic_pack(64, 256, 3)
            loss = built(pack.input_ids, labels=pack.labels, cu_seqlens=pack.cu_seqlens, seq_idx=pack.seq_idx).loss_sum
            loss.backward()
            assert 4 < loss.item() / pack.num_target_tokens < 8, f"{name}, {expansion}: far from ln 256"
            assert all(torch.isfinite(p.grad).all() for p in built.parameters() if p.grad is not None)


@pytest.mark.slow
@pytest.mark.distributed
def test_the_command_runs_on_a_cpu(tmp_path, capsys):
    out = tmp_path / "model.json"
    options = ["--device", "cpu", "--tiny", "--steps", "1", "--packs", "2", "--only", "GLA tiny", "--out", str(out)]
    assert model.main(options) == 0
    document = json.loads(out.read_text())
    assert [row["expansion"] for row in document["rows"]] == expansions(TINY_MODELS["GLA tiny"])
    for row in document["rows"]:
        assert row["tokens_per_s"] == pytest.approx(2 * 128 / row["step_s"])
        assert 4 < row["loss"] < 8
    assert [row["expanded_layers"] for row in document["rows"]] == [0, 1, 1, 1, 1]
    assert capsys.readouterr().out.strip() == model.render(document)


def test_a_model_that_fails_or_hangs_is_a_row(monkeypatch, tmp_path):
    args = model.argparse.Namespace(
        device="cpu", tokens=8, packs=1, documents=1, steps=1, recompute="none", limit=5.0, out=None
    )
    monkeypatch.setattr(model, "run_limited", lambda command, limit, env: f"stopped after {limit:.0f} s")
    row = model.launch("GLA tiny", "merged", args)
    assert row == {"model": "GLA tiny", "expansion": "merged", "failed": "stopped after 5 s"}
    assert "stopped after 5 s" in model.render({"machine": {}, "ceilings": None, "settings": {}, "rows": [row]})


def test_steps_are_compared_with_the_unexpanded_model():
    def row(name, expansion, seconds):
        common = {"layers": 24, "parameters": 1, "tokens_per_s": 1.0, "step_least_s": 1.0, "peak_bytes": 2**30}
        common |= {"expanded_layers": 4, "flops_per_s": 1e12, "utilisation": 0.4}
        return {"model": name, "expansion": expansion, "step_s": seconds, **common}

    rows = [row("a", "as it was", 2.0), row("b", "as it was", 8.0), row("a", "merged", 2.06), row("b", "merged", 7.6)]
    text = model.render({"machine": {}, "ceilings": None, "settings": {"packs": 1}, "rows": rows}).splitlines()[-4:]
    assert [line.split("|")[7].strip() for line in text] == ["", "", "+3.0 %", "-5.0 %"]


def test_an_unknown_model_is_refused(capsys):
    with pytest.raises(SystemExit):
        model.main(["--device", "cpu", "--tiny", "--only", "GLA 7B"])
    assert "--only 'GLA 7B'" in capsys.readouterr().err
