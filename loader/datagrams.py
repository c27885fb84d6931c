"""UDP in the tables: which endpoints sockets may go on talking to, and which connected sockets may not any more.

Datagrams have no connection that ends by itself: a socket keeps its endpoint until the endpoint leaves the service's
port. Draining is not leaving, and neither is the service's own end: then nobody said that the endpoint is gone.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

from loader import abi, libbpf
from loader.plan import IDENTITY, Plan
from meshbpf.errors import MapFull
from meshbpf.model import Protocol

PRESENT = (1).to_bytes(4, "little")


def serving(planned: Plan) -> Set[bytes]:
    """The keys that `serving` must hold: every endpoint of every UDP port, whatever its state and weight. Pure."""
    ids = {value[:IDENTITY]: int.from_bytes(key, "little") for key, value in planned.tables.endpoints.items()}
    return {
        bytes(abi.ServingKey(service_id, ids[identity(endpoint.address, endpoint.ports[port.name])]))
        for service_id, (service, port) in planned.service_ids.items()
        if port.protocol is Protocol.UDP
        for endpoint in service.endpoints
        if port.name in endpoint.ports
    }


def identity(address: str, port: int) -> bytes:
    return bytes(abi.EndpointValue(abi.pack_address(address), port))[:IDENTITY]


class Serving:
    """The table `serving`, changed around an apply: who comes is in it before a slot leads to him, who goes leaves it
    after the last slot did.
    """

    def __init__(self, table: libbpf.Map) -> None:
        self._table = table
        self._have: Set[bytes] | None = None  # read when it is first needed, and after a failure

    def add(self, wanted: Set[bytes]) -> None:
        """Raises MapFull; what was added by then does no harm and goes with the next removal."""
        have = set(self._table.keys()) if self._have is None else self._have
        self._have = None
        for key in wanted - have:
            try:
                self._table.update(key, PRESENT)
            except MapFull as full:
                raise MapFull("endpoints", full.size) from full
        self._have = have | wanted

    def remove(self, wanted: Set[bytes]) -> bool:
        """Whether anybody has left."""
        have = set(self._table.keys()) if self._have is None else self._have
        self._have = None
        for key in have - wanted:
            self._table.delete(key)
        self._have = wanted
        return bool(have - wanted)


def stranded(maps: Mapping[str, libbpf.Map]) -> dict[int, abi.Connected]:
    """Cookie → socket, for every connected socket whose endpoint has left the service's port. Of a service that is
    gone itself, those whose endpoint serves nobody any more.
    """
    gone: dict[tuple[int, int], bool] = {}
    found = {}
    for cookie, value in maps["connected"].items():
        row = abi.Connected.from_buffer_copy(value)
        pair = (row.service_id, row.endpoint_id)
        if pair not in gone:
            gone[pair] = _gone(maps, *(number.to_bytes(4, "little") for number in pair))
        if gone[pair]:
            found[int.from_bytes(cookie, "little")] = row
    return found


def _gone(maps: Mapping[str, libbpf.Map], service_id: bytes, endpoint_id: bytes) -> bool:
    if maps["endpoints"].lookup(endpoint_id) is None:
        return True
    return maps["policies"].lookup(service_id) is not None and maps["serving"].lookup(service_id + endpoint_id) is None
