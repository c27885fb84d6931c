"""The row `memory`: what the agent and its worker hold while ten thousand proxied connections are idle.

Rule: each connection has had one request answered before it idles, as a client's kept connection has. Resident memory
of the processes, so without the sockets' buffers in the kernel, which are the same for any proxy. `python -m
bench.memory HOST COUNT` is the client: it says `idle` when all are, and waits to be ended.
"""

from __future__ import annotations

import resource
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.machine import spawn, stop
from bench.subjects import Mesh

IDLE = 10_000
PATIENCE = 120
Cells = dict[str, dict[str, float]]


def resident(pid: int) -> float:
    """MB (10⁶ bytes)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmRSS:"))


def measure(subject: Mesh, rounds: int) -> Iterator[Cells]:
    """Each round is a fresh start, which is stopped again."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # as a service's would be
    for _ in range(rounds):
        try:
            subject.start()
            yield {"memory": _cell(subject)}
        finally:
            subject.stop()


def _cell(subject: Mesh) -> dict[str, float]:
    assert subject.child is not None
    agent = subject.child.pid
    pids = [int(line) for line in (subject.group / "cgroup.procs").read_text().split()]
    (worker,) = (pid for pid in pids if b"meshbpf.runtime.worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    before = resident(worker)
    client = spawn([sys.executable, "-m", "bench.memory", subject.address, str(IDLE)], subject.client_group)
    try:
        assert client.stdout is not None
        if not select.select([client.stdout], [], [], PATIENCE)[0] or client.stdout.readline() != "idle\n":
            raise RuntimeError(f"{IDLE} idle connections: {stopped(client)}")
        after, open_files = resident(worker), len(list(Path(f"/proc/{worker}/fd").iterdir()))
        if open_files < IDLE:
            raise RuntimeError(f"the worker has only {open_files} files open, so connections went past it")
        return {
            "agent_mb": resident(agent), "worker_mb": after, "worker_before_mb": before,
            "kb_per_connection": 1000 * (after - before) / IDLE, "open_files": open_files,
        }  # fmt: skip
    finally:
        stop(client)


def stopped(client: subprocess.Popen[str]) -> str:
    """Why a client is not idle; ends it."""
    stop(client)
    return client.communicate()[1].strip() or f"not within {PATIENCE} s"


def main() -> None:
    host, count = sys.argv[1], int(sys.argv[2])
    held = []
    for _ in range(count):
        connection = socket.create_connection((host, 80), timeout=PATIENCE)
        held.append(connection)
        connection.sendall(f"GET /small HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = connection.recv(65536)
        while not answer.endswith(b"x" * 1024):
            more = connection.recv(65536)
            if not more:
                raise SystemExit(f"answered {answer[:80]!r}")
            answer += more
    print("idle", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
