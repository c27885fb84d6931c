"""Joins the parts: subjects up, rows measured, raw file written, table printed, everything taken away again.

    python -m bench [--quick] [--subjects none,envoy] [--rows keepalive] [--free]

Exit 0 when every figure holds, 1 when one does not, was not measured, or the run failed; 69 when the machine lacks
something for any run at all. All subjects run side by side for the whole time: starting them for every cell would
measure start-up, and the idle CPU of those waiting, published in the raw file, falls on all cells alike.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from bench import rounds as rounds_module
from bench import scale
from bench.backend import Backend, nginx
from bench.envoy import Envoy
from bench.figures import ALL, ATTACH, FIGURES, ROWS, SCALE, SCALE_SUBJECTS, WIDEST, Row, judge, series
from bench.load import Load
from bench.machine import CLIENT_SIDE, SUBJECT_SIDE, Groups, pinned, steered
from bench.report import markdown
from bench.rounds import Plan, Rounds, Runner, say
from bench.subjects import Attach, Mesh, NoMesh, Subject

RESULTS = Path(__file__).with_name("results")
LOCK = Path("/run/lock/meshbpf-bench.lock")
IDLE_SECONDS = 2
FAILURES = (RuntimeError, OSError, subprocess.SubprocessError)  # what a subject may fail with


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="what meshbpf costs, against none and Envoy")
    quick = os.environ.get("QUICK", "") not in ("", "0")
    parser.add_argument("--quick", action="store_true", default=quick, help="3 short rounds (or QUICK=1)")
    parser.add_argument("--subjects", default=",".join(ALL), help="only these")
    parser.add_argument("--rows", default=",".join([*(row.name for row in ROWS), ATTACH, SCALE]), help="only these")
    parser.add_argument("--rounds", type=int, help="paired rounds per row")
    parser.add_argument("--seconds", type=float, help="seconds per measurement")
    parser.add_argument("--free", action="store_true", help="pin nothing")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the order of subjects")
    return parser.parse_args()


def lacking() -> str:
    """What this machine lacks for any run, with the remedy; empty when nothing."""
    if os.geteuid() != 0:
        return "root is needed for cgroups and BPF: sudo make bench"
    if shutil.which("wrk") is None:
        return "wrk is missing: vagrant/provision.sh bench (Debian package wrk)"
    if nginx() is None:
        return "nginx is missing: vagrant/provision.sh bench (Debian package nginx-light)"
    if steering := steered():
        return f"loopback packets hop to other CPUs and every row would pay for that: echo 0 > {steering}"
    return ""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Two benches at once would measure each other."""
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    with LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError("another bench is running on this machine") from None
        yield


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """The run directory, in tmpfs: written back to a disk, one subject's log would be paid for in another's cell."""
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    for left in Path(parent).glob("meshbpf-bench-*"):  # of a killed predecessor: we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="meshbpf-bench-", dir=parent) as name:
        yield Path(name)


