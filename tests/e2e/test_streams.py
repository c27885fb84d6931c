"""Long streams and new connections while the agent is restarted, killed and upgraded to tables of another layout.

Direct streams may neither end nor lack a byte, new ones may not fail. Proxied ones are drained: what ends in time is
whole, and for each that is cut the access log has one record. `make bench` has the same with 320 streams.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.machine import Machine, free_port, policy, service, until

DIRECT, NEW, RELAYED, WEB, WEB_OFF = (f"127.96.0.{number}" for number in range(1, 6))
STREAMS = (
    f"direct:lasting:{DIRECT}:40", f"relayed:lasting:{RELAYED}:6", f"relayed-brief:brief:{RELAYED}:6",
    f"kept:kept:{WEB}:6", f"kept-off:kept:{WEB_OFF}:6", f"download:download:{WEB}:6",
    f"download-off:download:{WEB_OFF}:6",
)  # fmt: skip
CUT = {"relayed": 6, "download": 6, "download-off": 6}  # what is never over
RATE = 500  # new connections per second
OTHER_LAYOUT = {"flows": 4096}


def started(machine: Machine, *arguments: object) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    assert machine.start(command, stdout=subprocess.PIPE, text=True).stdout.readline() == "listening\n"


def client(machine: Machine, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *map(str, arguments)]
    return machine.start_client(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str], word: str = "") -> dict[str, Any]:
    """Tell it that it is over; what came of it."""
    out, _err = process.communicate(word, timeout=30)
    found: dict[str, Any] = json.loads(out)
    return found


def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("number", "sizes"),
    [(signal.SIGTERM, {}), (signal.SIGKILL, {}), (signal.SIGTERM, OTHER_LAYOUT)],
    ids=["restarted", "killed", "upgraded"],
)
def test_streams_outlive_their_agent_or_are_drained(
    machine: Machine, number: signal.Signals, sizes: dict[str, int]
) -> None:
    raw, http, new = free_port(), free_port(), free_port()
    started(machine, "bench.stream_server", raw, http)
    started(machine, "bench.storm", "serve", new)
    documents = [
        service("direct", DIRECT, [raw], "tcp"),
        service("new", NEW, [new], "tcp"),
        service("relayed", RELAYED, [raw], "tcp"),
        service("web", WEB, [http]),
        service("web-off", WEB_OFF, [http]),
        policy("relayed", mode="proxy"),
        policy("web", acceleration="redirect"),
        policy("web-off", acceleration="off"),
    ]
    machine.agent_spec = {
        "proxy": {"listen": f"127.0.0.1:{machine.proxy_port}", "drain": "1s", "workers": 2},
        "acceleration": "redirect",
    }
    machine.configure(*documents)
    machine.run_agent()
    until(lambda: machine.agent_says()["acceleration"].startswith("redirect"), "the self-test has passed")
    layout = machine.instance.read_state()["layout"]
    workers = machine.agent_says()["worker_pids"]
    callers = client(machine, "bench.stream_callers", *STREAMS)
    assert callers.stdout is not None and callers.stdin is not None
    assert callers.stdout.readline() == "begun\n"
    storm = client(machine, "bench.storm", "call", RATE, NEW)
    counts = {row["reason"]: row["count"] for row in machine.show("reasons")["reasons"]}
    assert counts["redirected"] > 0
    assert machine.agent is not None
    machine.agent.send_signal(number)
    callers.stdin.write("wind\n")
    callers.stdin.flush()
    machine.agent.wait(20)
    machine.agent_spec["maps"] = sizes
    machine.configure(*documents)
    machine.run_agent()
    until(lambda: gone(workers), "the earlier workers are gone")
    tally, connected = ended(callers, "end\n"), ended(storm)

    assert (machine.instance.read_state()["layout"] != layout) == bool(sizes)
    assert connected["failed"] == {} and connected["ok"] == connected["offered"] > 3 * RATE, connected
    for name, found in tally.items():
        cut = CUT.get(name, 0)
        assert found.get("cut", 0) == cut, tally
        assert found.get("whole", 0) == found["streams"] - cut, tally
        assert not found.get("wrong", 0) and not found.get("failed", 0), tally
        assert found["received"] > 0
    assert tally["direct"]["sent"] > 40 * 2048 * 8
    assert all(tally[name]["told to close"] + tally[name].get("stale", 0) >= 6 for name in ("kept", "kept-off")), tally
    records = Counter(record["service"] for record in machine.records(1) if record["reason"] == "draining")
    assert records == {"relayed": 6, "web": 6, "web-off": 6}, records
    lines = [dict(word.split("=") for word in line.split() if "=" in word) for line in machine.log().splitlines()]
    assert sum(int(line["cut"]) for line in lines if "cut" in line) == 18, machine.log()
    if number is signal.SIGKILL:  # the next agent has heard of it from those who outlived the first
        found = {row["reason"]: row["count"] for row in machine.show("reasons")["reasons"]}
        assert found["draining"] == 18, found
