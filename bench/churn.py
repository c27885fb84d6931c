"""What changes all the time while a soak runs, and how all of it is taken back.

Rule: `Site` knows how to do a thing once, `Churn` when: each action has its own gap in seconds, chance comes from the
dice, and names of what is born are never used twice, so that whatever is kept for a name adds up.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from bench.machine import free_ports, spawn, stop
from meshbpf.demo import plumbing

WEB, PLAIN, RELAYED = "127.96.242.1", "127.96.242.2", "127.96.242.3"  # proxied HTTP, direct TCP, proxied TCP
KEPT_ENDPOINTS = 3  # of the ports, in the file for good; the others come and go by the registry
EXTRAS = 8  # services at most in the file beside the three
LEASE = "3s"
BORN_SECONDS = 3.0  # how long a namespace or cgroup lives


class Site:
    """One instance's configuration, registry and places."""

    def __init__(self, run: Path, group: Path, instance: str, ports: list[int]) -> None:
        self.run, self.group, self.instance, self.ports = run, group, instance, ports
        self.proxy, self.admin, self.registry = free_ports(3, 18600)
        self.file = run / "soak.yaml"
        self.extras: list[dict[str, Any]] = []
        self.weight = 100

    def write(self, broken: bool = False) -> None:
        """The configuration in one step; `broken`: one that must be refused, while the last good one stays."""
        endpoints = [
            {"address": "127.0.0.1", "ports": {"main": port}, "weight": self.weight if number else 100}
            for number, port in enumerate(self.ports[:KEPT_ENDPOINTS])
        ]
        agent = {
            "registries": [{"embedded": {"listen": f"127.0.0.1:{self.registry}", "store": str(self.run / "soak.db")}}],
            "proxy": {"listen": f"127.0.0.1:{self.proxy}", "workers": 2, "drain": "1s"},
            "admin": {"listen": f"127.0.0.1:{self.admin}"},
            "accessLog": {"format": "json", "path": "/dev/null"},  # an hour of it would fill what this runs in
        }
        documents: list[dict[str, Any]] = [
            {"apiVersion": "meshbpf.io/v1", "kind": "Agent", "spec": agent},
            _service("web", WEB, "http", endpoints),
            _service("plain", PLAIN, "tcp", endpoints),
            _service("relayed", RELAYED, "tcp", endpoints),
            _policy("relayed", "proxy"),
            *self.extras,
        ]
        text = yaml.safe_dump_all(documents) + ("---\nkind: [\n" if broken else "")
        staged = self.file.with_suffix(".new")
        staged.write_text(text)
        staged.replace(self.file)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> int:
        """A request to the registry; its status."""
        client = http.client.HTTPConnection("127.0.0.1", self.registry, timeout=10)
        try:
            client.request(method, f"/v1/services/{path}", json.dumps(body) if body else None)
            answer = client.getresponse()
            answer.read()
            return answer.status
        finally:
            client.close()

    def traffic(self, *arguments: str, out: Path, group: Path | None = None) -> subprocess.Popen[str]:
        """A bench.traffic process, in `group`; setsid, because Ctrl-C in a terminal is for the soak alone."""
        return spawn(["setsid", sys.executable, "-m", "bench.traffic", *arguments], group, None, out)


def _service(name: str, address: str, protocol: str, endpoints: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "meshbpf.io/v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "addresses": [address],
            "ports": [{"name": "main", "port": 80, "protocol": protocol}],
            "endpoints": endpoints,
        },
    }


def _policy(name: str, mode: str) -> dict[str, Any]:
    spec = {"service": name, "mode": mode}
    return {"apiVersion": "meshbpf.io/v1", "kind": "ServicePolicy", "metadata": {"name": name}, "spec": spec}


