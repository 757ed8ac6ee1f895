import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from statex_dist.errors import ConfigError
from statex_dist.inference.decoding import Sampling, choose_tokens


def generators(count, seed=0):
    return [np.random.Generator(np.random.Philox(seed + i)) for i in range(count)]


SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(1),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 5.0]),
    top_k=st.sampled_from([0, 1, 3, 100]),
    top_p=st.sampled_from([1e-6, 0.5, 0.9, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(samplings=st.lists(SAMPLINGS, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_a_row_draws_what_it_would_alone_and_only_from_what_is_allowed(samplings, seed):
    logits = torch.randn(len(samplings), 11, generator=torch.Generator().manual_seed(seed)) * 3
    together = choose_tokens(logits, samplings, generators(len(samplings), seed)).tolist()
    for row, sampling in enumerate(samplings):
        alone = choose_tokens(logits[row : row + 1], [sampling], generators(len(samplings), seed)[row : row + 1])
        assert alone.tolist() == [together[row]]
        order = logits[row].argsort(descending=True, stable=True).tolist()
        rank = order.index(together[row])
        if sampling.temperature == 0:
            assert rank == 0
            continue
        assert rank < (sampling.top_k or 11)
        kept = logits[row].double()[order][: sampling.top_k or 11]
        shares = (kept / sampling.temperature).softmax(0)
        assert shares[:rank].sum() < sampling.top_p + 1e-12


@pytest.mark.parametrize("temperature", [1e-308, 1e-30, 1e30])
def test_any_temperature_draws_a_token(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0]]).expand(50, 3)
    drawn = choose_tokens(logits, [Sampling(max_tokens=1, temperature=temperature)] * 50, generators(50)).tolist()
    assert set(drawn) == ({1} if temperature < 1 else {0, 1, 2})


def test_an_infinite_logit_of_minus_is_never_drawn():
    logits = torch.tensor([[0.0, -torch.inf, 0.0]]).expand(500, 3)
    drawn = choose_tokens(logits, [Sampling(max_tokens=1, temperature=9.0)] * 500, generators(500))
    assert sorted(set(drawn.tolist())) == [0, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 0}, "max_tokens.*not 0"),
        ({"top_p": 0.0, "temperature": 1.0}, "temperature 1, top_k 0 and top_p 0"),
        ({"top_p": 1.5}, "top_p 1.5 make no sampling"),
        ({"top_k": -1}, "top_k -1 and"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": -0.5}, "temperature -0.5"),
        ({"until": ("a", "")}, "stop string"),
    ],
)
def test_what_makes_no_sampling_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Sampling(**{"max_tokens": 1, **options})
