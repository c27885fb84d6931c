"""Another agent's embedded registry as a source of services: asked over HTTP, again and again.

What to ask and what to make of the answer is `follower`'s; here are the clock, the dice and the wire. Nothing that the
other side does ends it. The token is read anew for each question, so that a changed one counts at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any

from meshbpf.errors import ConfigError
from meshbpf.model import HttpRegistry
from meshbpf.registry import recall
from meshbpf.registry.base import Snapshot, read_token
from meshbpf.registry.client import TIMEOUT, RegistryAway, RegistryClient, RegistryRefused
from meshbpf.registry.follower import Follower, Question

log = logging.getLogger("registry")
KEEP_SECONDS = 5.0
TOKEN_FILE = "Agent.spec.registries.http.tokenFile"


class HttpSource:
    """`watch` gives its first word after one try, whether or not there was an answer within `timeout` seconds. `keep`:
    where the last answer is kept for an agent that starts while the registry is away.
    """

    def __init__(
        self,
        settings: HttpRegistry,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        timeout: float = TIMEOUT,
        keep: Path | None = None,
    ) -> None:
        self.name = settings.url
        self._keep = keep
        self._kept: object = None  # the services of the answer that is kept
        self._kept_at = -KEEP_SECONDS
        self._trouble = ""
        self._settings = settings
        self._clock, self._chance, self._sleep, self._timeout = clock, chance, sleep, timeout

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        follower = Follower(self.name, self._settings.allow_loopback)
        last = follower.snapshot
        await self._step(follower)
        if follower.snapshot.stale and self._keep and (answer := await asyncio.to_thread(recall.read, self._keep)):
            follower.recall(answer)
        while True:
            if follower.snapshot is not last:
                last = follower.snapshot
                yield last
            await self._remember(follower)
            await self._sleep(follower.pause(self._chance()))
            await self._step(follower)

    def _forgetful(self, follower: Follower) -> bool:
        """Whether the last answer is news that is not kept yet."""
        return bool(self._keep) and not follower.snapshot.stale and follower.snapshot.services is not self._kept

    async def _remember(self, follower: Follower) -> None:
        """Keep the answer if it is news, but not all the time: a large one is megabytes."""
        now = self._clock()
        if self._keep is None or not self._forgetful(follower) or now - self._kept_at < KEEP_SECONDS:
            return
        self._kept, self._kept_at = follower.snapshot.services, now
        trouble = await asyncio.to_thread(recall.write, self._keep, follower.answer)
        if trouble and trouble != self._trouble:
            log.warning("the last answer of a registry is not kept path=%s error=%s", self._keep, trouble)
        self._trouble = trouble

    async def _step(self, follower: Follower) -> None:
        question = follower.question(self._clock())
        if self._forgetful(follower):  # nothing may happen there for long
            question = replace(question, wait=min(question.wait, KEEP_SECONDS))
        try:
            answer = await self._ask(question)
        except RegistryRefused as error:
            if error.status == HTTPStatus.TOO_MANY_REQUESTS and question.wait:
                follower.crowded()
            else:
                follower.failed(_refused(error, self._settings))
        except (RegistryAway, ConfigError) as error:
            follower.failed(str(error))
        else:
            follower.answered(answer, self._clock())

    async def _ask(self, question: Question) -> dict[str, Any]:
        token = await asyncio.to_thread(read_token, TOKEN_FILE, self._settings.token_file)
        async with RegistryClient(url=self._settings.url, token=token, timeout=self._timeout) as client:
            return await client.services(question.wait, question.generation)


def _refused(error: RegistryRefused, settings: HttpRegistry) -> str:
    if error.status == HTTPStatus.UNAUTHORIZED:
        remedy = f"is {settings.token_file} its token?" if settings.token_file else f"set {TOKEN_FILE}"
        return f"{settings.url} answered {error.status}: {error}: {remedy}"
    return f"{settings.url} answered {error.status}: {error}" if error.field else str(error)
