"""The redirect table seen from user space: who joins, who leaves, and how it is emptied. The kernel does the judging.

`join` belongs where the proxy has read a whole request and has not answered yet: then everything either side ever sent
has been read, which is what joining asks for (right after an answer, the application has not read it yet). Everything
is reached through the pins of one `maps` folder, which holds the tables, the command program and the stub's link, so
that an old layout's table can be emptied by its own program.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import Any

from loader import abi, libbpf
from loader.pipes import Pipes
from meshbpf.errors import DataplaneError
from meshbpf.reason import Reason

COMMAND, STAGE, STUB, NAIVE, LINK = "command", "redirect", "redirect_stub", "redirect_naive", "redirect_link"
PROGRAMS = (COMMAND, STAGE, STUB)
SK_MSG_VERDICT = 7
DRAIN_SECONDS = 2.0
DRAIN_PAUSE = 0.002  # a queue that is read, or a call that returns, tells nobody
NO_PAIR = bytes(8)
GRANT_BYTES = 1 << 16  # how much a worker may redirect before it asks the kernel again, and so learns of an unbinding
PACKET = abi.COMMAND_OFFSET + len(bytes(abi.Command()))


# --- in the hands of the loader ----------------------------------------------------------------------------------


def attach(maps: Path, stage: Path) -> None:
    """The staged programs take over. Members of an earlier attach follow, because their stub only jumps."""
    number = libbpf.get(stage / STAGE)
    with libbpf.Map(maps / "stages", 4, 4) as stages:
        stages.update(bytes(4), number.to_bytes(4, "little"))
    os.close(number)
    (stage / COMMAND).rename(maps / COMMAND)
    (stage / STAGE).rename(maps / STAGE)
    if (stage / NAIVE).exists():
        (stage / NAIVE).rename(maps / NAIVE)
    _attach_stub(maps, stage / STUB)
    (stage / STUB).rename(maps / STUB)
    with libbpf.Map(maps / "pairs", 8, len(bytes(abi.Pair()))) as pairs:
        pairs.delete(NO_PAIR)  # a detach that was killed had closed the table


def _attach_stub(maps: Path, stub: Path) -> None:
    """By a pinned link where the kernel has them for sockmaps (6.10), else to the table itself, once."""
    if (maps / LINK).exists() or (maps / STUB).exists():
        return
    program, table = libbpf.get(stub), libbpf.get(maps / "socks")
    try:
        link = libbpf.link_create(program, table, SK_MSG_VERDICT)
    except DataplaneError:
        libbpf.prog_attach(program, table, SK_MSG_VERDICT)
    else:
        libbpf.pin(link, maps / LINK)
        os.close(link)
    finally:
        os.close(program)
        os.close(table)


def discard(maps: Path, stage: Path) -> None:
    """This kernel refused one of the programs: none of them stays, and nobody can join."""
    for folder in (maps, stage):
        for name in (*PROGRAMS, NAIVE):
            (folder / name).unlink(missing_ok=True)


def drain(maps: Path, seconds: float = DRAIN_SECONDS) -> int:
    """Empty the table without losing a byte: nobody joins any more, everybody sends by TCP, then the members go, each
    when it has read what was redirected to it and its peer is in no call. Returns how many were still in at the end.
    """
    if not (maps / COMMAND).exists():
        return 0
    deadline = time.monotonic() + seconds
    with contextlib.closing(Commands(maps)) as commands:
        commands.pairs.update(NO_PAIR, bytes(commands.pairs.value_size))
        while True:
            left = 0
            for raw in list(commands.socks.keys()):
                key = abi.MemberKey.from_buffer_copy(raw)
                left += commands.run(abi.Op.DRAIN, pair=key.pair, side=key.side) is not Reason.LEFT
            if not left or time.monotonic() > deadline:
                return left
            time.sleep(DRAIN_PAUSE)


def members(maps: Path) -> int:
    """How many sockets are in the table, where its own program cannot be asked."""
    if not (maps / "socks").exists():
        return 0
    with libbpf.Map(maps / "socks", 16, 8) as socks:
        return len(list(socks.keys()))


# --- in the hands of a worker ------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _packed(address: str) -> Any:
    """Most callers are on few addresses, and reading one costs as much as asking the kernel."""
    return abi.pack_address(address)


class Commands:
    """Runs the command program. `answer` is what the last run left. Not for two threads at once."""

    def __init__(self, maps: Path) -> None:
        self.answer = abi.Command()
        self.pairs = libbpf.Map(maps / "pairs", 8, len(bytes(abi.Pair())))
        self.socks = libbpf.Map(maps / "socks", 16, 8)
        self._program = libbpf.get(maps / COMMAND)
        self._runner = libbpf.TestRunner(self._program, PACKET)
        self._front = bytes(abi.COMMAND_OFFSET)

    def run(self, op: abi.Op, **fields: object) -> Reason:
        """One command. Raises DataplaneError when the kernel does not run it."""
        return self.send(abi.Command(op=op, **fields))

    def send(self, command: abi.Command) -> Reason:
        result, packet = self._runner.run(self._front + bytes(command))
        if result:
            raise DataplaneError(f"the command program refused its input ({result})")
        self.answer = abi.Command.from_buffer_copy(packet, abi.COMMAND_OFFSET)
        return Reason(self.answer.reason)

    def close(self) -> None:
        self.pairs.close()
        self.socks.close()
        if self._program >= 0:
            os.close(self._program)
            self._program = -1


class Membership:
    """A connection in the table, in the hands of the one who owns the proxy's socket and is not sending on it now.

    `inside` says that the application's socket still is: before a large answer goes by TCP it must be out, because a
    member that reads by FIONREAD sees no TCP bytes (Linux 6.18.14 and its kin).
    """

    __slots__ = ("_commands", "_room", "inside", "pair")

    def __init__(self, commands: Commands, pair: int) -> None:
        self.pair = pair
        self.inside = True
        self._commands = commands
        self._room = GRANT_BYTES

    def fits(self, size: int) -> bool:
        """Whether an answer of `size` bytes may be sent now without leaving first: it will be redirected whole, or this
        kernel redirects requests only. Nearly free: asks the kernel when what it last granted is used up.
        """
        if size > self._room:
            if self._commands.run(abi.Op.ROOM, pair=self.pair) is not Reason.JOINED:
                return False
            if size > self._commands.answer.room:
                return False
            self._room = min(self._commands.answer.room, max(size, GRANT_BYTES))
        self._room -= size
        return True

    def leave(self) -> None:
        """Nothing is redirected from now on, and the application's socket is out of the table, unless it has not read
        all that was redirected to it: then `inside` stays True, and leave() may be called again.
        """
        if self.inside:
            self._room = 0
            self.inside = self._commands.run(abi.Op.LEAVE, pair=self.pair) is not Reason.LEFT


class Redirector:
    """Lets the connections of one worker join. `in_netns(cookie)` is a context in which that namespace is the calling
    thread's; `home` is the cookie of the one that is anyway.
    """

    def __init__(
        self,
        maps: Path,
        in_netns: Callable[[int], AbstractContextManager[object]],
        home: int,
        pipes: Pipes | None = None,
    ) -> None:
        self.last = Reason.JOINED  # the answer to the last join, for logs and tests
        self._commands = Commands(maps)
        self._in_netns = in_netns
        self._home = home
        self._pipes = Pipes() if pipes is None else pipes
        self._checked = 0

    def join(
        self, netns: int, client_addr: str, client_port: int, local_addr: str, local_port: int
    ) -> Membership | None:
        """Let the connection accepted from `client_addr` on `local_addr` in; None when it may not, or not now."""
        if netns == self._home:
            return self._join(netns, client_addr, client_port, local_addr, local_port)
        with self._in_netns(netns):
            return self._join(netns, client_addr, client_port, local_addr, local_port)

    def _join(self, netns: int, client: str, client_port: int, local: str, local_port: int) -> Membership | None:
        command = abi.Command(
            op=abi.Op.JOIN,
            netns=netns,
            local=_packed(client),
            local_port=client_port,
            remote=_packed(local),
            remote_port=local_port,
        )
        # One client process asks most of the time: try with the one that was looked at last.
        if self._checked and not self._pipes.may_splice(self._checked):
            command.pid = self._checked
        self.last = self._commands.send(command)
        if self.last is Reason.READER_UNCHECKED:
            self._checked = command.pid = self._commands.answer.pid
            if self._pipes.may_splice(command.pid):
                self.last = self._commands.run(abi.Op.REFUSE, reason=Reason.READER_MAY_SPLICE)
                return None
            self.last = self._commands.send(command)
        if self.last is not Reason.JOINED:
            return None
        return Membership(self._commands, self._commands.answer.pair)

    def close(self) -> None:
        self._commands.close()
        self._pipes.close()
