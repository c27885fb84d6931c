"""What every registry adapter yields: whole snapshots, never changes. Files, the embedded registry and all later ones.

Rules for an adapter:
- each value of `watch()` is everything that source knows now; whoever consumes it compares, an adapter need not;
- a source in trouble neither ends nor yields less than it knew: it yields its last good snapshot again, with `error`
  and `stale`;
- the order of services and endpoints does not depend on time, so that equal knowledge gives equal snapshots.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from meshbpf.errors import ConfigError
from meshbpf.model import Agent, Service, ServicePolicy


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything one source knows. A service here may lack addresses, ports or endpoints that another source has."""

    services: tuple[Service, ...] = ()
    policies: tuple[ServicePolicy, ...] = ()
    agent: Agent | None = None
    error: str = ""  # what is wrong with the source, one line per fault; empty when all is well
    stale: bool = False  # the source may know better by now: this is its last good state
    source: str = ""  # who says so, for people: `Source.name`
    # Endpoints on 127.0.0.0/8 and ::1 mean "this machine", which a registry of other machines cannot know. An adapter
    # that listens to the network sets False, unless it has checked each instance itself when it was written.
    allow_loopback: bool = True


class Source(Protocol):
    """Where services come from. `watch()` is called once; closing the iterator (`aclose`) ends what it started."""

    name: str

    def watch(self) -> AsyncIterator[Snapshot]: ...


def read_token(field: str, path: str) -> str:
    """The bearer token in the file that a configuration's `field` names; empty for no file. Raises ConfigError."""
    if not path:
        return ""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(field, f"{path}: {error}") from error
    if not token or not token.isprintable():
        raise ConfigError(field, f"{path} {'is not one line of text' if token else 'is empty'}")
    return token
