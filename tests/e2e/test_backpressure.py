"""A reader that stops for ten seconds in the middle of a gibibyte costs the proxy less than a mebibyte.

Both ways, with both values of acceleration; and no byte is lost, doubled or out of order.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loader import abi, libbpf
from meshbpf.cli import ask
from tests.support.machine import Machine, policy, service, until

GIB = 1 << 30
MIB = 1 << 20
STOPPED_SECONDS = 10.0


def resident(pid: int) -> int:
    """Resident bytes of a process, its shared pages left out."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * 4096


def redirected_unread(machine: Machine) -> int:
    """The most bytes that any pair has redirected and nobody is known to have read."""
    layout = machine.instance.read_state()["layout"]
    most = 0
    with libbpf.Map(machine.instance.maps(layout) / "pairs", 8, ctypes.sizeof(abi.Pair)) as pairs:
        for _key, raw in pairs.items():
            pair = abi.Pair.from_buffer_copy(raw)
            most = max(most, *(pair.sent[side] - pair.read[side] for side in (0, 1)))
    return most


@pytest.mark.parametrize("acceleration", ["auto", "off"])
@pytest.mark.parametrize("way", ["download", "upload"])
def test_stopped_reader(machine: Machine, way: str, acceleration: str) -> None:
    script = [sys.executable, "-m", "tests.support.bulk"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = machine.start([*script, "serve"], **pipes)
    machine.configure(
        service("bulk", "127.96.0.30", [int(server.stdout.readline())]), policy("bulk", acceleration=acceleration)
    )
    machine.run_agent()
    until(lambda: machine.show("status")["agent"]["acceleration"].startswith("redirect"), "the self-test has passed")
    worker = ask.get(machine.instance, "/v1/status")["worker_pids"][0]  # type: ignore[index]
    before = resident(worker)
    client = machine.start_client(*script, "ask", "127.96.0.30", way, str(GIB), **pipes)
    reader = client if way == "download" else server
    assert reader.stdout.readline() == "stopped\n"
    most, unread = 0, 0
    deadline = time.monotonic() + STOPPED_SECONDS
    while time.monotonic() < deadline:  # a reader that stands still is the point: nothing to wait for
        most = max(most, resident(worker) - before)
        unread = max(unread, redirected_unread(machine))
        time.sleep(0.1)
    sockets = Path("/proc/net/sockstat").read_text().splitlines()[1]
    reader.stdin.write("go on\n")
    reader.stdin.flush()
    assert client.stdout.readline() == "whole\n"
    print(f"{way} acceleration={acceleration}: RSS +{most >> 10} KiB, redirected unread {unread >> 10} KiB, {sockets}")
    assert most < MIB
    assert unread <= MIB
