"""Losses of a hybrid's documents and continuations against transformers, whatever is read beside them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from statex_dist.data.store import DocumentSlice
from statex_dist.evaluation.documents import DocumentRow, read_rows
from statex_dist.evaluation.scoring import score_continuations
from statex_dist.models.hf import from_pretrained
from tests.models.hybrid.hosts import VOCABULARY, save_host

HOSTS = ("nemotron_h", "falcon_h1", "qwen3_next", "zamba2", "kimi_linear")
LENGTHS = (5, 23, 9, 14, 2, 31)


@pytest.fixture(scope="module", params=HOSTS)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return save_host(request.param, directory), from_pretrained(directory).eval()


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    return [rng.integers(1, VOCABULARY, length) for length in LENGTHS]


def losses(host, tokens):
    ids = torch.as_tensor(tokens).long()[None]
    with torch.no_grad():
        return F.cross_entropy(host(ids, use_cache=False).logits[0, :-1], ids[0, 1:], reduction="none").numpy()


def test_documents_that_follow_one_another_in_a_row_do_not_see_each_other(pair, texts):
    host, model = pair
    rows = [DocumentRow(i, DocumentSlice(tokens, None)) for i, tokens in enumerate(texts)]
    read_rows(model, rows, segment_length=4, batch_size=2)
    for row, tokens in zip(rows, texts, strict=True):
        assert row.loss_sum == pytest.approx(losses(host, tokens).sum(), rel=1e-5)


def test_continuations_of_unequal_contexts_have_the_hosts_scores(pair, texts):
    host, model = pair
    requests = [(tokens[: len(tokens) // 2].tolist(), tokens[len(tokens) // 2 :].tolist()) for tokens in texts]
    found = dict(score_continuations(model, requests, batch_size=3, segment_length=4))
    for i, (context, _) in enumerate(requests):
        assert -found[i].logprob == pytest.approx(losses(host, texts[i])[len(context) - 1 :].sum(), rel=1e-5)
