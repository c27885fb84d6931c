"""One request or TCP connection as it is logged and counted: filled in on the hot path, read by log and metrics.

A plain slotted class, because a frozen dataclass costs half a microsecond to make. Keys of the access log are the slot
names (INTERFACE "Logs, metrics, traces"); None is written `-` in text and null in JSON.
"""

from __future__ import annotations


class Record:
    """Times: `start_time` is UNIX seconds, durations are milliseconds; bytes count bodies, not heads.

    `endpoint_outcome` is for metrics only: ok, a reason that speaks of the endpoint, or None.
    """

    __slots__ = (
        "attempts", "authority", "bytes_received", "bytes_sent", "carrier", "direction", "downstream_remote",
        "duration_ms", "endpoint_outcome", "method", "path", "protocol", "reason", "request_id",
        "requested_server_name", "response_code", "response_code_details", "response_flags", "route_name", "service",
        "start_time", "trace_id", "upstream_host", "upstream_service_time_ms", "user_agent", "workload",
        "x_forwarded_for",
    )  # fmt: skip

    def __init__(self, service: str, start_time: float, workload: str, downstream_remote: str) -> None:
        self.service = service
        self.start_time = start_time
        self.workload = workload
        self.downstream_remote = downstream_remote
        self.direction = "outbound"
        self.carrier = "proxy"
        self.request_id: str | None = None
        self.trace_id: str | None = None
        self.route_name: str | None = None
        self.method: str | None = None
        self.authority: str | None = None
        self.path: str | None = None
        self.protocol: str | None = None
        self.response_code = 0
        self.response_flags: str | None = None
        self.response_code_details: str | None = None
        self.bytes_received = 0
        self.bytes_sent = 0
        self.duration_ms = 0.0
        self.upstream_service_time_ms: float | None = None
        self.upstream_host: str | None = None
        self.attempts = 0
        self.reason: str | None = None
        self.user_agent: str | None = None
        self.x_forwarded_for: str | None = None
        self.requested_server_name: str | None = None
        self.endpoint_outcome: str | None = None
