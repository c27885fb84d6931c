"""A rig per module, and a kernel log that must stay clean. Skipping, or failing instead, is tests/conftest.py's."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from loader.rig import Rig
from tests.support.ground import Listener

TROUBLE = re.compile(r"WARNING:|BUG:|Oops|refcount_t|inet_sock_destruct|hung task|general protection")


def trouble() -> list[str]:
    done = subprocess.run(["dmesg"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if TROUBLE.search(line)]


@pytest.fixture(autouse=True)
def clean_dmesg() -> Iterator[None]:
    before = trouble()
    yield
    assert trouble()[len(before) :] == []


@pytest.fixture
def listeners() -> Iterator[list[Listener]]:
    """Four endpoints; a module that needs others has its own."""
    made = [Listener(f"127.0.0.{n}") for n in range(1, 5)]
    yield made
    for listener in made:
        listener.close()


@pytest.fixture(scope="module")
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Attached, with this process under the mesh and its listeners open."""
    made = Rig(f"rig-{os.getpid()}-{request.module.__name__[-8:].replace('_', '-').strip('-')}")
    try:
        made.start()
        made.enter()
        made.serve()
        yield made
    finally:
        try:
            made.finish()
        finally:
            made.close()
