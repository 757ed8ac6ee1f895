"""Hosts with our mixers against transformers' own models."""

from __future__ import annotations

import pytest
import torch

from statex_dist.models.hf import from_pretrained
from tests.models.hybrid.hosts import HOSTS, VOCABULARY, save_host

LENGTHS = [7, 1, 9]


@pytest.fixture(scope="module", params=HOSTS)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    host = save_host(request.param, directory)
    return host, from_pretrained(directory).eval()


def tokens(rows=1):
    return torch.randint(0, VOCABULARY, (rows, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def test_logits_are_the_hosts(pair):
    host, ours = pair
    ids = tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, host(ids, use_cache=False).logits, rtol=0, atol=1e-5)
