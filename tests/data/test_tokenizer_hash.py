"""The tokenizer's hash covers every setting that changes ids; hashes of earlier releases are still recognised."""

import json
import logging
from dataclasses import replace

import pytest
from tokenizers import Tokenizer

from statex_dist.data.formats import open_store
from statex_dist.data.manifest import check_same_tokenizer, is_hash_of
from statex_dist.data.tokenizer import BytesTokenizer, load_tokenizer
from statex_dist.errors import DataError
from tests.data.fast_tokenizers import KINDS, NAMES, TEXTS, backend, save
from tests.data.options import prepare
from tests.data.prepared import json_lines, put

PROBES = [*TEXTS, *(f"The Fox{name}ﬁ  é <tool>s ① {name}" for name in NAMES), "x" * 50, " lead", "a\u0301b\n\n漢", ""]

LOWERCASE = {"type": "Lowercase"}
DIGITS = {"type": "Digits", "individual_digits": True}


def added(name, **flags):
    def mutate(state):
        state["added_tokens"] = [
            token | flags if token["content"] == name else token for token in state["added_tokens"]
        ]

    return mutate


def model(**values):
    return lambda state: state["model"].update(values)


def word_prefix(state):
    # The library aborts the process where a BPE model's merges do not fit to its prefix.
    if state["model"]["type"] == "WordPiece":
        state["model"]["continuing_subword_prefix"] = "@@"


def without_last_merge(state):
    if "merges" in state["model"]:
        state["model"]["merges"] = state["model"]["merges"][:-40]


def swapped_ids(state):
    """Swap the ids of two pieces of a probe."""
    used = [token for token in Tokenizer.from_str(json.dumps(state)).encode(TEXTS[0]).ids if token > len(NAMES)]
    first, second = used[0], next(token for token in used if token != used[0])
    vocab = state["model"]["vocab"]
    if isinstance(vocab, dict):
        names = {number: piece for piece, number in vocab.items()}
        vocab[names[first]], vocab[names[second]] = second, first
    else:
        vocab[first], vocab[second] = vocab[second], vocab[first]


def more(name, special):
    def mutate(state):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        number = max(token["id"] for token in state["added_tokens"]) + 1
        state["added_tokens"].append({"id": number, "content": name, "special": special, **flags})

    return mutate


FILE_MUTATIONS = {
    "normalizer": lambda state: state.update(normalizer=LOWERCASE),
    "pre-tokenizer": lambda state: state.update(pre_tokenizer=DIGITS),
    "no pre-tokenizer": lambda state: state.update(pre_tokenizer=None),
    "post-processor": lambda state: state.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        }
    ),
    "truncation": lambda state: state.update(
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    ),
    "padding": lambda state: state.update(
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 6,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        }
    ),
    "special": added("<tool>", special=True),
    "not special": added("[MASK]", special=False),
    "lstrip": added("<|endoftext|>", lstrip=True),
    "rstrip": added("<|endoftext|>", rstrip=True),
    "single word": added("<tool>", single_word=True),
    "normalized": added("<tool>", normalized=True),
    "another special token": more("fox", True),
    "another plain token": more("fox", False),
    "byte fallback": model(byte_fallback=True),
    "no byte fallback": model(byte_fallback=False),
    "ignore merges": model(ignore_merges=True),
    "fused unknown": model(fuse_unk=True),
    "word prefix": word_prefix,
    "short words": model(max_input_chars_per_word=4),
    "fewer merges": without_last_merge,
    "ids": swapped_ids,
}
CONFIG_MUTATIONS = {
    "split_special_tokens": {"split_special_tokens": True},
    "eos": {"eos_token": "<|endoftext|>"},
    "bos": {"bos_token": "<|endoftext|>"},
    "no bos": {"bos_token": None},
    "add_bos_token": {"add_bos_token": True},
    "extra special token": {"additional_special_tokens": ["fox"]},
    "added tokens": {"added_tokens_decoder": {"1": {"content": "<s>", "lstrip": True, "special": True}}},
    "pad": {"pad_token": "<|im_start|>"},
}
WITHOUT_EFFECT = {
    "chat template": {"chat_template": "{{ messages }}"},
    "comment": {"_comment": "made on a Monday"},
    "clean up": {"clean_up_tokenization_spaces": True},
    "length": {"model_max_length": 77},
    "class": {"tokenizer_class": "LlamaTokenizerFast"},
}


def ids_of(directory):
    """Everything that this tokenizer may put into a dataset, or a prompt."""
    tokenizer = load_tokenizer(directory)
    plain, split = (coder.encode_batch(PROBES) for coder in (tokenizer, tokenizer.for_corpus("split")))
    texts = [[ids.tolist() for ids in found] for found in (plain, split)]
    return tokenizer.hash, [texts, tokenizer.bos_token_id, tokenizer.eos_token_id]


@pytest.fixture(scope="module", params=KINDS)
def original(request, tmp_path_factory):
    made = backend(request.param)
    directory = save(made, tmp_path_factory.mktemp(request.param) / "original")
    return made, directory, *ids_of(directory)


