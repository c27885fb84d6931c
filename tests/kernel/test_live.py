"""Weights and states that change while callers call: the spread follows at once, nobody is refused or cut off."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from meshbpf.model import (
    Balance,
    ConsistentHash,
    EndpointState,
    LoadBalancer,
    Mesh,
    Mode,
    SessionAffinity,
)
from tests.support.ground import SECONDS, SIZES, Ground, Listener, join, mesh, reached, service

ADDRESS = "127.96.9.1"
MOST = 30_000  # connections of one caller
BALANCERS = {
    "round robin": LoadBalancer(Balance.ROUND_ROBIN),
    "random": LoadBalancer(Balance.RANDOM),
    "hash": LoadBalancer(consistent_hash=ConsistentHash(True)),
    "affinity": LoadBalancer(session_affinity=SessionAffinity.CLIENT_IP),
}


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"live-{os.getpid()}") as made:
        made.attach(mesh())
        yield made


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    made = [Listener(f"127.0.0.{n}") for n in (1, 2, 3)]
    yield made
    for listener in made:
        listener.close()


def weighed(listeners: Sequence[Listener], weights: Sequence[int], balance: LoadBalancer) -> Mesh:
    """A weight of -1 is an endpoint that is not there."""
    ends = [a.endpoint(weight) for a, weight in zip(listeners, weights, strict=True) if weight >= 0]
    made = mesh(service("orders", ADDRESS, *ends), mode=Mode.DIRECT, sizes=SIZES)
    return replace(made, policies={key: replace(p, load_balancer=balance) for key, p in made.policies.items()})


class Callers:
    """A process that connects again and again; `some` waits until it has done so a good number of times."""

    def __init__(self, ground: Ground) -> None:
        self._progress, progress = os.pipe()
        stop, self._stop = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            with contextlib.suppress(BaseException):
                join(ground.cgroup)
                os.close(self._stop)
                _call(stop, progress)
            os._exit(0)
        os.close(stop)
        os.close(progress)

    def some(self) -> None:
        assert select.select([self._progress], [], [], SECONDS)[0], "nobody calls"
        assert os.read(self._progress, 1) == b"."

    def end(self) -> Counter[str]:
        """What became of the calls."""
        os.close(self._stop)
        said = b""
        while more := os.read(self._progress, 65536):
            said += more
        os.close(self._progress)
        os.waitpid(self._pid, 0)
        return Counter(json.loads(said.lstrip(b".")))


def _call(stop: int, progress: int) -> None:
    outcome: Counter[str] = Counter()
    while sum(outcome.values()) < MOST and not select.select([stop], [], [], 0)[0]:
        with socket.socket() as sock:
            sock.settimeout(SECONDS)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no port stays taken
            try:
                sock.connect((ADDRESS, 80))
                outcome["led"] += 1
            except OSError as error:
                outcome[str(error)] += 1
        if sum(outcome.values()) % 50 == 0:
            os.write(progress, b".")
    os.write(progress, json.dumps(outcome).encode())


@contextlib.contextmanager
def accepting(listeners: list[Listener]) -> Iterator[None]:
    """Within: whoever connects is let in and let go."""
    ended, end = os.pipe()

    def serve() -> None:
        while ended not in (ready := select.select([*listeners, ended], [], [])[0]):
            for listener in ready:
                listener.accept().close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        os.close(end)
        thread.join()
        os.close(ended)


def drop(listeners: list[Listener]) -> None:
    """Let go of those who connected last."""
    while ready := select.select(listeners, [], [], 0)[0]:
        for listener in ready:
            listener.accept().close()


def spread(ground: Ground, listeners: list[Listener], calls: int) -> list[int]:
    found: Counter[Listener] = Counter()
    for sock in ground.clients(calls):
        with sock:
            sock.connect((ADDRESS, 80))
            found[reached(*listeners)] += 1
    return [found[listener] for listener in listeners]


WEIGHTS = [(1, 1, 1), (4, 1, 0), (0, 1, 4), (1, 0, -1), (-1, 0, 1), (2, 3, 1)]


@pytest.mark.parametrize("kind", BALANCERS)
def test_nobody_is_refused_while_weights_change(ground: Ground, listeners: list[Listener], kind: str) -> None:
    balance = BALANCERS[kind]
    ground.plane.apply(weighed(listeners, WEIGHTS[0], balance))
    with accepting(listeners):
        callers = Callers(ground)
        for weights in WEIGHTS * 5:
            ground.plane.apply(weighed(listeners, weights, balance))
            callers.some()
        outcome = callers.end()
    assert outcome.keys() == {"led"}
    assert outcome["led"] >= 50 * len(WEIGHTS) * 5


def test_nobody_is_refused_while_the_kind_of_balancing_changes(ground: Ground, listeners: list[Listener]) -> None:
    with accepting(listeners):
        ground.plane.apply(weighed(listeners, WEIGHTS[0], BALANCERS["random"]))
        callers = Callers(ground)
        for _ in range(5):
            for balance in BALANCERS.values():
                ground.plane.apply(weighed(listeners, WEIGHTS[0], balance))
                callers.some()
        assert callers.end().keys() == {"led"}


def test_the_spread_follows_with_the_next_call(ground: Ground, listeners: list[Listener]) -> None:
    for weights in WEIGHTS:
        ground.plane.apply(weighed(listeners, weights, BALANCERS["round robin"]))
        drop(listeners)
        total = sum(weight for weight in weights if weight > 0)
        assert spread(ground, listeners, 12 * total) == [12 * max(weight, 0) for weight in weights]


@pytest.mark.parametrize("kind", BALANCERS)
def test_who_drains_keeps_what_it_has(ground: Ground, listeners: list[Listener], kind: str) -> None:
    balance = BALANCERS[kind]
    ground.plane.apply(weighed(listeners, WEIGHTS[0], balance))
    with ground.connect(ADDRESS) as client:
        (which,) = select.select(listeners, [], [], SECONDS)[0]
        with which.accept() as served:
            ends = [a.endpoint(state=EndpointState.DRAINING if a is which else EndpointState.READY) for a in listeners]
            made = weighed(listeners, WEIGHTS[0], balance)
            ground.plane.apply(replace(made, services=(replace(made.services[0], endpoints=tuple(ends)),)))
            found = spread(ground, listeners, 30)
            assert found[listeners.index(which)] == 0
            assert sum(found) == 30
            client.sendall(b"question")
            assert served.recv(100) == b"question"
            served.sendall(b"answer")
            assert client.recv(100) == b"answer"
