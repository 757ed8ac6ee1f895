"""How many connections the limit of open files allows."""

from __future__ import annotations

import resource
from pathlib import Path

from statex_dist.errors import ConfigError

RESERVE = 16
"""Connections beyond the limit, so that a request for /health or /metrics has a place when the limit is reached."""

ACCEPTS_AT_ONCE = 8
"""Connections that the event loop accepts in one turn. One that is cut gives its descriptor back four turns later."""

DEFAULT_MAX_CONNECTIONS = 1024

_OTHER = 64
"""Files that are opened after the start: the model's, the event loop's, GPU devices."""


def connections_allowed(wanted: int | None) -> int:
    """Return how many connections may be open at a time.

    Args:
        wanted: Of ``--max-connections``, or None for the default or, where that is less, for what the files allow.

    Raises:
        ConfigError: The limit of open files is too small (``RLIMIT_NOFILE``).
    """
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(list(Path("/dev/fd").iterdir())) + _OTHER + RESERVE + 4 * ACCEPTS_AT_ONCE
    allowed = DEFAULT_MAX_CONNECTIONS if files == resource.RLIM_INFINITY else files - needed
    if allowed < 1:
        raise ConfigError(f"the process may open {files} files, serve needs {needed + 1} or more; raise `ulimit -n`")
    if wanted is None:
        return min(DEFAULT_MAX_CONNECTIONS, allowed)
    if wanted > allowed and files != resource.RLIM_INFINITY:
        raise ConfigError(
            f"--max-connections {wanted} needs {wanted + needed} open files, the process may open {files}; "
            f"raise `ulimit -n`, or give at most {allowed}"
        )
    return wanted
