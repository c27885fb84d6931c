"""The subjects: what carries a request from the load generator to the backend.

A subject starts, says which address to call, which cgroup the caller must be in and where its access log grows, and
stops without leaving anything. meshbpf is used the way users do: its command line, a file, its ready check.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from bench.backend import wait_for
from bench.machine import free_ports, spawn, stop, tail

ATTACH_PATIENCE = 120


class Subject(Protocol):
    name: str
    address: str
    client_group: Path | None  # the cgroup the load generator must live in; None: any
    namespace: int | None  # a descriptor of the network namespace it must live in; None: ours
    access_log: Path | None

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def evidence(self) -> dict[str, Any]: ...


class NoMesh:
    """The client calls the backend itself: the floor, and the base of everything `direct` claims."""

    name = "none"
    client_group: Path | None = None
    namespace: int | None = None
    access_log: Path | None = None

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"

    def start(self) -> None:
        return None

    def stop(self) -> None:
        return None

    def evidence(self) -> dict[str, Any]:
        return {}


# Access log and metrics are on, the log in Envoy's text line so that both write the same bytes. The embedded registry
# has a port and a store of its own, because several instances run side by side here. `refuse`, because a proxy that is
# down must show as errors and not as the speed of a call without one.
CONFIG = """\
apiVersion: meshbpf.io/v1
kind: Agent
spec:
  registries:
    - embedded: {{listen: 127.0.0.1:{registry}, store: {run}/{name}.db}}
  proxy: {{listen: 127.0.0.1:{proxy}, workers: 1, drain: 1s}}
  admin: {{listen: 127.0.0.1:{admin}}}
  acceleration: {acceleration}
  accessLog: {{format: text, path: {log}}}
---
apiVersion: meshbpf.io/v1
kind: Service
metadata: {{name: {name}}}
spec:
  addresses: [{address}]
  ports:
    - {{name: http, port: 80, protocol: http}}
  endpoints:
{endpoints}
---
apiVersion: meshbpf.io/v1
kind: ServicePolicy
metadata: {{name: {name}}}
spec:
  service: {name}
  mode: {mode}
  acceleration: {acceleration}
  onProxyDown: refuse
"""


def meshbpf() -> str:
    """The installed command; raises with the remedy where there is none."""
    command = Path(sys.executable).with_name("meshbpf")
    probe = subprocess.run([command, "run", "--help"], capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        last = (probe.stderr or probe.stdout).strip().splitlines()[-1:]
        raise RuntimeError(f"`meshbpf run` does not work here: {' '.join(last)}")
    return str(command)


class Mesh:
    """One meshbpf instance with one service. The load generator's cgroup is attached, the agent lives beside it."""

    namespace: int | None = None

    def __init__(
        self,
        name: str,
        *,
        mode: str,
        acceleration: str,
        number: int,
        run: Path,
        make_group: Callable[[str], Path],
        cpus: set[int] | None,
        endpoints: list[int],
    ) -> None:
        self.name, self.mode, self.acceleration, self.number = name, mode, acceleration, number
        self.run, self.cpus, self.endpoints = run, cpus, endpoints
        self.instance = f"bench-{name}"
        self.group = make_group(f"{name}-agent")
        self.client_group: Path | None = make_group(f"{name}-clients")
        self.access_log: Path | None = run / f"{name}-access.log"
        self.address = f"127.96.240.{number}"
        self.file = run / f"{name}.d" / "mesh.yaml"  # nothing else there: what its directory sees, the agent looks at
        self.admin = 0
        self.child: subprocess.Popen[str] | None = None

    def configure(self) -> list[str]:
        """Write the configuration; returns the options `attach` and `run` share."""
        proxy, self.admin, registry = free_ports(3, 18300 + 10 * self.number)
        endpoints = "\n".join(f"    - {{address: 127.0.0.1, ports: {{http: {port}}}}}" for port in self.endpoints)
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(CONFIG.format(
            name=self.name, run=self.run, proxy=proxy, admin=self.admin, registry=registry, mode=self.mode,
            acceleration=self.acceleration, log=self.access_log, address=self.address, endpoints=endpoints,
        ))  # fmt: skip
        return ["--cgroup", str(self.client_group), "-c", str(self.file), "--instance", self.instance]

    def start(self) -> None:
        self.detach()  # a killed bench leaves its pins; an instance of that name is always ours
        self.launch()

    def launch(self) -> None:
        command, log = meshbpf(), self.run / f"{self.name}.out"
        # SIGTERM, not SIGKILL, should the bench die: the agent then drains and takes its workers along.
        self.child = spawn([command, "run", *self.configure()], self.group, self.cpus, log, signal.SIGTERM)
        wait_for(f"http://127.0.0.1:{self.admin}/readyz", self.child, log, patience=ATTACH_PATIENCE)

    def evidence(self) -> dict[str, Any]:
        """Counters that show which carrier really moved the bytes, for the raw file."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        wanted = ("meshbpf_kernel_verdicts_total", "meshbpf_connections_total", "meshbpf_requests_total")
        return {"metrics": [line for line in lines if line.startswith(wanted)]}

    def detach(self) -> None:
        command = [meshbpf(), "detach", "--instance", self.instance]
        subprocess.run(command, capture_output=True, timeout=60, check=False)

    def stop(self) -> None:
        if self.child is not None:
            stop(self.child)
            self.detach()


class Attach(Mesh):
    """Not a carrier of load but of a figure: how long `meshbpf attach` takes when it is not the first time."""

    def once(self) -> float:
        """Wall seconds of one `attach`."""
        begun = time.monotonic()
        log = self.run / f"{self.name}.out"
        child = spawn([meshbpf(), "attach", *self.configure()], self.group, None, log)
        if child.wait(ATTACH_PATIENCE) != 0:
            raise RuntimeError(f"attach ended with {child.returncode}: {tail(log)}")
        return time.monotonic() - begun

    def measure(self, times: int) -> Iterator[dict[str, dict[str, float]]]:
        """Rounds of the attach row. "Second time" can mean attached again in place, and attached again after a
        detach; both must be fast, so the slower one counts."""
        self.detach()
        try:
            first = self.once()
            for _ in range(times):
                again = self.once()
                self.detach()
                after = self.once()
                cell = {"seconds": max(again, after), "again": again, "after_detach": after, "first": first}
                yield {"attach": cell}
        finally:
            self.detach()
