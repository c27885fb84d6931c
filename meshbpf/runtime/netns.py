"""Network namespaces: entering one for the length of a system call, and which ones the attached cgroups' processes use.

A process is in one namespace per thread; everything here is synchronous and comes back before it returns, so that no
other code of the thread ever runs inside somebody else's namespace.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from meshbpf.errors import DataplaneError, EnvironmentLack

CLONE_NEWNET = 0x40000000
_libc = ct.CDLL(None, use_errno=True)


class Own:
    """This process's own namespace, opened once."""

    _fd = -1

    @classmethod
    def fd(cls) -> int:
        if cls._fd < 0:
            cls._fd = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        return cls._fd


def _enter(fd: int) -> None:
    if _libc.setns(fd, CLONE_NEWNET) != 0:
        number = ct.get_errno()
        if number == errno.EPERM:
            raise EnvironmentLack(
                "may not enter the network namespace of a caller",
                "grant CAP_SYS_ADMIN and CAP_SYS_PTRACE, or run the callers in the agent's namespace",
            )
        raise DataplaneError(f"cannot enter a network namespace: {os.strerror(number)}")


@contextmanager
def inside(fd: int) -> Iterator[None]:
    """Run the block's system calls in the namespace `fd` names. No await inside. Our own needs no capability."""
    home = Own.fd()
    if identity(fd) == identity(home):
        yield
        return
    _enter(fd)
    try:
        yield
    finally:
        _enter(home)


def identity(fd: int) -> tuple[int, int]:
    """What tells namespaces apart: the device and inode behind /proc/PID/ns/net."""
    stat = os.fstat(fd)
    return (stat.st_dev, stat.st_ino)


def processes(cgroups: Sequence[Path]) -> Iterator[int]:
    """Every process in the cgroups and their descendants; those that end meanwhile are left out."""
    for cgroup in cgroups:
        for folder, _below, _files in os.walk(cgroup):
            try:
                text = Path(folder, "cgroup.procs").read_text()
            except OSError:
                continue  # the cgroup was removed under us
            yield from (int(line) for line in text.split() if line != "0")


def opened(path: str) -> int | None:
    """A descriptor of the namespace; None when it, or the process in whose name it was asked for, is gone."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def of_process(pid: int) -> str:
    return f"/proc/{pid}/ns/net"


def living() -> dict[tuple[int, int], str]:
    """identity → a path to it, for every namespace that a process is in or that a mount keeps (`ip netns add`)."""
    paths = [of_process(int(name)) for name in os.listdir("/proc") if name.isdigit()]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[3].startswith("net:["):
            paths.append(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
    found: dict[tuple[int, int], str] = {}
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError:
            continue  # it ended meanwhile
        found.setdefault((stat.st_dev, stat.st_ino), path)
    return found


def in_use(cgroups: Sequence[Path]) -> dict[tuple[int, int], int]:
    """identity → a process in it, for every namespace that the cgroups' processes use."""
    found: dict[tuple[int, int], int] = {}
    for pid in processes(cgroups):
        try:
            stat = os.stat(of_process(pid))
        except OSError:
            continue
        found.setdefault((stat.st_dev, stat.st_ino), pid)
    return found
