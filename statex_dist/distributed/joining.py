"""How the processes of a job find each other; each failure is one line with advice.

Rank 0 (or torchrun's agent) holds a store at ``MASTER_ADDR:MASTER_PORT``. An elastic torchrun, which starts the ranks
again when a host is lost or comes back, must give each start a store of its own (:data:`OWN_STORE`). Faults there are
checked for before torch is called: its own errors are dozens of lines, from C++ and Python, without the missing rank
and without advice.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from statex_dist.distributed.env import ProcessEnv
from statex_dist.errors import ConfigError, StateXError, reason, shown

logger = logging.getLogger(__name__)

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Environment variable with which torchrun's agents leave the store to rank 0 of each start."""

_NAME_SECONDS = 60.0
"""How long the name of an address may be unknown: a container's name appears when it starts."""
_ANSWER_SECONDS = 30.0
"""How long a listening store may take to answer."""
_TELL_SECONDS = 5.0
_POLL_SECONDS = 0.2
_LISTED = 8
_HOW_TO_CHOOSE = "torchrun --master-port N, deepspeed --master_port N, or MASTER_PORT=N on every rank"


class LostRanksError(StateXError):
    """Ranks that were started did not come, or cannot reach each other: another start may succeed."""


def join_processes(
    env: ProcessEnv,
    backend: str,
    *,
    join_limit: timedelta,
    wait_limit: timedelta,
    facts: Mapping[str, object] | None = None,
) -> None:
    """Join the processes that a launcher started.

    Args:
        env: This process among them.
        backend: Communication backends, in torch's form.
        join_limit: Longest wait for the others to start.
        wait_limit: Longest wait for one that runs.
        facts: What must be equal on all ranks, by name.

    Raises:
        ConfigError: The launcher's variables are wrong, the port is in use, or the ranks' ``facts`` differ.
        LostRanksError: Ranks do not come or cannot be reached.
    """
    with _ended_by_signals():
        store = _meet(env, join_limit, facts or {})
    store.set_timeout(wait_limit)
    check_interface()
    try:
        dist.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size, timeout=wait_limit)
    except (RuntimeError, ValueError) as error:
        raise LostRanksError(
            f"the {env.world_size} ranks have met, but {backend} does not connect them ({reason(error, 120)}); set "
            f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between the hosts (here: {_interfaces()})"
        ) from None


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the process: there is nothing to save yet, and launchers wait for the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminated = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminated)
        signal.signal(signal.SIGINT, interrupted)


def check_interface() -> None:
    """Raise if ``GLOO_SOCKET_IFNAME`` names an interface that is not here.

    Raises:
        ConfigError: It does.
    """
    given = os.environ.get("GLOO_SOCKET_IFNAME", "")
    known = [name for _, name in socket.if_nameindex()]
    if missing := [name for name in given.split(",") if name and name not in known]:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME={given}: {socket.gethostname()} has no interface {', '.join(missing)}; it has "
            f"{_interfaces()}; set one of these, or unset it"
        )


def _interfaces() -> str:
    return ", ".join(name for _, name in socket.if_nameindex())


def _meet(env: ProcessEnv, limit: timedelta, facts: Mapping[str, object]) -> dist.Store:
    """Return the store of the job, once every rank has written to it."""
    address, port = _master(env)
    deadline = time.monotonic() + limit.total_seconds()
    # torchrun's agent has opened the store already, and keeps it when it starts the ranks again.
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
    if agents:
        _require_one_count_of_restarts()
    holds = env.rank == 0 and not agents
    if holds:
        _require_free(port)
    else:
        _reach(env, address, port, deadline)
    store = _open_store(address, port, holds, limit)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if agents else "0"
    mine = dist.PrefixStore(f"statex/{start}", store)
    try:
        _compare(env, mine, facts, f"{address}:{port}", deadline)
        if mine.add(f"joined/{env.rank}", 1) > 1:
            raise ConfigError(
                f"RANK {env.rank} has joined at {address}:{port} already: two processes have this RANK, or two jobs "
                f"have this port; choose another: {_HOW_TO_CHOOSE}"
            )
        _wait_for_all(env, mine, f"{address}:{port}", deadline, limit)
    except RuntimeError as error:
        raise LostRanksError(
            f"rank 0 at {address}:{port} ended before all {env.world_size} ranks had joined "
            f"({reason(error, 120)}); see its output"
        ) from None
    # Connections of an earlier start are in an agent's store too.
    return mine if agents else store


