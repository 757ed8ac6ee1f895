"""Which files make a run's checkpoint a model that others open."""

from types import SimpleNamespace

import pytest

from statex_dist.data.tokenizer import BytesTokenizer, load_tokenizer
from statex_dist.train.model_files import describe_model
from tests.models.tiny import gla_config


@pytest.fixture
def describe():
    stores = {"a": SimpleNamespace(manifest=SimpleNamespace(tokenizer="bytes"))}

    def files(path):
        return describe_model(gla_config(), path, stores)

    return files


def test_the_models_own_files_go_along(describe, tmp_path):
    BytesTokenizer().save(tmp_path)
    for name in ("config.json", "chat_template.jinja", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BytesTokenizer", "mine": 1}')
    files = describe(tmp_path)
    assert set(files) >= {"config.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert '"mine": 1' in files["tokenizer_config.json"]


@pytest.mark.parametrize("settings", [False, True])
def test_a_model_without_a_tokenizer_gets_that_of_the_data(describe, tmp_path, settings):
    (tmp_path / "config.json").write_text("{}")
    if settings:
        (tmp_path / "generation_config.json").write_text("{}")
    files = describe(tmp_path)
    assert ("generation_config.json" in files) == settings
    target = tmp_path / "again"
    target.mkdir()
    for name, content in files.items():
        (target / name).write_text(content)
    assert isinstance(load_tokenizer(target), BytesTokenizer)
    assert set(describe(None)) == {"config.json", "tokenizer_config.json"}
