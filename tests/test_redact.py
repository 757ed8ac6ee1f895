"""No part of a secret is left in any text, in whatever form a library prints it."""

import logging
import subprocess
import sys
from urllib.parse import quote

import pytest

from statex_dist import redact as module
from statex_dist.errors import ConfigError, StateXError, bounded_line
from statex_dist.redact import MARK, bare_url, holds_secret, redact, redacted, remember, remember_all


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(module, "_secrets", {})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://user:pa55@host:80/a/b?X-Amz-Signature=5ig#frag", "http://***@host:80/a/b?***"),
        ("HTTPS://user@host/a", "HTTPS://***@host/a"),
        ("https://host/a#access_token=5ig", "https://host/a#***"),
        ("http://user:p%40ss@[::1]:8000/a", "http://***@[::1]:8000/a"),
        ("http://user:p@ss@host/a", "http://***@host/a"),
        ("http://user:p/a#s?s@host/a", "http://***@host/a"),
        ("http:/user:pa55@host/a", "http://***@host/a".replace("//", "/")),
        ("s3://KEY:SECRET@bucket/a?versionId=1", "s3://***@bucket/a?***"),
        ("gs://KEY:SECRET@bucket/a", "gs://***@bucket/a"),
        ("azure://container/a?sv=2024&sig=ab%2Fc", "azure://container/a?***"),
        ("sftp://user:pa55@host:22/a", "sftp://***@host:22/a"),
        ("hf://token@datasets/owner/name/a", "hf://***@datasets/owner/name/a"),
        ("hf://datasets/owner/name@main/a", "hf://datasets/owner/name@main/a"),
        ("postgres://user:pa55@host/a", "postgres://***@host/a"),
        ("http://***@host/a?***", "http://***@host/a?***"),
        ("http://host:80/a", "http://host:80/a"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("/data/a?b#c@d", "/data/a?b#c@d"),
        ("file:///data/a?b", "file:///data/a?b"),
        ("cannot read:/data/a?b", "cannot read:/data/a?b"),
    ],
)
def test_urls(url: str, shown: str):
    assert redact(url) == shown
    assert redact(f"see '{url}', or ({url}): no") == f"see '{shown}', or ({shown}): no"
    assert holds_secret(url) == (url != shown)


def test_an_identity_has_no_mark_and_does_not_follow_the_signature():
    assert bare_url("http://u:p@host:80/a?sig=1#x") == bare_url("http://v:q@host:80/a?sig=2") == "http://host:80/a"
    assert bare_url("http://host:80/a@b") == "http://host:80/a@b"


PASSWORD = "p@s/s:w#r?d&é+ x"
URL = f"https://user:{quote(PASSWORD, safe='')}@host/a?X-Amz-Signature=ab%2Fcd%2B12&v=1&X-Amz-Credential=AK1A%2F2026"


@pytest.mark.parametrize(
    "text",
    [
        "HTTPSConnectionPool(host='host'): Max retries exceeded with url: /a/index.json?X-Amz-Signature=ab%2Fcd%2B12",
        "signature ab/cd+12 expired",
        f"login {PASSWORD} failed",
        f"login {quote(PASSWORD)} failed",
        "Authorization: Basic dXNlcjpwQHMvczp3I3I/ZCbDqSsgeA==",
        "{'Authorization': 'Bearer ab/cd+12'}",
        '"GET /a/index.json?X-Amz-Signature=ab%2Fcd%2B12&v=1 HTTP/1.1" 403',
        "key AK1A/2026",
    ],
)
def test_parts_of_a_known_url_are_found_anywhere(text: str):
    remember(URL)
    clean = redact(text)
    for secret in (PASSWORD, quote(PASSWORD), "ab/cd+12", "ab%2Fcd%2B12", "AK1A", "dXNlcjpw"):
        assert secret not in clean
    assert "***" in clean
    assert "index.json" not in text or "index.json" in clean


