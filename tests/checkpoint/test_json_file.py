"""Infinities and NaN in ``config.json``, in both spellings, from the file to every file that we write from it."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Mamba2Config, PretrainedConfig

from checkpoints_tools.reshard.reshard import reshard
from checkpoints_tools.verify.verify import verify_expansion
from statex_dist.checkpoint.json_file import BareFloat, config_text, differing_keys, parse_config
from statex_dist.models.hf import save_pretrained
from statex_dist.models.registry import config_from_dict, read_config
from tests.checkpoints_tools.builders import run_expand
from tests.models.tiny import build, mamba2_config

numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-5, 5)
values = st.recursive(
    st.none() | st.booleans() | st.text(max_size=5) | numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)


@given(config=st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_what_transformers_writes_is_read_and_written_back(config):
    text = json.dumps(PretrainedConfig._encode_special_floats(config), indent=2) + "\n"
    assert config_text(parse_config(text)) == text
    assert not differing_keys(parse_config(text), config)
    json.loads(text, parse_constant=pytest.fail)


@given(config=st.dictionaries(st.text(max_size=5), values, max_size=4))
def test_bare_words_stay_bare_words(config):
    text = json.dumps(config, indent=2) + "\n"
    assert config_text(parse_config(text)) == text
    assert not differing_keys(parse_config(text), config)


def test_what_is_no_special_float_stays():
    """As transformers leaves it."""
    text = '{"a": {"__float__": "1.5"}, "b": {"__float__": "NaN", "c": 1}, "d": {"__float__": [1]}}'
    assert parse_config(text) == json.loads(text)


def test_differences_are_found_whatever_the_spelling():
    one = parse_config('{"a": Infinity, "b": NaN, "c": [{"__float__": "-Infinity"}], "d": null}')
    other = parse_config('{"a": {"__float__": "Infinity"}, "b": {"__float__": "NaN"}, "c": [-Infinity]}')
    assert differing_keys(one, other) == []
    assert differing_keys(one, {**other, "a": -math.inf, "b": 1.0, "e": False}) == ["a", "b", "e"]


SPELLINGS = {"object": {"__float__": "Infinity"}, "bare": math.inf}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_through_the_tools(tmp_path, spelling):
    """Expanded, resharded and exported, each file spells the limit as the source does; other keys come along."""
    high = SPELLINGS[spelling]
    save_pretrained(build(mamba2_config(), seed=0), tmp_path / "base")
    path = tmp_path / "base/config.json"
    own = {"time_step_limit": [0.0, high], "note": {"deep": [high]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    assert read_config(tmp_path / "base").time_step_limit == (0.0, math.inf)
    run_expand(tmp_path / "base", tmp_path / "grown", layers="all", factor=2)
    assert verify_expansion(tmp_path / "base", tmp_path / "grown").ok
    reshard(tmp_path / "grown", tmp_path / "plain")
    run_expand(tmp_path / "base", tmp_path / "uneven", layers="0", factor=2)
    reshard(tmp_path / "uneven", tmp_path / "code")
    for name in ("grown", "plain", "uneven", "code"):
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: written[key] for key in own} == own, name
        assert read_config(tmp_path / name).time_step_limit == (0.0, math.inf)
    assert Mamba2Config.from_pretrained(tmp_path / "plain").time_step_limit[1] == math.inf


def test_a_new_config_is_strict_json_and_a_read_one_keeps_its_spelling():
    strict = json.loads(mamba2_config().to_json(), parse_constant=pytest.fail)
    assert strict["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert config_from_dict(strict) == mamba2_config()
    bare = config_from_dict(parse_config(json.dumps(strict | {"time_step_limit": [0.0, math.inf]})))
    assert isinstance(bare.time_step_limit[1], BareFloat)
    assert bare == mamba2_config()
    assert json.loads(bare.to_json())["time_step_limit"] == [0.0, math.inf]
