"""New connections to endpoints, made in the caller's namespace. That one cannot be reached is a value, not an error.

`connect` is one try, of whatever protocol; `dial` is a relay's way to an endpoint: it picks, tries, picks once more.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from meshbpf.reason import Reason
from userspace_proxy.limits import DEFAULT_LIMITS
from userspace_proxy.stats import endpoint_label

if TYPE_CHECKING:
    from userspace_proxy.tcp import Relay

ATTEMPTS = DEFAULT_LIMITS.attempts


class Host(Protocol):
    """What a relay needs to know of an endpoint; `active` is counted up while it is dialled or connected."""

    address: str
    port: int
    active: int


async def connect(
    loop: asyncio.AbstractEventLoop,
    make_socket: Callable[[Any, int], socket.socket],
    netns: Any,
    host: Host,
    timeout: float,
) -> socket.socket | Reason:
    """A non-blocking socket connected to `host`, or why there is none (CONNECT_TIMEOUT, CONNECT_FAILED).

    `make_socket` is called with `netns` and an address family; `timeout` is in seconds, 0: as long as the kernel tries.
    """
    sock: socket.socket | None = None
    connected = False
    try:
        async with asyncio.timeout(timeout or None):
            sock = make_socket(netns, socket.AF_INET6 if ":" in host.address else socket.AF_INET)
            sock.setblocking(False)
            await loop.sock_connect(sock, (host.address, host.port))
        connected = True
    except TimeoutError:
        return Reason.CONNECT_TIMEOUT
    except (OSError, KeyError):  # KeyError: the namespace was unlistened while its connection waited
        return Reason.CONNECT_FAILED
    finally:
        if sock is not None and not connected:
            sock.close()
    return sock


async def dial(relay: Relay) -> socket.socket | Reason:
    """A socket connected to an endpoint that `relay.pick` named, told in its record; or why there is none."""
    reason = Reason.NO_HEALTHY_UPSTREAM
    record = relay.record
    failed: list[Host] = []
    for _ in range(ATTEMPTS):
        host = _another(relay.pick, failed)
        if host is None:
            break
        if failed and relay.attempted is not None:
            relay.attempted(failed[-1], reason.word)
        relay.host = host
        host.active += 1
        record.attempts += 1
        record.upstream_host = endpoint_label(host.address, host.port)
        timeout = relay.policy.connection_pool.tcp.connect_timeout
        outcome = await connect(relay.loop, relay.make_socket, relay.netns, host, timeout)
        if isinstance(outcome, socket.socket):
            record.endpoint_outcome = "ok"
            return outcome
        reason = outcome
        record.endpoint_outcome = reason.word
        relay.release()
        failed.append(host)
    return reason


def _another(pick: Callable[[], Host | None], failed: list[Host]) -> Host | None:
    """An endpoint that has not just failed. Balancers may name the same one twice, so a few are asked for."""
    for _ in range(1 if not failed else 4):
        host = pick()
        if host is None or host not in failed:
            return host
    return None
