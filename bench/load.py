"""Load generators: one call offers one load to one subject and returns what one cell of the raw file holds.

Closed loop (wrk) answers how much CPU a request costs and how many fit; its latencies suffer from coordinated omission
and are kept only as a hint. Latency is asked of `bench.openloop`, which sends at planned times.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bench.figures import Row
from bench.machine import Groups, spawn
from bench.subjects import Subject
from meshbpf.demo import plumbing

REPORT = Path(__file__).with_name("report.lua")
_GRACE = 30


class Load:
    """Runs cells. The generator lives in the subject's attached cgroup and on the client's side of the layout."""

    def __init__(self, groups: Groups, cpus: set[int] | None) -> None:
        self.groups, self.cpus = groups, cpus
        self.plain = groups.make("clients")

    def cell(self, subject: Subject, row: Row, seconds: float, rate: float | None = None) -> dict[str, Any]:
        """One measurement. CPU is read around the generator's whole life, which is equal for all subjects."""
        command = _openloop(subject, row, seconds, rate) if rate else _wrk(subject, row, seconds)
        _forget(subject.access_log)
        before = self.groups.clock()
        with nullcontext() if subject.namespace is None else plumbing.inside(subject.namespace):
            child = spawn(command, subject.client_group or self.plain, self.cpus)
        try:
            out, err = child.communicate(timeout=seconds + _GRACE)
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{subject.name}: the load generator hangs in row {row.name}") from error
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        after = self.groups.clock()
        lines = [line for line in out.splitlines() if line.startswith("{")]
        if child.returncode != 0 or not lines:
            raise RuntimeError(f"{subject.name}: load generator ended with {child.returncode}: {(err or out).strip()}")
        found = dict(json.loads(lines[-1]))
        # wrk counts an answer with a bad status as a request, too; only good answers are completed requests.
        found["requests"] -= found.get("status", 0)
        found.setdefault("errors", sum(found.pop(k, 0) for k in ("connect", "read", "write", "status", "timeout")))
        if found["requests"] <= found["errors"]:
            raise RuntimeError(f"{subject.name}: hardly a good answer in row {row.name}: {found}")
        busy, ours = after.machine - before.machine, after.ours - before.ours
        found["rps"] = found["requests"] / found["seconds"]
        served = int(found.get("offered") or found["requests"])  # the constant-rate client does not count its warm-up
        found["cpu_us"] = busy * 1e6 / served
        found["own_cpu_us"] = ours * 1e6 / served  # exact, without the kernel's nameless work
        # What ran beside us: helpers, cron, a neighbour's test. Kernel threads working for us are in here as well.
        found["foreign_share"] = max(0.0, 1 - ours / busy) if busy else 0.0
        found["log_bytes"] = _size(subject.access_log) / served
        return found


def _wrk(subject: Subject, row: Row, seconds: float) -> list[str]:
    # wrk takes whole seconds only.
    command = ["wrk", "-t1", f"-c{row.connections}", f"-d{max(1, round(seconds))}s", "-s", str(REPORT)]
    if row.close:
        command += ["-H", "Connection: close"]
    return [*command, f"http://{subject.address}{row.path}"]


def _openloop(subject: Subject, row: Row, seconds: float, rate: float | None) -> list[str]:
    script = Path(__file__).with_name("openloop.py")  # by path: it needs nothing of this package
    return [
        sys.executable, "-I", str(script), subject.address, row.path,
        "--rate", f"{rate:.1f}", "--connections", str(row.connections), "--seconds", f"{seconds:.2f}",
    ]  # fmt: skip


def _forget(log: Path | None) -> None:
    """Empty the access log before a cell: tmpfs is memory, and the size afterwards proves that logging was on."""
    if log is not None and log.exists():
        with log.open("r+") as file:
            file.truncate(0)


def _size(log: Path | None) -> int:
    # Blocks, not length: a writer without O_APPEND leaves a hole where the truncated part was.
    return log.stat().st_blocks * 512 if log is not None and log.exists() else 0
