"""Load and change for SOAK_MINUTES, then everything is back at its baseline, or it says what leaked.

    python -m bench.soak [--minutes 60] [--rate 300] [--seed N]

In order: an agent with two workers; a warm-up with everything that follows, so that pools and caches are as they will
be; rest, and the baseline; the run, a line each minute; rest, and the verdict. Exit 0 when everything is back, 1 when
not or when requests failed that no killed worker explains, 69 when the machine lacks something, 130 when it was
interrupted (SIGINT, SIGTERM): then what ran is judged and reported all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench import leaks, soak_text
from bench.__main__ import RESULTS, alone, place
from bench.backend import wait_for
from bench.churn import PLAIN, RELAYED, WEB, Churn, Site
from bench.gauges import Gauges
from bench.machine import Groups, free_ports, spawn, stop, tail
from bench.rounds import say
from bench.subjects import meshbpf
from loader.instance import Instance
from meshbpf.errors import MeshError

NAME = "bench-soak"
PORTS = 8  # of endpoints
# Of warm-up at most, or a third of a short run: what is gone is remembered for twenty minutes (twice stats.KEEP),
# and only memory that holds as much of that as it ever will can be compared with later memory.
WARM_SECONDS = 1260.0
SAMPLE_SECONDS = 5.0
TICK = 0.1
REST_SECONDS = 45.0  # by then idle pools, leases and what was broken off have gone
CALM_SECONDS = 4.0  # longer than a lease, and than pooled connections are kept
LOST_BY_A_KILL = 20  # requests: at most one of each caller
FAILED_SHARE = 1e-4  # and otherwise
INTERRUPTED = "interrupted"
FAILURES = (MeshError, RuntimeError, OSError, subprocess.SubprocessError)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.soak", description="load and change, and nothing left behind"
    )
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES") or 60))
    parser.add_argument("--rate", type=float, default=300.0, help="requests per second, all callers together")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of what happens when")
    return parser.parse_args()


class Soak:
    """One run. What it found is filled in as it goes, so that an interruption can report."""

    def __init__(self, args: argparse.Namespace, stack: contextlib.ExitStack) -> None:
        self.args, self.stack = args, stack
        self.run = stack.enter_context(place())
        groups = Groups()
        stack.callback(groups.close)
        self.groups = groups
        self.ports = free_ports(PORTS, 18500)
        self.site = Site(self.run, groups.make("soak"), NAME, self.ports)
        self.samples: list[tuple[float, leaks.Sample]] = []
        self.baseline: leaks.Sample = {}
        self.end: leaks.Sample = {}
        self.tally: Counter[str] = Counter()
        self.seconds = 0.0
        self.cut = ""  # why it ended before its time

    def start(self) -> None:
        log = self.run / "endpoints.log"
        endpoints = self.site.traffic("serve", *map(str, self.ports), out=log)
        self.stack.callback(stop, endpoints)
        wait_for(f"http://127.0.0.1:{self.ports[-1]}/1", endpoints, log, length=1)  # they are opened in order
        self.site.write()
        self.detach()  # what a killed predecessor left: an instance of that name is always ours
        self.log = self.run / "agent.log"
        options = ["--cgroup", str(self.site.group), "-c", str(self.site.file), "--instance", NAME]
        # A terminal's Ctrl-C is for us alone, hence setsid. SIGTERM, not SIGKILL, should we die: the agent then drains
        # and takes its workers along.
        command = ["setsid", meshbpf(), "run", *options]
        agent = spawn(command, self.groups.make("soak-agent"), None, self.log, signal.SIGTERM)
        self.stack.callback(self.detach)
        self.stack.callback(stop, agent)
        wait_for(f"http://127.0.0.1:{self.site.admin}/readyz", agent, self.log)
        ports = [self.site.proxy, *self.ports]
        self.gauges = Gauges(Instance(NAME), agent.pid, self.site.admin, self.site.group, ports)
        dice = random.Random(self.args.seed)
        self.churn = Churn(self.site, self.gauges.workers, self.gauges.elder, dice)

    def detach(self) -> None:
        done = subprocess.run([meshbpf(), "detach", "--instance", NAME], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            say(f"detach: {done.stderr.strip()}")

    # --- the phases ------------------------------------------------------------------------------------------

    def work(self, seconds: float, keep: bool) -> None:
        """Load and change; `keep`: this is the run itself, which is sampled and told of."""
        file = self.run / ("run.json" if keep else "warm.json")
        log, hosts = self.run / "callers.log", (WEB, PLAIN, RELAYED)
        callers = self.site.traffic("call", str(self.args.rate), str(file), *hosts, group=self.site.group, out=log)
        begun = time.monotonic()
        sample_at, minute_at = 0.0, 60.0
        try:
            while (passed := time.monotonic() - begun) < seconds:
                self.churn.due(begun + passed)
                if keep:
                    self.seconds = passed
                    if passed >= sample_at:
                        self.samples.append((passed, self.gauges.sample()))
                        sample_at += SAMPLE_SECONDS
                    if passed >= minute_at:
                        say(soak_text.minute(passed, _read(file), self.samples[-1][1]))
                        minute_at += 60.0
                if callers.poll() is not None:
                    raise RuntimeError(f"the callers ended: {tail(log)}")
                time.sleep(TICK)  # paces: there is nothing to wait for
        finally:
            stop(callers)
            if keep:
                self.tally = Counter(_read(file))

    def rest(self, until: leaks.Sample | None) -> leaks.Sample:
        """No load, no change: a sample once nothing moves any more, or, with `until`, once nothing is above that."""
        self.churn.rest()
        begun = time.monotonic()
        earlier: leaks.Sample = {}
        while True:
            time.sleep(CALM_SECONDS)
            found = self.gauges.sample()
            calm = leaks.settled(earlier, found) if until is None else not leaks.at_rest(until, found)
            if calm or time.monotonic() - begun > REST_SECONDS:
                return {**found, "series": self.gauges.series()}
            earlier = found

    # --- the verdict -----------------------------------------------------------------------------------------

    def findings(self) -> list[str]:
        found = [f"it stopped: {self.cut}"] if self.cut not in ("", INTERRUPTED) else []
        found += [str(finding) for finding in (*leaks.at_rest(self.baseline, self.end), *leaks.climbing(self.samples))]
        bound = LOST_BY_A_KILL * self.churn.done["worker killed"] + FAILED_SHARE * self.tally["ok"]
        if not self.tally["ok"]:
            found.append("no request was answered")
        if self.tally["failed"] > bound:
            found.append(f"{self.tally['failed']} requests failed, at most {bound:.0f} may")
        log = self.log.read_text()
        found += [f"the agent's log has: {word}" for word in ("Traceback", "task died") if word in log]
        return found

    def report(self) -> bool:
        """Print the table, write the file; True when nothing leaked."""
        findings = self.findings()
        stamp = time.strftime("%Y-%m-%d-%H%M%S")
        raw: dict[str, Any] = {
            "schemaVersion": 1, "date": stamp, "kernel": platform.release(), "cpus": os.cpu_count(),
            "minutes": self.seconds / 60, "asked": self.args.minutes, "cut": self.cut,
            "rate": self.args.rate, "seed": self.args.seed, "tally": self.tally, "churn": self.churn.done,
            "verdicts": self.gauges.verdicts(), "findings": findings, "baseline": self.baseline, "end": self.end,
            "samples": [{"seconds": round(at, 1), **sample} for at, sample in self.samples],
        }  # fmt: skip
        RESULTS.mkdir(exist_ok=True)
        file = RESULTS / f"soak-{stamp}.json"
        file.write_text(json.dumps(raw, indent=1) + "\n")
        print(soak_text.table(self.baseline, [sample for _at, sample in self.samples], self.end))
        for counted in (self.tally, self.churn.done, self.gauges.verdicts()):
            print(f"\n{soak_text.counts(counted)}")
        print(f"\n{self.seconds / 60:.1f} minutes {self.cut}; seed {self.args.seed}; {file}")
        for finding in findings:
            print(f"FOUND {finding}")
        print(f"{len(findings)} findings" if findings else "all is back at its baseline")
        return not findings


def _read(file: Path) -> dict[str, int]:
    """The callers' tally so far."""
    try:
        found: dict[str, int] = json.loads(file.read_text())
    except FileNotFoundError:  # they have just begun
        return {}
    return found