def _require_one_count_of_restarts() -> None:
    """Raise if starts of the ranks cannot be told apart in the store of torchrun's agents.

    Each agent counts its own restarts, and a host that comes back is no restart. An agent that is no longer the first
    would also continue with the store of another one.

    Raises:
        ConfigError: The agents of several hosts share a store, and may start the ranks again.
    """
    hosts, restarts = os.environ.get("GROUP_WORLD_SIZE", "1"), os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if hosts != "1" and restarts != "0":
        raise ConfigError(
            f"torchrun of {hosts} hosts may restart the ranks {restarts} times (--max-restarts) with one store for all "
            f"starts, which would mix them up; set {OWN_STORE}=1 for torchrun on every host and --rdzv-backend c10d, "
            "or --max-restarts 0"
        )


def _open_store(address: str, port: int, holds: bool, limit: timedelta) -> dist.Store:
    """Open the store, or be its client; torch has no time limit for another program at the port."""
    found: list[dist.Store | Exception] = []

    def open_it() -> None:
        try:
            found.append(dist.TCPStore(address, port, None, holds, timeout=limit, wait_for_workers=False))
        except (RuntimeError, ValueError, OSError) as error:
            found.append(error)

    thread = threading.Thread(target=open_it, name="statex-store", daemon=True)
    thread.start()
    thread.join(min(limit.total_seconds(), _ANSWER_SECONDS))
    store = found[0] if found else TimeoutError("no answer")
    if isinstance(store, Exception):
        if holds:
            if found:  # else it listens, and only its connection to itself is not there
                _require_free(port)
            raise LostRanksError(
                f"rank 0 on {socket.gethostname()} cannot reach itself at MASTER_ADDR {shown(address)}, MASTER_PORT "
                f"{port} ({reason(store, 100)}); set MASTER_ADDR to a name or address of this host on all ranks"
            )
        raise LostRanksError(
            f"the program at MASTER_ADDR {shown(address)}, MASTER_PORT {port}, is not rank 0 ({reason(store, 100)}); "
            f"choose another port: {_HOW_TO_CHOOSE}"
        )
    return store


def _master(env: ProcessEnv) -> tuple[str, int]:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {env.world_size}; missing: {' and '.join(missing)}; start the ranks with "
            "torchrun or deepspeed, or set MASTER_ADDR to the host of rank 0 and MASTER_PORT to a free port there"
        )
    port = os.environ["MASTER_PORT"]
    if not (port.isdecimal() and port.isascii() and 0 < int(port) < 1 << 16):
        raise ConfigError(
            f"MASTER_PORT {shown(port)} is not a port; set a number from 1 to 65535, the same on all ranks"
        )
    address = os.environ["MASTER_ADDR"]
    if address.startswith("[") and address.endswith("]"):  # an IPv6 address as URLs have it
        address = address[1:-1]
    return address, int(port)


def _require_free(port: int) -> None:
    """Raise if the store cannot listen at the port."""
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(("", port)).close()
    except PermissionError:
        raise ConfigError(
            f"MASTER_PORT {port} needs the rights of root; choose a port above 1023: {_HOW_TO_CHOOSE}"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"MASTER_PORT {port} is in use on {socket.gethostname()} ({os.strerror(error.errno or 0)}), perhaps by "
            f"another job; choose another: {_HOW_TO_CHOOSE}"
        ) from None