def _terminated(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


class Bench:
    """One run: what was measured so far, and what could not be."""

    def __init__(self, args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.args, self.stack = args, stack
        plan = rounds_module.QUICK if args.quick else rounds_module.FULL
        rounds = args.rounds or plan.rounds
        self.plan = Plan(rounds, max(plan.most, rounds), args.seconds or plan.seconds)
        self.rounds: dict[str, Rounds] = {}
        self.missing: dict[str, str] = {}
        self.notes: dict[str, Any] = {"idle_share": {}, "evidence": {}}
        self.run = stack.enter_context(place())
        self.groups = Groups()
        stack.callback(self.groups.close)
        self.subjects: dict[str, Subject] = {}
        self.load = Load(self.groups, pinned(CLIENT_SIDE, args.free))

    def start(self) -> None:
        backend = Backend(self.run, self.groups.make("backend"), pinned(CLIENT_SIDE, self.args.free))
        self.stack.callback(backend.stop)
        backend.start()
        cpus, make, ports = pinned(SUBJECT_SIDE, self.args.free), self.groups.make, backend.ports
        common: dict[str, Any] = {"run": self.run, "make_group": make, "cpus": cpus, "endpoints": ports}
        known: list[Subject] = [
            NoMesh(ports[0]),
            Mesh("direct", mode="direct", acceleration="off", number=1, **common),
            Mesh("proxy", mode="proxy", acceleration="redirect", number=2, **common),
            Mesh("proxy-off", mode="proxy", acceleration="off", number=3, **common),
            Envoy(self.run, make("envoy-agent"), cpus, ports),
        ]
        self.attach = Attach("attach", mode="direct", acceleration="off", number=4, **common)
        self.starts = (
            scale.Start("start-yaml", mode="direct", acceleration="off", number=5, **common),
            scale.JsonStart("start-json", mode="direct", acceleration="off", number=6, **common),
        )
        for subject in known:
            if subject.name not in self.args.subjects.split(","):
                self.missing[subject.name] = "not asked for"
                continue
            say(f"starting {subject.name}")
            self.stack.callback(subject.stop)
            try:
                subject.start()
                # Also the proof that requests get through, and the warm-up of pools, caches and logs.
                self.load.cell(subject, ROWS[0], 1)
            except FAILURES as error:
                self.missing[subject.name] = str(error)
                say(f"{subject.name} is left out: {error}")
                subject.stop()
            else:
                self.subjects[subject.name] = subject

    def measure(self) -> None:
        self._idle()
        runner = Runner(self.load, self.plan, self.subjects, self.args.seed)
        for row in ROWS:
            if row.name in self.args.rows.split(","):
                rate = self._half_of_peak() if row.open_loop else None
                if rate is None and row.open_loop:
                    say(f"{row.name}: left out, Envoy's peak is not known")
                    continue
                runner.row(row, self.rounds.setdefault(row.name, []), rate)
                self.missing |= runner.failed
        if ATTACH in self.args.rows.split(","):
            try:
                self.rounds[ATTACH] = list(self.attach.measure(3 if self.args.quick else 7))
            except FAILURES as error:
                self.missing[ATTACH] = str(error)
        if SCALE in self.args.rows.split(","):
            self._scale()
        for subject in self.subjects.values():
            self.notes["evidence"][subject.name] = subject.evidence()

    def _scale(self) -> None:
        groups = {name: self.groups.make(f"scale-{name}") for name in ("maps", "many", "few")}
        found = self.rounds.setdefault(SCALE, [])
        try:
            cpus = pinned(CLIENT_SIDE, self.args.free)
            found.extend(scale.measure(*self.starts, groups, 1 if self.args.quick else 5, cpus))
        except FAILURES as error:
            self.missing |= {name: str(error) for name in SCALE_SUBJECTS if not any(name in cells for cells in found)}
            say(f"{SCALE}: {error}")

    def _idle(self) -> None:
        """CPU share of every waiting subject: what it adds to the cells of the others."""
        names = [name for name in self.subjects if name != "none"]
        before = {name: self.groups.usage(f"{name}-agent") for name in names}
        time.sleep(IDLE_SECONDS)
        for name in names:
            share = (self.groups.usage(f"{name}-agent") - before[name]) / IDLE_SECONDS
            self.notes["idle_share"][name] = round(share, 5)

    def _half_of_peak(self) -> float | None:
        """The same fixed rate for all: half of what Envoy reached in this run, below everybody's knee."""
        peak = next((row for row in ROWS if not row.open_loop and not row.close), Row("", "", ()))
        cells = [cells for cells in self.rounds.get(peak.name, []) if "envoy" in cells]
        return median(series(cells, "envoy", "rps")) / 2 if cells else None

    def report(self) -> bool:
        """Write the raw file, print the table; True when every figure holds."""
        verdicts = [judge(figure, self.rounds.get(figure.row, []), self.missing) for figure in FIGURES]
        stamp = time.strftime("%Y-%m-%d-%H%M%S")
        facts = {
            "kernel": platform.release(), "cpus": os.cpu_count(), "python": platform.python_version(),
            "rounds": self.plan.rounds, "seconds": self.plan.seconds, "seed": self.args.seed,
            "layout": "free" if self.args.free else "client+backend | subject",
        }  # fmt: skip
        raw = {
            "schemaVersion": 1, "date": stamp, "facts": facts, "quick": self.args.quick, "missing": self.missing,
            **self.notes, "rounds": self.rounds,
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{stamp}.json").write_text(json.dumps(raw, indent=1) + "\n")
        title = "meshbpf bench" + (" (quick: shows that it works, proves nothing)" if self.args.quick else "")
        print(markdown(title, verdicts, self.rounds, facts, WIDEST))
        say(f"raw data: bench/results/{stamp}.json")
        return all(verdict.holds for verdict in verdicts)


def main() -> int:
    args = options()
    if reason := lacking():
        say(reason)
        return 69
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with alone(), contextlib.ExitStack() as stack:
            bench = Bench(args, stack)
            try:
                bench.start()
                bench.measure()
            except KeyboardInterrupt:
                say("interrupted: reporting what was measured")
            except RuntimeError as error:
                say(f"stopped: {error}")
            return 0 if bench.report() else 1
    except RuntimeError as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
