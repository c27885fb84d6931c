"""The trials of the self-test about readers that block: as members they would get wrong what plain TCP gets right."""

from __future__ import annotations

import errno
import platform
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

from loader.rig import PATIENCE, Pair, Rig
from meshbpf.reason import Reason

Seen = tuple[bool, str]
RECVFROM = {"x86_64": 45, "aarch64": 207}.get(platform.machine(), 207)


def name_of(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


def blocking_reader(rig: Rig) -> Seen:
    """A blocking recv of a member ends with EAGAIN at any signal: blocking readers are left out."""
    with rig.pair(blocking=True) as pair:
        refused = rig.join(pair) is None and rig.redirector.last is Reason.READER_BLOCKS
        got = _blocked(pair, _signal, then=lambda: pair.p.sendall(b"x"))
        return refused and got == "x", f"{'left out' if refused else 'let in'}, recv after a signal: {got}"


def blocking_reader_control(rig: Rig) -> Seen:
    with rig.pair(blocking=True) as pair:
        rig.force(pair)
        got = _blocked(pair, _signal, then=lambda: pair.p.sendall(b"x"))
        return got != "x", f"recv after a signal: {got}"


def reset(rig: Rig) -> Seen:
    """A reset must be told as ECONNRESET, behind what was redirected before."""
    with rig.pair() as pair:
        rig.joined(pair)
        pair.p.sendall(b"x")
        _reset(pair)
        got = pair.c.recv(10)
        try:
            end = repr(pair.c.recv(10))
        except OSError as error:
            end = name_of(error)
        return (got, end) == (b"x", "ECONNRESET"), f"{got.decode()} then {end}"


def reset_control(rig: Rig) -> Seen:
    with rig.pair(blocking=True) as pair:
        rig.force(pair)
        got = _blocked(pair, lambda tid: _reset(pair))
        return got != "ECONNRESET", f"blocking recv: {got}"


def waitall(rig: Rig) -> Seen:
    """MSG_WAITALL of a member returns short: it blocks, so it is left out."""
    with rig.pair(blocking=True) as pair:
        refused = rig.join(pair) is None
        got = _in_two(pair)
        return refused and got == "x" * 20, f"{'left out' if refused else 'let in'}, {len(got)} of 20 bytes"


def waitall_control(rig: Rig) -> Seen:
    with rig.pair(blocking=True) as pair, rig.naive():
        rig.force(pair)
        got = _in_two(pair)
        return got != "x" * 20, f"{len(got)} of 20 bytes"


def _in_two(pair: Pair) -> str:
    pair.p.sendall(b"x" * 10)
    return _blocked(pair, lambda tid: pair.p.sendall(b"x" * 10), size=20, flags=socket.MSG_WAITALL)


def _signal(tid: int) -> None:
    signal.signal(signal.SIGUSR1, lambda number, frame: None)  # and stays: it may be delivered later than we return
    signal.siginterrupt(signal.SIGUSR1, False)
    signal.pthread_kill(tid, signal.SIGUSR1)


def _reset(pair: Pair) -> None:
    pair.p.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    pair.p.close()


def _blocked(
    pair: Pair,
    disturb: Callable[[int], object],
    then: Callable[[], object] = lambda: None,
    size: int = 100,
    flags: int = 0,
) -> str:
    """What a recv, blocked in the kernel, returns or raises when it is disturbed there."""
    result: list[str] = []

    def read() -> None:
        try:
            result.append(pair.c.recv(size, flags).decode())
        except OSError as error:
            result.append(name_of(error))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    _await_recv(reader)
    disturb(reader.ident or 0)
    if reader.native_id and reader.is_alive():
        _await_recv(reader)
    then()
    reader.join(PATIENCE)
    if reader.is_alive():
        pair.c.shutdown(socket.SHUT_RDWR)  # wakes it
        reader.join(PATIENCE)
        return "nothing, for ever"
    return result[0]


def _await_recv(reader: threading.Thread) -> None:
    """Until the thread sleeps in recv, or is done: nothing tells, so look."""
    deadline = time.monotonic() + PATIENCE
    path = f"/proc/self/task/{reader.native_id}/syscall"
    while reader.is_alive() and time.monotonic() < deadline:
        try:
            with open(path, encoding="ascii") as file:
                if file.read().split()[0] == str(RECVFROM):
                    return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.0005)
