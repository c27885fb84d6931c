"""An attached instance with no agent and no proxy: what the kernel programs do by themselves.

A socket belongs to the cgroup in which it was made, so the test process enters the cgroup only to make its clients.
Endpoints are bare listeners: a loopback handshake is over when connect() returns, so whoever is readable was reached.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from loader import abi, dataplane, environment
from loader.instance import Instance
from meshbpf.model import (
    Agent,
    Balance,
    Endpoint,
    LoadBalancer,
    MapSizes,
    Mesh,
    Mode,
    OnProxyDown,
    Port,
    Protocol,
    Service,
    ServicePolicy,
)
from tests.support.machine import until

SECONDS = 10.0
SIZES = MapSizes(services=256, slots=4096, endpoints=512, policies=128, flows=1024, members=64)
AGENT = Agent(maps=SIZES)


def service(name: str, addresses: str | Sequence[str], *endpoints: Endpoint, port: int = 80) -> Service:
    """A TCP service with one port, `main`."""
    every = (addresses,) if isinstance(addresses, str) else tuple(addresses)
    return Service(name, addresses=every, ports=(Port("main", port, Protocol.TCP),), endpoints=endpoints)


def mesh(
    *services: Service,
    mode: Mode = Mode.AUTO,
    simple: Balance = Balance.ROUND_ROBIN,
    down: OnProxyDown = OnProxyDown.DIRECT,
    sizes: MapSizes = SIZES,
) -> Mesh:
    """All services under one and the same policy."""
    policies = {
        s.id: ServicePolicy(service=s.name, mode=mode, load_balancer=LoadBalancer(simple), on_proxy_down=down)
        for s in services
    }
    return Mesh(Agent(maps=sizes), services, policies)


class Listener:
    """An endpoint that never says a word. `accept` gives the connection that reached it."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        if family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind((address, port))
        self.socket.listen(1024)
        self.socket.settimeout(SECONDS)
        self.address, self.port = self.socket.getsockname()[:2]

    def endpoint(self, weight: int = 100, **more: object) -> Endpoint:
        return Endpoint(self.address, {"main": self.port}, weight, **more)  # type: ignore[arg-type]

    def accept(self) -> socket.socket:
        return self.socket.accept()[0]

    def fileno(self) -> int:
        return self.socket.fileno()

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def reached(*listeners: Listener) -> Listener:
    """Which of them has a connection waiting; takes it and closes it."""
    ready, _, _ = select.select(listeners, [], [], SECONDS)
    assert len(ready) == 1, f"{len(ready)} endpoints were reached"
    found: Listener = ready[0]
    found.accept().close()
    return found


def untouched(*listeners: Listener) -> bool:
    return not select.select(listeners, [], [], 0)[0]


def join(cgroup: Path, pid: int = 0) -> None:
    (cgroup / "cgroup.procs").write_text(str(pid or os.getpid()))


@contextlib.contextmanager
def inside(cgroup: Path) -> Iterator[None]:
    """Within: this process is in the cgroup, and so is every socket it makes."""
    home = next(x[3:] for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
    join(cgroup)
    try:
        yield
    finally:
        join(environment.cgroup2() / home.lstrip("/"))


def _identity(plane: dataplane.Dataplane) -> str:
    return plane.maps["services"].info()["map_id"]


class Ground:
    """Use as a context manager: an instance and a cgroup of its own, gone at the end whatever the test did."""

    def __init__(self, name: str) -> None:
        self.instance = Instance(name)
        self.cgroup = environment.cgroup2() / name
        self._planes: list[dataplane.Dataplane] = []

    def __enter__(self) -> Ground:
        self.cgroup.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for plane in self._planes:
            plane.close()
        dataplane.detach(self.instance)
        self.remove(self.cgroup)

    @staticmethod
    def remove(cgroup: Path) -> None:
        """With everything below it; waits for processes that have just ended."""

        def gone() -> bool:
            for folder in [*sorted(cgroup.rglob("*/"), reverse=True), cgroup]:
                with contextlib.suppress(FileNotFoundError):
                    try:
                        folder.rmdir()
                    except OSError:
                        return False
            return True

        until(gone, f"{cgroup} is empty")

    def child(self, name: str) -> Path:
        folder = self.cgroup / name
        folder.mkdir()
        return folder

    def attach(self, wanted: Mesh, *cgroups: Path) -> None:
        with self.instance.lock():
            dataplane.attach(self.instance, cgroups or (self.cgroup,), wanted)

    @property
    def plane(self) -> dataplane.Dataplane:
        """The attached tables, opened anew after every attach."""
        opened = dataplane.open_pins(self.instance)
        assert opened is not None
        # Not by their folder: tables of a layout that was left and is back are others.
        if not self._planes or _identity(self._planes[-1]) != _identity(opened[0]):
            self._planes.append(opened[0])
        else:
            opened[0].close()
        return self._planes[-1]

    def client(
        self,
        family: int = socket.AF_INET,
        cgroup: Path | None = None,
        protocol: int = 0,
        kind: int = socket.SOCK_STREAM,
    ) -> socket.socket:
        """An application's socket."""
        with inside(cgroup or self.cgroup):
            made = socket.socket(family, kind, protocol)
        made.settimeout(SECONDS)
        return made

    def clients(self, count: int, family: int = socket.AF_INET) -> list[socket.socket]:
        with inside(self.cgroup):
            made = [socket.socket(family, socket.SOCK_STREAM) for _ in range(count)]
        for one in made:
            one.settimeout(SECONDS)
        return made

    def connect(self, address: str, port: int = 80, family: int = 0) -> socket.socket:
        made = self.client(family or (socket.AF_INET6 if ":" in address else socket.AF_INET))
        try:
            made.connect((address, port))
        except BaseException:
            made.close()
            raise
        return made

    def reasons(self) -> Mapping[str, int]:
        """Verdicts of the connect hooks by reason."""
        counted = self.plane.counters().items()
        return {reason: count for (program, reason), count in counted if program == "connect"}

    def counts(self, address: str, port: int = 80) -> tuple[int, int, int, int]:
        """Connections of the service: opened direct, opened proxy, closed direct, closed proxy."""
        key = bytes(abi.ServiceKey(abi.pack_address(address), port, 6))
        service_id = self.plane.maps["services"].lookup(key)
        assert service_id is not None
        return self.plane.connections()[int.from_bytes(service_id, "little")]

    def origin(self, netns: int, address: str, port: int) -> abi.FlowValue | None:
        """What the kernel says about a connection that came from there; None when no connect hook led it."""
        raw = self.plane.maps["flows"].lookup(bytes(abi.FlowKey(netns, abi.pack_address(address), port)))
        return None if raw is None else abi.FlowValue.from_buffer_copy(raw)

    def proxy(self, *listeners: Listener, beat: bool = True) -> None:
        """These are the proxy's listeners, all on one port, and it lives right now."""
        self.plane.mark([listener.socket for listener in listeners])
        self.plane.set_agent(listeners[0].port, 0)
        if beat:
            self.plane.beat(time.monotonic_ns())
