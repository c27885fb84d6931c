"""Joining and leaving under fire: an application that sends and reads all the time never sees an error or a wrong byte.

The applications are processes of their own, so that both processors are used and a send can be interrupted anywhere.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import pytest

from loader import abi, redirect
from loader.rig import Rig
from meshbpf.reason import Reason

PIECE = 100
SECONDS = 40.0


@contextmanager
def process(work: Callable[[], Any]) -> Iterator[Callable[[], Any]]:
    """`work` in a forked child; yields a function that waits for its result."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)
            os.write(writing, json.dumps(work()).encode())
            code = 0
        except BaseException:  # noqa: BLE001  a child of pytest must not become a second pytest
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    os.close(writing)
    ended = False

    def result() -> Any:
        nonlocal ended
        with os.fdopen(reading, "rb") as file:
            raw = file.read()
        ended = True
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        return json.loads(raw)

    try:
        yield result
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def pieces(start: int, number: int) -> bytes:
    return b"".join(b"%0*d" % (PIECE, start + i) for i in range(number))


def sender(sock: socket.socket, least: int, enough: mmap.mmap) -> dict[str, int]:
    """Numbered pieces, one send each, as fast as the socket takes them: `least`, and on until the reader has seen
    enough, because how often the two meet depends on what else the machine does. Errors by name.
    """
    errors: dict[str, int] = {}
    sock.setblocking(False)
    deadline = time.monotonic() + SECONDS
    for index in count():
        if index >= least and (enough[0] or time.monotonic() > deadline):
            break
        data = pieces(index, 1)
        while data:
            try:
                data = data[sock.send(data) :]
            except BlockingIOError:
                select.select([], [sock], [], 5)
            except OSError as error:
                name = error.strerror or str(error)
                errors[name] = errors.get(name, 0) + 1
                break
    sock.shutdown(socket.SHUT_WR)
    return errors


@pytest.mark.slow
def test_joins_and_leaves_while_the_application_sends(rig: Rig) -> None:
    """The application streams 300 000 numbered sends; the proxy reads, and joins and leaves as fast as it can."""
    total = 300_000
    joined = left = at = 0
    expected, rest = 0, b""
    redirected = rig.count(Reason.REDIRECTED)
    enough = mmap.mmap(-1, 1)
    with rig.pair() as pair, process(lambda: sender(pair.c, total, enough)) as result:
        pair.p.setblocking(False)
        membership = None
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            at += 1
            try:
                data = pair.p.recv(1 << 16)
            except BlockingIOError:
                # Everything is read: the moment that joining waits for.
                membership = rig.join(pair)
                joined += membership is not None
                select.select([pair.p], [], [], 1)
                continue
            if not data:
                break
            rest += data
            whole = len(rest) // PIECE
            assert rest[: whole * PIECE] == pieces(expected, whole)
            expected, rest = expected + whole, rest[whole * PIECE :]
            if membership is not None and at % 3 == 0:
                membership.leave()
                left += not membership.inside
                membership = None
                enough[0] = joined > 1000 and left > 300
        assert result() == {}
    assert expected >= total
    assert enough[0], (joined, left)
    assert rig.count(Reason.REDIRECTED) - redirected > 10_000


@pytest.mark.slow
def test_drains_while_the_application_sends(rig: Rig) -> None:
    """As a detach would: the whole table is emptied again and again, the target of the sends included."""
    total, drained, expected, rest = 200_000, 0, 0, b""
    redirected = rig.count(Reason.REDIRECTED)
    enough = mmap.mmap(-1, 1)
    with rig.pair() as pair, process(lambda: sender(pair.c, total, enough)) as result:
        pair.p.setblocking(False)
        deadline, joins = time.monotonic() + 60, 0
        while time.monotonic() < deadline:
            try:
                data = pair.p.recv(1 << 16)
            except BlockingIOError:
                if drained * 4 < joins:
                    drained += redirect.drain(rig.maps, 0.0) == 0
                    rig.commands.pairs.delete(redirect.NO_PAIR)
                joins += rig.join(pair) is not None
                enough[0] = drained > 100 and joins > 400
                select.select([pair.p], [], [], 1)
                continue
            if not data:
                break
            rest += data
            whole = len(rest) // PIECE
            assert rest[: whole * PIECE] == pieces(expected, whole)
            expected, rest = expected + whole, rest[whole * PIECE :]
        assert result() == {}
    assert expected >= total
    assert enough[0], (drained, joins)
    assert rig.count(Reason.REDIRECTED) - redirected > 5_000


def test_the_control_shows_that_a_failing_send_is_seen(rig: Rig) -> None:
    """A sender whose target is missing, under a program without our rules, reports errors: no errors above means none.

    The obvious control, deleting the target of a running sender, is not run: besides EPIPE for the sender it makes the
    kernel warn when the target is closed (inet_sock_destruct: bytes that landed after the purge stay charged).
    """
    with rig.pair() as pair, rig.naive():
        number = rig.force(pair)
        rig.delete(number, abi.Side.PROXY)
        enough = mmap.mmap(-1, 1)
        enough[0] = True
        with process(lambda: sender(pair.c, 10, enough)) as result:
            assert result() == {"Permission denied": 10}


def test_closing_in_the_middle_of_a_stream(rig: Rig) -> None:
    """The proxy's socket is closed while the application sends: what plain TCP would say, and a clean kernel log."""

    def stream() -> str:
        pair.p.close()
        pair.c.setblocking(False)
        while True:
            try:
                pair.c.send(b"x" * PIECE)
            except BlockingIOError:
                select.select([], [pair.c], [], 5)
            except (ConnectionResetError, BrokenPipeError) as error:
                return type(error).__name__

    for round in range(200):
        with rig.pair() as pair:
            membership = rig.joined(pair)
            with process(stream) as result:
                for _ in range(round % 20):
                    pair.p.recv(1 << 16)
                if round % 2:
                    membership.leave()
                pair.p.close()
                assert result() in ("ConnectionResetError", "BrokenPipeError")


@pytest.mark.slow
def test_answers_both_ways_while_joining_and_leaving(rig: Rig) -> None:
    """Requests and answers in lockstep, redirected and by TCP in turn, answers of every size up to 200 kB."""
    total = 20_000

    def client() -> int:
        pair.c.setblocking(True)
        pair.c.settimeout(10)
        for index in range(total):
            pair.c.sendall(b"%08d" % index)
            size = index * 37 % 2000 if index % 50 else index * 7 % 200_000
            want, got = b"%08d" % index + b"x" * size, bytearray()
            while len(got) < len(want):
                data = pair.c.recv(1 << 16)
                if not data:
                    return index
                got += data
            if bytes(got) != want:
                return index
        return total

    with rig.pair() as pair, process(client) as result:
        membership, joins = None, 0
        for index in range(total):
            got = b""
            while len(got) < 8:
                got += pair.p.recv(8 - len(got))
            assert got == b"%08d" % index
            if index % 7 == 0:
                membership = rig.join(pair)
                joins += membership is not None
            elif index % 7 == 4 and membership is not None:
                membership.leave()
                assert not membership.inside
            pair.p.sendall(got + b"x" * (index * 37 % 2000 if index % 50 else index * 7 % 200_000))
        assert result() == total
        assert joins > total // 7 - 5