def _terminated(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def soak(args: argparse.Namespace, stack: contextlib.ExitStack) -> int:
    made = Soak(args, stack)
    made.start()
    seconds = args.minutes * 60
    warm = min(WARM_SECONDS, seconds / 3)
    try:
        say(f"warming up for {warm:.0f} s, then {args.minutes:g} minutes; seed {args.seed}")
        made.work(warm, keep=False)
        made.baseline = made.rest(None)
        made.churn.done.clear()
        made.work(seconds, keep=True)
    except KeyboardInterrupt:
        made.cut = INTERRUPTED
    except FAILURES as error:
        made.cut = f"{error}; {tail(made.log)}"
    if made.cut:
        say(f"{made.cut}: judging what ran" if made.baseline else f"{made.cut}: there is no baseline to judge by")
    if not made.baseline:
        return 130 if made.cut == INTERRUPTED else 1
    try:
        made.end = made.rest(made.baseline)
    except KeyboardInterrupt:  # again: then as things are
        made.cut, made.end = INTERRUPTED, made.gauges.sample()
    except FAILURES as error:
        made.cut = made.cut or str(error)
    clean = made.report()
    return 1 if not clean else 130 if made.cut else 0


def main() -> int:
    args = options()
    if os.geteuid() != 0:
        say("root is needed for cgroups and BPF: sudo make soak")
        return 69
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with alone(), contextlib.ExitStack() as stack:
            return soak(args, stack)
    except KeyboardInterrupt:
        return 130
    except FAILURES as error:
        say(str(error))
        return 1


if __name__ == "__main__":
    sys.exit(main())
