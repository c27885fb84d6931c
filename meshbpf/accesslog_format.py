"""How a Record becomes one line of the access log: pure formatting, nothing is written here.

Rule: whatever bytes a client or an endpoint sent, the result is exactly one line that a parser takes apart again.
Nearly always nothing needs an escape, and the values go in as they are. The keys of the JSON line and their order are
the contract (INTERFACE "Logs, metrics, traces").
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
    "user_agent", "x_forwarded_for", "requested_server_name",
)  # fmt: skip
_AWKWARD = re.compile(r'[\\"\x00-\x1f]|[^\x20-\x7e]')
_NULL = "null"
NONE = "-"
MAX_COMMON, MAX_COMMON_SIZE = 4096, 1024  # entries, and characters of one: 4 MiB at most
_COMMON: dict[tuple[object, ...], tuple[str, str, str, str]] = {}


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
    # What one caller's requests of one kind have in common is escaped and joined once; a dictionary read is half the
    # price. What is each request's own stays out of the key.
    key = (
        r.direction, r.workload, r.service, r.route_name, r.method, r.authority, r.protocol, r.response_code,
        r.response_flags, r.response_code_details, r.upstream_host, r.attempts, r.carrier, r.reason, r.user_agent,
        r.x_forwarded_for, r.requested_server_name,
    )  # fmt: skip
    common = _COMMON.get(key)
    if common is None:
        common = _fragments(r)
        # Most of it a caller can choose: long values are not worth the memory that a hostile one could take.
        if sum(map(len, common)) <= MAX_COMMON_SIZE:
            if len(_COMMON) >= MAX_COMMON:
                _COMMON.clear()
            _COMMON[key] = common
    before_path, before_bytes, host, end = common
    request_id, path, remote = r.request_id, r.path, r.downstream_remote
    if request_id is not None and path is not None and _plain(f"{request_id}{path}{remote}"):
        own, path, remote = f'"{request_id}"', f'"{path}"', f'"{remote}"'
    else:
        own, path, remote = _value(request_id), _value(path), _value(remote)
    trace_id = _NULL if r.trace_id is None else _value(r.trace_id)
    service_ms = r.upstream_service_time_ms
    upstream_ms = _NULL if service_ms is None else f"{service_ms:.3f}"
    return (
        f'{{"start_time":"{seconds.text(r.start_time)}","request_id":{own},"trace_id":{trace_id}{before_path}'
        f',"path":{path}{before_bytes},"bytes_received":{r.bytes_received},"bytes_sent":{r.bytes_sent}'
        f',"duration_ms":{r.duration_ms:.3f},"upstream_service_time_ms":{upstream_ms}{host}'
        f',"downstream_remote":{remote}{end}'
    )


def _fragments(r: Record) -> tuple[str, str, str, str]:
    """What stands before the path, before the byte counts, before the caller's address, and behind it."""
    return (
        f',"direction":{_value(r.direction)},"workload":{_value(r.workload)},"service":{_value(r.service)}'
        f',"route_name":{_value(r.route_name)},"method":{_value(r.method)},"authority":{_value(r.authority)}',
        f',"protocol":{_value(r.protocol)},"response_code":{r.response_code}'
        f',"response_flags":{_value(r.response_flags)},"response_code_details":{_value(r.response_code_details)}',
        f',"upstream_host":{_value(r.upstream_host)}',
        f',"attempts":{r.attempts},"carrier":{_value(r.carrier)},"reason":{_value(r.reason)}'
        f',"user_agent":{_value(r.user_agent)},"x_forwarded_for":{_value(r.x_forwarded_for)}'
        f',"requested_server_name":{_value(r.requested_server_name)}}}\n',
    )


def _plain(value: str) -> bool:
    # isprintable is False for controls, line separators and lone surrogates: with `"` and `\` all that JSON or a
    # line-wise reader could stumble over. It is twice as fast as a regular expression of the same.
    return value.isprintable() and '"' not in value and "\\" not in value


def _value(value: str | None) -> str:
    """`value` as JSON."""
    return _NULL if value is None else f'"{_escaped(value)}"'


def _escaped(value: str) -> str:
    """`value` as it stands between the quotes of JSON."""
    if _plain(value):
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
    if _plain(value):
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
