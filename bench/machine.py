"""The machine as the bench uses it: CPU clock, cgroups, ports, CPUs, child processes. No measuring decisions in here.

Every process and cgroup the bench makes hangs below one `meshbpf-bench` cgroup and ends with it; the root cgroup and
processes of others are never touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

GROUP = "meshbpf-bench"
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)
_TICK = os.sysconf("SC_CLK_TCK")

# Layout. The client and the backend share the first CPU, the subject's own processes have the second for themselves:
# - `none` and `direct` have no process on the path, so they become the one-CPU layout: pure datapath cost, without the
#   35-80 us a cross-CPU wake-up takes in a VM, which would drown what a connect hook costs;
# - a proxy gets exactly one CPU, ours and Envoy alike, so requests per second are requests per core;
# - no row depends on where the scheduler happened to put three processes on two cores.
# CPU per request is of the whole machine in any case. `--free` leaves placing to the scheduler, to see that it agrees.
CLIENT_SIDE = 0
SUBJECT_SIDE = 1


def pinned(side: int, free: bool) -> set[int] | None:
    """The CPUs of one side of the layout; None where the machine has too few or pinning is switched off."""
    cpus = sorted(os.sched_getaffinity(0))
    return None if free or len(cpus) < 2 else {cpus[side]}


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds of CPU since boot: of the machine, and of the bench's own processes."""

    machine: float
    ours: float


def busy_seconds(stat: str) -> float:
    """CPU of the whole machine from /proc/stat: user nice system irq softirq. Not idle, not iowait (idle with a
    reason), not steal (another VM's work); guest time is already inside user."""
    user, nice, system, _idle, _iowait, irq, softirq = (int(word) for word in stat.split("\n", 1)[0].split()[1:8])
    return (user + nice + system + irq + softirq) / _TICK


def usage_seconds(cpu_stat: str) -> float:
    """`usage_usec` of a cgroup's cpu.stat: exact, but without what the kernel does in no process's name."""
    return next(int(line.split()[1]) for line in cpu_stat.splitlines() if line.startswith("usage_usec")) / 1e6


def mountpoint() -> Path:
    """The cgroup2 mount; on hybrid machines it is /sys/fs/cgroup/unified."""
    for line in Path("/proc/mounts").read_text().splitlines():
        fields = line.split()
        if fields[2] == "cgroup2":
            return Path(fields[1])
    raise RuntimeError("no cgroup2 is mounted: mount -t cgroup2 none /sys/fs/cgroup/unified")


class Groups:
    """The bench's own cgroup tree; leaves are made by name and removed with everything in them."""

    def __init__(self) -> None:
        self.root = mountpoint() / GROUP
        self.close()  # what a killed predecessor left behind; the caller holds the lock, so it is nobody else's
        self.root.mkdir()

    def make(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(exist_ok=True)
        return path

    def clock(self) -> Clock:
        ours = usage_seconds((self.root / "cpu.stat").read_text())
        return Clock(busy_seconds(Path("/proc/stat").read_text()), ours)

    def usage(self, name: str) -> float:
        return usage_seconds((self.root / name / "cpu.stat").read_text())

    def close(self) -> None:
        if not self.root.exists():
            return
        # Everything in here was started by a bench; by now only children that outlived their parent are left.
        with contextlib.suppress(OSError):
            (self.root / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + 5
        for path in [*sorted(p for p in self.root.rglob("*") if p.is_dir())[::-1], self.root]:
            while path.exists() and time.monotonic() < deadline:
                try:
                    path.rmdir()
                except OSError:
                    time.sleep(0.05)


def steered(queues: Path = Path("/sys/class/net/lo/queues")) -> Path | None:
    """The file that switches receive packet steering on for the loopback, if one does. With it a connection's packets
    are handled on whichever CPU their hash names: the one-CPU layout is none, and a connection costs twice as much.
    """
    for path in sorted(queues.glob("rx-*/rps_cpus")):
        if path.read_text().strip("0,\n"):
            return path
    return None


def program(name: str) -> str:
    """Where a program is; root's PATH may lack the sbin directories. Raises RuntimeError with the remedy."""
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
    if found is None:
        raise RuntimeError(f"{name} is missing: vagrant/provision.sh bench")
    return found


def free_ports(count: int, start: int = 18100) -> list[int]:
    """Loopback ports nobody listens on, below the ephemeral range so that no client of ours can sit on one."""
    found: list[int] = []
    for port in range(start, 32000):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _placed(group: Path | None, cpus: set[int] | None, on_parent_death: int) -> Callable[[], None]:
    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, on_parent_death)
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        if cpus is not None:
            os.sched_setaffinity(0, cpus)

    return prepare


def spawn(
    command: Sequence[str],
    group: Path | None = None,
    cpus: set[int] | None = None,
    log: Path | None = None,
    on_parent_death: int = signal.SIGKILL,
    pipe: bool = False,
) -> subprocess.Popen[str]:
    """Start a child inside `group` and on `cpus`; with `log` its output goes there, else it is piped to us. `pipe`: it
    listens to us on its stdin.
    """
    out = subprocess.PIPE if log is None else log.open("a")
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE if pipe else subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT if log is not None else subprocess.PIPE,
            text=True,
            # The bench has one thread, so code between fork and exec is safe here.
            preexec_fn=_placed(group, cpus, on_parent_death),  # noqa: PLW1509
        )
    finally:
        if not isinstance(out, int):
            out.close()


def stop(child: subprocess.Popen[str], patience: float = 10) -> None:
    """Ask, wait, then insist; only ever our own child."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            child.kill()
    child.wait()


def tail(log: Path, lines: int = 5) -> str:
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-lines:]) if log.exists() else ""
