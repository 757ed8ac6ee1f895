"""Raw UTF-8 bytes as tokens 0..255, 256 = end of text, 257 = padding; the vocabulary is in tokenizer.json.

Written by statex-dist; transformers is all it needs:

    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
"""

from transformers import PreTrainedTokenizerFast


class BytesTokenizer(PreTrainedTokenizerFast):
    """A fast tokenizer under the name by which statex-dist recognises models of raw bytes."""
