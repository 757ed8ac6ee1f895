"""Hosts of a hostfile (``name slots=N`` a line): which of them answer, and how many ranks each of them runs."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from statex_dist.errors import ConfigError, shown

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_SECONDS}")
_LINE = re.compile(r"(\S+)[ \t]+slots=(\d+)", flags=re.ASCII)
# Names alone: ssh reads a leading "-" as an option, and pdsh reads commas and brackets as lists.
_NAME = re.compile(r"(?:[\w.-]+@)?[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", flags=re.ASCII)
_MAX_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Host:
    """A machine, and how many ranks it can run."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a hostfile, in order.

    Raises:
        ConfigError: It cannot be read, is empty, or a line is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {error}; save it as UTF-8") from None
    hosts: list[Host] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        try:
            host = _host(text)
            if (before := seen.setdefault(host.name.lower(), number)) != number:
                raise ConfigError(f"{host.name} is in line {before} too; give it all slots at once")
        except ConfigError as error:
            raise ConfigError(f"--hostfile {path}, line {number}: {error}") from None
        hosts.append(host)
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host; write a line 'name slots=N' for each")
    return hosts


def _host(text: str) -> Host:
    """Return the host of a line without comments."""
    if (match := _LINE.fullmatch(text)) is None:
        raise ConfigError(f"{shown(text)} is not of the form 'name slots=N'")
    name, slots = match[1], match[2]
    if name.count(":") > 1:
        raise ConfigError(f"{name} is an IPv6 address, which pdsh cannot take; give a name, in /etc/hosts or DNS")
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"{shown(name)} is not a host name; allowed are letters, digits and . _ - (one host a line)")
    if len(slots) > 4 or not 1 <= int(slots) <= _MAX_SLOTS:
        raise ConfigError(f"slots={slots} of {name}: give the ranks that it can run, from 1 to {_MAX_SLOTS}")
    return Host(name, int(slots))


def run_on(host: str, command: str, *, seconds: float) -> bool:
    """Run a shell command over ssh and return whether it succeeded in time."""
    try:
        done = subprocess.run(
            [*_SSH, host, command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def run_on_all(hosts: Sequence[Host], command: str, *, seconds: float) -> list[Host]:
    """Run a shell command on all hosts at once and return those where it succeeded in time."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        done = list(pool.map(lambda host: run_on(host.name, command, seconds=seconds), hosts))
    return [host for host, succeeded in zip(hosts, done, strict=True) if succeeded]


def answering(hosts: Sequence[Host]) -> list[Host]:
    """Return the hosts that answer over ssh within a few seconds."""
    found = run_on_all(hosts, "true", seconds=2 * ANSWER_SECONDS)
    if missing := [host.name for host in hosts if host not in found]:
        logger.warning("%s: no answer over ssh within %d s", ", ".join(missing), 2 * ANSWER_SECONDS)
    return found


def fill(hosts: Sequence[Host], *, group: int, most: int) -> list[Host]:
    """Return the hosts that a job uses, in order, with the slots that it takes of each.

    Hosts are filled one after another, so what the job does not need are whole hosts: spares for one that is lost. A
    context group lies within a host, because its ranks exchange states in every layer; slots beyond a multiple of the
    group's size stay idle. Only where no host has slots enough for a group do groups take several hosts.

    Args:
        hosts: What is available.
        group: Ranks of a context group.
        most: Largest number of groups that have something to do.
    """
    inside = any(host.slots >= group for host in hosts)
    capacity = [host.slots // group * group if inside else host.slots for host in hosts]
    left = min(sum(capacity) // group, most) * group
    used = []
    for host, slots in zip(hosts, capacity, strict=True):
        if taken := min(slots, left):
            used.append(replace(host, slots=taken))
            left -= taken
    return used


def hostfile_text(hosts: Sequence[Host]) -> str:
    """Return the contents of a hostfile."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
