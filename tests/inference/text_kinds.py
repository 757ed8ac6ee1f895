"""Real tokenizers of every kind of decoder, small enough that random ids make words, bytes and special tokens."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from statex_dist.data.hf_tokenizer import HFTokenizer

TEXT = "the quick brown fox — naïve café, 東京 is big, 🙂🙃 and \n\n so on " * 4
BYTES = [f"<0x{i:02X}>" for i in range(256)]
WORDS = ["the", "quick", "a", "b", "e", "is", ",", ".", "n't", "é", "東"]
MARK = "\u2581"
SPECIAL = ["<unk>", "<eos>", "<|im_end|>"]
"""``<|im_end|>`` is marked as special and is in no named slot."""


def hugging_face(backend, name, **settings):
    """Return our tokenizer of a backend, and transformers'."""
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", **settings)
    return HFTokenizer(fast, name)


def byte_level_bpe():
    """As GPT-2 and Llama 3: a character may be torn apart."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    return hugging_face(backend, "byte-level")


def pieces():
    """Return sentencepiece's kinds of tokens: bytes, words with and without a mark, and marks alone."""
    return [*SPECIAL, *BYTES, MARK, 2 * MARK, *(MARK + word for word in WORDS), *WORDS, "\ufffd", *"cdfghiklmnoqrstuwx"]


def unigram(prepend, decoder=None):
    backend = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces()], unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoder or decoders.Metaspace(prepend_scheme=prepend)
    return hugging_face(backend, f"unigram, {prepend}")


def metaspace_bpe(prepend):
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    backend.decoder = decoders.Metaspace(prepend_scheme=prepend)
    trainer = trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return hugging_face(backend, f"bpe, {prepend}")


def llama(*, strip=True):
    """As Llama 2 and Mistral: spaces are marks, the first is dropped, unknown characters fall back to bytes."""
    vocabulary = {piece: i for i, piece in enumerate(pieces())}
    merges = [(MARK, "e"), (MARK, "a"), ("i", "s"), (MARK, "is")]
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(MARK), normalizers.Replace(" ", MARK)])
    steps = [decoders.Replace(MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if strip else steps)
    return hugging_face(backend, "llama")


def word_piece(*, cleanup=False):
    vocabulary = [*SPECIAL, *WORDS, *(f"##{word}" for word in WORDS), *"0123456789", *(f"##{i}" for i in range(10))]
    backend = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##", cleanup=cleanup)
    return hugging_face(backend, "word piece")


def end_of_word():
    """As GPT-1: the end of a word is in its token, and the last word has no space behind it."""
    vocabulary = [*SPECIAL, *WORDS, *(f"{word}</w>" for word in WORDS)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(vocabulary)}, [], end_of_word_suffix="</w>"))
    backend.decoder = decoders.BPEDecoder("</w>")
    return hugging_face(backend, "end of word")


def words(decoder=None):
    backend = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        backend.decoder = decoder
    return hugging_face(backend, "words")


KINDS = {
    "byte-level": byte_level_bpe(),
    **{f"unigram-{prepend}": unigram(prepend) for prepend in ("first", "always", "never")},
    **{f"bpe-{prepend}": metaspace_bpe(prepend) for prepend in ("first", "always", "never")},
    "llama": llama(),
    "gemma": llama(strip=False),
    "word-piece": word_piece(),
    "word-piece-cleanup": word_piece(cleanup=True),
    "end-of-word": end_of_word(),
    "no-decoder": words(),
    "ctc": words(decoders.CTC(pad_token="a", word_delimiter_token="b")),
    "joins-then-replaces": words(decoders.Sequence([decoders.Fuse(), decoders.Replace("the", "THE")])),
}