class Churn:
    """`due(now)` does what is due; `rest` takes everything back. `done` counts what was done."""

    def __init__(self, site: Site, workers: Callable[[], list[int]], elder: int, dice: random.Random) -> None:
        self.site, self.workers, self.elder, self.dice = site, workers, elder, dice
        self.done: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._registered: list[str] = []
        self._born: list[tuple[float, list[subprocess.Popen[str]], Path | None]] = []  # until when
        self._actions: list[tuple[float, Callable[[float], None]]] = [
            (0.4, self._endpoint), (5.0, self._unknown_service), (1.5, self._file), (20.0, self._broken_file),
            (6.0, self._namespace), (7.0, self._cgroup), (25.0, self._kill), (0.5, self._bury),
        ]  # fmt: skip
        self._next = [gap * self.dice.random() for gap, _action in self._actions]
        self._begun: float | None = None

    def due(self, now: float) -> None:
        if self._begun is None:
            self._begun = now
        for number, (gap, action) in enumerate(self._actions):
            if now - self._begun >= self._next[number]:
                self._next[number] = now - self._begun + gap * (0.5 + self.dice.random())
                action(now)

    def _endpoint(self, _now: float) -> None:
        """One more, or one taken out, or one forgotten: its lease ends by itself."""
        if self._registered and self.dice.random() < 0.5:
            path = self._registered.pop(self.dice.randrange(len(self._registered)))
            if self.dice.random() < 0.5:
                self.done["lease left to lapse"] += 1
            else:
                self.site.ask("DELETE", path)
                self.done["endpoint deregistered"] += 1
            return
        service = self.dice.choice(("web", "plain", "relayed"))
        path = f"{service}/instances/i{next(self._numbers)}"
        port = self.dice.choice(self.site.ports[KEPT_ENDPOINTS:])
        protocol = "http" if service == "web" else "tcp"
        self._put(path, {"main": {"port": port, "protocol": protocol}})
        self._registered.append(path)
        self.done["endpoint registered"] += 1

    def _unknown_service(self, _now: float) -> None:
        """One that no file knows: it comes with its first instance and goes with the lease."""
        name = f"born{next(self._numbers)}"
        self._put(f"{name}/instances/only", {"http": {"port": self.site.ports[-1], "servicePort": 80}})
        self.done["service born in the registry"] += 1

    def _put(self, path: str, ports: dict[str, Any]) -> None:
        status = self.site.ask("PUT", path, {"address": "127.0.0.1", "ports": ports, "ttl": LEASE})
        if status not in (200, 201):
            raise RuntimeError(f"the registry answered {status} to PUT {path}")

    def _file(self, _now: float) -> None:
        """Services added and removed, modes and weights changed."""
        site = self.site
        if len(site.extras) < 2 * EXTRAS and self.dice.random() < 0.6:
            number = next(self._numbers)
            address = f"127.96.243.{number % 254 + 1}"
            endpoint = {"address": "127.0.0.1", "ports": {"main": self.dice.choice(site.ports)}}
            taken = [document["spec"].get("addresses") for document in site.extras]
            if [address] not in taken:
                protocol = self.dice.choice(("http", "tcp"))
                site.extras += [
                    _service(f"extra{number}", address, protocol, [endpoint]),
                    _policy(f"extra{number}", self.dice.choice(("auto", "direct", "proxy"))),
                ]
        else:
            del site.extras[:2]
        site.weight = self.dice.choice((1, 50, 100))
        site.write()
        self.done["file changed"] += 1

    def _broken_file(self, _now: float) -> None:
        self.site.write(broken=True)
        self.done["broken file written"] += 1

    def _namespace(self, now: float) -> None:
        """A namespace with endpoints and a caller of its own, which ends with them."""
        with plumbing.fresh():
            ours = [self.site.traffic("serve", *map(str, self.site.ports), out=Path(os.devnull))]
            ours.append(self._caller("namespace", self.site.group))
        self._born.append((now + BORN_SECONDS, ours, None))
        self.done["namespace born"] += 1

    def _cgroup(self, now: float) -> None:
        """A caller in a cgroup of its own, as a container would be."""
        group = self.site.group / f"child{next(self._numbers)}"
        group.mkdir()
        self._born.append((now + BORN_SECONDS, [self._caller("cgroup", group)], group))
        self.done["cgroup born"] += 1

    def _caller(self, name: str, group: Path) -> subprocess.Popen[str]:
        tally = self.site.run / f"{name}.json"
        return self.site.traffic("call", "20", str(tally), WEB, RELAYED, group=group, out=Path(os.devnull))

    def _kill(self, _now: float) -> None:
        """A worker dies with all its connections; never the elder, whose memory is watched."""
        others = [pid for pid in self.workers() if pid != self.elder]
        for pid in others[:1]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.done["worker killed"] += 1

    def _bury(self, now: float) -> None:
        """End what has lived long enough."""
        for entry in [entry for entry in self._born if entry[0] <= now]:
            self._born.remove(entry)
            _until, processes, group = entry
            for process in processes[::-1]:  # the caller before its endpoints
                stop(process)
            if group is not None:
                group.rmdir()

    def rest(self) -> None:
        """Take back everything that was added; leases lapse by themselves."""
        self._bury(float("inf"))
        for path in self._registered:
            self.site.ask("DELETE", path)
        self._registered.clear()
        self.site.extras.clear()
        self.site.weight = 100
        self.site.write()
