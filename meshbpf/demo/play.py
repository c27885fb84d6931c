"""The demo's story, act by act: what is done is said before it is done, and every table is a command's real output."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from textwrap import fill, indent
from typing import Any

from meshbpf.cli import ask, output, view
from meshbpf.cli.read import opened
from meshbpf.demo import cast, network
from meshbpf.demo.scene import Scene, free_port, said, until
from meshbpf.errors import MeshError

WIDTH = 80
CALLS = 120
Echo = Callable[[str], None]


class Play:
    def __init__(self, scene: Scene, echo: Echo) -> None:
        self._scene = scene
        self._echo = echo
        self._began = time.monotonic()
        self._ports = (free_port(15101), free_port(15110), free_port(15120))

    def run(self) -> None:
        """Raises MeshError when anything is not as it should be, the planted fault not found included."""
        self._echo("meshbpf demo: small services, real calls, and one planted fault to find\n")
        self._set_up()
        self._start()
        self._call()
        self._look()
        self._find()
        self._mend()

    # --- acts --------------------------------------------------------------------------------------------------------

    def _set_up(self) -> None:
        parts = ", ".join(cast.PARTS)
        self._say(f"{len(cast.PARTS)} network namespaces and cgroups, joined by a bridge: {parts}")
        network.make()
        self._scene.make_cgroups()
        cast.WORK.mkdir(mode=0o700)
        cast.CONFIG.write_text(cast.configuration(*self._ports))
        services = [
            self._scene.service(part, "http", cast.WRONG if part == cast.FAULTY else cast.HTTP)
            for part in cast.PARTS
            if part.startswith("orders-")
        ]
        services.append(self._scene.service("ledger", "tcp", cast.TCP))
        services.append(self._scene.service("web", "http", cast.HTTP))
        for process in services:
            assert process.stdout is not None
            if not said(process.stdout, "listening"):
                raise MeshError("a service of the demo did not start")
        self._say("orders (3 HTTP endpoints) and ledger (TCP) run; none of them knows of a mesh")

    def _start(self) -> None:
        self._say(f"$ meshbpf run --cgroup {cast.CGROUP} -c mesh.yaml --instance {cast.INSTANCE}")
        self._scene.run_agent()
        self._say("programs compiled, loaded and attached; the proxy listens in every namespace")
        address = cast.PARTS["billing"]
        self._say(f"$ meshbpf register billing --port http={cast.HTTP}/http --address {address} -- CMD")
        process = self._scene.registered("billing", "billing", "http", cast.HTTP)
        assert process.stderr is not None
        if not said(process.stderr, " registered", cast.WORK / "billing.log"):
            raise MeshError(f"billing was not registered:\n{(cast.WORK / 'billing.log').read_text()[-2000:]}")
        self._billing = until(self._billing_address, "billing has an address")
        self._say(f"billing is in the registry; the mesh gave it the address {self._billing}")

    def _billing_address(self) -> str:
        _instance, plane, mesh = opened(cast.INSTANCE)
        with closing(plane):
            rows = [row for row in view.services(plane, mesh) if row["service"] == "billing"]
        return str(rows[0]["address"]) if rows and rows[0]["why"] != "not_in_kernel" else ""

    def _call(self) -> None:
        self._head("Unmodified programs call services by their addresses, from namespace web")
        fetch = "fetch(process.argv[1]).then(r => r.text()).then(t => process.stdout.write(t))"
        urllib = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode(), end='')"
        ledger = (
            "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2]))); "
            "s.sendall(b'hello\\n'); print(s.makefile().readline(), end='')"
        )
        orders, billing = f"http://{cast.ORDERS}/cart", f"http://{self._billing}/invoice"
        programs = [
            ("curl", ["curl", "-sS", "--max-time", "5", orders], orders),
            ("python3", ["python3", "-I", "-c", urllib, billing], billing),
            ("node", ["node", "-e", fetch, orders], orders),
            ("python3", ["python3", "-I", "-c", ledger, cast.LEDGER, str(cast.TCP)], f"tcp {cast.LEDGER}:{cast.TCP}"),
        ]
        for name, command, target in programs:
            if shutil.which(name) is None:
                self._echo(f"  {name.ljust(9)}{target.ljust(33)}skipped: not installed")
                continue
            answer = self._scene.call("web", *command).strip()
            self._echo(f"  {name.ljust(9)}{target.ljust(33)}{answer}")
        self._load = self._scene.load(orders, CALLS)
        self._echo(f"\n  {CALLS} more calls to orders:  {_counts(self._load['codes'], 'status ')}")
        self._echo(f"  answered by:{' ' * 16}{_counts(self._load['from'])}")

    def _look(self) -> None:
        self._table("services")
        until(self._failures, "the failing endpoint shows up", 5.0)
        self._head("The access log: who called what, who answered, how many attempts it took")
        self._echo(_indented(self._log_lines()))
        self._table("reasons")
        self._latency()

    def _find(self) -> None:
        served = "Every call was answered" if set(self._load["codes"]) == {"200"} else "Not every call was answered"
        self._head(f"{served}, and yet something is wrong. Which endpoint?")
        self._echo(f"  $ meshbpf endpoints orders --instance {cast.INSTANCE}\n")
        self._echo(_indented(self._scene.show("endpoints", "orders")))
        worst = max(self._endpoints(), key=lambda row: int(row["failed"] or 0))
        expected = f"{cast.PARTS[cast.FAULTY]}:{cast.HTTP}"
        if worst["endpoint"] != expected:
            raise MeshError(f"the planted fault was not found: it is {expected}, the table says {worst['endpoint']}")
        self._echo("")
        self._para(
            f"FOUND: {worst['endpoint']} ({cast.FAULTY}) failed {worst['failed']} times, {worst['last_error']}. "
            f"It listens on port {cast.WRONG}; mesh.yaml says {cast.HTTP}. A failed connection was tried again on "
            "another endpoint, which costs time and hides the fault."
        )

    def _mend(self) -> None:
        self._head("Mend it: write the right port into mesh.yaml; the running agent notices")
        staged = cast.CONFIG.with_suffix(".new")
        staged.write_text(cast.configuration(*self._ports, mended=True))
        staged.replace(cast.CONFIG)
        right = f"{cast.PARTS[cast.FAULTY]}:{cast.WRONG}"
        until(lambda: any(row["endpoint"] == right for row in self._endpoints()), "the mended mesh is applied", 10.0)
        load = self._scene.load(f"http://{cast.ORDERS}/cart", CALLS)
        self._echo(f"  {CALLS} calls to orders:  {_counts(load['codes'], 'status ')}")
        self._echo(f"  answered by:{' ' * 11}{_counts(load['from'])}")
        if cast.FAULTY not in load["from"]:
            raise MeshError(f"{cast.FAULTY} is mended and yet nobody reaches it")

    # --- what is shown -----------------------------------------------------------------------------------------------

    def _endpoints(self) -> list[dict[str, Any]]:
        """The same rows as `meshbpf endpoints orders`, without the time that a command takes to start."""
        instance, plane, mesh = opened(cast.INSTANCE)
        with closing(plane):
            seen = (ask.get(instance, "/v1/status") or {}).get("endpoints", {})
            return view.endpoints(plane, mesh, view.find(mesh, "orders"), seen)

    def _failures(self) -> bool:
        return any(row["failed"] for row in self._endpoints())

    def _log_lines(self, most: int = 5) -> str:
        records = [json.loads(line) for line in cast.ACCESS_LOG.read_text().splitlines()]
        tried_again = [record for record in records if record["attempts"] > 1][:2]
        shown = sorted(records[: most - len(tried_again)] + tried_again, key=lambda record: str(record["start_time"]))
        heads = ["WORKLOAD", "SERVICE", "PATH", "CODE", "TRIES", "UPSTREAM", "MS"]
        keys = ["workload", "service", "path", "response_code", "attempts", "upstream_host"]
        rows = [[*(record[key] for key in keys), f"{record['duration_ms']:.1f}"] for record in shown]
        return output.table(heads, rows)

    def _latency(self) -> None:
        self._head("One call on a kept connection, milliseconds")
        own, service = f"http://{cast.PARTS['billing']}:{cast.HTTP}/invoice", f"http://{self._billing}/invoice"
        without: list[float] = []
        through: list[float] = []
        for _ in range(3):  # in turn, so that whatever else this machine does falls on both
            without += self._scene.load(own, CALLS, keep=True, in_mesh=False)["ms"]
            through += self._scene.load(service, CALLS, keep=True)["ms"]
        rows = [["no mesh, the endpoint's own address", *_times(without)], ["mesh, carrier proxy", *_times(through)]]
        self._echo(_indented(output.table(["BILLING", "P50", "P90"], rows)))

    def _table(self, command: str) -> None:
        self._head(f"$ meshbpf {command} --instance {cast.INSTANCE}")
        self._echo(_indented(self._scene.show(command)))

    def _say(self, text: str) -> None:
        stamp = f"[{time.monotonic() - self._began:4.1f} s] "
        self._echo(fill(text, WIDTH, initial_indent=stamp, subsequent_indent=" " * len(stamp), break_on_hyphens=False))

    def _head(self, text: str) -> None:
        self._echo("")
        self._say(text)

    def _para(self, text: str) -> None:
        self._echo(fill(text, WIDTH, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False))


def _counts(counts: Mapping[str, int], before: str = "") -> str:
    return ", ".join(f"{before}{name} × {count}" for name, count in sorted(counts.items())) or "nobody"


def _times(milliseconds: list[float]) -> list[str]:
    if len(milliseconds) < 2:
        return ["-", "-"]
    return [f"{statistics.median(milliseconds):.2f}", f"{statistics.quantiles(milliseconds, n=10)[-1]:.2f}"]


def _indented(text: str) -> str:
    return indent(text, "  ")
