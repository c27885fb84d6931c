"""The trials of the self-test: each does one thing that redirects are known to get wrong, with our rules and without.

`ours` answers (right?, what was seen), `control` (wrong?, what was seen). Every socket they make they close; amounts
are bounded. The kernel lore behind each is its first line.
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass

from loader import abi, blocking
from loader.blocking import Seen, name_of
from loader.pipes import holds_payload_pipe
from loader.rig import PATIENCE, Pair, Rig
from meshbpf.reason import Reason

FLOOD = 16 << 20
CHUNK = 1 << 16


@dataclass(frozen=True, slots=True)
class Trial:
    """`must_fail`: the control is wrong on every kernel."""

    ours: Callable[[Rig], Seen]
    control: Callable[[Rig], Seen]
    must_fail: bool


def unread(sock: socket.socket) -> int:
    """FIONREAD, by which nginx, Java and .NET size their reads."""
    return int(struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4)))[0])


def receive(sock: socket.socket, size: int) -> bytes:
    got = bytearray()
    while len(got) < size and (data := sock.recv(1 << 20)):
        got += data
    return bytes(got)


def flood(sock: socket.socket) -> int:
    """How much a socket takes whose peer does not read, up to FLOOD."""
    sock.setblocking(False)
    taken = 0
    while taken < FLOOD:
        try:
            taken += sock.send(bytes(CHUNK))
        except BlockingIOError:
            break
    return taken


def order(rig: Rig) -> Seen:
    """A member reads what was redirected first: TCP bytes unread when a redirect comes are inverted with it."""
    with rig.pair() as pair:
        pair.c.sendall(b"first")
        early = rig.join(pair) is not None
        first = pair.p.recv(100)
        rig.joined(pair)
        data = b"".join(b"%08d" % n for n in range(abi.CREDIT_BYTES // 4))  # twice the credit: redirected, then by TCP
        sending = threading.Thread(target=pair.c.sendall, args=(data,), daemon=True)
        sending.start()
        whole = receive(pair.p, len(data)) == data
        sending.join(PATIENCE)
        return not early and first == b"first" and whole, "in order" if whole else "inverted"


def order_control(rig: Rig) -> Seen:
    with rig.pair() as pair, rig.naive():
        pair.c.sendall(b"first ")
        rig.force(pair)
        pair.c.sendall(b"second ")
        got = receive(pair.p, len(b"first second "))
        return got != b"first second ", f"read {got.decode().strip()!r}"


def credit(rig: Rig) -> Seen:
    """A redirect has no back-pressure: the kernel takes all memory for a reader that does not read."""
    with rig.pair() as pair:
        membership = rig.joined(pair)
        taken = flood(pair.c)
        binding = rig.binding(membership)
        redirected = binding.sent[abi.Side.APPLICATION] if binding is not None else FLOOD
        return 0 < redirected <= abi.CREDIT_BYTES and taken < FLOOD, f"{redirected} bytes redirected, {taken} taken"


def credit_control(rig: Rig) -> Seen:
    with rig.pair() as pair, rig.naive():
        rig.force(pair)
        taken = flood(pair.c)
        return taken >= FLOOD, f"{taken} taken"


def fionread(rig: Rig) -> Seen:
    """Readers that ask first how much there is: must see redirected bytes, and TCP bytes once they have left."""
    with rig.pair() as pair:
        membership = rig.joined(pair)
        pair.p.sendall(b"x" * 100)
        select.select([pair.c], [], [], PATIENCE)
        redirected = unread(pair.c)
        pair.c.recv(100)
        membership.leave()
        pair.p.sendall(b"x" * 50)
        select.select([pair.c], [], [], PATIENCE)
        tcp = unread(pair.c)
        return (redirected, tcp) == (100, 50), f"{redirected} of 100 bytes inside, {tcp} of 50 outside"


def fionread_control(rig: Rig) -> Seen:
    with rig.pair() as pair:
        rig.force(pair)
        pair.p.sendall(b"x" * 50)
        select.select([pair.c], [], [], PATIENCE)
        tcp = unread(pair.c)
        return tcp != 50, f"{tcp} of 50 TCP bytes of a member"


def splice(rig: Rig) -> Seen:
    """A member that reads by splice is told that there is nothing: whoever holds pipes is left out."""
    before = holds_payload_pipe(os.getpid())
    with rig.pair() as pair:
        got = _spliced(pair, lambda: None)
        reading, writing = os.pipe()
        seen = holds_payload_pipe(os.getpid())
        os.close(reading)
        os.close(writing)
        return not before and seen and got == b"x" * 50, f"pipes noticed, {len(got)} of 50 TCP bytes"


def splice_control(rig: Rig) -> Seen:
    with rig.pair() as pair, rig.naive():
        got = _spliced(pair, lambda: rig.force(pair))
        return len(got) != 50, f"{len(got)} of 50 redirected bytes"


def _spliced(pair: Pair, prepare: Callable[[], object]) -> bytes:
    prepare()
    pair.p.sendall(b"x" * 50)
    select.select([pair.c], [], [], PATIENCE)
    reading, writing = os.pipe()
    try:
        return os.read(reading, os.splice(pair.c.fileno(), writing, 100))
    except BlockingIOError:
        return b""
    finally:
        os.close(reading)
        os.close(writing)


def half_close(rig: Rig) -> Seen:
    """The end of the stream goes by TCP and must come out behind the redirected bytes; the other half stays open."""
    with rig.pair() as pair:
        rig.joined(pair)
        pair.c.sendall(b"request")
        pair.c.shutdown(socket.SHUT_WR)
        got = receive(pair.p, 100)
        pair.p.sendall(b"answer")
        pair.p.close()
        answer = receive(pair.c, 100)
        return (got, answer) == (b"request", b"answer"), f"{got.decode()}, end, {answer.decode()}, end"


def half_close_control(rig: Rig) -> Seen:
    """Cleaning up at the end of the stream, as the table's owner is tempted to."""
    with rig.pair() as pair:
        membership = rig.joined(pair)
        pair.c.sendall(b"request")
        pair.c.shutdown(socket.SHUT_WR)
        rig.delete(membership.pair, abi.Side.PROXY)
        got = receive(pair.p, 100)
        return got != b"request", f"{len(got)} of 7 bytes before the end"


