"""URL schemes of remote datasets: their packages and credentials, and the meaning of their SDKs' exceptions.

Most SDKs are not installed, and their exceptions have no common base class. This module identifies an exception by its
HTTP status, wherever its SDK keeps that, or by its name.
"""

from __future__ import annotations

import errno
import re
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import requests

from statex_dist.errors import ConfigError, DataError
from statex_dist.redact import MARK, holds_secret

PACKAGES = {
    "s3": "'statex-dist[s3]'",
    "gs": "'statex-dist[gs]'",
    "azure": "'statex-dist[azure]'",
    "azure-dl": "'statex-dist[azure]'",
    "oci": "'statex-dist[oci]'",
    "hf": "huggingface_hub",
    "sftp": "'statex-dist[sftp]'",
    "dbfs": "databricks-sdk",
    "alipan": "alipcs-py",
}
"""What to install for each scheme of streaming's."""
HTTP = ("http", "https")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+-]+):(/+)(.*)", re.DOTALL)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_WORTH_RETRYING = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)
# S3 reports this one with status 400.
_CODES_WORTH_RETRYING = ("RequestTimeout", "RequestTimeoutException")
_NO_ACCESS = (
    *("NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError", "DefaultCredentialsError"),
    *("AuthenticationException", "BadHostKeyException", "ConfigFileNotFound", "PermissionDenied"),
    "Unauthenticated",
)
_MISSING = ("NotFound", "ResourceDoesNotExist")  # Databricks


def is_disk_error(error: BaseException) -> bool:
    """Return whether ``error`` reports that a local file cannot be written."""
    return isinstance(error, OSError) and error.errno in (*_DISK_FULL, errno.EROFS)


def is_disk_full(error: OSError) -> bool:
    """Return whether ``error`` reports that no space is left for a file."""
    return error.errno in _DISK_FULL


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status in an exception of requests, huggingface_hub, botocore, google, azure or oci."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {})
        found = response.get("HTTPStatusCode")
    else:
        places = ((response, "status_code"), (error, "status_code"), (error, "status"), (error, "code"))
        found = next((getattr(thing, name) for thing, name in places if hasattr(thing, name)), None)
    return int(found) if isinstance(found, int) else None


def _code(error: BaseException) -> str:
    """The name that S3 gives to an error, or an empty string."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def root_of(error: BaseException) -> BaseException:
    """Return the cause of ``error`` where ``error`` is a wrapper that reports less, else ``error``."""
    return error.__cause__ or error if _is_offline(error) else error


def _is_offline(error: BaseException) -> bool:
    """Return whether huggingface_hub could not reach its server: it raises a kind of FileNotFoundError then."""
    return type(error).__name__ == "LocalEntryNotFoundError"


def is_missing(error: BaseException) -> bool:
    """Return whether ``error`` reports that the object does not exist."""
    if _is_offline(error):
        return False
    if (status := http_status(error)) is not None:
        return status == HTTPStatus.NOT_FOUND
    return isinstance(error, FileNotFoundError) or type(error).__name__ in _MISSING


def is_worth_retrying(error: BaseException) -> bool:
    """Return whether another attempt may succeed: so for all that is not known to be a mistake or a refusal."""
    if _is_offline(error) or _code(error) in _CODES_WORTH_RETRYING:
        return True
    if (status := http_status(error)) is not None:
        return status in _WORTH_RETRYING or status >= HTTPStatus.INTERNAL_SERVER_ERROR
    if isinstance(error, requests.RequestException):
        return not isinstance(error, ValueError)  # a malformed URL
    mistakes = (DataError, ConfigError, PermissionError, FileNotFoundError, ValueError, TypeError, LookupError)
    if isinstance(error, (*mistakes, AttributeError, AssertionError)) or not isinstance(error, Exception):
        return False
    return not is_disk_error(error) and type(error).__name__ not in _NO_ACCESS


def cure(error: BaseException) -> str:
    """Return what the user can do about ``error``."""
    if http_status(error) in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) or type(error).__name__ in _NO_ACCESS:
        return (
            "check the credentials and that they allow reading and listing (a store that may not list answers 403 for "
            "what does not exist)"
        )
    if is_worth_retrying(error):
        return "check the network, or raise download_retries or download_timeout"
    return "check the URL and the credentials"


def split_url(path: str | Path) -> tuple[str, str] | None:
    """Return the scheme and the whole of a URL, or ``None`` for a path of this machine.

    Raises:
        ConfigError: It is a URL of a scheme that is not known here.
    """
    found = _URL.fullmatch(str(path))
    if found is None:
        return None
    scheme, slashes, rest = found[1].lower(), found[2], found[3]
    if scheme not in (*HTTP, *PACKAGES, "local", "file"):
        allowed = ", ".join([*HTTP, *PACKAGES, "local", "file"])
        raise ConfigError(f"{path}: URLs of {scheme!r} are not known; allowed: {allowed}, or a directory")
    if len(slashes) == 1 and scheme != "dbfs":
        slashes = "//" if scheme not in ("local", "file") else "///"  # a Path folds them
    return scheme, f"{scheme}:{slashes}{rest}"


_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GCS_KEY and GCS_SECRET, or GOOGLE_APPLICATION_CREDENTIALS",
    "azure": "AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "azure-dl": "AZURE_ACCOUNT_NAME and AZURE_ACCOUNT_ACCESS_KEY",
    "oci": "~/.oci/config",
    "hf": "HF_TOKEN",
    "dbfs": "DATABRICKS_HOST and DATABRICKS_TOKEN",
}
"""Where the SDK of each scheme looks for credentials."""


def check_credentials(scheme: str, url: str) -> None:
    """Raise if a URL holds credentials that are not used or cannot be read.

    Raises:
        ConfigError: It was redacted, its scheme takes no credentials, or its password is not percent-encoded.
    """
    if MARK in url:
        raise ConfigError(f"{url} is without its credentials ({MARK}), as run directories show it; give the whole URL")
    if scheme in HTTP or scheme == "sftp":
        parts = urlsplit(url)
        try:
            whole = parts.hostname is not None and (parts.port or True)
        except ValueError:
            whole = False
        if not whole:
            raise ConfigError(
                f"{url}: host and port cannot be told from the rest; write / ? # and @ in a user name or password as "
                "%2F %3F %23 and %40"
            )
    elif holds_secret(url):
        where = f"set {_CREDENTIALS[scheme]}" if scheme in _CREDENTIALS else "use the configuration of its SDK"
        raise ConfigError(f"{url}: URLs of {scheme} take no user, query or fragment; {where} instead")
