"""Killed at any step: the next attach works, and detach leaves nothing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loader import dataplane, libbpf
from meshbpf.errors import DataplaneError
from meshbpf.model import MapSizes, Mesh
from tests.support import bpftool
from tests.support.ground import SIZES, Ground, Listener, mesh, reached, service, untouched

ADDRESS = "127.96.5.1"
LARGER = MapSizes(services=512, slots=4096, endpoints=512, policies=128, flows=1024, members=64)
STEPS = ["folders", "compiled", "filled", "redirect", *(f"{hook} on" for hook in dataplane.CGROUP_HOOKS),
         "programs kept", "state written"]  # fmt: skip


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"steps-{os.getpid()}") as made:
        yield made


@pytest.fixture(scope="module")
def a() -> Iterator[Listener]:
    with Listener() as made:
        yield made


def killed(run: Callable[[], object]) -> None:
    """Run it in a child of ours, which must not come to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            run()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL, "it was not killed"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def attach_until(ground: Ground, wanted: Mesh, last: int) -> Callable[[], None]:
    def run() -> None:
        with ground.instance.lock():
            for number, _ in enumerate(dataplane.attach_steps(ground.instance, [ground.cgroup], wanted)):
                if number == last:
                    die()

    return run


def wanted(a: Listener, sizes: MapSizes = SIZES) -> Mesh:
    return mesh(service("orders", ADDRESS, a.endpoint()), sizes=sizes)


def served(ground: Ground, a: Listener) -> bool:
    try:
        ground.connect(ADDRESS).close()
    except ConnectionRefusedError:
        assert untouched(a)
        return False
    return reached(a) is a


def nothing_left(ground: Ground) -> None:
    ours = bpftool.pinned(ground.instance)
    dataplane.detach(ground.instance)
    assert ours.gone()
    assert bpftool.hooks_on(ground.cgroup) == []
    assert not ground.instance.pins.exists()
    assert not ground.instance.run.exists()


def test_the_steps_are_these(ground: Ground, a: Listener) -> None:
    steps = list(dataplane.attach_steps(ground.instance, [ground.cgroup], wanted(a)))
    assert len(steps) == len(STEPS)
    assert all(step.startswith(name) for step, name in zip(steps, STEPS, strict=True))
    nothing_left(ground)


@pytest.mark.parametrize("last", range(len(STEPS)), ids=[name.replace(" ", "-") for name in STEPS])
def test_a_first_attach_killed_after(ground: Ground, a: Listener, last: int) -> None:
    killed(attach_until(ground, wanted(a), last))
    connected = STEPS.index("connect4 on")
    assert served(ground, a) == (last >= connected), "led before it was complete, or not after"
    nothing_left(ground)
    killed(attach_until(ground, wanted(a), last))
    ground.attach(wanted(a))
    assert served(ground, a)
    nothing_left(ground)


@pytest.mark.parametrize("others", [SIZES, LARGER], ids=["same-tables", "other-tables"])
def test_an_upgrade_killed_after_each_step(ground: Ground, a: Listener, others: MapSizes) -> None:
    """Each begins on what the last one left behind; whatever it is, calls are led all the time."""
    ground.attach(wanted(a))
    for last in range(len(STEPS)):
        sizes = SIZES if last % 2 else others
        killed(attach_until(ground, wanted(a, sizes), last))
        assert served(ground, a), STEPS[last]
        with ground.connect(ADDRESS) as sock:
            assert sock.getpeername() == (ADDRESS, 80) or 0 < last < len(STEPS) - 1, STEPS[last]
            reached(a)
    ground.attach(wanted(a, sizes))
    with ground.connect(ADDRESS) as sock:
        assert sock.getpeername() == (ADDRESS, 80)
        reached(a)
    assert len(list(ground.instance.pins.glob("maps-*"))) == 1
    assert not (ground.instance.pins / "stage").exists()
    nothing_left(ground)


@pytest.mark.parametrize("at", range(len(dataplane.CGROUP_HOOKS)))
def test_killed_between_attaching_a_link_and_pinning_it(
    ground: Ground, a: Listener, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    real, calls = libbpf.pin, iter(range(100))

    def pin(fd: int, path: Path) -> None:
        if next(calls) == at:
            die()
        real(fd, path)

    monkeypatch.setattr(libbpf, "pin", pin)
    killed(lambda: ground.attach(wanted(a)))
    monkeypatch.undo()
    assert len(bpftool.on_cgroup(ground.cgroup)) <= at
    nothing_left(ground)


@pytest.mark.parametrize("at", [0, 1, 4, 5, 9, 15])
def test_a_detach_killed_at_any_pin(ground: Ground, a: Listener, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    ground.attach(wanted(a))
    ours = bpftool.pinned(ground.instance)
    real, calls = Path.unlink, iter(range(100))

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if next(calls) == at:
            die()
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    killed(lambda: dataplane.detach(ground.instance))
    monkeypatch.undo()
    nothing_left(ground)
    assert ours.gone()


def test_the_compiler_is_killed(ground: Ground, a: Listener, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ground.attach(wanted(a))
    suicide = tmp_path / "python"
    suicide.write_text("#!/bin/sh\nkill -9 $$\n")
    suicide.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(suicide))
    with pytest.raises(DataplaneError, match="the compiler process ended with -9"):
        ground.attach(wanted(a))
    monkeypatch.undo()
    assert served(ground, a)
    ground.attach(wanted(a))
    nothing_left(ground)
