"""What crosses the loopback, seen by scapy: redirected payload does not, and with acceleration off all of it does.

The proof of a redirect is absence, so the same test with acceleration off has to find every marker.
"""

from __future__ import annotations

import json
import sys
import threading

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Packet
from scapy.sendrecv import AsyncSniffer

from tests.support.machine import Machine, policy, service, until

REQUESTS = 30
JOINED_BY = 10  # the fifth request may join; a little later all must be inside
CLIENT = """
import http.client, sys
connection = http.client.HTTPConnection("127.96.0.10", 80, timeout=10)
for count in range(int(sys.argv[1])):
    connection.request("POST", f"/{count}", body=f"marker-{count:03d}-request")
    connection.getresponse().read()
"""


class Capture:
    """Every TCP payload that crosses `lo` to or from `port`, while the block runs."""

    def __init__(self, port: int) -> None:
        self._started = threading.Event()
        self._payloads: list[bytes] = []
        self._sniffer = AsyncSniffer(
            iface="lo", store=False, prn=self._take, started_callback=self._started.set, filter=f"tcp port {port}"
        )

    def _take(self, packet: Packet) -> None:
        if TCP in packet:
            self._payloads.append(bytes(packet[TCP].payload))

    def __enter__(self) -> Capture:
        self._sniffer.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._sniffer.stop()

    def crossed(self, count: int) -> bool:
        return any(f"marker-{count:03d}-request".encode() in payload for payload in self._payloads)


@pytest.mark.parametrize("acceleration", ["auto", "off"])
def test_payload_on_the_loopback(machine: Machine, acceleration: str) -> None:
    port = machine.endpoint("a")
    machine.configure(service("orders", "127.96.0.10", [port]), policy("orders", acceleration=acceleration))
    machine.run_agent()
    until(lambda: machine.show("status")["agent"]["acceleration"].startswith("redirect"), "the self-test has passed")
    with Capture(machine.proxy_port) as proxy, Capture(port) as endpoint:
        done = machine.client(sys.executable, "-c", CLIENT, str(REQUESTS))
        assert done.returncode == 0, done.stderr
        until(lambda: endpoint.crossed(REQUESTS - 1), "the last request was captured on its way to the endpoint")
    assert all(endpoint.crossed(count) for count in range(REQUESTS))  # the capture works
    seen = [count for count in range(REQUESTS) if proxy.crossed(count)]
    if acceleration == "off":
        assert seen == list(range(REQUESTS))
    else:
        assert seen
        assert max(seen) < JOINED_BY, json.dumps(seen)
