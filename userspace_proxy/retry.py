"""Whether a request is tried again: its endpoint could not be reached, or its pooled connection turned out to be dead.

Decisions only; `attempt` performs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.upstream import Upstream


def connects_again(exchange: Exchange) -> bool:
    """The target could not be reached: another one is tried, `limits.attempts` in all, a replay's first try apart."""
    target, route = exchange.target, exchange.route
    assert route is not None
    if exchange.tries - exchange.retried >= exchange.down.limits.attempts:
        return False
    return any(other is not target and other.weight and not other.draining for other in route.targets)


def replays(exchange: Exchange, upstream: Upstream) -> bool:
    """The connection ended unanswered. An endpoint may close an idle one just when we use it: nobody need notice.

    What must not be served twice is not sent again: that nothing of it was acknowledged does not say it was not read.
    """
    return not (upstream.served == 0 or exchange.careful or exchange.retried or exchange.sent is None)
