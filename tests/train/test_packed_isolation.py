"""A pack that the loader made, through a whole model: nothing of a document reaches another one."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from statex_dist.batch import IGNORE_INDEX
from tests.data.options import make_loader
from tests.data.synthetic import PAD, memory_store
from tests.models.tiny import CONFIGS, build

LENGTHS = [9, 23, 5, 14, 2, 40, 7]


def one_pack(vocab_size: int):
    store = memory_store(LENGTHS, shards=1)
    loader = make_loader(store, seq_len=112, global_packs=1, pad_id=PAD, prefetch_steps=0)
    (batch,) = next(iter(loader))
    return batch.input_ids % vocab_size, batch


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_logits_of_a_document_are_those_of_the_document_alone(config):
    model = build(config)
    ids, batch = one_pack(config.vocab_size)
    with torch.no_grad():
        packed = model(ids, cu_seqlens=batch.cu_seqlens, seq_idx=batch.seq_idx, chunk_size=8).logits
        for begin, end in itertools.pairwise(batch.cu_seqlens.tolist()):
            alone = model(ids[:, begin:end], chunk_size=8).logits
            torch.testing.assert_close(packed[:, begin:end], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_loss_of_a_document_has_no_gradient_at_another(config):
    model = build(config)
    ids, batch = one_pack(config.vocab_size)
    labels = torch.where(batch.labels == IGNORE_INDEX, IGNORE_INDEX, batch.labels % config.vocab_size)
    seen: list[torch.Tensor] = []
    model.trunk.embedding_table.register_forward_hook(lambda *args: seen.append(args[-1].requires_grad_()))
    logits = model(ids, cu_seqlens=batch.cu_seqlens, seq_idx=batch.seq_idx, chunk_size=8).logits
    losses = F.cross_entropy(logits[0], labels[0], ignore_index=IGNORE_INDEX, reduction="none")
    borders = batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(borders):
        if not (labels[0, begin:end] != IGNORE_INDEX).any():
            assert (begin, end) == (borders[-2], borders[-1])  # the padding: nothing is learned from it
            continue
        (gradient,) = torch.autograd.grad(losses[begin:end].sum(), seen, retain_graph=True)
        outside = torch.ones(ids.shape[1], dtype=torch.bool)
        outside[begin:end] = False
        assert gradient[0, outside].abs().max() == 0
        assert (gradient[0, begin : end - 1].abs().amax(-1) > 0).all()
