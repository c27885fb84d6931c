"""What the store keeps, and the changes to it, as values. Pure: `store` performs them on the file.

A change says what became true, not how it came about, so that applying it twice does no harm.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshbpf.registry.instance import ServiceId

Key = tuple[str, str, str]  # (name, namespace, id)


@dataclass(frozen=True, slots=True)
class PutRow:
    key: Key
    body: str  # JSON
    deadline: float  # wall clock: the monotonic one means nothing to the next process


@dataclass(frozen=True, slots=True)
class Renew:
    key: Key
    deadline: float


@dataclass(frozen=True, slots=True)
class Drop:
    key: Key


@dataclass(frozen=True, slots=True)
class Give:
    service: ServiceId
    address: str


@dataclass(frozen=True, slots=True)
class Count:
    generation: int


@dataclass(frozen=True, slots=True)
class Clear:
    """Forget instances and addresses: the first step of writing everything again."""


Change = PutRow | Renew | Drop | Give | Count | Clear


@dataclass(slots=True)
class Content:
    """What the file holds; also the thread's copy of it, from which a failed write is made good."""

    instances: dict[Key, tuple[str, float]] = field(default_factory=dict)  # oldest first
    addresses: dict[ServiceId, str] = field(default_factory=dict)
    generation: int = 0

    def apply(self, change: Change) -> None:
        match change:
            case PutRow(key, body, deadline):
                self.instances[key] = (body, deadline)
            case Renew(key, deadline):
                if key in self.instances:
                    self.instances[key] = (self.instances[key][0], deadline)
            case Drop(key):
                self.instances.pop(key, None)
            case Give(service, address):
                self.addresses[service] = address
            case Count(generation):
                self.generation = generation
            case Clear():
                self.instances.clear()
                self.addresses.clear()

    def changes(self) -> list[Change]:
        """What turns any file into this content."""
        return [
            Clear(),
            *(PutRow(key, body, deadline) for key, (body, deadline) in self.instances.items()),
            *(Give(service, address) for service, address in self.addresses.items()),
            Count(self.generation),
        ]
