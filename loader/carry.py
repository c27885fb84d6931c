"""What an upgrade that makes new tables takes along: which UDP socket talks to whom, and which client had whom.

The rule: a number is worth nothing in other tables. A service is carried by its addresses, an endpoint by its own; what
has left the mesh by then becomes number 0, which is nobody, as if it had left afterwards. What connect decided about a
socket lies with the socket, in a table that cannot be read from here: so TCP connections go on, but getpeername()
shows where they really go; for datagrams `answers` says whose they are.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loader import abi, libbpf
from loader.slots import IDENTITY, is_ipv4
from loader.tables import SHAPES
from meshbpf.errors import DataplaneError

log = logging.getLogger("dataplane")
Rows = dict[bytes, bytes]
Row = tuple[bytes, bytes]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Earlier numbers to ours, and what an earlier service was dialled by."""

    services: Mapping[int, int]
    endpoints: Mapping[int, int]
    dialled: Mapping[int, Sequence[abi.ServiceKey]]


def numbers(earlier: Mapping[str, Rows], ours: Mapping[str, Rows]) -> Numbers:
    """From the tables `services` and `endpoints`. Pure."""
    services = {
        _number(old): _number(ours["services"][key])
        for key, old in earlier["services"].items()
        if key in ours["services"]
    }
    known = {value[:IDENTITY]: _number(key) for key, value in ours["endpoints"].items()}
    endpoints = {_number(key): known.get(value[:IDENTITY], 0) for key, value in earlier["endpoints"].items()}
    dialled: dict[int, list[abi.ServiceKey]] = {}
    for key, old in earlier["services"].items():
        dialled.setdefault(_number(old), []).append(abi.ServiceKey.from_buffer_copy(key))
    return Numbers(services, endpoints, dialled)


def _number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def _connected(to: Numbers, key: bytes, value: bytes) -> Row:
    row = abi.Connected.from_buffer_copy(value)
    row.service_id, row.endpoint_id = to.services.get(row.service_id, 0), to.endpoints.get(row.endpoint_id, 0)
    row.carried = 1
    return key, bytes(row)


def shown_as(to: Numbers, key: bytes, value: bytes) -> Row | None:
    """Of a connected socket: what its endpoint's datagrams are shown as. None where the service has several addresses
    that it may have been connected to.
    """
    row = abi.Connected.from_buffer_copy(value)
    every = to.dialled.get(row.service_id, ())
    alike = [one for one in every if is_ipv4(bytes(one.address)) == is_ipv4(bytes(row.given))]
    found = every if len(every) == 1 else alike
    if len(found) != 1:
        return None
    place = abi.TalkKey(_number(key), row.given, row.given_port)
    return bytes(place), bytes(abi.Asked(found[0].address, found[0].port))


def _talk(to: Numbers, key: bytes, value: bytes) -> Row:
    row = abi.Talk.from_buffer_copy(value)
    row.service_id, row.endpoint_id = to.services.get(row.service_id, 0), to.endpoints.get(row.endpoint_id, 0)
    return key, bytes(row)


def _asked(_to: Numbers, key: bytes, value: bytes) -> Row:
    return key, value


def _affinity(to: Numbers, key: bytes, value: bytes) -> Row:
    who, last = abi.AffinityKey.from_buffer_copy(key), abi.Affinity.from_buffer_copy(value)
    who.service_id, last.endpoint_id = to.services.get(who.service_id, 0), to.endpoints.get(last.endpoint_id, 0)
    return bytes(who), bytes(last)


CARRIED: dict[str, Callable[[Numbers, bytes, bytes], Row]] = {
    "connected": _connected, "talks": _talk, "answers": _asked, "affinities": _affinity,
}  # fmt: skip
NAMED = ("services", "endpoints")


class Carry:
    """From the tables in one folder to those in another; a context manager. Tables of another shape are left out."""

    def __init__(self, earlier: Path, ours: Path) -> None:
        self._open = contextlib.ExitStack()
        self._tables: dict[str, tuple[libbpf.Map, libbpf.Map]] = {}
        self._seen: dict[str, Rows] = {}
        self._to = Numbers({}, {}, {})
        for name in (*NAMED, *CARRIED):
            both = [
                self._open.enter_context(libbpf.Map(folder / name, *SHAPES[name][:2]))
                for folder in (earlier, ours)
                if (folder / name).exists()
            ]
            if len(both) == 2 and both[0].shape() == both[1].shape():
                self._tables[name] = both[0], both[1]

    def __enter__(self) -> Carry:
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.close()

    def over(self) -> None:
        """Carry over what is there, or, called again, what has changed since; an entry that the programs of our tables
        have changed meanwhile stays as they left it.
        """
        if not all(name in self._tables for name in NAMED):
            return
        earlier, ours = ({name: dict(self._tables[name][side].items()) for name in NAMED} for side in (0, 1))
        self._to = numbers(earlier, ours)
        for name in CARRIED.keys() & self._tables.keys():
            try:
                self._table(name)
            except DataplaneError as error:  # full, or no memory: an upgrade does not stop half-way for that
                log.warning("sockets are not carried over to the new tables: %s", error)
        if "answers" in self._tables:
            try:
                self._show()
            except DataplaneError as error:
                log.warning("sockets may show their endpoint's address: %s", error)

    def _show(self) -> None:
        """Whose the datagrams of connected sockets are, which the earlier tables knew by the socket."""
        answers = self._tables["answers"][1]
        there = set(answers.keys())
        rows = [shown_as(self._to, *row) for row in self._seen.get("connected", {}).items()]
        answers.update_many([row for row in rows if row is not None and row[0] not in there])

    def _table(self, name: str) -> None:
        source, target = self._tables[name]
        before, now = self._seen.get(name, {}), dict(source.items())
        self._seen[name] = now
        there = set(target.keys())
        new = [CARRIED[name](self._to, *row) for row in now.items() if row[0] not in before]
        target.update_many([row for row in new if row[0] not in there])
        for key, value in before.items():
            if now.get(key) == value:
                continue
            place, carried = CARRIED[name](self._to, key, value)
            if target.lookup(place) != carried:
                continue
            if key in now:
                target.update(*CARRIED[name](self._to, key, now[key]))
            else:
                target.delete(place)
