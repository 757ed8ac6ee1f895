"""A trunk of several kinds of layers, and models that are copied and pickled."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from statex_dist.models.core.sequences import Sequences
from statex_dist.models.fla import NAMES
from statex_dist.models.gla.mixer import GLABlock
from statex_dist.models.lm import Trunk
from statex_dist.models.retnet.mixer import RetNetBlock
from tests.models.tiny import CONFIGS, build, retnet_config, tokens
from tests.ops.scan_cases import borders


def test_layers_of_two_kinds():
    torch.manual_seed(0)
    config = retnet_config(num_hidden_layers=3)
    trunk = Trunk(config, names=NAMES, blocks=[GLABlock, RetNetBlock, GLABlock]).double()
    lengths, ids = [5, 1, 8], tokens(1, 14)
    with torch.no_grad():
        packed, states = trunk(ids, Sequences(cu_seqlens=borders(lengths), output_states=True, chunk_size=4), None)
        assert [len(state) for state in states] == [1, 2, 1], "RetNet's layers have positions"
        parts = [trunk(part, Sequences(chunk_size=4), None)[0] for part in ids.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(parts, dim=1), rtol=0, atol=1e-12)
        states = None
        for t in range(lengths[0]):
            hidden, states = trunk(ids[:, t : t + 1], Sequences(output_states=True), states)
            torch.testing.assert_close(hidden[:, 0], packed[:, t], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gla-conv", "hgrn2", "mamba2-one-group"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_the_model_and_apart_from_it(name, copied):
    model, ids = build(CONFIGS[name]), tokens(1, 9)
    expected = model(ids).logits
    other = copied(model)
    assert torch.equal(other(ids).logits, expected)
    tied = model.config.tie_word_embeddings
    assert (other.lm_head.weight is other.trunk.embedding_table.weight) is tied
    with torch.no_grad():
        other.trunk.final_norm.weight.zero_()
    assert torch.equal(model(ids).logits, expected)
    assert not torch.equal(other(ids).logits, expected)
