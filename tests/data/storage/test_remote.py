"""Datasets behind URLs, read from servers on loopback that fail on request."""

import base64
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest

from statex_dist.data.formats import open_store
from statex_dist.data.manifest import pack_lengths
from statex_dist.data.storage.remote import MissingObjectError, RemoteDirectory, RetryPolicy
from statex_dist.data.storage.schemes import PACKAGES, split_url
from statex_dist.errors import ConfigError, CorruptShardError, DataError, ShardError
from tests.data.options import make_loader
from tests.data.storage.loopback import s3_server, serve, upload, write_manifest
from tests.data.synthetic import all_documents, make_documents, write_mds
from tests.raising import raises

ROOT = Path(__file__).parents[3]
DOCUMENTS = make_documents([1000, 1, 255, 256, 2000, 3, *[700] * 20])
SHARD = "shard.00001.mds"


def assert_same(store, documents=DOCUMENTS):
    found = all_documents(store)
    assert len(found) == len(documents)
    for a, b in zip(found, documents, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    """The policy that ``open_store`` makes waits seconds between attempts; these are loopback servers."""
    monkeypatch.setattr(
        RetryPolicy.__init__, "__kwdefaults__", dict(RetryPolicy.__init__.__kwdefaults__, first_wait=0.01)
    )


@pytest.fixture(params=["none", "zstd"])
def dataset(request, tmp_path):
    return write_mds(tmp_path / "ds", DOCUMENTS, compression=request.param)


@pytest.fixture
def raw(tmp_path):
    return write_manifest(write_mds(tmp_path / "ds", DOCUMENTS))


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as url:
        yield url


@pytest.fixture
def _s3(monkeypatch, endpoint):
    settings = {
        "S3_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def test_http_end_to_end(tmp_path, dataset):
    with serve(tmp_path) as server:
        store = open_store(f"{server.url}/ds/", cache_dir=tmp_path / "cache")
        assert store.num_shards > 3
        assert_same(store)
        assert store.files.origin == f"{server.url}/ds"
        before = server.requests.copy()
        again = open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache")
        assert_same(again)
        new = server.requests - before
        assert set(new) == {"index.json", "manifest.json"}, "only what may have changed is fetched again"
    assert again.fingerprint == store.fingerprint == open_store(dataset, cache_dir=tmp_path / "other").fingerprint


@pytest.mark.usefixtures("_s3")
def test_s3_end_to_end(tmp_path, dataset, endpoint):
    url = upload(dataset, endpoint, f"b{abs(hash(dataset))}", "some/where")
    assert_same(open_store(url, cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("scheme", ["local://", "file://"])
def test_a_url_of_this_machine(tmp_path, raw, scheme):
    assert_same(open_store(f"{scheme}{raw}", cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache" / "lock").exists(), "read where it is"


@pytest.mark.usefixtures("_s3")
def test_s3_busy_and_broken(tmp_path, raw, endpoint, monkeypatch, caplog):
    url = upload(raw, endpoint, "busy", "ds")
    with serve(upstream=endpoint) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", server.url)
        server.faults[SHARD] = [503, 500, None, "truncate"]
        server.faults["index.json"] = ["reset"]
        assert_same(open_store(url, cache_dir=tmp_path / "cache"))
    assert "busy/ds/shard.00001.mds: attempt 1 of 5 failed (HTTP 503, ClientError:" in caplog.text
    assert "busy/ds/index.json: attempt 1 of 5 failed" in caplog.text


@pytest.mark.usefixtures("_s3")
def test_s3_that_stalls_is_given_up_by_our_timeout(tmp_path, raw, endpoint, monkeypatch):
    """boto3 by itself reads a body that stalls five times, each for the whole timeout."""
    url = upload(raw, endpoint, "stalls", "ds")
    with serve(upstream=endpoint) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", server.url)
        server.always[SHARD] = "stall"
        source = RemoteDirectory(url, RetryPolicy(timeout=1, retries=0))
        source.download("index.json", tmp_path / "got")  # makes the client, which takes a while
        begin = time.monotonic()
        with pytest.raises(DataError, match=r"stalls/ds/shard\.00001\.mds .* 1 s"):
            source.download(SHARD, tmp_path / "got")
        assert server.stalled.is_set()
        assert time.monotonic() - begin < 2.5


@pytest.mark.usefixtures("_s3")
def test_s3_refusals_are_final(tmp_path, raw, endpoint, monkeypatch):
    url = upload(raw, endpoint, "refuses", "ds")
    with pytest.raises(DataError, match=r"s3://refuses/nowhere has no index\.json"):
        open_store("s3://refuses/nowhere", cache_dir=tmp_path / "cache")
    with serve(upstream=endpoint) as server:
        monkeypatch.setenv("S3_ENDPOINT_URL", server.url)
        server.always["index.json"] = 403
        with pytest.raises(DataError, match=r"index\.json .*credentials"):
            open_store(url, cache_dir=tmp_path / "cache")
        server.always["index.json"] = 400  # streaming asks without a limit
        with pytest.raises(DataError, match=r"400 .*credentials"):
            open_store(url, cache_dir=tmp_path / "cache")


@pytest.mark.usefixtures("_s3")
def test_s3_without_credentials_reads_a_public_bucket(tmp_path, raw, endpoint, monkeypatch):
    url = upload(raw, endpoint, "public", "ds", acl="public-read")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert_same(open_store(url, cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (500, "HTTP 500 Internal Server Error"),
        (429, "HTTP 429 Too Many Requests"),
        ("reset", "ConnectionError: .*reset by peer"),
        ("truncate", "ChunkedEncodingError: .*IncompleteRead"),
        ("short", r"\d+ bytes arrived, the index says \d+"),
        ("stall", "(ConnectionError|TimeoutError): .*(timed out|nothing arrived)"),
    ],
)
def test_what_passes_is_tried_again(tmp_path, raw, caplog, fault, reason):
    timeout = 1.0 if fault == "stall" else 20.0
    with serve(tmp_path) as server:
        server.faults[SHARD] = [fault, fault]
        store = open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache", download_timeout=timeout)
        assert_same(store)
        assert server.requests[SHARD] == 3
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 2
    for i, message in enumerate(warned):
        assert message.startswith(f"{server.url}/ds/{SHARD}: attempt {i + 1} of 5 failed (")
        assert message.endswith(" s")
    with serve(tmp_path) as server:
        server.always[SHARD] = fault
        store = open_store(
            f"{server.url}/ds", cache_dir=tmp_path / "other", download_timeout=timeout, download_retries=1
        )
        with pytest.raises(ShardError, match=rf"/ds/{SHARD} .* 2 attempts: {reason}"):
            assert_same(store)
        assert server.requests[SHARD] == 2
    left = [path for path in (tmp_path / "other").rglob("*") if ".partial" in path.name or "arriving" in path.name]
    assert left == []


@pytest.mark.parametrize(("status", "words"), [(404, "does not exist; check the URL"), (403, "check the credentials")])
def test_what_will_not_pass_is_not_tried_again(tmp_path, raw, status, words):
    with serve(tmp_path) as server:
        server.always[SHARD] = status
        store = open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache")
        with pytest.raises(ShardError, match=rf"/ds/{SHARD} .*{words}"):
            assert_same(store)
        assert server.requests[SHARD] == 1


def test_nobody_listens(tmp_path):
    with serve(tmp_path) as server:
        url = server.url
    with pytest.raises(DataError, match=r"index\.json .* 2 attempts: ConnectionError: .*refused"):
        open_store(f"{url}/ds", cache_dir=tmp_path / "cache", download_retries=1)


def test_a_missing_index_and_a_damaged_one(tmp_path, raw):
    with serve(tmp_path) as server:
        with pytest.raises(DataError, match=rf"{server.url}/nowhere .*index\.json"):
            open_store(f"{server.url}/nowhere", cache_dir=tmp_path / "cache")
        (raw / "index.json").write_text("<html>log in first</html>")
        with raises(DataError, f"{server.url}/ds/index.json"):
            open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache")


def test_damage_on_the_way_and_at_the_origin(tmp_path, dataset, caplog):
    write_manifest(dataset)
    entry = json.loads((dataset / "index.json").read_text())["shards"][1]
    name = (entry["zip_data"] or entry["raw_data"])["basename"]
    with serve(tmp_path) as server:
        server.faults[name] = ["flip"]
        assert_same(open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache"))
        assert f"{server.url}/ds/{name} is damaged (xxh64 differs" in caplog.text
        server.always[name] = "flip"
        store = open_store(f"{server.url}/ds", cache_dir=tmp_path / "other")
        message = rf"^{server.url}/ds/{name} .*downloaded twice"
        with pytest.raises(ShardError, match=message):
            assert_same(store)


def read_all_but_corrupt(store) -> int:
    """Read an epoch with ``skip_corrupt``; return the tokens that were lost."""
    loader = make_loader(store, seq_len=512, global_packs=2, pad_id=257, epochs=1, prefetch_steps=1, skip_corrupt=True)
    for _ in loader:
        pass
    return loader.lost_tokens


@pytest.mark.parametrize("damage", [404, "flip", "truncated", "not a shard"])
def test_skip_corrupt_skips_what_is_damaged_at_the_origin(tmp_path, dataset, caplog, damage):
    write_manifest(dataset)
    entry = json.loads((dataset / "index.json").read_text())["shards"][1]
    name = (entry["zip_data"] or entry["raw_data"])["basename"]
    with serve(tmp_path) as server:
        if damage == "truncated":
            os.truncate(dataset / name, 100)
        elif damage == "not a shard":
            (dataset / name).write_bytes(bytes((dataset / name).stat().st_size))
            index = (dataset / "index.json").read_text()
            hashes = {found["hashes"]["xxh64"] for found in (entry["zip_data"], entry["raw_data"]) if found}
            for found in hashes:
                index = index.replace(f'"xxh64": "{found}"', "")
            (dataset / "index.json").write_text(index)
        else:
            server.always[name] = damage
        store = open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache", download_retries=1)
        assert read_all_but_corrupt(store) >= store.num_tokens(1)
        assert [r.message for r in caplog.records if "skipped a shard" in r.message and name[:15] in r.message]
        with pytest.raises(CorruptShardError, match=r"shard\.00001\.mds"):
            store.read(1, 0, 0, 1)


@pytest.mark.parametrize("fault", [500, 403, "reset", "truncate"])
def test_skip_corrupt_does_not_hide_a_bad_network(tmp_path, dataset, fault):
    write_manifest(dataset)
    with serve(tmp_path) as server:
        for shard in dataset.glob("shard*"):
            server.always[shard.name] = fault
        store = open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache", download_retries=1)
        with pytest.raises(ShardError, match=r"shard\.0000\d\.mds.* cannot be downloaded") as caught:
            read_all_but_corrupt(store)
        assert not isinstance(caught.value, CorruptShardError)


def test_skip_corrupt_does_not_hide_a_bad_cache(tmp_path):
    path = write_manifest(write_mds(tmp_path / "ds", DOCUMENTS, compression="zstd"))
    (tmp_path / "file").touch()
    store = open_store(path, cache_dir=tmp_path / "file" / "cache")
    with pytest.raises(ShardError, match="cache_dir"):
        read_all_but_corrupt(store)


def test_skip_corrupt_does_not_hide_a_dataset_that_is_gone(tmp_path, raw):
    store = open_store(raw, cache_dir=tmp_path / "cache")
    raw.rename(tmp_path / "unmounted")
    with pytest.raises(ShardError, match=rf"{raw} is gone"):
        read_all_but_corrupt(store)


def test_lengths_come_with_the_manifest_or_from_every_shard(tmp_path, raw):
    with serve(tmp_path) as server:
        open_store(f"{server.url}/ds", cache_dir=tmp_path / "lazy")
        assert set(server.requests) == {"index.json", "manifest.json", "lengths.npy"}
        (raw / "manifest.json").unlink()
        store = open_store(f"{server.url}/ds", cache_dir=tmp_path / "cache")
        shards = [name for name in server.requests if name.startswith("shard")]
        assert [server.requests[name] for name in shards] == [1] * store.num_shards
        (kept,) = (tmp_path / "cache").glob("lengths-*.npy")
        assert kept.read_bytes() == pack_lengths(np.concatenate([store.lengths(s) for s in range(store.num_shards)]))


@pytest.mark.parametrize("login", ["me:pé", "me:пароль:€", "token:", "me:a b"])
def test_logins_are_sent_as_their_bytes(tmp_path, raw, login):
    name, _, password = login.partition(":")
    with serve(tmp_path) as server:
        user = f"{name}:{quote(password, safe='')}".removesuffix(":")
        open_store(server.url.replace("://", f"://{user}@") + "/ds", cache_dir=tmp_path / "cache")
        assert set(server.logins) == {f"Basic {base64.b64encode(login.encode()).decode()}"}


def test_secrets_of_a_url_are_used_and_not_shown(tmp_path, raw, caplog):
    with serve(tmp_path) as server:
        server.faults["index.json"] = ["reset"]
        url = server.url.replace("://", "://me:hidden@") + "/ds?signature=secret"
        store = open_store(url, cache_dir=tmp_path / "cache")
        assert_same(store)
        assert set(server.queries) == {"signature=secret"}
    with pytest.raises(DataError) as caught:
        open_store(url, cache_dir=tmp_path / "other", download_retries=1)
    assert "secret" not in caplog.text + str(caught.value)
    assert "hidden" not in caplog.text + str(caught.value)


def test_hugging_face(tmp_path):
    """huggingface_hub reads its endpoint when it is imported, so in a process of its own."""
    write_mds(tmp_path / "datasets" / "org" / "name" / "resolve" / "main" / "sub", DOCUMENTS)
    script = (
        "from statex_dist.data.formats import open_store; from tests.data.synthetic import all_documents;"
        f"print(len(all_documents(open_store('hf://datasets/org/name/sub', cache_dir={str(tmp_path / 'cache')!r}))))"
    )
    with serve(tmp_path) as server:
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == str(len(DOCUMENTS)), done.stderr
        assert server.requests[SHARD] == 1


def test_urls():
    assert split_url("/data/x") is None
    assert split_url("relative/x:y") is None
    assert split_url("s3://bucket/x") == ("s3", "s3://bucket/x")
    assert split_url("s3:/bucket/x") == ("s3", "s3://bucket/x"), "what a Path makes of it"
    assert split_url("dbfs:/Volumes/x") == ("dbfs", "dbfs:/Volumes/x")
    assert split_url("file:/x") == ("file", "file:///x")
    with raises(ConfigError, "ftp", "http", "https", "s3", "gs"):
        split_url("ftp://host/x")


def test_options_out_of_range(tmp_path):
    with pytest.raises(ConfigError, match="download_retries -1 is negative"):
        open_store("http://x/y", download_retries=-1)
    with pytest.raises(ConfigError, match="download_timeout 0 s"):
        open_store("http://x/y", download_timeout=0)


@pytest.mark.parametrize(
    ("url", "modules", "package"),
    [
        ("s3://b/x", ("boto3", "boto3.s3.transfer", "boto3.session"), r"'statex-dist\[s3\]'"),
        ("gs://b/x", ("google.cloud", "google.cloud.storage"), r"'statex-dist\[gs\]'"),
        ("azure://b/x", ("azure", "azure.storage.blob"), r"'statex-dist\[azure\]'"),
        ("oci://b/x", ("oci",), r"'statex-dist\[oci\]'"),
        ("sftp://b/x", ("paramiko",), r"'statex-dist\[sftp\]'"),
        ("dbfs:/Volumes/x", ("databricks", "databricks.sdk"), "databricks-sdk"),
    ],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, url, modules, package):
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        open_store(url, cache_dir=tmp_path / "cache")


def test_the_schemes_are_streamings():
    from statex_dist.data.storage.mds import load_streaming

    known = load_streaming().storage.download.DOWNLOADER_MAPPINGS
    assert {name.removesuffix("-uc") for name in known if name} == set(PACKAGES)


@pytest.mark.usefixtures("_s3")
def test_waits_grow_and_an_object_is_replaced_whole(tmp_path, raw):
    with serve(tmp_path) as server:
        source = RemoteDirectory(f"{server.url}/ds", RetryPolicy(retries=3, first_wait=0.1))
        server.faults["index.json"] = [500, 500, 500]
        begin = time.monotonic()
        source.download("index.json", tmp_path / "got")
        assert 0.7 <= time.monotonic() - begin < 2
        assert (tmp_path / "got").read_bytes() == (raw / "index.json").read_bytes()
        with pytest.raises(MissingObjectError):
            source.download("nothing", tmp_path / "got")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ds", "got"]
