"""Which tokens wait for later ones, by decoders as the ``tokenizers`` library writes them."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models

from statex_dist.data.hf_tokenizer import tokens_in_runs

VOCABULARY = {"a": 0, "<0x0A>": 1, "<0xfF>": 2, "<0x0>": 3, "x<0x0A>": 4}
MARKS = decoders.Replace("\u2581", " ")


def state(decoder):
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.decoder = decoder
    return json.loads(backend.to_str())["decoder"]


@pytest.mark.parametrize(
    ("decoder", "wanted"),
    [
        (decoders.ByteLevel(), set()),
        (decoders.WordPiece(), set()),
        (decoders.Metaspace(), set()),
        (decoders.BPEDecoder(), set()),
        (decoders.Sequence([MARKS, decoders.Fuse(), decoders.Strip(" ", 1, 0)]), set()),
        (decoders.Sequence([decoders.Fuse(), MARKS]), set()),
        (decoders.Sequence([decoders.Replace("ab", "c"), decoders.Fuse()]), set()),
        (decoders.ByteFallback(), {1, 2}),
        (decoders.Sequence([decoders.Sequence([MARKS, decoders.ByteFallback()]), decoders.Fuse()]), {1, 2}),
        (decoders.CTC(), {0, 1, 2, 3, 4}),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")]), {0, 1, 2, 3, 4}),
        (decoders.Sequence([decoders.ByteLevel(), decoders.Metaspace()]), {0, 1, 2, 3, 4}),
    ],
)
def test_tokens_wait_only_where_later_ones_may_change_them(decoder, wanted):
    assert tokens_in_runs(state(decoder), VOCABULARY) == wanted


def test_without_a_decoder_every_token_is_a_word():
    assert tokens_in_runs(None, VOCABULARY) == frozenset()
