"""A mesh that a worker cannot follow: it says why, and the agent leads nobody by that mesh."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import json
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest

from loader.dataplane import Applied, Dataplane
from loader.instance import Instance
from loader.plan import Tables, plan
from meshbpf.errors import DataplaneError, EnvironmentLack
from meshbpf.model import Mesh, Service
from meshbpf.runtime import about, netns
from meshbpf.runtime.agent import Agent, Options
from meshbpf.runtime.channel import Channel
from meshbpf.runtime.following import Following
from meshbpf.runtime.namespaces import Namespaces
from meshbpf.runtime.supervisor import Handle, Supervisor
from meshbpf.runtime.worker import Worker
from meshbpf.telemetry import Totals

GOOD, NEW = Mesh(generation=1), Mesh(services=(Service("orders", addresses=("127.96.0.1",)),), generation=2)


class Said:
    """Stands for a channel."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def send(self, message: dict[str, Any], fds: object = (), blob: object = None) -> None:
        self.messages.append(message)


def test_a_worker_says_why_it_cannot_follow(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[dict[str, Any]]:
        worker, said = Worker(Instance("unit")), Said()
        worker._channel = cast(Channel, said)

        def refuse(*_: object) -> None:
            raise RuntimeError("no such luck")

        monkeypatch.setattr(worker, "_use", refuse)
        worker._receive({"type": "mesh", "blob": Packed(NEW)}, [])
        return said.messages

    (answer,) = asyncio.run(run())
    assert answer == {"type": "refused", "generation": 2, "why": "RuntimeError: no such luck"}


def test_a_worker_that_refused_its_first_mesh_keeps_no_descriptors() -> None:
    async def run() -> None:
        worker = Worker(Instance("unit"))
        worker._receive({"type": "listen", "netns": 1}, fds)
        worker._receive({"type": "unlisten", "netns": 1}, [])

    fds = list(os.pipe())
    asyncio.run(run())
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


class Packed:
    """Stands for a Blob."""

    def __init__(self, mesh: Mesh) -> None:
        self._bytes = about.pack(mesh, {})

    def read(self) -> Any:
        return json.loads(self._bytes)


class Process:
    pid = 7


def supervised() -> tuple[Supervisor, Handle, list[str]]:
    changes: list[str] = []
    supervisor = Supervisor(Instance("unit"), {}, lambda *_: None, lambda: changes.append("changed"))
    handle = Handle(0, cast(asyncio.subprocess.Process, Process()))
    supervisor._handles[0] = handle
    return supervisor, handle, changes


def test_the_supervisor_remembers_a_refusal_until_another_mesh_comes() -> None:
    supervisor, handle, changes = supervised()
    supervisor.use(2, bytes)
    supervisor._receive(handle, {"type": "using", "generation": 2, "trouble": ""}, [])
    assert supervisor.ready == 1
    supervisor._receive(handle, {"type": "refused", "generation": 2, "why": "poison"}, [])
    assert supervisor.refusal == "worker 7 cannot follow: poison"
    assert (supervisor.ready, len(changes)) == (0, 2)
    supervisor.use(1, bytes)
    assert supervisor.refusal == ""
    supervisor._receive(handle, {"type": "using", "generation": 1, "trouble": ""}, [])
    assert supervisor.ready == 1


class Plane:
    """Stands for the kernel's tables."""

    layout = "unit"

    def __init__(self) -> None:
        self.applied: list[int] = []
        self.error: Exception | None = None
        self.left = False

    def apply(self, mesh: Mesh) -> Applied:
        if self.error is not None:
            raise self.error
        self.applied.append(mesh.generation)
        return Applied(0, plan(mesh, Tables()), self.left)


class Workers:
    """Stands for the supervisor: answers every mesh at once."""

    def __init__(self) -> None:
        self.told: list[int] = []
        self.ready = 1
        self.refusal = self.trouble = ""
        self.refuses = ""

    def use(self, generation: int, _about: bytes) -> None:
        self.told.append(generation)
        self.refusal = self.refuses if generation == NEW.generation else ""
        self.ready = 0 if self.refusal else 1


@dataclass(frozen=True, slots=True)
class Followed:
    following: Following
    plane: Plane
    workers: Workers
    left: list[int]  # when it was heard that an endpoint left: the meshes applied by then


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Followed:
    monkeypatch.setattr("loader.instance.RUN", tmp_path)
    plane, workers = Plane(), Workers()
    left: list[int] = []

    async def settled(_seconds: float) -> bool:
        return True

    made = Following(
        Instance("unit"), (), GOOD, cast(Supervisor, workers), cast(Namespaces, None), Totals(), settled,
        lambda: left.extend(plane.applied),
    )  # fmt: skip
    made.plane = cast(Dataplane, plane)

    async def tell(mesh: Mesh) -> None:
        workers.use(mesh.generation, bytes)

    monkeypatch.setattr(made, "tell", tell)
    return Followed(made, plane, workers, left)


def test_what_a_worker_refuses_is_not_told_to_the_kernel(followed: Followed) -> None:
    following, plane, workers = followed.following, followed.plane, followed.workers
    workers.refuses = "worker 7 cannot follow: poison"
    asyncio.run(following.apply(NEW))
    assert plane.applied == []
    assert workers.told == [2, 1], "the last good mesh, to all"
    assert "poison" in following.error
    assert following.mesh is GOOD
    workers.refuses = ""
    asyncio.run(following.apply(NEW))
    assert (plane.applied, following.error) == ([2], "")


@pytest.mark.parametrize("error", [DataplaneError("E2BIG"), OSError(28, "No space left on device")])
def test_no_error_of_the_machine_ends_the_following(followed: Followed, error: Exception) -> None:
    following, plane = followed.following, followed.plane
    plane.error = error
    asyncio.run(following.apply(NEW))
    assert following.error == str(error)
    plane.error = None
    asyncio.run(following.apply(NEW))
    assert (plane.applied, following.error) == ([2], "")


def test_an_endpoint_of_a_udp_port_that_left_is_told_once_the_kernel_knows(followed: Followed) -> None:
    asyncio.run(followed.following.apply(NEW))
    assert followed.left == []
    followed.plane.left = True
    asyncio.run(followed.following.apply(NEW))
    assert followed.left == [2, 2]


def test_a_state_file_that_cannot_be_written_is_tried_again(followed: Followed, tmp_path: Path) -> None:
    following = followed.following

    async def run() -> None:
        (tmp_path / "unit" / "state.new").mkdir(parents=True)
        await following.apply(NEW)
        await following.noted()
        assert following.mesh.generation == 2
        assert "state.json is old" in following.error
        (tmp_path / "unit" / "state.new").rmdir()
        following.note_again()
        await following.noted()
        assert following.error == ""
        assert Instance("unit").read_state()["mesh"]["generation"] == 2

    asyncio.run(run())


def test_a_state_file_that_is_written_at_last_does_not_hide_a_refusal(followed: Followed, tmp_path: Path) -> None:
    following = followed.following

    async def run() -> None:
        (tmp_path / "unit" / "state.new").mkdir(parents=True)
        await following.apply(NEW)
        await following.noted()
        followed.workers.refuses = "worker 7 cannot follow: poison"
        await following.apply(NEW)
        (tmp_path / "unit" / "state.new").rmdir()
        following.note_again()
        await following.noted()
        assert following.error == "worker 7 cannot follow: poison"

    asyncio.run(run())


def test_changes_do_not_wait_for_the_state_file_which_ends_with_the_newest(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    following, writes, may_write = followed.following, threading.Event(), threading.Event()
    written: list[int] = []

    def write(_instance: Instance, _layout: str, _cgroups: object, mesh: Mesh, _lack: object) -> None:
        writes.set()
        may_write.wait()
        written.append(mesh.generation)

    monkeypatch.setattr("loader.dataplane.write_state", write)

    async def run() -> None:
        for generation in (2, 3, 4):
            await following.apply(replace(NEW, generation=generation))
            await asyncio.to_thread(writes.wait)
        assert followed.plane.applied == [2, 3, 4]
        may_write.set()
        await following.noted()

    try:
        asyncio.run(run())
    finally:
        may_write.set()  # else the thread outlives a failure
    assert written == [2, 4]


def test_a_needed_task_that_dies_is_told() -> None:
    async def die() -> None:
        raise RuntimeError("of this")

    async def run() -> None:
        agent = Agent(Options(Instance("unit"), (), 1), GOOD)
        task = asyncio.ensure_future(die())
        agent.need(task)
        assert agent.dead == ""
        await asyncio.wait([task])
        assert agent.dead.endswith("has died: RuntimeError('of this')")
        agent.stop()
        assert agent.dead == "", "it is time to end"

    asyncio.run(run())


def test_reading_a_mesh_again_keeps_what_did_not_change() -> None:
    one, two = (Service(name, addresses=(f"127.96.0.{n}",)) for n, name in enumerate(("orders", "users"), 1))
    reader = about.Reader()
    first = reader.mesh(json.loads(about.pack(Mesh(services=(one, two), generation=1), {})))
    assert first == Mesh(services=(one, two), generation=1)
    changed = Service("users", addresses=("127.96.0.9",))
    second = reader.mesh(json.loads(about.pack(Mesh(services=(one, changed), generation=2), {})))
    assert second == Mesh(services=(one, changed), generation=2)
    assert second.services[0] is first.services[0]


def test_our_own_namespace_is_entered_without_a_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netns, "_enter", lambda _fd: pytest.fail("setns"))
    with netns.inside(netns.Own.fd()):
        pass


def test_a_namespace_that_may_not_be_entered_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def setns(_fd: int, _kind: int) -> int:
            ctypes.set_errno(errno.EPERM)
            return -1

    monkeypatch.setattr(netns, "_libc", Library)
    with pytest.raises(EnvironmentLack, match="CAP_SYS_ADMIN and CAP_SYS_PTRACE"):
        netns._enter(0)