def test_words_that_say_nothing_are_not_replaced():
    remember("https://me:pw@host/a?download=true&v=1")
    text = "v=1, true: the download of me cannot be done"
    assert redact(text) == text


def test_unknown_signatures_in_parameters_and_headers():
    assert redact("GET /a?x=1&X-Goog-Signature=00ff&y=2") == "GET /a?x=1&X-Goog-Signature=***&y=2"
    assert redact("authorization: bearer hf_abc") == "authorization: bearer ***"
    assert redact("num_tokens=5, token=6") == "num_tokens=5, token=6"


def test_keys_of_the_environment(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    monkeypatch.setenv("HTTPS_PROXY", "http://user:proxypass@proxy:3128")
    module.remember_environment()
    assert redact("0123456789abcdef wJalrXUtnFEMI proxypass") == "*** *** ***"


def test_nested_values_and_messages():
    assert redacted({"a": [URL], "b": ("x", 1)}) == {"a": ["https://***@host/a?***"], "b": ["x", 1]}
    remember_all({"a": [f"--data.path={URL}"]})
    assert str(ConfigError(f"{URL}: no")) == "https://***@host/a?***: no"
    for length in (10_000, 100_000):
        for place in range(740, 780):  # a cut through the URL shows no part of it
            text = "x" * place + " " + URL + " " + "y" * length
            assert "ab%2F" not in bounded_line(text)
            assert "p%40" not in bounded_line(text)
            assert "cd%2B" not in bounded_line("y" * length + " " + URL + " " + "x" * place)


SCRIPT = f"""
import logging, threading
from statex_dist.log import setup_logging
from statex_dist.redact import remember
setup_logging()
logging.basicConfig(level=logging.DEBUG)
remember({URL!r})
import warnings
class Ignored:
    def __del__(self):
        raise ValueError({URL!r})
Ignored()
warnings.warn({URL!r})
logging.getLogger("urllib3").debug("GET %s", "/a?X-Amz-Signature=ab%2Fcd%2B12")
logging.getLogger("statex_dist").warning("at %s", {URL!r})
try:
    raise OSError({URL!r})
except OSError:
    logging.getLogger("botocore").exception("failed")
def fail():
    raise ValueError({URL!r})
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise KeyError("ab/cd+12")
"""


def test_third_party_records_and_tracebacks_of_a_process():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    for expected in (
        "urllib3",
        "OSError: https://***@host/a?***",
        "in thread",
        "KeyError: '***'",
        "UserWarning: https://***@",
        "Exception ignored in",
        "at https://***@",
    ):
        assert expected in done.stderr
    assert "UserWarning: https://***@" in done.stderr
    assert "Exception ignored in" in done.stderr
    source = [line for line in done.stderr.splitlines() if "File " not in line]
    for secret in ("ab%2Fcd", "ab/cd", "p%40s", PASSWORD):
        assert not [line for line in source if secret in line], secret


SIGNED = (
    "http://h/d?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA5%2F2026&X-Amz-Date=20260101T000000Z"
    "&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Signature=deadbeef01"
)


def test_the_public_parts_of_a_signed_query_are_ordinary_text():
    remember(SIGNED)
    text = "localhost, step 3600 of 13600: AWS4-HMAC-SHA256"
    assert redact(text) == text
    assert redact("deadbeef01 AKIA5/2026") == "*** ***"


@pytest.mark.parametrize("password", ["a", "pw", "abc"])
def test_a_short_password_leaves_other_text(password: str):
    remember(f"http://me:{password}@host/x")
    assert redact(f"http://me:{password}@host/x") == "http://***@host/x"
    for text in ("a step at a time, abc pw", f"name:{password}c"):
        assert redact(text) == text


def test_a_password_that_is_a_word_is_replaced_as_a_word():
    remember("http://me:train@host/x")
    assert redact("'train' training train_batch me%3Atrain") == "'***' training train_batch ***"
    assert redacted({"run_dir": "/x/train", "path": "http://me:train@host/x"}) == {
        "run_dir": "/x/train",
        "path": "http://***@host/x",
    }


@pytest.mark.parametrize("password", ["a.*b+(c[", "pa ss'w\"d", "пароль-1", "pé$$word", "s3cret\\d"])
def test_passwords_of_any_characters(password: str):
    url = f"http://me:{password}@host/x"
    for given in (url, f"--data.path={url}", f"http://me:{quote(password, safe='')}@host/x"):
        remember_all([given])
        assert password not in str(redacted([given]))
        for form in (password, repr(password)[1:-1], ascii(password)[1:-1], quote(password, safe="")):
            assert redact(f"no {form}.") == "no ***."
        module._secrets.clear()


def test_urls_one_behind_another():
    remember_all("http://h/x,http://u:comma-pass@h/y")
    assert redact("comma-pass http://a/x,http://u:p@h/y;s3://k:q@i/z?k=http://e:f@g/") == (
        "*** http://a/x,http://***@h/y;s3://***@i/z?***"
    )


@pytest.mark.parametrize(
    "text",
    ["http://h" + ")" * 200_000 + "x", "http://h/," * 20_000, "a://" * 50_000, "http://h/" + "?token" * 40_000],
    ids=["brackets", "urls", "schemes", "names"],
)
def test_the_cost_of_hostile_text_is_linear(text: str):
    """Quadratic cost would be minutes or hours here."""
    assert len(redact(text)) > 0
    remember_all(text)


def test_many_secrets_cost_no_more_than_their_number():
    remember_all([f"http://user{i}:pAss%2Fw0rd{i * 7919}@host/a?X-Amz-Signature=ab{i}cd%2B12ff" for i in range(1000)])
    assert redact("pAss/w0rd7919, ab999cd+12ff") == "***, ***"


def test_paths_in_variables_named_like_keys(monkeypatch, tmp_path):
    monkeypatch.setenv("SSH_KEY", str(tmp_path))
    monkeypatch.setenv("GCS_KEY", "GOOG1EXYZ")
    monkeypatch.setenv("SOME_TOKEN", "true")
    module.remember_environment()
    assert redact(f"{tmp_path}/a is true: GOOG1EXYZ") == f"{tmp_path}/a is true: ***"


def test_a_record_that_cannot_be_shown_does_not_fail_its_caller():
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    for message, arguments in (("%s", (Broken(),)), ("%(x)s", ({},)), ("%s %s", ("a",))):
        module._CleanRecord("x", logging.ERROR, "f", 1, message, arguments, None)
    record = module._CleanRecord("x", logging.INFO, "f", 1, "%d of %s", (5, "a"), None)
    assert record.args == (5, "a")


def test_a_record_with_wrong_arguments_is_still_logging_s_to_report(caplog):
    from statex_dist.redact import _CleanRecord

    record = _CleanRecord("x", logging.INFO, "f", 1, "%d", ("no number",), None)
    with pytest.raises(TypeError):
        record.getMessage()
    assert isinstance(StateXError("x"), Exception)


def test_a_parameter_without_a_value_is_no_secret():
    remember("http://host/shards?token&key&download")
    assert redact("a token, a key and a download") == "a token, a key and a download"
    remember("http://host/shards?5ig-Without-Name1")
    assert redact("5ig-Without-Name1") == "***"


def test_options_with_the_name_of_a_secret():
    options = {
        "api_key": "k-5e8c1f",
        "eos_token": "</s>",
        "num_key_value_heads": 4,
        "token": "t-77ab42",
        "password": "",
    }
    shown = {**options, "api_key": MARK, "token": MARK}
    assert redacted([{"package:Callback": options}]) == [{"package:Callback": shown}]
    remember_all({"callbacks": [{"package:Callback": options}]})
    assert redact("refused: k-5e8c1f, t-77ab42, </s>") == f"refused: {MARK}, {MARK}, </s>"
