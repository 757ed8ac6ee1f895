"""Small trained tokenizers of the kinds that models have, each with special tokens of every kind."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

KINDS = ("gpt2", "llama", "llama3", "unigram", "t5", "wordpiece", "words")

SPECIAL = {
    "<unk>": {},
    "<s>": {"normalized": True},
    "</s>": {"lstrip": True, "rstrip": True},
    "<|endoftext|>": {},
    "<|im_start|>": {"single_word": True},
    "[MASK]": {"lstrip": True},
    "<pad>": {},
}
NAMES = list(SPECIAL)
TEXTS = [
    "the quick brown fox jumps over the lazy dog, 0123456789 times: <b>bold</b> [x] | y",
    "pack my box with five dozen liquor jugs; how vexingly quick daft zebras jump!",
    "<s> </s> <|endoftext|> <|im_start|> [MASK] <pad> <unk> <s></s> x</s>y",
]


def backend(kind: str) -> Tokenizer:
    """Return a trained tokenizer with the special tokens of :data:`SPECIAL` and a plain added token ``<tool>``."""
    trainer = {"special_tokens": NAMES, "show_progress": False}
    if kind in ("gpt2", "llama3"):
        made = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, **trainer))
    elif kind == "llama":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer["special_tokens"] = NAMES + [f"<0x{byte:02X}>" for byte in range(256)]
        made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=370, **trainer))
    elif kind in ("unigram", "t5"):
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC() if kind == "t5" else None
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Metaspace()
        made.train_from_iterator(TEXTS, trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **trainer))
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.decoder = decoders.WordPiece()
        made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, **trainer))
    else:
        made = Tokenizer(models.WordLevel(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        made.train_from_iterator(TEXTS[:2], trainers.WordLevelTrainer(vocab_size=300, **trainer))
    state = json.loads(made.to_str())
    # Training makes added tokens of all its special tokens, with plain flags.
    state["added_tokens"] = [
        token | SPECIAL[token["content"]] for token in state["added_tokens"] if token["content"] in SPECIAL
    ]
    made = Tokenizer.from_str(json.dumps(state))
    made.add_tokens([AddedToken("<tool>", normalized=False)])
    return made


def save(made: Tokenizer, directory: Path, **config) -> Path:
    """Write a tokenizer's directory; ``config`` is for ``tokenizer_config.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    made.save(str(directory / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | named | config
    settings = {name: value for name, value in settings.items() if value is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def with_bos_template(made: Tokenizer) -> Tokenizer:
    """Have a tokenizer put ``<s>`` in front of every text, as those of Llama and Mistral do."""
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made
