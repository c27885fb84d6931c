"""UDP in the tables: which connected sockets may not go on talking to their endpoint.

Datagrams have no connection that ends by itself: a socket keeps its endpoint until the endpoint leaves the service's
port. Draining is not leaving, and neither is the service's own end: then nobody said that the endpoint is gone.
"""

from __future__ import annotations

from collections.abc import Mapping

from loader import abi, libbpf


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
