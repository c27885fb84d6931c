"""A constant-rate HTTP/1.1 client: request k is due at start + k/rate, whatever the server does, and its latency counts
from that planned moment. A stalled server therefore pays for every request it kept waiting (no coordinated omission).

Runs alone (`python openloop.py HOST:PORT PATH --rate R`), prints one JSON line, imports nothing of this package.
A timerfd paces it: event loops round their timers to milliseconds, which is more than the latencies looked for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Sequence

_ABSOLUTE = 1  # TFD_TIMER_ABSTIME
_NONBLOCK = os.O_NONBLOCK | os.O_CLOEXEC
_DRAIN_NS = 2_000_000_000
_LIBC = ctypes.CDLL(None, use_errno=True)


def ticker(first_ns: int, interval_ns: int) -> int:
    """A file descriptor that counts the due requests: at `first_ns` (CLOCK_MONOTONIC), then every interval."""
    descriptor: int = _LIBC.timerfd_create(time.CLOCK_MONOTONIC, _NONBLOCK)
    times = (ctypes.c_long * 4)(*divmod(interval_ns, 10**9), *divmod(first_ns, 10**9))
    if descriptor < 0 or _LIBC.timerfd_settime(descriptor, _ABSOLUTE, ctypes.byref(times), None) != 0:
        raise OSError(ctypes.get_errno(), "timerfd")
    return descriptor


class Connection:
    """One kept connection: at most one request on it, the answer read until its length is complete."""

    __slots__ = ("host", "planned", "port", "rest", "sock")

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.planned = 0  # when the request under way was due
        self.rest = -1  # bytes still missing; -1: the head has not come yet
        self.sock = socket.create_connection((host, port), timeout=5)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setblocking(False)

    def feed(self, data: bytes) -> bool:
        """Take bytes; True when the answer is complete. Raises ValueError for anything but a 200 with a length."""
        if self.rest < 0:
            head, found, body = data.partition(b"\r\n\r\n")
            if not found or not head.startswith(b"HTTP/1.1 200"):
                raise ValueError(head[:40])
            lower = head.lower()
            at = lower.index(b"content-length:") + 15
            self.rest = int(lower[at:].split(b"\r\n", 1)[0]) - len(body)
        else:
            self.rest -= len(data)
        return self.rest == 0


def summary(samples: Sequence[int], late: Sequence[int], errors: int, seconds: float) -> dict[str, float]:
    """Nanosecond samples to the cell the bench stores. Nearest rank: a p99 is a latency that happened. Pure."""
    ordered, lateness = sorted(samples), sorted(late)

    def at(values: Sequence[int], share: float) -> float:
        return values[min(len(values) - 1, int(share * len(values)))] / 1000 if values else 0.0

    shares = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "p999_us": 0.999, "max_us": 1.0}
    return {
        "requests": len(ordered), "errors": errors, "seconds": seconds,
        **{name: at(ordered, share) for name, share in shares.items()},
        "late_p99_us": at(lateness, 0.99),
    }  # fmt: skip


def run(address: str, path: str, *, rate: float, count: int, seconds: float, warmup: float) -> dict[str, float]:
    """Offer the load and drain it; the requests of the first `warmup` seconds are sent but not counted."""
    host, _, port = address.partition(":")
    connections = [Connection(host, int(port or 80)) for _ in range(count)]
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: bench\r\n\r\n".encode()
    idle = deque(connections)
    due: deque[int] = deque()  # planned moments of requests that wait for a free connection
    interval = round(1e9 / rate)
    total, skip = int((warmup + seconds) * rate), int(warmup * rate)
    start = time.monotonic_ns() + 50_000_000
    counted_from = start + skip * interval
    timer = ticker(start, interval)
    poll = select.epoll()
    poll.register(timer, select.EPOLLIN)
    by_fd = {connection.sock.fileno(): connection for connection in connections}
    for descriptor in by_fd:
        poll.register(descriptor, select.EPOLLIN)
    samples: list[int] = []
    late: list[int] = []
    planned = finished = errors = 0
    now, last = time.monotonic_ns, start + total * interval + _DRAIN_NS
    while finished < total and now() < last:
        for descriptor, _ in poll.poll(0.5):
            if descriptor == timer:
                for _ in range(struct.unpack("Q", os.read(timer, 8))[0]):
                    if planned < total:
                        due.append(start + planned * interval)
                        planned += 1
                continue
            connection = by_fd[descriptor]
            try:
                done = connection.feed(connection.sock.recv(65536))
            except (OSError, ValueError):
                errors += 1
                finished += 1
                poll.unregister(descriptor)
                connection.sock.close()
                del by_fd[descriptor]
                fresh = Connection(connection.host, connection.port)
                by_fd[fresh.sock.fileno()] = fresh
                poll.register(fresh.sock.fileno(), select.EPOLLIN)
                idle.append(fresh)
                continue
            if done:
                if connection.planned >= counted_from:
                    samples.append(now() - connection.planned)
                finished += 1
                idle.append(connection)
        while due and idle:
            connection = idle.popleft()
            connection.planned, connection.rest = due.popleft(), -1
            late.append(now() - connection.planned)
            connection.sock.send(request)
    # Whatever is still unanswered waited at least until now: leaving it out would flatter the slow.
    waiting = [c.planned for c in by_fd.values() if c not in idle] + list(due)
    samples += [now() - moment for moment in waiting if moment >= counted_from]
    for connection in by_fd.values():
        connection.sock.close()
    poll.close()
    os.close(timer)
    return {**summary(samples, late[skip:], errors + len(waiting), seconds), "offered": total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("path")
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--warmup", type=float, default=0.5)
    args = parser.parse_args()
    gc.disable()  # a collection of ours would be counted as the server's latency
    load = {"rate": args.rate, "count": args.connections, "seconds": args.seconds, "warmup": args.warmup}
    print(json.dumps(run(args.address, args.path, **load)))


if __name__ == "__main__":
    main()
