"""A request head that is not like one before: its fields, the first line to send, and what a route remembers of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshbpf.record import Record
from userspace_proxy.grammar import Fault
from userspace_proxy.head import RequestFields, request_fields, request_target
from userspace_proxy.limits import Limits

if TYPE_CHECKING:
    from userspace_proxy.connection import Connection
    from userspace_proxy.origin import Origin
    from userspace_proxy.route import Route

HEADS, HEAD_BYTES = 256, 1024  # request heads that a route remembers, and the longest of them


def read_request(
    route: Route | None, origin: Origin, method: bytes, target: bytes, version: bytes, lines: bytes, limits: Limits
) -> tuple[RequestFields, bytes] | Fault:
    """The fields and the request line to send."""
    where = request_target(method, target)
    if isinstance(where, Fault):
        return where
    target, host = where
    dialled = route.dialled if route is not None else f"{origin.address}:{origin.port}".encode()
    fields = request_fields(lines, 1 if version == b"1" else 0, host, dialled, limits)
    if isinstance(fields, Fault):
        return fields
    # A head with an id of its own comes once, and remembering it would push out those that come again.
    own = fields.request_id is not None or fields.trace_id is not None
    if version == b"1" and host is None and route is not None and len(lines) <= HEAD_BYTES and not own:
        if len(route.heads) >= HEADS:
            route.heads.clear()
        route.heads[lines] = fields
    return fields, b"%b %b HTTP/1.1\r\n" % (method, target)


def request_record(
    down: Connection, route: Route | None, method: str | None, path: str | None, fields: RequestFields | None = None
) -> Record:
    """The record of a request, as far as its head says it; the head may be one that is refused."""
    service = route.service if route is not None else ""
    record = Record(service, down.proxy.wall(), down.origin.workload, down.remote)
    record.method = method
    record.path = path
    if fields is not None:
        record.authority = fields.authority
        record.trace_id = fields.trace_id
        record.user_agent = fields.user_agent
        record.x_forwarded_for = fields.forwarded_for
    return record
