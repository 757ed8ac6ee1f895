"""Hosts of a hostfile (``name slots=N`` a line): which of them answer, and how many ranks each of them gets."""

from __future__ import annotations

import logging
import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from statex_dist.errors import ConfigError

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_SECONDS}")
_LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)", flags=re.ASCII)


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
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path} cannot be read: {error}") from None
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        if (match := _LINE.fullmatch(text)) is None:
            raise ConfigError(f"--hostfile {path}, line {number}: {text!r} is not of the form 'name slots=N'")
        if match[1] in {host.name for host in hosts}:
            raise ConfigError(f"--hostfile {path}, line {number}: {match[1]} is there twice; give it all slots at once")
        hosts.append(Host(match[1], int(match[2])))
    if not hosts:
        raise ConfigError(f"--hostfile {path} names no host")
    return hosts


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


def spread(hosts: Sequence[Host], ranks: int) -> list[Host]:
    """Return the hosts with the slots that are used when ``ranks`` are dealt out one after another to each in turn."""
    assert 0 < ranks <= sum(host.slots for host in hosts)
    used = [0] * len(hosts)
    while ranks:
        for index, host in enumerate(hosts):
            if ranks and used[index] < host.slots:
                used[index] += 1
                ranks -= 1
    return [replace(host, slots=count) for host, count in zip(hosts, used, strict=True) if count]


def hostfile_text(hosts: Sequence[Host]) -> str:
    """Return the contents of a hostfile."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)
