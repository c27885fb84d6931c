"""A tiny mesh for trying the kernel out: an instance and a cgroup of its own, and a proxy that is a bare listener.

The self-test and the kernel tests make their connections here. Traffic stays on the loopback; `close` leaves nothing.
`naive` is the control: the same members without any of the rules, to show that breaking them is noticed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loader import abi, dataplane, environment, libbpf, redirect
from loader.instance import Instance
from loader.pipes import Pipes
from meshbpf.model import Agent, Endpoint, MapSizes, Mesh, Mode, Port, Protocol, Service, ServicePolicy
from meshbpf.reason import Reason

ADDRESS4, ADDRESS6, PORT = "127.96.255.254", "fd00:6d62::fe", 80
PATIENCE = 2.0  # seconds for what takes microseconds
MESH = Mesh(
    agent=Agent(maps=MapSizes(services=16, slots=64, endpoints=16, policies=16, flows=1024, members=256)),
    services=(
        Service(
            "rig",
            addresses=(ADDRESS4, ADDRESS6),
            ports=(Port("any", PORT, Protocol.TCP),),
            endpoints=(Endpoint("127.0.0.1", {"any": 9}),),
        ),
    ),
    policies={("rig", "default"): ServicePolicy(service="rig", mode=Mode.PROXY)},
)


class NoPipes(Pipes):
    """Whoever tries splice holds pipes: what the kernel does about it is the question here."""

    def may_splice(self, pid: int) -> bool:
        return False


@dataclass(slots=True)
class Pair:
    """`c` is the application's socket, `p` the one the proxy accepted."""

    c: socket.socket
    p: socket.socket
    netns: int

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exc: object) -> None:
        self.c.close()
        self.p.close()


class Rig:
    """`start` attaches, `enter` puts the calling process under the mesh, `serve` opens the proxy's listeners."""

    def __init__(self, name: str, mesh: Mesh = MESH) -> None:
        self.instance = Instance(name)
        self.cgroup = environment.cgroup2() / name
        self.mesh = mesh
        self._home = ""
        self.listeners: dict[int, socket.socket] = {}

    def start(self) -> None:
        self.cgroup.mkdir(exist_ok=True)
        dataplane.attach(self.instance, [self.cgroup], self.mesh, naive=True)

    def enter(self) -> None:
        self._home = next(x[3:] for x in Path("/proc/self/cgroup").read_text().splitlines() if x.startswith("0::"))
        (self.cgroup / "cgroup.procs").write_text(str(os.getpid()))

    def serve(self, pipes: Pipes | None = None) -> None:
        opened = dataplane.open_pins(self.instance)
        if opened is None:
            raise RuntimeError(f"{self.instance.name} is not attached")
        self.plane = opened[0]
        self.maps = self.plane.maps_folder
        self.members = libbpf.Map(self.maps / "members", 4, len(bytes(abi.Member())))
        self.commands = redirect.Commands(self.maps)
        port = 0
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
            self.listeners[family] = self.listen(family, address, port)
            port = self.listeners[family].getsockname()[1]
        self.plane.set_agent(port, 0)
        self.port = port
        netns = dataplane.netns_cookie(self.listeners[socket.AF_INET])
        self.redirector = redirect.Redirector(self.maps, contextlib.nullcontext, netns, pipes or NoPipes())

    def listen(self, family: int, address: str, port: int) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(64)
        self.plane.mark([listener])
        listener.settimeout(PATIENCE)
        return listener

    def pair(
        self,
        family: int = socket.AF_INET,
        blocking: bool = False,
        client: socket.socket | None = None,
        listener: socket.socket | None = None,
    ) -> Pair:
        """A connection that connect led to us; not joined. `client` and `listener` may stand in another namespace."""
        self.plane.beat(time.monotonic_ns())
        c = socket.socket(family, socket.SOCK_STREAM) if client is None else client
        c.connect((ADDRESS4 if family == socket.AF_INET else ADDRESS6, PORT))
        p, _ = (listener or self.listeners[family]).accept()
        for end in (c, p):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # A timeout of 0 is O_NONBLOCK; Python waits by poll for any other, and sets O_NONBLOCK just the same.
            end.settimeout(None if blocking and end is c else PATIENCE)
        return Pair(c, p, dataplane.netns_cookie(p))

    def join(self, pair: Pair) -> redirect.Membership | None:
        client, local = pair.p.getpeername(), pair.p.getsockname()
        return self.redirector.join(pair.netns, client[0], client[1], local[0], local[1])

    def joined(self, pair: Pair) -> redirect.Membership:
        membership = self.join(pair)
        if membership is None:
            raise AssertionError(f"could not join: {self.redirector.last.word}")
        return membership

    def binding(self, membership: redirect.Membership) -> abi.Pair | None:
        raw = self.commands.pairs.lookup(membership.pair.to_bytes(8, "little"))
        return None if raw is None else abi.Pair.from_buffer_copy(raw)

    def delete(self, number: int, side: abi.Side) -> bool:
        """Tear a member out of the table with everything in it, as nobody should."""
        return self.commands.socks.delete(bytes(abi.MemberKey(number, side)))

    @contextlib.contextmanager
    def naive(self) -> Iterator[None]:
        """Within: every member redirects whatever it sends."""
        with libbpf.Map(self.maps / "stages", 4, 4) as stages:
            numbers = [libbpf.get(self.maps / name) for name in (redirect.NAIVE, redirect.STAGE)]
            try:
                stages.update(bytes(4), numbers[0].to_bytes(4, "little"))
                yield
            finally:
                stages.update(bytes(4), numbers[1].to_bytes(4, "little"))
                for number in numbers:
                    os.close(number)

    def force(self, pair: Pair) -> int:
        """Both into the table without a question, bound to each other but by no proof; returns the pair's number."""
        number = int.from_bytes(os.urandom(8), "little") | 1
        for side, end in ((abi.Side.APPLICATION, pair.c), (abi.Side.PROXY, pair.p)):
            member = bytes(abi.Member(number, 0, side))
            self.members.update(struct.pack("i", end.fileno()), member)
            self.commands.socks.update(bytes(abi.MemberKey(number, side)), struct.pack("q", end.fileno()))
        return number

    def count(self, reason: Reason, program: abi.Program = abi.Program.SK_MSG) -> int:
        return self.plane.counters().get((program.name.lower(), reason.word), 0)

    def finish(self) -> None:
        """The end of `serve` and `enter`."""
        for listener in self.listeners.values():
            listener.close()
        self.redirector.close()
        self.commands.close()
        self.members.close()
        self.plane.close()
        if self._home:
            (environment.cgroup2() / self._home.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))

    def close(self) -> None:
        """The end of `start`: nothing is left."""
        dataplane.detach(self.instance, lose_unread=True)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                self.cgroup.rmdir()
                return
            except OSError:  # a process that has just ended still counts
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
