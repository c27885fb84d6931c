"""`meshbpf register` and `deregister`: put an instance into the registry, keep it there while it is ready, take it out.

Order. With a command the instance goes in after its check passes, and out *before* the command is told to stop: on
SIGTERM, SIGINT or SIGHUP it is deregistered, callers get `SETTLE` to learn of it, then the signal is forwarded. The
command runs in a session of its own, otherwise Ctrl-C would reach it first. Its exit code is ours (128+N for signal N),
but 1 when it ends, and well, before it was ever ready.

A program that starts is waited for: only after `PATIENCE` checks is it said what is wrong with it. Later on, a check
that fails `FAILURES` times in a row takes the instance out; one success puts it in again. An agent that is away
changes nothing for the command: it is said once, tried again with growing pauses, and a lost lease is put again.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from meshbpf import checks
from meshbpf.errors import CannotRun, MeshError, NotFound
from meshbpf.registration import Registration
from meshbpf.registry.client import RegistryAway, RegistryClient, RegistryRefused, RegistryUnreached
from meshbpf.schema import addresses
from meshbpf.tasks import spawn

FAILURES = 3
PATIENCE = 10
SETTLE = 0.25  # seconds: the agent gathers changes for 20 ms, then writes the kernel's tables
LEAVE_SECONDS = 3.0  # a stop must not hang on an agent that is away; the lease ends by itself
FIRST_CHECKS = 0.2  # seconds between checks until the first success: a start should not wait for `interval`
BACKOFF_FIRST = 0.2
BACKOFF_MOST = 5.0
CHECK_TIMEOUT = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

Say = Callable[[str], None]


class Action(Enum):
    PUT = "put"
    HEARTBEAT = "heartbeat"
    DELETE = "delete"
    NOTHING = "nothing"


@dataclass(slots=True)
class Upkeep:
    """What follows from a check. Pure: `registered` is set by whoever performed the action."""

    registered: bool = False
    failures: int = 0

    def after_check(self, passes: bool) -> Action:
        if passes:
            self.failures = 0
            return Action.HEARTBEAT if self.registered else Action.PUT
        self.failures += 1
        return Action.DELETE if self.registered and self.failures >= FAILURES else Action.NOTHING


class Keeper:
    """Keeps one registration: `run` until cancelled, then `leave`."""

    def __init__(self, client: RegistryClient, wanted: Registration, say: Say) -> None:
        self._client, self._wanted, self._say = client, wanted, say
        self._upkeep = Upkeep()
        self._maybe_in = False  # a PUT was sent; whether it arrived may be unknown when we are cancelled
        self._ever_in = False
        self.was_ready = False  # the check has passed, whatever came of it
        self._trouble = ""
        self._waited_for = ""
        self._backoff = BACKOFF_FIRST

    async def run(self) -> None:
        """Raises RegistryRefused when the registry will never take this instance."""
        while True:
            await asyncio.sleep(await self._step())

    async def leave(self) -> bool:
        """Take the instance out; False when there was nothing to take out, or nobody to tell."""
        if not self._maybe_in:
            return False
        try:
            async with asyncio.timeout(LEAVE_SECONDS):
                await self._client.delete(self._wanted.service, self._wanted.id)
        except (RegistryAway, RegistryRefused, TimeoutError) as error:
            why = away(self._client, error) if isinstance(error, RegistryAway) else error or "no answer"
            self._say(f"{self._name} not deregistered, its lease ends by itself: {why}")
            return False
        self._maybe_in = self._upkeep.registered = False
        self._say(f"{self._name} deregistered")
        return True

    @property
    def _name(self) -> str:
        return f"{self._wanted.service}/{self._wanted.id}"

    async def _step(self) -> float:
        """Check once, act once; how long to pause."""
        why = await self._check()
        self.was_ready = self.was_ready or not why
        action = self._upkeep.after_check(not why)
        if why and not self._upkeep.registered:
            self._wait_for(why)
        try:
            await self._perform(action, why)
        except RegistryAway as error:
            return self._again(away(self._client, error))
        except RegistryRefused as error:
            # Later on, a refusal must not take down a command that serves: the agent's rules may change back.
            if not (error.passing or self._ever_in):
                raise
            return self._again(f"the registry refuses {self._name}: {error}")
        if self._trouble and action is not Action.NOTHING:
            self._say("the registry answers again")
            self._trouble, self._backoff = "", BACKOFF_FIRST
        waiting = not self._upkeep.registered
        return min(FIRST_CHECKS, self._wanted.interval) if waiting else self._wanted.interval

    def _wait_for(self, why: str) -> None:
        if not self._ever_in and self._upkeep.failures < PATIENCE:
            if self._upkeep.failures == 1:
                self._say(f"waiting until it is ready: {self._asked}")
        elif why != self._waited_for:
            self._waited_for = why
            self._say(f"{self._name} is not ready: {why}")

    @property
    def _asked(self) -> str:
        """The check in words, for a line: `tcp 127.0.0.1:9001`."""
        text = self._wanted.check.text if self._wanted.check else ""
        return text if text.startswith("cmd") else f"{text} {addresses.joined(self._wanted.address, self._wanted.port)}"

    async def _check(self) -> str:
        if self._wanted.check is None:
            return ""
        timeout = min(self._wanted.interval, CHECK_TIMEOUT)
        return await checks.run(self._wanted.check, self._wanted.address, self._wanted.port, timeout)

    async def _perform(self, action: Action, why: str) -> None:
        service, id = self._wanted.service, self._wanted.id
        match action:
            case Action.HEARTBEAT if not await self._client.heartbeat(service, id):
                self._say(f"{self._name} had lost its lease")
                await self._put()
            case Action.PUT:
                await self._put()
            case Action.DELETE:
                await self._client.delete(service, id)
                self._upkeep.registered = self._maybe_in = False
                self._waited_for = why
                self._say(f"{self._name} taken out after {FAILURES} failed checks: {why}")

    async def _put(self) -> None:
        earlier, self._maybe_in = self._maybe_in, True
        try:
            await self._client.put(self._wanted.service, self._wanted.id, self._wanted.body)
        except (RegistryUnreached, RegistryRefused):
            self._maybe_in = earlier  # this one gave no lease
            raise
        self._upkeep.registered = self._ever_in = True
        self._waited_for = ""
        self._say(f"{self._name} registered")

    def _again(self, trouble: str) -> float:
        if not self._trouble:
            self._say(f"{trouble}; trying again until it answers")
        self._trouble = trouble
        pause = self._backoff
        self._backoff = min(self._backoff * 2, BACKOFF_MOST)
        return min(pause, self._wanted.interval)


def away(client: RegistryClient, error: RegistryAway) -> str:
    """What to tell a person of an agent that is not there; anything else as the client says it."""
    cause = error.__cause__
    if client.where.startswith("/") and isinstance(cause, OSError):
        if cause.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return f"no agent listens on {client.where}: start one with `meshbpf run`"
        if cause.errno in (errno.EACCES, errno.EPERM):
            return f"may not ask the agent on {client.where}: run as root (sudo)"
    return str(error)


def say_to_stderr(text: str) -> None:
    print(f"meshbpf register: {text}", file=sys.stderr, flush=True)


async def register(
    client: RegistryClient, wanted: Registration, command: Sequence[str] = (), say: Say = say_to_stderr
) -> int:
    """Keep `wanted` registered until a signal or the end of `command`; the exit code. Owns SIGTERM, SIGINT, SIGHUP."""
    keeper = Keeper(client, wanted, say)
    for note in wanted.notes:
        say(note)
    with _signals() as signals:
        if command:
            return await _beside_command(keeper, command, signals, say)
        return await _alone(keeper, signals, say)


async def deregister(client: RegistryClient, service: str, id: str = "") -> str:
    """Take one instance out and return its id. Without `id` the service must have just one. Raises NotFound, and
    MeshError when no agent answers."""
    try:
        return await _taken_out(client, service, id)
    except RegistryAway as error:
        raise MeshError(away(client, error)) from error


async def _taken_out(client: RegistryClient, service: str, id: str) -> str:
    if not id:
        instances = (await client.instances(service))["instances"]
        if len(instances) > 1:
            ids = ", ".join(sorted(str(entry["id"]) for entry in instances))
            raise MeshError(f"service {service} has {len(instances)} instances, name one with --id: {ids}")
        id = str(instances[0]["id"])
    if not await client.delete(service, id):
        raise NotFound(f"service {service} has no instance {id}")
    return id


async def _alone(keeper: Keeper, signals: asyncio.Queue[signal.Signals], say: Say) -> int:
    keeping, stop = spawn(_kept(keeper, say), "register"), spawn(signals.get(), "signal")
    await asyncio.wait([keeping, stop], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if keeping.done():
        return 1
    await _cancelled(keeping)
    await keeper.leave()
    return 0


async def _beside_command(
    keeper: Keeper, command: Sequence[str], signals: asyncio.Queue[signal.Signals], say: Say
) -> int:
    try:
        process = await asyncio.create_subprocess_exec(*command, start_new_session=True)
    except OSError as error:
        why = CannotRun(command[0], error)
        say(str(why))
        return why.exit_code
    ended = spawn(process.wait(), "command")
    keeping, stop = spawn(_kept(keeper, say), "register"), spawn(signals.get(), "signal")
    await asyncio.wait([ended, keeping, stop], return_when=asyncio.FIRST_COMPLETED)
    refused, too_early = keeping.done(), ended.done() and not keeper.was_ready
    await _cancelled(keeping)
    if too_early:
        say(f"{command[0]} ended before it was ready")
    # A port that is closed already needs no pause; a command that still serves does.
    if await keeper.leave() and not ended.done():
        await asyncio.wait([ended], timeout=SETTLE)
    if refused and not ended.done():
        process.terminate()
    while not ended.done():
        if stop.done():
            _forward(process, stop.result())
            stop = spawn(signals.get(), "signal")
        await asyncio.wait([ended, stop], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    code = ended.result()
    return 1 if refused or (too_early and not code) else code if code >= 0 else 128 - code


async def _kept(keeper: Keeper, say: Say) -> None:
    """Ends, with a word to the user, only when the registry will never take the instance."""
    try:
        await keeper.run()
    except RegistryRefused as error:
        say(f"the registry refuses this instance: {error}")


async def _cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.wait([task])


def _forward(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except ProcessLookupError:
        return  # it has just ended; `ended` will tell


@contextmanager
def _signals() -> Iterator[asyncio.Queue[signal.Signals]]:
    """The stop signals as a queue, while the block runs."""
    queue: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, queue.put_nowait, number)
    try:
        yield queue
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)
