"""Columns beside the tokens in shards that other tools wrote: nothing that is learned is passed over."""

import logging

import numpy as np
import pytest
import webdataset as wds

from statex_dist.data.formats import open_store
from statex_dist.data.storage.mds import load_streaming
from statex_dist.data.store import sequential_documents
from statex_dist.errors import DataError
from tests.data.synthetic import assert_same, make_documents

DOCUMENTS = make_documents([5, 9, 300])
REFUSED = ("labels", "attention_mask", "position_ids", "input_ids", "token_type_ids", "weights", "cu_seqlens")


def write_mds(path, name, encoding, value):
    columns = {"tokens": "ndarray:uint16", name: encoding}
    with load_streaming().MDSWriter(out=str(path), columns=columns) as writer:
        for document in DOCUMENTS:
            writer.write({"tokens": document, name: value(document)})
    return path


def write_tar(path, name, value):
    path.mkdir()
    with wds.ShardWriter(str(path / "part-%03d.tar"), maxcount=2, verbose=0) as writer:
        for i, document in enumerate(DOCUMENTS):
            writer.write({"__key__": f"sample{i}", "tokens.npy": document, name: value(document)})
    return path


def open_read(path, tmp_path):
    return [piece.tokens for piece in sequential_documents(open_store(path, cache_dir=tmp_path / "cache"))]


@pytest.mark.parametrize("name", REFUSED)
def test_mds_columns_are_refused_by_name(tmp_path, name):
    path = write_mds(tmp_path / "ds", name, "ndarray:int64", lambda d: d.astype(np.int64))
    with pytest.raises(DataError, match=f"column '{name}' .*loss_mask"):
        open_store(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", [f"{name}.npy" for name in REFUSED] + ["labels.pyd", "completion_mask.npy"])
def test_tar_members_are_refused_by_name(tmp_path, name):
    path = write_tar(tmp_path / "ds", name, lambda d: d.astype(np.int64))
    with pytest.raises(DataError, match=rf"sample0\.{name}' .*loss_mask"):
        open_store(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("dtype", ["uint8", "int64", "float32", "float16"])
def test_unknown_arrays_with_a_number_for_each_token_are_refused(tmp_path, dtype):
    path = write_mds(tmp_path / "mds", "importance", f"ndarray:{dtype}", lambda d: d.astype(dtype))
    with pytest.raises(DataError, match="column 'importance'"):
        open_store(path, cache_dir=tmp_path / "cache")
    path = write_tar(tmp_path / "tar", "importance.npy", lambda d: d.astype(dtype))
    with pytest.raises(DataError, match=r"importance\.npy'"):
        open_store(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize(
    ("encoding", "value"),
    [
        ("ndarray:float32", lambda d: np.zeros(7, np.float32)),
        ("ndarray:float32", lambda d: np.zeros((len(d), 2), np.float32)),
        ("str", lambda d: "w" * len(d)),
        ("int", len),
    ],
)
def test_what_says_nothing_of_single_tokens_is_reported(tmp_path, caplog, encoding, value):
    caplog.set_level(logging.INFO)
    path = write_mds(tmp_path / "ds", "about", encoding, value)
    assert_same(open_read(path, tmp_path), DOCUMENTS)
    assert caplog.text.count("columns that are not used: about") == 1


def test_members_of_tars_that_say_nothing_of_single_tokens_are_reported(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write_tar(tmp_path / "ds", "embedding.npy", lambda d: np.zeros(7, np.float32))
    assert_same(open_read(path, tmp_path), DOCUMENTS)
    assert caplog.text.count("members that are not used: embedding.npy") == 2  # of two tars
