"""The same Envoy behind two interceptions: our connect hook, and the iptables REDIRECT of an Istio sidecar.

Each has a namespace of its own with its own endpoints, because rules and the connection tracking they bring are paid by
everything in a namespace. What is spared Istio here: looking up the original destination, and its rules on the inbound
side of the called service.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from bench.backend import Backend
from bench.envoy import Envoy
from bench.machine import program
from bench.subjects import Attach
from meshbpf.demo import plumbing

PROXY_UID = 1337
SERVICE = "198.51.100.10"
# What istio-iptables writes for outgoing calls. `-o lo` is not the path of a call to a service: its address is routed
# to the pod's interface, and only the REDIRECT turns it to loopback.
RULES = """\
*nat
:ISTIO_INBOUND - [0:0]
:ISTIO_IN_REDIRECT - [0:0]
:ISTIO_OUTPUT - [0:0]
:ISTIO_REDIRECT - [0:0]
-A PREROUTING -p tcp -j ISTIO_INBOUND
-A OUTPUT -p tcp -j ISTIO_OUTPUT
-A ISTIO_INBOUND -p tcp --dport 15008 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15090 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15021 -j RETURN
-A ISTIO_INBOUND -p tcp --dport 15020 -j RETURN
-A ISTIO_INBOUND -p tcp -j ISTIO_IN_REDIRECT
-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
-A ISTIO_OUTPUT -s 127.0.0.6/32 -o lo -j RETURN
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp ! --dport 15008 -m owner --uid-owner {uid} -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner {uid} -j RETURN
-A ISTIO_OUTPUT -m owner --uid-owner {uid} -j RETURN
-A ISTIO_OUTPUT ! -d 127.0.0.1/32 -o lo -p tcp ! --dport 15008 -m owner --gid-owner {uid} -j ISTIO_IN_REDIRECT
-A ISTIO_OUTPUT -o lo -m owner ! --gid-owner {uid} -j RETURN
-A ISTIO_OUTPUT -m owner --gid-owner {uid} -j RETURN
-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN
-A ISTIO_OUTPUT -j ISTIO_REDIRECT
-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {port}
COMMIT
"""


class Sidecar(Envoy):
    """Envoy as the user whom the rules exempt, which still may reach its files wherever they are."""

    def command(self, listen: int) -> list[str]:
        return [
            program("setpriv"), f"--reuid={PROXY_UID}", f"--regid={PROXY_UID}", "--clear-groups", "--pdeathsig=KILL",
            "--inh-caps=+dac_override", "--ambient-caps=+dac_override", *super().command(listen),
        ]  # fmt: skip


class Intercepted(ABC):
    """Endpoints and an Envoy in a namespace, which a subclass leads the client's calls to."""

    name: str
    address: str
    client_group: Path | None = None

    def __init__(self, run: Path, make_group: Callable[[str], Path], client: set[int] | None, cpus: set[int] | None):
        self.run, self.make_group, self.client, self.cpus = run / self.name, make_group, client, cpus
        self.namespace: int | None = None
        self.access_log: Path | None = None
        self.stack = contextlib.ExitStack()

    def start(self) -> None:
        self.run.mkdir()
        with plumbing.fresh() as there:
            self.namespace = os.dup(there)
            self.stack.callback(os.close, self.namespace)
            interface()
            backend = Backend(self.run, self.make_group(f"{self.name}-backend"), self.client)
            self.stack.callback(backend.stop)
            backend.start()
            envoy = Sidecar(self.run, self.make_group(f"{self.name}-agent"), self.cpus, backend.ports)
            self.stack.callback(envoy.stop)
            envoy.start()
            self.access_log = envoy.access_log
        self.intercept(int(envoy.address.partition(":")[2]))

    @abstractmethod
    def intercept(self, port: int) -> None:
        """Have calls to `address` come to this port of 127.0.0.1."""

    def evidence(self) -> dict[str, Any]:
        return {}

    def stop(self) -> None:
        self.stack.close()


class Redirected(Intercepted):
    name = "envoy-iptables"
    address = SERVICE

    def intercept(self, port: int) -> None:
        self._iptables("iptables-restore", text=RULES.format(uid=PROXY_UID, port=port))

    def evidence(self) -> dict[str, Any]:
        """How often each rule was met: that the calls were redirected, and those of Envoy exempt."""
        return {"rules": [line for line in self._iptables("iptables-save", "-c", "-t", "nat") if "ISTIO" in line]}

    def _iptables(self, name: str, *options: str, text: str = "") -> list[str]:
        assert self.namespace is not None
        with plumbing.inside(self.namespace):
            done = subprocess.run([program(name), *options], input=text, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{name}: {done.stderr.strip()}")
        return done.stdout.splitlines()


class Hooked(Intercepted):
    """`meshbpf attach` with one service whose only endpoint is Envoy; no process of ours runs."""

    name = "envoy-hook"

    def intercept(self, port: int) -> None:
        mesh = Attach(
            self.name, mode="direct", acceleration="off", number=7, run=self.run, make_group=self.make_group, cpus=None,
            endpoints=[port],
        )  # fmt: skip
        self.stack.callback(mesh.detach)
        mesh.detach()
        mesh.once()
        self.address, self.client_group = mesh.address, mesh.client_group


def interface() -> None:
    """What a pod's eth0 is here: an interface with an address and the default route; nobody is at its other end."""
    with IPRoute() as links:
        links.link("add", ifname="eth0", kind="veth", peer="far0")
        for name in ("far0", "eth0"):
            (index,) = links.link_lookup(ifname=name)
            links.link("set", index=index, state="up")
        links.addr("add", index=index, address="198.18.78.2", prefixlen=24)
        links.route("add", dst="default", gateway="198.18.78.1")