def _reach(env: ProcessEnv, address: str, port: int, deadline: float) -> None:
    """Wait until the address accepts a connection."""
    began, told = time.monotonic(), False
    while True:
        unknown = False
        try:
            socket.create_connection((address, port), timeout=max(min(5.0, deadline - time.monotonic()), 0.1)).close()
            return
        except (socket.gaierror, UnicodeError) as error:
            unknown, why = True, f"the name is not known: {error}"
        except OSError as error:
            why = error.strerror or str(error)
        now = time.monotonic()
        if now > deadline or (unknown and now - began > _NAME_SECONDS):
            raise LostRanksError(
                f"rank {env.rank} on {socket.gethostname()} cannot reach rank 0 at MASTER_ADDR {shown(address)}, "
                f"MASTER_PORT {port}, after {now - began:.0f} s ({why}); set MASTER_ADDR to the host of rank 0, start "
                "that rank too, and open the port"
            )
        if not told and now - began > _TELL_SECONDS:
            told = True
            logger.warning("rank 0 at %s, port %d, does not answer yet (%s); waiting for it", address, port, why)
        time.sleep(_POLL_SECONDS)


def _compare(env: ProcessEnv, store: dist.Store, facts: Mapping[str, object], place: str, deadline: float) -> None:
    """Raise if rank 0 is of another job, or runs with other settings or versions."""
    mine = {"WORLD_SIZE": env.world_size, **facts}
    if env.rank == 0:
        store.set("rank0", json.dumps(mine, default=str))
        return
    _wait_for(store, ["rank0"], deadline)
    if not store.check(["rank0"]):
        raise LostRanksError(f"rank 0 at {place} has written no settings; another program may be at this port")
    theirs, mine = json.loads(store.get("rank0")), json.loads(json.dumps(mine, default=str))
    names = [name for name in {**theirs, **mine} if theirs.get(name) != mine.get(name)]
    if names:
        name = names[0]
        more = f" (and {len(names) - 1} other settings)" if len(names) > 1 else ""
        raise ConfigError(
            f"rank {env.rank} on {socket.gethostname()} has {name} {shown(mine.get(name), 60)}, rank 0 at {place} has "
            f"{shown(theirs.get(name), 60)}{more}; start all ranks alike, or, where two jobs have this port, choose "
            f"another: {_HOW_TO_CHOOSE}"
        )


def _wait_for(store: dist.Store, keys: Sequence[str], deadline: float) -> None:
    """Wait for keys until the deadline; the caller checks whether they have come."""
    while not store.check(list(keys)) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _wait_for_all(env: ProcessEnv, store: dist.Store, place: str, deadline: float, limit: timedelta) -> None:
    keys = [f"joined/{rank}" for rank in range(env.world_size)]
    _wait_for(store, keys, min(deadline, time.monotonic() + _TELL_SECONDS))
    if env.rank == 0 and not store.check(keys):
        logger.warning("waiting for the ranks %s", _missing(store, env.world_size))
    _wait_for(store, keys, deadline)
    if not store.check(keys):
        raise LostRanksError(
            f"of {env.world_size} ranks these did not come to {place} within {limit.total_seconds():.0f} s: "
            f"{_missing(store, env.world_size)}; see their output, start them, or correct WORLD_SIZE"
        )
    # Rank 0 holds the store: it stays until all ranks have seen that the others are here.
    store.add("seen", 1)
    while env.rank == 0 and store.add("seen", 0) < env.world_size and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS / 10)


def _missing(store: dist.Store, world_size: int) -> str:
    ranks = [rank for rank in range(world_size) if not store.check([f"joined/{rank}"])]
    more = f" and {len(ranks) - _LISTED} more" if len(ranks) > _LISTED else ""
    return ", ".join(map(str, ranks[:_LISTED])) + more
