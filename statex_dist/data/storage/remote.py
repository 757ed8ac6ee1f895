"""One object of a remote dataset, downloaded to a file: tried again where that helps, refused at once where not.

``http(s)`` goes through requests, every other scheme through mosaicml-streaming's downloaders. Their SDKs differ in
how long they wait and whether they try again (some wait without a limit). So all of them run under one watch over the
growth of the file and one loop of attempts.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit, urlunsplit

import requests
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

from statex_dist.data.storage.mds import load_streaming
from statex_dist.data.storage.schemes import (
    HTTP,
    PACKAGES,
    check_credentials,
    cure,
    http_status,
    is_disk_error,
    is_missing,
    is_worth_retrying,
    root_of,
    split_url,
)
from statex_dist.errors import ConfigError, DataError, bounded_line
from statex_dist.redact import bare_url, remember

log = logging.getLogger(__name__)

_BLOCK = 1 << 16


class MissingObjectError(DataError):
    """The remote has no object of this name."""


class DamagedObjectError(DataError):
    """The remote's object has another size than it should have: attempt after attempt brought the same one."""


class _WrongSizeError(ConnectionError):
    def __init__(self, found: int, size: int):
        super().__init__(f"{found} bytes arrived, the index says {size}")
        self.found = found


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How hard to try.

    Attributes:
        retries: Attempts after the first one.
        timeout: Seconds without a new byte after which an attempt is given up.
        first_wait: Seconds before the second attempt; doubled for each later one, with up to as much again at random.
        longest_wait: Seconds that no wait exceeds.
    """

    retries: int = 4
    timeout: float = 60.0
    first_wait: float = 1.0
    longest_wait: float = 60.0

    def __post_init__(self) -> None:
        if self.retries < 0:
            raise ConfigError(f"download_retries {self.retries} is negative; give 0 or more")
        if self.timeout <= 0:
            raise ConfigError(f"download_timeout {self.timeout} s is not positive; give seconds, such as 60")


class RemoteDirectory:
    """A directory of objects behind a URL.

    Args:
        url: The directory; a query (a signature) is appended to every object's name.
        policy: How hard to try.

    Attributes:
        origin: The URL without password and query, for messages and as the identity of the dataset.

    Raises:
        ConfigError: The scheme is not known, or mosaicml-streaming is missing.
    """

    def __init__(self, url: str, policy: RetryPolicy):
        split = split_url(url)
        if split is None:
            raise ConfigError(f"{url} is not a URL")
        self._scheme, self._url = split
        self._policy = policy
        remember(self._url)
        check_credentials(self._scheme, self._url)
        self.origin = bare_url(self._url).rstrip("/")
        self._idle: list[Any] = []
        self._pid = os.getpid()
        if self._scheme not in HTTP:
            load_streaming()  # imports torch, which no download's timeout should count

    def download(self, name: str, target: Path, size: int | None = None) -> None:
        """Download an object into ``target``, in an existing directory; on failure nothing is left there.

        Args:
            name: Name of the object in the directory.
            target: The file to make.
            size: Its bytes, if they are known: another size counts as a broken download.

        Raises:
            MissingObjectError: There is no such object.
            DamagedObjectError: It has not ``size`` bytes.
            DataError: It cannot be fetched, after all attempts or because no further one could help.
            ConfigError: A package is missing.
            OSError: The disk is full or not writable.
        """
        url, shown = self._join(name)
        sizes: list[int] = []
        retrying = Retrying(
            stop=stop_after_attempt(self._policy.retries + 1),
            wait=wait_exponential_jitter(
                initial=self._policy.first_wait, max=self._policy.longest_wait, jitter=self._policy.first_wait
            ),
            retry=retry_if_exception(is_worth_retrying),
            before_sleep=partial(self._warn, shown),
            reraise=True,
        )
        try:
            retrying(self._attempt, url, shown, target, size, sizes)
        except (DataError, ConfigError):
            raise
        except Exception as error:
            # Every SDK has exceptions of its own; those that are about this machine's disk are the caller's.
            if is_disk_error(error):
                # The traceback and tenacity's state hold each other, and so all that the callers' frames hold: shards
                # that they map would keep their disk space when it is needed most.
                error.__traceback__ = None
                raise OSError(error.errno, error.strerror) from None  # type: ignore[attr-defined]
            attempts = retrying.statistics.get("attempt_number", 1)
            tried = "" if attempts == 1 else f" in {attempts} attempts"
            message = f"{shown} cannot be downloaded{tried}: {self._reason(error)}"
            # One short answer may be a connection that broke where no length was announced; two alike are the object.
            if isinstance(error, _WrongSizeError) and sizes.count(error.found) > 1:
                raise DamagedObjectError(
                    f"{message}: the remote copy is damaged; restore it or prepare the dataset again"
                ) from error
            raise DataError(f"{message}; {cure(error)}") from error

    def _join(self, name: str) -> tuple[str, str]:
        shown = f"{self.origin}/{name}"
        if self._scheme not in HTTP:
            return f"{self._url.rstrip('/')}/{name}", shown
        parts = urlsplit(self._url)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}")), shown

    def _attempt(self, url: str, shown: str, target: Path, size: int | None, sizes: list[int]) -> None:
        work = Path(tempfile.mkdtemp(dir=target.parent, prefix=".arriving-"))
        try:
            arriving = work / target.name
            get = self._http_get if self._scheme in HTTP else self._cloud_get
            try:
                _watched(lambda: get(url, arriving), work, self._policy.timeout)
            except Exception as error:
                if is_missing(error) and work.is_dir():
                    raise MissingObjectError(f"{shown} does not exist; check the URL") from error
                raise
            if not arriving.exists():
                raise ConnectionError("nothing arrived")
            found = arriving.stat().st_size
            if size is not None and found != size:
                sizes.append(found)
                raise _WrongSizeError(found, size)
            arriving.replace(target)
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def _http_get(self, url: str, target: Path) -> None:
        headers = {"Accept-Encoding": "identity"}  # the index counts the bytes as they are stored
        parts = urlsplit(url)
        user, at, host = parts.netloc.rpartition("@")
        name, _, password = user.partition(":")
        # As bytes, since requests takes text for Latin-1.
        auth: Any = (unquote_to_bytes(name), unquote_to_bytes(password)) if at else None
        url = urlunsplit(parts._replace(netloc=host))
        with requests.get(url, stream=True, timeout=self._policy.timeout, headers=headers, auth=auth) as response:
            response.raise_for_status()
            with target.open("wb") as file:
                for block in response.iter_content(_BLOCK):
                    file.write(block)

    def _cloud_get(self, url: str, target: Path) -> None:
        if self._pid != os.getpid():
            self._idle, self._pid = [], os.getpid()  # a forked process must not share its parent's connections
        try:
            try:
                downloader = self._idle.pop()
            except IndexError:
                downloader = _downloader(self._url)
            try:
                downloader.download(url, str(target), self._policy.timeout)
            except Exception as error:
                if type(error).__name__ != "NoCredentialsError" or self._scheme != "s3":
                    raise
                # A public bucket. (streaming looks for this error where the client is made; boto3 raises it later.)
                downloader._create_s3_client(unsigned=True, timeout=self._policy.timeout)
                downloader.download(url, str(target), self._policy.timeout)
        except ImportError as error:
            package = PACKAGES[self._scheme]
            raise ConfigError(
                f"{self._scheme}:// needs the package {error.name}, which is not installed: pip install {package}"
            ) from error
        self._idle.append(downloader)

    def _warn(self, shown: str, state: RetryCallState) -> None:
        assert state.outcome is not None
        assert state.next_action is not None
        error = state.outcome.exception()
        assert error is not None
        log.warning(
            "%s: attempt %d of %d failed (%s); trying again in %.1f s",
            *(shown, state.attempt_number, self._policy.retries + 1, self._reason(error), state.next_action.sleep),
        )

    def _reason(self, error: BaseException) -> str:
        error = root_of(error)
        if isinstance(error, _WrongSizeError):
            return str(error)
        status = http_status(error)
        if isinstance(error, requests.HTTPError) and status is not None:
            return f"HTTP {status} {error.response.reason}"
        text = str(error).replace(self._url, self.origin)
        return ("" if status is None else f"HTTP {status}, ") + f"{type(error).__name__}: {bounded_line(text, 150)}"


def _watched(work: Callable[[], None], directory: Path, seconds: float) -> None:
    """Do ``work`` in a thread; give up when ``directory`` did not change for ``seconds``.

    The abandoned thread ends with its SDK's own timeout. The files that it still writes do no harm, because the
    directory is removed.
    """
    done = threading.Event()
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="statex-download", daemon=True).start()
    seen, since = -1, time.monotonic()
    while not done.wait(min(1.0, seconds / 10)):
        if (arrived := _size(directory)) != seen:
            seen, since = arrived, time.monotonic()
        elif time.monotonic() - since >= seconds:
            raise TimeoutError(f"nothing arrived for {seconds:g} s (download_timeout)")
    if failed:
        raise failed.pop()


def _size(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            try:
                total += os.stat(os.path.join(folder, name)).st_size  # noqa: PTH116, PTH118 - polled
            except FileNotFoundError:
                continue
    return total


def _downloader(url: str) -> Any:
    """Return streaming's downloader for ``url``."""
    downloader = load_streaming().storage.download.CloudDownloader.get(url)
    if not hasattr(downloader, "_create_s3_client"):
        return downloader
    # streaming 0.13 answers a 400 by making a client without credentials and calling itself. If that client gets a 400
    # too, the recursion has no end.
    create = downloader._create_s3_client
    anonymous = False

    def create_once(unsigned: bool = False, timeout: float = 60.0) -> None:
        nonlocal anonymous
        if unsigned and anonymous:
            raise PermissionError("400 Bad Request, with and without credentials")
        anonymous = anonymous or unsigned
        create(unsigned=unsigned, timeout=timeout)

    downloader._create_s3_client = create_once
    return downloader
