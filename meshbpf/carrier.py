"""Which carrier serves a port, and why. Pure; the only place that knows: plan, proxy and the commands ask it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshbpf.model import Mode, Port, Protocol, ServicePolicy


class Carrier(StrEnum):
    DIRECT = "direct"
    KERNEL = "kernel"
    PROXY = "proxy"


@dataclass(frozen=True, slots=True)
class Choice:
    """`why` is a stable word for machines and short enough for a table."""

    carrier: Carrier
    why: str


def lack(port: Port, policy: ServicePolicy) -> str:
    """Why no carrier does with the port what its policy says, and the remedy; empty when one does."""
    if port.protocol is Protocol.UDP and policy.mode is Mode.PROXY:
        return "is UDP, which no proxy carries, and the service's policy has mode proxy: leave mode out"
    field = policy.load_balancer.by_client
    if field and choose(port, policy).carrier is Carrier.PROXY:
        return (
            f"is carried by the proxy, which has no loadBalancer.{field} yet: set mode: direct in the service's policy"
        )
    return ""


def choose(port: Port, policy: ServicePolicy) -> Choice:
    """The carrier of `port` under `policy` (INTERFACE, "mode: auto follows the port's protocol")."""
    if port.protocol is Protocol.UDP:
        return Choice(Carrier.DIRECT, "protocol_udp")
    if policy.mode is Mode.DIRECT:
        return Choice(Carrier.DIRECT, "policy_mode_direct")
    if port.protocol in (Protocol.HTTP2, Protocol.GRPC):
        return Choice(Carrier.PROXY if policy.mode is Mode.PROXY else Carrier.DIRECT, "http2_not_yet")
    if policy.mode is Mode.PROXY:
        return Choice(Carrier.PROXY, "policy_mode_proxy")
    if port.protocol is Protocol.HTTP:
        return Choice(Carrier.PROXY, "protocol_http")
    return Choice(Carrier.DIRECT, f"protocol_{port.protocol}")
