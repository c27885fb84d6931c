"""docs/tutorial.md as a script: its blocks are typed into one shell, in order, and print what stands below them.

A block ```sh is typed; a bare block right behind it is what that prints, at 80 columns. The shell is in a network
namespace and a cgroup of its own, so that the page's ports are free, and whatever was started can be ended.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loader import environment
from tests.support.machine import CLI, ROOT, until

PAGE = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```sh\n(?P<typed>.*?)^```\n(?:```\n(?P<shown>.*?)^```\n)?", re.M | re.S)
# What only looks may be asked again, as a person would who sees that it has not got round yet.
LOOKS = re.compile(r"(\$HOST_[AB] )?meshbpf (status|services|endpoints|explain|connections|edges|check)\b[^\n]*\n")
PATIENCE = 15.0
INSTANCES = ("tutorial", "tutorial-a", "tutorial-b")  # also the names of its cgroups
HOSTS = INSTANCES[1:]
STORES = Path("/var/lib/meshbpf")
# What differs from run to run: its shape counts, and whether a count is zero.
VARIES: Mapping[str, str] = {
    r"/sys/fs/cgroup/unified\b": "/sys/fs/cgroup",
    r"/\S*/(?=host-a/)": "DIR/",
    r"ACCELERATION .*?\n(?=[A-Z])": "ACCELERATION ...\n",  # what this kernel can
    r"\b[0-9]+(\.[0-9]+)?(ms|s)\b|\b[0-9]+[mhd]([0-9]+[smh])?\b": "AGE",
    r"(?<=127\.0\.0\.1:)[3-6][0-9]{4}\b": "PORT",
    r"(?<![\w.:/-])[1-9][0-9]*(?![\w.:/%-])": "N",
    r"(?<=agent )[0-9]+|(?<=worker )[0-9]+|(?<=link )[0-9]+(?=-)": "ID",
    r"\s+": " ",
}


@dataclass(frozen=True, slots=True)
class Block:
    line: int
    typed: str
    shown: str | None

    @property
    def looks(self) -> bool:
        return LOOKS.fullmatch(self.typed) is not None


def blocks(page: str) -> Iterator[Block]:
    for found in BLOCK.finditer(page):
        yield Block(page.count("\n", 0, found.start()) + 2, found["typed"], found["shown"])


def same(text: str) -> str:
    """What is left of an output when everything that differs from run to run is gone."""
    for pattern, instead in VARIES.items():
        text = re.sub(pattern, instead, text, flags=re.S if "ACCELERATION" in pattern else 0)
    return text.strip()


class Shell:
    """One shell for the whole page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._top = environment.cgroup2()
        self._cgroup = self._top / f"mt-tutorial-{os.getpid()}"
        self._cgroup.mkdir()
        # Nor anything of a `make test` that we may run below: the page's make would speak as its child.
        others = ("MESHBPF_", "MAKE", "MFLAGS")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        self._errors = (folder / "stderr").open("wb+")
        self._process = subprocess.Popen(
            ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec unshare --net bash --norc', str(self._cgroup)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=ROOT,
            env={**kept, "COLUMNS": "80", "TMPDIR": str(folder), "LC_ALL": "C.UTF-8"},
        )  # fmt: skip
        self.type("ip link set lo up\n")

    def type(self, text: str, seconds: float = 60.0) -> tuple[str, str, int]:
        """What it printed to stdout and to stderr, and how its last command ended."""
        script = self._folder / "typed"
        script.write_text(text)
        begin = os.fstat(self._errors.fileno()).st_size
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f". {script} < /dev/null; printf '\\0%s\\0' $?\n".encode())
        self._process.stdin.flush()
        out = _until_end(self._process.stdout, time.monotonic() + seconds)
        told, _, code = out.removesuffix("\0").rpartition("\0")
        return told, os.pread(self._errors.fileno(), 1 << 20, begin).decode(), int(code)

    def close(self) -> None:
        """End all that was started, and take away what a page that stopped half way has left."""
        cgroups = [self._cgroup, *(self._top / name for name in INSTANCES)]
        for cgroup in cgroups:
            if cgroup.is_dir():
                (cgroup / "cgroup.kill").write_text("1")
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()
        for name in INSTANCES:
            subprocess.run([*CLI, "detach", "--instance", name], check=False, stdout=subprocess.DEVNULL)
        for host in HOSTS:
            if Path("/run/netns", host).exists():
                subprocess.run(["ip", "netns", "delete", host], check=True)
        until(lambda: all(map(_removed, cgroups)), "the cgroups are empty")
        for path in stores():
            path.unlink()


def left() -> list[str]:
    """What the page has not taken away."""
    places = [environment.cgroup2(), Path("/sys/fs/bpf/meshbpf"), Path("/run/meshbpf"), Path("/run/netns")]
    return [str(place / name) for place in places for name in INSTANCES if (place / name).exists()] + [
        str(path) for path in stores()
    ]


def stores() -> list[Path]:
    return [path for instance in INSTANCES for path in STORES.glob(f"{instance}.db*")]


def _removed(cgroup: Path) -> bool:
    """Its processes take a moment to end."""
    try:
        cgroup.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _until_end(stream: IO[bytes], end: float) -> str:
    """Up to the code between two zero bytes that follows each block."""
    heard = b""
    while heard.count(b"\0") < 2:
        ready, _, _ = select.select([stream], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"the block did not end in time; it printed:\n{heard.decode()}"
        piece = os.read(stream.fileno(), 1 << 16)
        assert piece, f"the shell has ended; it printed:\n{heard.decode()}"
        heard += piece
    return heard.decode()
