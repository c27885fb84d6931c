"""docs/tutorial.md is true: every block can be typed, prints what stands below it, and nothing is left at the end.

`python -m tests.e2e.test_tutorial` writes the outputs into the page anew; look at the difference before you commit it.
"""

from __future__ import annotations

import fcntl
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import environment
from tests.support import tutorial
from tests.support.tutorial import Block, Shell, same

TERMINATED = re.compile(
    r"^.*: line \d+: +\d+ Terminated .*\n", re.M
)  # what bash says of a program that was told to end


@pytest.fixture(autouse=True)
def turn() -> Iterator[None]:
    """Instances and cgroups have the page's names: another run of this test is waited for."""
    with Path(tempfile.gettempdir(), "meshbpf-test-tutorial.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert tutorial.left() == [], "somebody follows the tutorial on this machine just now"
        yield


def typed(shell: Shell, block: Block) -> str:
    """What the block printed; of one that only looks, what it prints once it is what the page says, if ever."""
    end = time.monotonic() + tutorial.PATIENCE
    while True:
        out, errors, code = shell.type(block.typed)
        if block.shown is None:
            assert code == 0 and TERMINATED.sub("", errors) == "", f"docs/tutorial.md:{block.line}: {code} {errors}"
        if not block.looks or same(out) == same(block.shown or "") or time.monotonic() > end:
            return out


@pytest.mark.slow
def test_the_page_is_true(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    try:
        for block in tutorial.blocks(tutorial.PAGE.read_text()):
            out = typed(shell, block)
            assert same(out) == same(block.shown or ""), f"docs/tutorial.md:{block.line} prints\n{out}"
        assert tutorial.left() == []
    finally:
        shell.close()


def write() -> None:
    """Blocks that only look are given the time in which the workers report, and registries answer."""
    page = tutorial.PAGE.read_text()
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder))
        try:
            for block in tutorial.blocks(page):
                time.sleep(3.0 if block.looks else 0.0)
                out, errors, _ = shell.type(block.typed)
                print(f"{block.typed}{errors}{out}")
                out = out.replace(str(environment.cgroup2()), "/sys/fs/cgroup")  # where it is on most machines
                if block.shown is not None:
                    before = f"{block.typed}```\n```\n"
                    page = page.replace(f"{before}{block.shown}```\n", f"{before}{out}```\n", 1)
        finally:
            shell.close()
    tutorial.PAGE.write_text(page)


if __name__ == "__main__":
    write()
