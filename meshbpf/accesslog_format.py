"""How a Record becomes one line of the access log: pure formatting, nothing is written here.

Rule: whatever bytes a client or an endpoint sent, the result is exactly one line that a parser takes apart again. Both
formats look once, for all fields together, whether anything needs an escape; nearly always nothing does, and the values
go in as they are. The keys of the JSON line and their order are the contract (INTERFACE "Logs, metrics, traces").
"""

from __future__ import annotations

import json
import re
import time

from meshbpf.model import AccessLogPolicy
from meshbpf.record import Record

KEYS = (
    "start_time", "request_id", "trace_id", "direction", "workload", "service", "route_name", "method", "authority",
    "path", "protocol", "response_code", "response_flags", "response_code_details", "bytes_received", "bytes_sent",
    "duration_ms", "upstream_service_time_ms", "upstream_host", "downstream_remote", "attempts", "carrier", "reason",
    "user_agent", "x_forwarded_for",
)  # fmt: skip
_AWKWARD = re.compile(r'[\\"\x00-\x1f]|[^\x20-\x7e]')
_NULL = "null"
NONE = "-"


class Seconds:
    """UNIX seconds as ISO-8601 with milliseconds in UTC; the part up to the second is made once per second."""

    __slots__ = ("_prefix", "_second")

    def __init__(self) -> None:
        self._second = -1
        self._prefix = ""

    def text(self, when: float) -> str:
        milliseconds = int(when * 1000.0 + 0.5)
        second = milliseconds // 1000
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{milliseconds - second * 1000:03d}Z"


def wanted(record: Record, policy: AccessLogPolicy, rnd: float) -> bool:
    """Is this record logged? Errors and slow requests always, of the others `sample_percent`. `rnd` is in [0, 1)."""
    if record.response_flags is not None or record.response_code >= 500:
        return True
    if record.duration_ms >= policy.slow * 1000.0 and record.protocol != "TCP":  # a TCP connection is long by nature
        return True
    return rnd * 100.0 < policy.sample_percent


def json_line(record: Record, seconds: Seconds) -> str:
    """One JSON object with the keys of KEYS in their order, and a newline."""
    r = record
    request_id, trace_id, route, method = r.request_id, r.trace_id, r.route_name, r.method
    authority, path, protocol, flags = r.authority, r.path, r.protocol, r.response_flags
    details, host, reason = r.response_code_details, r.upstream_host, r.reason
    agent, forwarded, service_ms = r.user_agent, r.x_forwarded_for, r.upstream_service_time_ms
    direction, workload, service, remote, carrier = r.direction, r.workload, r.service, r.downstream_remote, r.carrier
    every = (
        f"{request_id}{trace_id}{direction}{workload}{service}{route}{method}{authority}{path}{protocol}{flags}"
        f"{details}{host}{remote}{carrier}{reason}{agent}{forwarded}"
    )
    # isprintable is False for controls, line separators and lone surrogates: with `"` and `\` all that JSON or a
    # line-wise reader could stumble over. It is twice as fast as a regular expression of the same.
    if not every.isprintable() or '"' in every or "\\" in every:
        request_id, trace_id, route, method, authority = map(_inner, (request_id, trace_id, route, method, authority))
        path, protocol, flags, details, host = map(_inner, (path, protocol, flags, details, host))
        reason, agent, forwarded = map(_inner, (reason, agent, forwarded))
        direction, workload, service = _escaped(direction), _escaped(workload), _escaped(service)
        remote, carrier = _escaped(remote), _escaped(carrier)
    request_id = _NULL if request_id is None else f'"{request_id}"'
    trace_id = _NULL if trace_id is None else f'"{trace_id}"'
    route = _NULL if route is None else f'"{route}"'
    method = _NULL if method is None else f'"{method}"'
    authority = _NULL if authority is None else f'"{authority}"'
    path = _NULL if path is None else f'"{path}"'
    protocol = _NULL if protocol is None else f'"{protocol}"'
    flags = _NULL if flags is None else f'"{flags}"'
    details = _NULL if details is None else f'"{details}"'
    host = _NULL if host is None else f'"{host}"'
    reason = _NULL if reason is None else f'"{reason}"'
    agent = _NULL if agent is None else f'"{agent}"'
    forwarded = _NULL if forwarded is None else f'"{forwarded}"'
    upstream_ms = _NULL if service_ms is None else f"{service_ms:.3f}"
    return (
        f'{{"start_time":"{seconds.text(r.start_time)}","request_id":{request_id},"trace_id":{trace_id}'
        f',"direction":"{direction}","workload":"{workload}","service":"{service}","route_name":{route}'
        f',"method":{method},"authority":{authority},"path":{path},"protocol":{protocol}'
        f',"response_code":{r.response_code},"response_flags":{flags},"response_code_details":{details}'
        f',"bytes_received":{r.bytes_received},"bytes_sent":{r.bytes_sent},"duration_ms":{r.duration_ms:.3f}'
        f',"upstream_service_time_ms":{upstream_ms},"upstream_host":{host},"downstream_remote":"{remote}"'
        f',"attempts":{r.attempts},"carrier":"{carrier}","reason":{reason}'
        f',"user_agent":{agent},"x_forwarded_for":{forwarded}}}\n'
    )


def _inner(value: str | None) -> str | None:
    return None if value is None else _escaped(value)


def _escaped(value: str) -> str:
    """`value` as it stands between the quotes of JSON."""
    if value.isprintable() and '"' not in value and "\\" not in value:
        return value
    # Lone surrogates (bytes that were no UTF-8) are spelled out first: a strict reader refuses them in JSON.
    return json.dumps(value.encode("utf-8", "backslashreplace").decode("utf-8"))[1:-1]


def text_line(record: Record, seconds: Seconds) -> str:
    """Envoy's default line; what is empty is `-`, an escape is written as in a Python string."""
    r = record
    upstream_ms = r.upstream_service_time_ms
    return (
        f'[{seconds.text(r.start_time)}] "{_word(r.method)} {_word(r.path)} {_word(r.protocol)}" {r.response_code} '
        f"{_word(r.response_flags)} {r.bytes_received} {r.bytes_sent} {int(r.duration_ms)} "
        f"{NONE if upstream_ms is None else int(upstream_ms)} "
        f'"{_quoted(r.x_forwarded_for)}" "{_quoted(r.user_agent)}" "{_quoted(r.request_id)}" "{_quoted(r.authority)}" '
        f'"{_quoted(r.upstream_host)}"\n'
    )


def _quoted(value: str | None) -> str:
    if not value:
        return NONE
    if value.isprintable() and '"' not in value and "\\" not in value:
        return value
    return _AWKWARD.sub(_escape, value)


def _word(value: str | None) -> str:
    """As _quoted, for a place that a space would end."""
    return _quoted(value).replace(" ", "\\x20")


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    return char.encode("unicode_escape").decode("ascii")
