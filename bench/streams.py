"""The row `streams`: long streams and new connections while the agent is restarted, killed and upgraded.

Rule: every stream knows what it should have sent and heard (course.py), so nothing is lost unseen; and what the proxy
cut must be found again in its access log as `draining`, one record for each that a caller saw cut. An upgrade makes
tables of another layout. Each event has callers of its own; direct streams may neither end nor lack a byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from bench.machine import free_ports, spawn, stop
from bench.rounds import say
from bench.subjects import Mesh
from loader.instance import Instance
from meshbpf.cli import ask

DIRECT, STORM, RELAYED, WEB, WEB_OFF = (f"127.96.244.{number}" for number in range(1, 6))
STREAMS = (
    f"direct:lasting:{DIRECT}:200", f"relayed:lasting:{RELAYED}:20", f"relayed-brief:brief:{RELAYED}:20",
    f"kept:kept:{WEB}:20", f"kept-off:kept:{WEB_OFF}:20",
    f"download:download:{WEB}:20", f"download-off:download:{WEB_OFF}:20",
)  # fmt: skip
RATE = 2000  # new connections per second
EVENTS = ("restart", "kill", "upgrade", "killed-upgrade")
DRAIN = 3.0
STEADY = 1.0  # seconds before and after
PATIENCE = 60.0
FLOWS = (65536, 32768)  # of tables of one layout, and of the other
Tally = Mapping[str, Mapping[str, int]]


class Streamed(Mesh):
    """One instance with services of every carrier, whose agent comes and goes."""

    layouts = 0  # how many there have been
    ports: list[int] | None = None
    endpoints_raw = endpoints_http = endpoint_storm = 0

    def configure(self) -> list[str]:
        # Once: the next agent takes the ports over, as an orphaned worker may hold them.
        self.ports = self.ports or free_ports(3, 18300 + 10 * self.number)
        proxy, self.admin, registry = self.ports
        agent = {
            "registries": [{"embedded": {"listen": f"127.0.0.1:{registry}", "store": str(self.run / "streams.db")}}],
            "proxy": {"listen": f"127.0.0.1:{proxy}", "workers": 2, "drain": f"{DRAIN:.0f}s"},
            "admin": {"listen": f"127.0.0.1:{self.admin}"},
            "acceleration": "redirect",
            "accessLog": {"format": "json", "path": str(self.access_log)},
            "maps": {"flows": FLOWS[self.layouts % 2]},
        }
        documents = [
            {"apiVersion": "meshbpf.io/v1", "kind": "Agent", "spec": agent},
            *_service("direct", DIRECT, "tcp", self.endpoints_raw, mode="direct"),
            *_service("storm", STORM, "tcp", self.endpoint_storm, mode="direct"),
            *_service("relayed", RELAYED, "tcp", self.endpoints_raw, mode="proxy"),
            *_service("web", WEB, "http", self.endpoints_http, mode="proxy", acceleration="redirect"),
            *_service("web-off", WEB_OFF, "http", self.endpoints_http, mode="proxy", acceleration="off"),
        ]
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(yaml.safe_dump_all(documents))
        return ["--cgroup", str(self.client_group), "-c", str(self.file), "--instance", self.instance]

    def happen(self, event: str) -> None:
        """Returns when the next agent is ready and nothing of the one before is left."""
        assert self.child is not None
        before = self.pids()
        if event in ("kill", "killed-upgrade"):
            self.child.kill()
        else:
            self.child.terminate()
        self.child.wait(PATIENCE)
        self.layouts += event in ("upgrade", "killed-upgrade")
        self.launch()
        deadline = time.monotonic() + PATIENCE
        while left := before & self.pids():
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} of the earlier agent do not end")
            time.sleep(0.05)

    def await_redirect(self) -> None:
        """Returns when connections may be redirected. Raises RuntimeError where they may not."""
        deadline = time.monotonic() + PATIENCE
        while (
            not (said := ask.get(Instance(self.instance), "/v1/status") or {}).get("acceleration", "").startswith("re")
        ):
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing can be redirected here: {said}")
            time.sleep(0.1)

    def pids(self) -> set[int]:
        return {int(line) for line in (self.group / "cgroup.procs").read_text().split()}

    def redirected(self) -> float:
        """Sends from socket to socket, by these tables."""
        lines = self.evidence()["metrics"]
        return sum(float(line.split()[-1]) for line in lines if 'reason="redirected"' in line)

    def drained(self, begin: int) -> Counter[str]:
        """By service, what the log says was cut by a drain since it was so long."""
        assert self.access_log is not None
        with self.access_log.open("rb") as log:
            log.seek(begin)
            records = [json.loads(line) for line in log]
        return Counter(record["service"] for record in records if record["reason"] == "draining")


def _service(name: str, address: str, protocol: str, port: int, **policy: str) -> list[dict[str, Any]]:
    ports = [{"name": "main", "port": 80, "protocol": protocol}]
    endpoints = [{"address": "127.0.0.1", "ports": {"main": port}}]
    about = {"apiVersion": "meshbpf.io/v1", "metadata": {"name": name}}
    return [
        {**about, "kind": "Service", "spec": {"addresses": [address], "ports": ports, "endpoints": endpoints}},
        {**about, "kind": "ServicePolicy", "spec": {"service": name, **policy}},
    ]


def measure(subject: Streamed, make_group: Callable[[str], Path], rounds: int) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        raw, http, storm = free_ports(3, 18900)
        for module, *ports in (("bench.stream_server", raw, http), ("bench.storm", "serve", storm)):
            command = [sys.executable, "-m", module, *map(str, ports)]
            server = spawn(command, make_group("streams-endpoints"))
            stack.callback(stop, server)
            _heard(server, "listening")
        subject.endpoints_raw, subject.endpoints_http, subject.endpoint_storm = raw, http, storm
        stack.callback(subject.stop)
        subject.start()
        for _ in range(rounds):
            yield {"streams": summed({event: _event(subject, event) for event in EVENTS})}


def _event(subject: Streamed, event: str) -> dict[str, float]:
    """One event in the middle of everything."""
    assert subject.access_log is not None
    subject.await_redirect()
    callers = spawn([sys.executable, "-m", "bench.stream_callers", *STREAMS], subject.client_group, pipe=True)
    storm = None
    try:
        _heard(callers, "begun")
        command = [sys.executable, "-m", "bench.storm", "call", str(RATE), STORM]
        storm = spawn(command, subject.client_group, pipe=True)
        time.sleep(STEADY)
        redirected, begin = subject.redirected(), os.stat(subject.access_log).st_size
        begun = time.monotonic()
        _tell(callers, "wind")
        subject.happen(event)
        took = time.monotonic() - begun
        time.sleep(STEADY)
        _tell(callers, "end")
        tally: Tally = json.loads(_end(callers))
        stormed = json.loads(_end(storm))
    finally:
        stop(callers)
        if storm is not None:
            stop(storm)
    say(f"streams, {event}, {took:.1f} s: {json.dumps(tally)}; storm {json.dumps(stormed)}")
    return {"seconds": took, "redirected": redirected, **judged(tally, stormed, subject.drained(begin))}


def judged(tally: Tally, stormed: Mapping[str, Any], drained: Mapping[str, int]) -> dict[str, float]:
    """One event's numbers; `drained` is what the log says was cut, by service. Pure."""
    direct, proxied = tally["direct"], [found for name, found in tally.items() if name != "direct"]
    cut, counted = sum(found.get("cut", 0) for found in proxied), sum(drained.values())
    return {
        "resets": direct.get("cut", 0) + direct.get("failed", 0),
        "lost_bytes": direct.get("lost", 0),
        "wrong": sum(found.get("wrong", 0) for found in tally.values()),
        "direct_whole": direct.get("whole", 0),
        "direct_mb": (direct.get("sent", 0) + direct.get("received", 0)) / 1e6,
        "proxied": sum(found["streams"] for found in proxied),
        "proxied_whole": sum(found.get("whole", 0) for found in proxied),
        "told_to_close": sum(found.get("told to close", 0) for found in proxied),
        "asked_again": sum(found.get("stale", 0) for found in proxied),
        "cut": cut,
        "cut_counted": counted,
        "cut_uncounted": abs(cut - counted),
        "new": stormed["ok"],
        "new_failed": sum(stormed["failed"].values()),
        "new_per_second": stormed["per_second"],
        "new_slowest_ms": stormed["slowest_ms"],
    }


def summed(events: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The cell: what must be zero over all events together, the worst rate and wait, and every event's own numbers."""
    every = list(events.values())
    own = {f"{event}: {key}": value for event, found in events.items() for key, value in found.items()}
    return {
        **{key: sum(one[key] for one in every) for key in ("resets", "lost_bytes", "wrong", "new_failed")},
        "cut_uncounted": sum(one["cut_uncounted"] for one in every),
        "new_per_second": min(one["new_per_second"] for one in every),
        **own,
    }


def _heard(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdout is not None
    if not select.select([child.stdout], [], [], PATIENCE)[0] or child.stdout.readline().strip() != word:
        stop(child)
        raise RuntimeError(f"{child.args!r} did not say {word}: {child.communicate()[1][-500:]}")


def _tell(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{word}\n")
    child.stdin.flush()


def _end(child: subprocess.Popen[str]) -> str:
    """Close its stdin; what it says in the end."""
    out, err = child.communicate(timeout=PATIENCE)
    if child.returncode != 0:
        raise RuntimeError(f"{child.args!r} ended with {child.returncode}: {err[-500:]}")
    return out
