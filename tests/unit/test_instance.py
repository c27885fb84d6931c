"""Where an instance lives, who may change it, and what it remembers."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import instance as module
from loader.instance import Instance, owner
from meshbpf.errors import Busy, MeshError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "RUN", tmp_path / "run")
    monkeypatch.setattr(module, "BPFFS", tmp_path / "bpf")
    yield


@pytest.mark.parametrize("name", ["default", "a", "9", "a-b", "x" * 40])
def test_names(name: str) -> None:
    assert Instance(name).pins.name == name


@pytest.mark.parametrize("name", ["", "A", "-a", "a-", "a_b", "a/b", "..", ".", "a b", "x" * 41, "a\n"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(MeshError, match="lower-case"):
        Instance(name)


def test_how_a_command_names_it() -> None:
    assert [Instance(name).option for name in ("default", "eval7")] == ["", " --instance eval7"]


def test_paths(tmp_path: Path) -> None:
    made = Instance("a")
    assert made.maps("0123") == tmp_path / "bpf/meshbpf/a/maps-0123"
    assert made.links == tmp_path / "bpf/meshbpf/a/links"
    assert made.socket == tmp_path / "run/a/agent.sock"


def test_state_is_for_its_owner_and_comes_back() -> None:
    made = Instance("a")
    assert made.read_state() == {}
    made.write_state({"layout": "0123"})
    assert made.read_state() == {"layout": "0123"}
    assert stat.S_IMODE(made.state_file.stat().st_mode) == 0o600
    assert stat.S_IMODE(made.run.stat().st_mode) == 0o700
    assert [path.name for path in made.run.iterdir()] == ["state.json"]


def test_a_state_that_is_cut_off_is_none() -> None:
    made = Instance("a")
    made.write_state({"layout": "0123"})
    made.state_file.write_text('{"layout": ')
    assert made.read_state() == {}


def test_one_at_a_time_and_the_owner_is_named() -> None:
    made = Instance("a")
    assert owner(made) == 0
    assert not made.run.exists(), "asking makes nothing"
    with made.lock():
        assert owner(made) == os.getpid()
        with pytest.raises(Busy, match=rf"instance a is in use by process {os.getpid()}\n  remedy: change"):
            made.lock()
        with Instance("b").lock():
            pass
    assert owner(made) == 0
    with made.lock():
        pass


def test_a_lock_in_a_folder_that_was_removed_is_none() -> None:
    """A detach removes the folder with the lock it holds; whoever comes in between must not hold the removed one."""
    made = Instance("a")
    real, removed = module.fcntl.flock, []

    def flock(fd: int, operation: int) -> None:
        real(fd, operation)
        if not removed:
            shutil.rmtree(made.run)
            removed.append(True)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module.fcntl, "flock", flock)
        held = made.lock()
    assert removed
    with pytest.raises(Busy):
        made.lock()
    held.release()


def test_many_lock_and_remove_and_never_two_at_once() -> None:
    made = Instance("a")
    inside, most, done = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, done
        while done < 200:
            try:
                held = made.lock()
            except Busy:
                continue
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0)  # let the others try
            with guard:
                inside -= 1
                done += 1
            with contextlib.suppress(OSError):
                shutil.rmtree(made.run)
            held.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_a_lock_leaves_no_folder_of_its_own() -> None:
    made = Instance("a")
    with made.lock():
        assert made.run.is_dir()
    assert not made.run.exists() and not module.RUN.exists()
    with made.lock():
        made.write_state({"cgroups": []})
    assert sorted(os.listdir(made.run)) == ["lock", "state.json"]


def test_a_lock_leaves_the_folder_of_who_came_after_a_detach() -> None:
    made = Instance("a")
    first = made.lock()
    shutil.rmtree(made.run)
    with made.lock():
        first.release()
        assert os.listdir(made.run) == ["lock"] and owner(made) == os.getpid()
