"""How much and how long the proxy bears, per connection and per request. Numbers only; tests inject smaller ones.

What a service may choose for itself (connect, request and pool times) is in its policy, not here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and seconds."""

    request_line: int = 8 * 1024
    head: int = 64 * 1024  # a whole head, of requests and of answers
    fields: int = 100  # header lines in one head
    parked: int = 64 * 1024  # bytes of pipelined requests that wait; above, the caller is not read
    replay: int = 64 * 1024  # bytes of a request that are kept in case its pooled connection was dead (INTERFACE)
    write_high: int = 256 * 1024  # bytes of an answer that the caller has not taken; above, the endpoint is not read
    head_timeout: float = 10.0  # from the first to the last byte of a request head
    hello_timeout: float = 15.0  # from the connection to the last byte of a TLS hello (Envoy's listener filters)
    body_timeout: float = 30.0  # without a byte of a request body that the proxy is ready to read
    keep_alive: float = 60.0  # without a request on the caller's connection
    drain_quiet: float = 0.3  # without a request on a connection when the proxy shuts down
    linger: float = 1.0  # Envoy's delayed close: how long a refused caller may go on sending
    flush: float = 30.0  # without a byte taken of what is left to send on a connection that we have closed
    stream_idle: float = 300.0  # without a byte either way while a request is served (Envoy's)
    attempts: int = 2  # tries of a connect, each on another endpoint
    tick: float = 0.05  # how late a timeout may be noticed
    join_after: int = 4  # answers with a body after which a connection may join the redirect table
    leave_idle: float = 3.0  # without a request on a connection that is in the redirect table


DEFAULT_LIMITS = Limits()
