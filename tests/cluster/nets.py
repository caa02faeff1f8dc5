"""Several machines on one: network namespaces on a bridge, each with an address and a /tmp.

The bridge lies in a namespace too, so no firewall of the machine's own sees what goes over it, and
whoever is outside, as these tests are, has an address on it like a user's laptop.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lib.line.layout import PROJECT_ROOT

SERVERS, OUTSIDE = 4, 254
"""Last numbers of the addresses of what is no node: the servers, and these tests."""
_KILL_S = 20.0


class Machine:
    """A namespace with an address. What shares the disk with the others is not its /tmp."""

    def __init__(self, namespace: str, ip: str, folder: Path) -> None:
        self.namespace = namespace
        self.ip = ip
        self._folder = folder
        self._num_boots = 0
        self._started: list[subprocess.Popen[bytes]] = []
        self.boot()

    def boot(self) -> None:
        """Begin with an empty /tmp, as after a loss of power."""
        self._num_boots += 1
        self._tmp = self._folder / f"tmp-{self._num_boots}"
        self._tmp.mkdir(parents=True)
        self._tmp.chmod(0o1777)

    def start(
        self, command: Sequence[str], env: Mapping[str, str], log: str
    ) -> subprocess.Popen[bytes]:
        """Start a process here; its output goes to `log` in the machine's folder."""
        with self.log(log).open("ab") as output:
            process = subprocess.Popen(
                self._inside(command),
                cwd=PROJECT_ROOT,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, command: Sequence[str], env: Mapping[str, str]) -> str:
        """Run a command here to its end and return its output; fail with that if it fails."""
        done = subprocess.run(
            self._inside(command),
            cwd=PROJECT_ROOT,
            env=dict(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}"
        return done.stdout

    def log(self, name: str) -> Path:
        """Return where the output of a process goes."""
        return self._folder / f"{name}.log"

    def pids(self) -> list[int]:
        """Return every process that runs here, whoever its parent is."""
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]

    def kill(self) -> int:
        """End all that runs here with -9; return how many processes that were."""
        ended: set[int] = set()
        deadline = time.monotonic() + _KILL_S
        while pids := self.pids():
            assert time.monotonic() < deadline, f"{self.namespace}: {pids} do not end"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended.update(pids)
            time.sleep(0.02)
        for process in self._started:
            process.wait()
        self._started.clear()
        return len(ended)

    def _inside(self, command: Sequence[str]) -> list[str]:
        # `ip netns exec` has a mount namespace of its own: nobody else sees what is mounted in it.
        tmp = shlex.quote(str(self._tmp))
        steps = []
        for path in (PROJECT_ROOT, Path(sys.prefix), Path(sys.base_prefix)):
            # A checkout or environment below the machine's own /tmp stays to be seen.
            if path.is_relative_to("/tmp"):
                place = shlex.quote(f"{self._tmp}/{path.relative_to('/tmp')}")
                steps += [f"mkdir -p {place}", f"mount --bind {shlex.quote(str(path))} {place}"]
        steps += [f"mount --rbind {tmp} /tmp", 'exec "$@"']
        shell = ["sh", "-c", " && ".join(steps), "sh"]
        return ["ip", "netns", "exec", self.namespace, *shell, *command]


@contextlib.contextmanager
def machines(folder: Path, num_nodes: int) -> Iterator[tuple[list[Machine], Machine]]:
    """Yield the nodes, .1 and on, and the machine of the servers; at the end all is gone."""
    tag, subnet = f"rl{os.getpid()}", _free_subnet()
    hub = f"{tag}-s"
    made: list[Machine] = []
    namespaces = [f"{tag}-{number}" for number in range(1, num_nodes + 1)]
    try:
        for namespace in (hub, *namespaces):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", hub, "link", "add", "br0", "type", "bridge")
        ip("-n", hub, "addr", "add", f"{subnet}.{SERVERS}/24", "dev", "br0")
        ip("-n", hub, "link", "set", "br0", "up")
        for number, namespace in enumerate(namespaces, start=1):
            _plug(hub, f"v{number}", "eth0", namespace)
            ip("-n", namespace, "addr", "add", f"{subnet}.{number}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
            # It leads nowhere, but tells whoever asks which address is its own.
            ip("-n", namespace, "route", "add", "default", "via", f"{subnet}.{OUTSIDE}")
            made.append(Machine(namespace, f"{subnet}.{number}", folder / f"node-{number}"))
        _plug(hub, f"v{OUTSIDE}", tag, str(os.getpid()))
        ip("addr", "add", f"{subnet}.{OUTSIDE}/24", "dev", tag)
        ip("link", "set", tag, "up")
        servers = Machine(hub, f"{subnet}.{SERVERS}", folder / "servers")
        made.append(servers)
        yield made[:-1], servers
    finally:
        for machine in made:
            machine.kill()
        # What was not made yet is not there to be taken away.
        with contextlib.suppress(RuntimeError):
            ip("link", "del", tag)
        for namespace in (hub, *namespaces):
            with contextlib.suppress(RuntimeError):
                ip("netns", "del", namespace)


def why_not() -> str | None:
    """Return why there can be no such machines here, None if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root: run as root, or with sudo"
    name = f"rl{os.getpid()}-try"
    try:
        ip("netns", "add", name)
        try:
            ip("netns", "exec", name, "true")
        finally:
            ip("netns", "del", name)
    except RuntimeError as error:
        return f"this machine lets nobody make network namespaces ({error})"
    return None


def ip(*arguments: str) -> str:
    """Run `ip` and return what it says."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _plug(hub: str, end: str, other_end: str, where: str) -> None:
    """Lay a cable from the bridge; `where` is a namespace, or a process in one."""
    peer = ["peer", "name", other_end, "netns", where]
    ip("-n", hub, "link", "add", end, "type", "veth", *peer)
    ip("-n", hub, "link", "set", end, "master", "br0", "up")


def _free_subnet() -> str:
    taken = ip("-o", "-4", "addr") + ip("-4", "route")
    return next(
        subnet
        for subnet in (f"10.77.{number}" for number in range(100))
        if f" {subnet}." not in f" {taken}"
    )
