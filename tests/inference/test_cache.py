"""Kept states continue as if they had never left memory, and only in their own model."""

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from statex_dist.data.tokenizer import BytesTokenizer
from statex_dist.errors import CheckpointError
from statex_dist.inference.cache import load_prefix, save_prefix
from statex_dist.inference.decoding import Sampling
from statex_dist.inference.generate import read_prefix, stream_continuations
from statex_dist.models.lm import RecurrentLM
from statex_dist.models.mitigation import parse_mitigation
from statex_dist.models.registry import make_plan
from statex_dist.state.geometry import FeatureMap
from tests.evaluation.stand_ins import tiny_config, tiny_model
from tests.models.tiny import CONFIGS, build

TOKENIZER = BytesTokenizer()


class OtherTokenizer(BytesTokenizer):
    hash = "another"


def texts(model, prefix):
    sampling = Sampling(max_tokens=6, ignore_eos=True)
    options = {"tokenizer": TOKENIZER, "batch_size": 2, "segment_length": 8, "prefix": prefix}
    return [progress.token for progress in stream_continuations(model, [[], [3, 1]], sampling, **options)]


@pytest.mark.parametrize("remedy", [None, "sliding-window:tokens=4", "state-norm:learn=8,every=1"])
@pytest.mark.parametrize("name", ["gla-mixed", "mamba2-grown", "retnet-grown", "hgrn2-conv-merged"])
def test_kept_states_go_on_bit_for_bit(tmp_path, name, remedy):
    model, rng = build(CONFIGS[name]).eval(), random.Random(1)
    model.mitigation = None if remedy is None else parse_mitigation(remedy)
    prefix = read_prefix(model, [rng.randrange(40) for _ in range(19)], segment_length=8)
    save_prefix(tmp_path / "states", prefix, model, TOKENIZER)
    loaded = load_prefix(tmp_path / "states", model, TOKENIZER)
    assert loaded.num_tokens == 19
    for ours, theirs in zip(prefix.states, loaded.states, strict=True):
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(ours, theirs, strict=True))
    assert texts(model, loaded) == texts(model, prefix)


def test_states_of_another_model_are_refused_with_the_difference(tmp_path):
    model = tiny_model()
    path = tmp_path / "states"
    save_prefix(path, read_prefix(model, [1, 2, 3]), model, TOKENIZER)
    one_weight = tiny_model()
    with torch.no_grad():
        one_weight.trunk.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    planned = RecurrentLM(make_plan(tiny_config(), layers="0", factor=2, init="inherit"))
    products = [FeatureMap(rolls=(1,)), FeatureMap(rolls=(0,))]  # models of the same shapes and weights
    featured = [
        RecurrentLM(
            make_plan(tiny_config(), layers="0", factor=2, init="lossless", op="grow_features", features=features)
        )
        for features in products
    ]
    remedied = tiny_model()
    remedied.mitigation = parse_mitigation("forget-more")
    others = [
        (tiny_model("mamba2"), TOKENIZER, "model_type.* gla .* mamba2"),
        (tiny_model(num_hidden_layers=3), TOKENIZER, "its num_hidden_layers differs: 2 there, 3 here"),
        (tiny_model(norm_eps=1e-3), TOKENIZER, "its norm_eps differs: 1e-06 there, 0.001 here"),
        (tiny_model(gate_logit_normalizer=1), TOKENIZER, "its gate_logit_normalizer differs: 16 there, 1 here"),
        (planned, TOKENIZER, "plan.* none .*layer 0 merge_heads x2 inherit"),
        (remedied, TOKENIZER, "mitigation.* none .*forget-more:"),
        (tiny_model().double(), TOKENIZER, "dtype.* float32 .* float64"),
        (one_weight, TOKENIZER, "its weights differ$"),
        (tiny_model(), OtherTokenizer(), "its tokenizer differs$"),
    ]
    for other, tokenizer, words in others:
        with pytest.raises(CheckpointError, match=words):
            load_prefix(path, other, tokenizer)
    load_prefix(path, tiny_model(), TOKENIZER)
    for model in featured:
        model.init_parameters(0)
    save_prefix(path, read_prefix(featured[0].eval(), [1, 2, 3]), featured[0], TOKENIZER)
    with pytest.raises(CheckpointError, match=r"plan.*rolls 1.*rolls 0"):
        load_prefix(path, featured[1], TOKENIZER)


def test_files_that_are_none_are_refused(tmp_path):
    model, path = tiny_model(), tmp_path / "states"
    with pytest.raises(CheckpointError, match="states"):
        load_prefix(path, model, TOKENIZER)
    path.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="states"):
        load_prefix(path, model, TOKENIZER)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="--save-state"):
        load_prefix(path, model, TOKENIZER)
    save_prefix(path, read_prefix(model, [1, 2, 3]), model, TOKENIZER)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        load_prefix(path, model, TOKENIZER)
    path.write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match="states"):
        load_prefix(path, model, TOKENIZER)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        header = {**file.metadata(), "version": "7"}
    save_file(load_file(path), path, header)
    with pytest.raises(CheckpointError, match=r"'7'.*1.*2"):
        load_prefix(path, model, TOKENIZER)
    with pytest.raises(CheckpointError, match="directory"):
        load_prefix(tmp_path, model, TOKENIZER)
    with pytest.raises(CheckpointError, match="written"):
        save_prefix(tmp_path, read_prefix(model, [1]), model, TOKENIZER)
    assert sorted(file.name for file in tmp_path.parent.glob(".tmp*")) == []
    with pytest.raises(CheckpointError, match="written"):
        save_prefix(tmp_path / "none" / "states", read_prefix(model, [1]), model, TOKENIZER)
