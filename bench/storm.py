"""New connections at a constant rate, each of which must reach its endpoint: `serve PORT`, and `call RATE HOST`.

Rule: a connection is due at start + k / RATE, whatever became of those before it, so that a moment in which nobody is
let in shows as failed or slow ones and never as fewer. The endpoint says one letter; whoever hears it has arrived, and
leaves by reset, so that no TIME_WAIT piles up. `call` ends with its stdin and then prints what came of it as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections import Counter

from bench.openloop import ticker

LETTER = b"A"
PATIENCE_NS = 5_000_000_000
RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close by RST


class Storm:
    def __init__(self, rate: float, host: str) -> None:
        self.host = host
        self.failed: Counter[str] = Counter()
        self.arrived: Counter[int] = Counter()  # by the second of arrival
        self.offered = self.slowest = self.latest = 0  # the last two in nanoseconds
        self._interval = round(1e9 / rate)
        self._start = time.monotonic_ns() + 50_000_000
        self._poll = select.epoll()
        self._open: dict[int, tuple[socket.socket, int]] = {}  # … and when it was due

    def run(self, stop: int) -> None:
        """Until `stop` is readable, and until the last connection has arrived or failed."""
        timer = ticker(self._start, self._interval)
        self._poll.register(timer, select.EPOLLIN)
        self._poll.register(stop, select.EPOLLIN)
        stopped = 0
        while not stopped or (self._open and time.monotonic_ns() - stopped < PATIENCE_NS):
            for descriptor, _ in self._poll.poll(0.5):
                if descriptor == timer:
                    for _ in range(struct.unpack("Q", os.read(timer, 8))[0]):
                        self._call()
                elif descriptor == stop:
                    stopped = time.monotonic_ns()
                    self._poll.unregister(stop)
                    self._poll.unregister(timer)
                else:
                    self._heard(descriptor)
        for sock, _due in self._open.values():
            self.failed["no word within 5 s"] += 1
            sock.close()
        os.close(timer)

    def _call(self) -> None:
        due = self._start + self.offered * self._interval
        self.offered += 1
        self.latest = max(self.latest, time.monotonic_ns() - due)
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        code = sock.connect_ex((self.host, 80))
        if code not in (0, errno.EINPROGRESS):
            self.failed[f"connect: {os.strerror(code)}"] += 1
            sock.close()
            return
        self._open[sock.fileno()] = sock, due
        self._poll.register(sock, select.EPOLLIN)

    def _heard(self, descriptor: int) -> None:
        sock, due = self._open.pop(descriptor)
        with sock:
            try:
                letter = sock.recv(1)
            except OSError as error:
                self.failed[str(error.strerror)] += 1
                return
        if letter != LETTER:
            self.failed[f"heard {letter!r}"] += 1
            return
        now = time.monotonic_ns()
        self.slowest = max(self.slowest, now - due)
        self.arrived[now // 10**9] += 1

    def result(self) -> dict[str, object]:
        whole = [self.arrived[second] for second in sorted(self.arrived)][1:-1]
        ok = sum(self.arrived.values())
        seconds = self.offered * self._interval / 1e9
        return {
            "offered": self.offered, "ok": ok, "failed": dict(self.failed), "seconds": seconds,
            "per_second": ok / seconds if seconds else 0.0, "least_per_second": min(whole, default=0),
            "slowest_ms": self.slowest / 1e6, "latest_ms": self.latest / 1e6,
        }  # fmt: skip


def serve(port: int) -> None:
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    print("listening", flush=True)
    while True:
        accepted, _address = listener.accept()
        with accepted:
            try:
                accepted.send(LETTER)
            except OSError:  # it has left
                continue


def main() -> None:
    role, *arguments = sys.argv[1:]
    if role == "serve":
        serve(int(arguments[0]))
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    storm = Storm(float(arguments[0]), arguments[1])
    storm.run(0)
    print(json.dumps(storm.result()), flush=True)


if __name__ == "__main__":
    main()