def test_what_changes_ids_changes_the_hash(original, tmp_path):
    made, _, first_hash, first_ids = original
    changed = set()
    for name, mutate in FILE_MUTATIONS.items():
        state = json.loads(made.to_str())
        mutate(state)
        directory = save(made, tmp_path / name)
        (directory / "tokenizer.json").write_text(json.dumps(state))
        try:
            found_hash, found_ids = ids_of(directory)
        except DataError:  # no tokenizer of this kind can have the setting
            continue
        if found_ids != first_ids:
            changed.add(name)
            assert found_hash != first_hash, name
    for name, config in CONFIG_MUTATIONS.items():
        found_hash, found_ids = ids_of(save(made, tmp_path / name, **config))
        if found_ids != first_ids:
            changed.add(name)
            assert found_hash != first_hash, name
    assert {"normalizer", "ids", "not special", "special", "eos", "bos", "no bos", "split_special_tokens"} <= changed
    assert len(changed) >= 12


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_changes_no_id_changes_no_hash(original, tmp_path, name):
    made, _, first_hash, first_ids = original
    assert ids_of(save(made, tmp_path / "t", **WITHOUT_EFFECT[name])) == (first_hash, first_ids)


def test_a_tokenizer_that_transformers_saved_again_is_the_same(original, tmp_path):
    _, directory, first_hash, _ = original
    (tmp_path / "again").mkdir()
    load_tokenizer(directory).save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").hash == first_hash


def test_random_ids_are_refused(tmp_path):
    state = json.loads(backend("gpt2").to_str())
    for dropout, good in ((0.1, False), (1.0, False), (0.0, True), (None, True)):
        state["model"]["dropout"] = dropout
        directory = save(backend("gpt2"), tmp_path / f"{dropout}")
        (directory / "tokenizer.json").write_text(json.dumps(state))
        if good:
            load_tokenizer(directory)
        else:
            with pytest.raises(DataError, match=rf"dropout {dropout:g} .*'dropout'"):
                load_tokenizer(directory)


@pytest.fixture
def datasets(tmp_path):
    """Datasets of one corpus under three tokenizers, by name."""
    corpus = put(tmp_path / "a.jsonl", json_lines({"text": "the fox"}, {"text": "dog"}))
    spec = {"gpt2": save(backend("gpt2"), tmp_path / "gpt2"), "llama": save(backend("llama"), tmp_path / "llama")}
    found = {}
    for name, tokenizer in (*spec.items(), ("bytes", "bytes")):
        prepare([corpus], tmp_path / f"data-{name}", tokenizer)
        found[name] = open_store(tmp_path / f"data-{name}").manifest
    return found


def of_version_2(manifest):
    return replace(manifest, version=2, tokenizer_hash=load_tokenizer(manifest.tokenizer).old_hash)


def test_datasets_of_the_release_before_go_with_their_model(datasets, caplog):
    caplog.set_level(logging.INFO)
    own = load_tokenizer(datasets["gpt2"].tokenizer)
    old, new = of_version_2(datasets["gpt2"]), datasets["gpt2"]
    assert old.tokenizer_hash != new.tokenizer_hash
    assert is_hash_of(own, old.tokenizer_hash)
    check_same_tokenizer({"old": old, "new": new}, own)
    assert any("old was prepared by an earlier release" in record.getMessage() for record in caplog.records)
    for version in (datasets["llama"], of_version_2(datasets["llama"]), datasets["bytes"]):
        with pytest.raises(DataError, match=r"x .*another tokenizer"):
            check_same_tokenizer({"x": version}, own)


def test_datasets_without_a_model_are_compared_with_each_other(datasets, caplog):
    check_same_tokenizer({"a": datasets["gpt2"], "b": datasets["gpt2"]}, None)
    assert not caplog.records
    for other in (datasets["llama"], datasets["bytes"], of_version_2(datasets["llama"])):
        with pytest.raises(DataError, match=r"b .*another tokenizer"):
            check_same_tokenizer({"a": datasets["gpt2"], "b": other}, None)
    check_same_tokenizer({"a": datasets["bytes"], "b": of_version_2(datasets["bytes"])}, None)
    caplog.clear()
    check_same_tokenizer({"a": datasets["gpt2"], "b": of_version_2(datasets["gpt2"])}, None)
    assert any("so their tokenizers cannot be compared" in record.getMessage() for record in caplog.records)


def test_documents_made_in_other_ways_are_reported(datasets, caplog):
    one = datasets["gpt2"]
    check_same_tokenizer({"a": one, "b": replace(one, bos="prepend", special_tokens="keep")}, None)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "b was prepared with bos prepend, a with none",
        "b was prepared with special_tokens keep, a with split",
    ]


def test_the_hash_of_bytes_did_not_change():
    """Datasets and models of every release have it."""
    assert BytesTokenizer.hash == BytesTokenizer().old_hash == "d7f6d9ee4c128b0b67508004e6e5a9f1"
