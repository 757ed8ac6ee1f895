"""Two hosts on one machine: a network namespace each, a cable between them, and an ssh server on either.

The hosts have a network stack, a host name, processes and ``/etc/ssh`` of their own, and share the file system, as the
nodes of a cluster do. Killing a host's first process ends everything that runs on it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
COMMANDS = ("ip", "unshare")
OF_SSH = ("ssh", "ssh-keygen", "pdsh")
INTERFACE = "eth0"
_START_SECONDS = 20.0

_SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
StrictModes no
PidFile none
"""
# The two lines on servers that do not answer are those of docs/cluster/hostfile.md.
_SSH_CONFIG = """
Host *
    IdentityFile /etc/ssh/user_key
    StrictHostKeyChecking accept-new
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ServerAliveInterval 5
    ServerAliveCountMax 2
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """One host: its name, also of its network namespace, and its address."""

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """Return ``command`` as it is started on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def boot(self, *command: str) -> list[str]:
        """Return ``command`` as this host's first process: what it starts ends with it, as if the power failed."""
        first_process = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts", "sh", "-c"]
        return self.command(*first_process, f'hostname {self.name} && exec "$@"', "sh", *command)

    def set_link(self, state: str) -> None:
        """Plug the cable in (``up``) or pull it out (``down``)."""
        _run("ip", "-n", self.name, "link", "set", INTERFACE, state)


def missing(*, ssh: bool = True) -> str:
    """Return what this machine lacks for two hosts, in words; empty if it has all."""
    lacking = [command for command in COMMANDS + OF_SSH * ssh if shutil.which(command) is None]
    lacking += ["sshd"] if ssh and not SSHD else []
    if lacking:
        return f"needs {', '.join(lacking)}"
    probe = f"statex-probe-{os.getpid()}"
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "needs the right to make network namespaces (root with CAP_NET_ADMIN and CAP_SYS_ADMIN)"
    _run("ip", "netns", "delete", probe)
    return ""


@contextmanager
def two_hosts(directory: Path, *, ssh: bool = True) -> Iterator[tuple[Host, Host]]:
    """Bring up two hosts that reach each other; whatever happens, nothing of them is left.

    Args:
        directory: For the keys and the servers' logs.
        ssh: Whether they have ssh servers.
    """
    hosts = tuple(Host(name=f"sx{os.getpid()}{letter}", address=f"10.77.0.{i + 1}") for i, letter in enumerate("ab"))
    first, second = hosts
    keys = [directory / name for name in ("user_key", "host_key")]
    for key in keys * ssh:
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
    with ExitStack() as stack:
        for host in hosts:
            _run("ip", "netns", "add", host.name)
            stack.callback(_run, "ip", "netns", "delete", host.name)
            # `ip netns exec` mounts what lies here over /etc.
            etc = Path("/etc/netns") / host.name
            stack.callback(shutil.rmtree, etc, ignore_errors=True)
            _fill_etc(etc, hosts, keys * ssh)
            _run("ip", "-n", host.name, "link", "set", "lo", "up")
        ends = ("netns", first.name, "type", "veth", "peer", "name", INTERFACE, "netns", second.name)
        _run("ip", "link", "add", INTERFACE, *ends)
        for host in hosts:
            _run("ip", "-n", host.name, "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.set_link("up")
        for host in hosts * ssh:
            stack.enter_context(_ssh_server(host, directory / f"{host.name}.log"))
        for host in hosts * ssh:
            _wait_for(first, host, directory / f"{host.name}.log")
        yield first, second


def _fill_etc(etc: Path, hosts: tuple[Host, ...], keys: list[Path]) -> None:
    ssh = etc / "ssh"
    ssh.mkdir(parents=True)
    names = "".join(f"{each.address} {each.name}\n" for each in hosts)
    (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}", encoding="utf-8")
    if not keys:
        return
    for key in keys:
        shutil.copy(key, ssh)
    shutil.copy(keys[0].with_suffix(".pub"), ssh / "authorized_keys")
    (ssh / "sshd_config").write_text(_SSHD_CONFIG, encoding="utf-8")
    (ssh / "ssh_config").write_text(_SSH_CONFIG, encoding="utf-8")


@contextmanager
def _ssh_server(host: Host, log: Path) -> Iterator[None]:
    assert SSHD is not None
    Path("/run/sshd").mkdir(exist_ok=True)  # it insists on this directory
    with log.open("wb") as output:
        server = subprocess.Popen(host.boot(SSHD, "-D", "-e"), stdout=output, stderr=output)
    try:
        yield
    finally:
        server.kill()
        server.wait()


def _wait_for(source: Host, target: Host, log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        # The name is checked too, because the tests need hosts with names of their own.
        answer = subprocess.run(source.command("ssh", target.name, "hostname"), capture_output=True, text=True)
        if answer.stdout.strip() == target.name:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(f"no ssh to {target.name}: {answer.stderr}\n{log.read_text(encoding='utf-8')}")
        time.sleep(0.1)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