def unread_entry(rig: Rig) -> Seen:
    """Deleting a member throws its unread bytes away: it must be refused until they are read."""
    with rig.pair() as pair:
        membership = rig.joined(pair)
        pair.c.sendall(b"request")
        early = rig.commands.run(abi.Op.DRAIN, pair=membership.pair, side=abi.Side.PROXY)
        got = pair.p.recv(100)
        late = rig.commands.run(abi.Op.DRAIN, pair=membership.pair, side=abi.Side.PROXY)
        right = (early, got, late) == (Reason.UNREAD, b"request", Reason.LEFT)
        return right, f"{'kept' if early is Reason.UNREAD else 'deleted'}, {got.decode()}"


def unread_entry_control(rig: Rig) -> Seen:
    with rig.pair() as pair:
        membership = rig.joined(pair)
        pair.c.sendall(b"request")
        rig.delete(membership.pair, abi.Side.PROXY)
        pair.p.setblocking(False)
        try:
            return False, f"read {pair.p.recv(100).decode()!r}"
        except BlockingIOError:
            return True, "lost"


def missing_target(rig: Rig) -> Seen:
    """A redirect to nobody is EACCES for the application: it must become TCP."""
    with rig.pair() as pair:
        membership = rig.joined(pair)
        rig.delete(membership.pair, abi.Side.PROXY)
        pair.c.sendall(b"request")
        got = pair.p.recv(100)
        return got == b"request", f"{got.decode()} by TCP"


def missing_target_control(rig: Rig) -> Seen:
    with rig.pair() as pair, rig.naive():
        number = rig.force(pair)
        rig.delete(number, abi.Side.PROXY)
        try:
            pair.c.sendall(b"request")
        except OSError as error:
            return True, name_of(error)
        return False, "sent"


TRIALS = (
    Trial(order, order_control, True),
    Trial(credit, credit_control, True),
    Trial(fionread, fionread_control, False),
    Trial(splice, splice_control, False),
    Trial(blocking.blocking_reader, blocking.blocking_reader_control, False),
    Trial(blocking.reset, blocking.reset_control, False),
    Trial(blocking.waitall, blocking.waitall_control, False),
    Trial(half_close, half_close_control, True),
    Trial(unread_entry, unread_entry_control, True),
    Trial(missing_target, missing_target_control, True),
)
