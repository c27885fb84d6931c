"""Who listens on a port: for the message of somebody who wanted it. Reads /proc; guesses nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

LISTEN = "0A"


def _inodes(port: int) -> set[str]:
    """Inodes of the sockets that listen on `port`, in the calling thread's network namespace."""
    found = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/thread-self/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue  # no IPv6 here
        for line in lines:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(fields[9])
    return found


def _sockets(pid: int) -> Iterator[str]:
    """The inodes of the process's sockets."""
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(entry.path)
            if target.startswith("socket:["):
                yield target[8:-1]
    except OSError:
        return  # it ended meanwhile, or closed one


def owner(port: int) -> str:
    """`process 1234 (nginx)`, of the namespace the calling thread is in; `another process` when none is to be seen."""
    wanted = _inodes(port)
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if pid != os.getpid() and not wanted.isdisjoint(_sockets(pid)):
            try:
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            return f"process {pid} ({name})"
    return "another process"
