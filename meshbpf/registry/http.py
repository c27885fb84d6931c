"""Another agent's embedded registry as a source of services: asked over HTTP, again and again.

What to ask and what to make of the answer is `follower`'s; here are the clock, the dice and the wire. Nothing that the
other side does ends it. The token is read anew for each question, so that a changed one counts at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from meshbpf.errors import ConfigError
from meshbpf.model import HttpRegistry
from meshbpf.registry.base import Snapshot, read_token
from meshbpf.registry.client import TIMEOUT, RegistryAway, RegistryClient, RegistryRefused
from meshbpf.registry.follower import Follower, Question

TOKEN_FILE = "Agent.spec.registries.http.tokenFile"


class HttpSource:
    """`watch` gives its first word after one try, whether or not there was an answer within `timeout` seconds."""

    def __init__(
        self,
        settings: HttpRegistry,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        timeout: float = TIMEOUT,
    ) -> None:
        self.name = settings.url
        self._settings = settings
        self._clock, self._chance, self._sleep, self._timeout = clock, chance, sleep, timeout

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        follower = Follower(self.name, self._settings.allow_loopback)
        last = follower.snapshot
        while True:
            await self._step(follower)
            if follower.snapshot is not last:
                last = follower.snapshot
                yield last
            await self._sleep(follower.pause(self._chance()))

    async def _step(self, follower: Follower) -> None:
        question = follower.question(self._clock())
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
