"""When a request is tried again: its endpoint could not be reached, or its pooled connection turned out to be dead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshbpf.reason import Reason

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.upstream import Upstream


def connect_again(exchange: Exchange, reason: Reason) -> bool:
    """The target could not be reached: another one is tried, `limits.attempts` in all, a replay's first try apart."""
    target, route, down = exchange.target, exchange.route, exchange.down
    assert target is not None and route is not None
    if exchange.tries - exchange.retried >= down.limits.attempts:
        return False
    if not any(other is not target and other.weight and not other.draining for other in route.targets):
        return False
    _acquire(exchange, reason)
    return True


def replay(exchange: Exchange, upstream: Upstream) -> bool:
    """The connection ended unanswered. An endpoint may close an idle one just when we use it: nobody need notice.

    What must not be served twice is not sent again: that nothing of it was acknowledged does not say it was not read.
    """
    if upstream.served == 0 or exchange.careful or exchange.retried or exchange.sent is None:
        return False
    exchange.retried = True
    _acquire(exchange, Reason.UPSTREAM_RESET)
    return True


def _acquire(exchange: Exchange, reason: Reason) -> None:
    route, target = exchange.route, exchange.target
    assert route is not None and target is not None
    exchange.detach()
    exchange.avoid = target
    exchange.down.proxy.attempt(route.service, target.label, reason.word)
    route.pool.acquire(exchange)
