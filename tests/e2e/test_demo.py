"""`meshbpf demo` finds its fault in time and leaves nothing: at its end, interrupted, or killed and run again."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loader import environment
from tests.support.machine import ROOT

DEMO = [sys.executable, "-m", "meshbpf.cli", "demo"]
SECONDS = 30.0
FOUND = "FOUND: 198.18.77.23:8080 (orders-3) failed"
MIDDLE = "meshbpf services --instance demo"  # agent, endpoints, namespaces: everything is there by then


@pytest.fixture(autouse=True)
def turn() -> Iterator[None]:
    """One demo at a time is all that a machine has room for: another run of these tests is waited for."""
    with Path(tempfile.gettempdir(), "meshbpf-test-demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def left() -> list[str]:
    """What a demo left on this machine."""
    links = subprocess.run(["bpftool", "-j", "-f", "link"], capture_output=True, text=True, check=True).stdout
    pins = [path for link in json.loads(links) for path in link.get("pinned", ()) if "/meshbpf/demo/" in path]
    folders = [Path("/run/meshbpf/demo"), Path("/run/meshbpf-demo"), Path("/sys/fs/bpf/meshbpf/demo")]
    folders += [*environment.cgroup2().glob("meshbpf-demo*"), *Path("/run/netns").glob("meshbpf-demo*")]
    return pins + [str(folder) for folder in folders if folder.exists()]


def finish(began: float, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert FOUND in done.stdout
    assert time.monotonic() - began < SECONDS
    assert left() == []


@contextmanager
def half_way() -> Iterator[subprocess.Popen[str]]:
    """A demo that has everything running."""
    with subprocess.Popen(
        DEMO, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # A suite that runs in a shell's background inherits an ignored SIGINT, and would hand it on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    ) as demo:  # fmt: skip
        assert demo.stdout is not None and demo.stderr is not None
        assert any(MIDDLE in line for line in demo.stdout), demo.stderr.read()
        try:
            yield demo
        finally:
            demo.kill()


def test_finds_the_fault_and_leaves_nothing() -> None:
    began = time.monotonic()
    done = subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    finish(began, done)
    assert "orders-3 × " in done.stdout.split("Mend it")[1]
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_half_way_leaves_nothing(number: signal.Signals, code: int) -> None:
    with half_way() as demo:
        demo.send_signal(number)
        assert demo.wait(SECONDS) == code
    assert left() == []


def test_killed_half_way_is_taken_away_by_the_next() -> None:
    with half_way() as demo:
        other = subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert (other.returncode, f"process {demo.pid}" in other.stderr) == (1, True)
        demo.kill()
        demo.wait()
    assert left() != []
    assert "meshbpf-demo-web" in os.listdir("/run/netns")
    began = time.monotonic()
    finish(began, subprocess.run(DEMO, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60))
