"""Where an instance lives: its pins, its run directory, its lock and its state file. Paths and locking only.

/sys/fs/bpf/meshbpf/NAME/maps-LAYOUT/   tables        /run/meshbpf/NAME/lock        who may change the instance
/sys/fs/bpf/meshbpf/NAME/programs/      programs      /run/meshbpf/NAME/state.json  what was attached, for reading
/sys/fs/bpf/meshbpf/NAME/links/         CGROUP-HOOK   /run/meshbpf/NAME/agent.sock  the agent's API
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshbpf.errors import Busy, MeshError

BPFFS = Path("/sys/fs/bpf")
RUN = Path("/run/meshbpf")
DEFAULT = "default"
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Instance:
    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise MeshError(f"instance {self.name!r}: use lower-case letters, digits and dashes, at most 40")

    @property
    def option(self) -> str:
        """What a command that is to mean this instance needs, with a blank before it; empty for the default one."""
        return "" if self.name == DEFAULT else f" --instance {self.name}"

    @property
    def pins(self) -> Path:
        return BPFFS / "meshbpf" / self.name

    @property
    def programs(self) -> Path:
        return self.pins / "programs"

    @property
    def links(self) -> Path:
        return self.pins / "links"

    def maps(self, layout: str) -> Path:
        return self.pins / f"maps-{layout}"

    @property
    def run(self) -> Path:
        return RUN / self.name

    @property
    def socket(self) -> Path:
        return self.run / "agent.sock"

    @property
    def state_file(self) -> Path:
        return self.run / "state.json"

    def make_run(self) -> None:
        RUN.mkdir(mode=0o755, exist_ok=True)
        self.run.mkdir(mode=0o700, exist_ok=True)

    def write_state(self, state: dict[str, Any], mesh: str = "") -> None:
        """Replace the state file in one step, so that a reader never sees half of it. `mesh` is JSON, already large."""
        self.make_run()
        staged = self.state_file.with_suffix(".new")
        text = json.dumps(state)
        staged.write_text(f'{text[:-1]}, "mesh": {mesh}}}' if mesh else text)
        staged.chmod(0o600)
        staged.replace(self.state_file)

    def read_state(self) -> dict[str, Any]:
        """What the last attach or apply left; empty when nothing is attached."""
        try:
            state: dict[str, Any] = json.loads(self.state_file.read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return state

    def lock(self) -> Lock:
        return Lock(self)


class Lock:
    """Exclusive right to change the instance, for as long as the process holds it. Raises Busy, naming the owner."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        path = instance.run / "lock"
        while True:
            try:
                instance.make_run()
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except (FileNotFoundError, FileExistsError):  # a detach is removing the folder just now
                if instance.run.is_file():
                    raise
                continue
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(self._fd, 64, 0).decode() or "unknown"
                os.close(self._fd)
                raise Busy(
                    f"instance {instance.name} is in use by process {owner}\n"
                    "  remedy: change its configuration, which a running agent reads again, or stop that process"
                ) from error
            if _is(path, self._fd):
                break
            os.close(self._fd)  # the lock of a folder that a detach has removed: nobody else would see it
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            self._tidy()
            os.close(self._fd)
            self._fd = -1

    def _tidy(self) -> None:
        """A start that failed before it attached anything leaves no run directory with nothing but our lock in it."""
        run, path = self._instance.run, self._instance.run / "lock"
        if not self._instance.pins.exists() and _is(path, self._fd) and os.listdir(run) == ["lock"]:
            path.unlink()  # whoever waits for it sees that it is gone, and makes it anew
            for folder in (run, run.parent):
                with contextlib.suppress(OSError):  # another instance's, or made anew already
                    folder.rmdir()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


def _is(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def attached() -> list[str]:
    """The names of the instances that are attached here, as far as we may see."""
    try:
        return sorted(path.parent.name for path in RUN.glob("*/state.json"))
    except PermissionError:
        return []


def owner(instance: Instance) -> int:
    """The process that holds the instance's lock, or 0. Makes nothing."""
    try:
        fd = os.open(instance.run / "lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(fd, 64, 0).decode()
        return int(text) if text.isdigit() else 0
    else:
        return 0
    finally:
        os.close(fd)
