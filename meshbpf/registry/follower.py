"""How another registry is followed: what to ask next, when, and what is known after each answer. Pure.

After a failure, and at first, the question is a plain one, and its answer is compared with what is known; after an
answer it waits there until something changes. A registry that cannot be asked changes nothing here but `error`.

A registry whose generation is smaller than before has lost its memory: its store was damaged, or somebody moved it
away. Whom it has not heard of again stays for `leases.grace`, as in its own restarts: its clients are just finding out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from meshbpf.model import Service
from meshbpf.registry import answer as answers
from meshbpf.registry.answer import Said
from meshbpf.registry.base import Snapshot
from meshbpf.registry.instance import Instance, Refusal, ServiceId
from meshbpf.registry.leases import Key, grace
from meshbpf.registry.services import service_of

WAIT = 30.0  # seconds that a question may wait there
FIRST_PAUSE = 0.1
MOST_PAUSE = 2.0  # so that with a lost try before it, a registry that is back is found within 5 s
HASTY = 1.0  # seconds; sooner than that nobody has waited
PACE = 0.02  # seconds; as the embedded registry gathers changes
PER_SECOND = 20_000.0  # instances: an answer costs both sides CPU by its size, so a large registry is asked less often


@dataclass(frozen=True, slots=True)
class Question:
    """`wait` 0: answer at once; else when the generation is another one, or after so many seconds."""

    wait: float = 0.0
    generation: int | None = None


class Follower:
    """`question`, then `answered`, `failed` or `crowded`, then `pause`, and again. `now` is a monotonic clock."""

    def __init__(self, name: str, allow_loopback: bool) -> None:
        self.snapshot = Snapshot(error="has not answered yet", stale=True, source=name, allow_loopback=allow_loopback)
        self._generation: int | None = None  # None: it has never answered
        self._said: Mapping[ServiceId, Said] = {}
        self._kept: dict[Key, tuple[Instance, float]] = {}  # lost there, until when it stays here
        self._services: dict[ServiceId, tuple[tuple[Instance, ...], Service]] = {}
        self._failures = 0
        self._plain = True
        self._seldom = False  # one cannot wait there
        self._asked = 0.0

    def question(self, now: float) -> Question:
        self._asked = now
        if self._plain:
            return Question()
        ends = [until for _instance, until in self._kept.values()]
        wait = min(WAIT, min(ends, default=now + WAIT) - now)
        return Question(wait, self._generation) if wait > 0 else Question()

    def answered(self, answer: Mapping[str, Any], now: float) -> None:
        read = answers.read(answer, self._said)
        if isinstance(read, Refusal):
            self.failed(f"answered what no registry says: {read.field}: {read.message}")
            return
        # Who does not wait although asked to, and has no news, would be asked without end.
        hasty = not self._plain and read.generation == self._generation and now - self._asked < HASTY
        self._failures, self._plain, self._seldom = 0, False, hasty
        self._keep(read, now)
        self._generation, self._said = read.generation, read.services
        left_out = [text for said in read.services.values() for text in said.left_out]
        error = f"{len(left_out)} instances left out, first {left_out[0]}" if left_out else ""
        self._tell(self._united(), error, stale=False)

    @property
    def answer(self) -> dict[str, Any]:
        """The last good answer, for `recall` in another life."""
        entries = [{"service": ".".join(service), "instances": said.raw} for service, said in self._said.items()]
        return {"generation": self._generation, "services": entries}

    def recall(self, answer: Mapping[str, Any]) -> None:
        """What was known in an earlier life counts until there is an answer."""
        read = answers.read(answer, {})
        if self._generation is None and not isinstance(read, Refusal):
            self._generation, self._said = read.generation, read.services
            self._tell(self._united(), self.snapshot.error, stale=True)

    def failed(self, why: str) -> None:
        self._failures += 1
        self._plain, self._seldom = True, False
        self._tell(self.snapshot.services, why, stale=True)

    def crowded(self) -> None:
        """Too many wait there already. That is no fault: what we know is as new as the last plain answer."""
        self._plain, self._seldom = True, True

    def pause(self, chance: float) -> float:
        """Seconds before the next question. `chance` is from [0, 1): followers of one registry shall not come back all
        at the same moment, so half of a pause is up to it.
        """
        if self._failures:
            most = min(MOST_PAUSE, FIRST_PAUSE * (1 << min(self._failures - 1, 10)))
        elif self._seldom:
            most = MOST_PAUSE
        else:
            return max(PACE, sum(len(said.raw) for said in self._said.values()) / PER_SECOND)
        return most * (0.5 + chance / 2)

    def _keep(self, read: answers.Answer, now: float) -> None:
        """Who stays although the registry has lost him."""
        listed = {one.key for said in read.services.values() for one in said.instances}
        if self._generation is not None and read.generation < self._generation:
            for said in self._said.values():
                for one in said.instances:
                    self._kept.setdefault(one.key, (one, now + grace(one)))
        self._kept = {
            key: (one, until) for key, (one, until) in self._kept.items() if key not in listed and until > now
        }

    def _united(self) -> tuple[Service, ...]:
        """All services, sorted by (namespace, name); one of which nothing changed stays the same object."""
        lost: dict[ServiceId, list[Instance]] = {}
        for one, _until in self._kept.values():
            lost.setdefault(one.service, []).append(one)
        found: dict[ServiceId, tuple[tuple[Instance, ...], Service]] = {}
        for identity in sorted({*self._said, *lost}, key=lambda identity: (identity[1], identity[0])):
            said = self._said[identity].instances if identity in self._said else ()
            # The lost ones are older: they decide what the service's ports are, until they go.
            whole = (*lost[identity], *said) if identity in lost else said
            if not whole:
                continue
            last = self._services.get(identity)
            same = last is not None and last[0] == whole
            found[identity] = last if last and same else (whole, service_of(identity, whole, self.snapshot.source))
        self._services = found
        return tuple([service for _instances, service in found.values()])

    def _tell(self, services: tuple[Service, ...], error: str, stale: bool) -> None:
        """The snapshot stays the same object when it says nothing new."""
        last = self.snapshot
        now = Snapshot(services, error=error, stale=stale, source=last.source, allow_loopback=last.allow_loopback)
        if now != last:
            self.snapshot = now
