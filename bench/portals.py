"""What kube-proxy would write for as many services, as text: a chain to walk for iptables, a verdict map for nft. Pure.

Rule: what a call walks through is as kube-proxy arranges it: a service's entry leads to a chain of its own that draws
an endpoint, whose chain turns the destination. What nobody walks through is not there: the crowd has its entries, but
one chain for all (nft takes 66 s to load all chains of 10 000 services); no node ports, no marks, no comments.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshbpf.model import Service


def spread(few: Sequence[Service], many: Sequence[Service]) -> list[Service]:
    """All of them, `few` at even distances, so that their median place in a chain is its middle."""
    found, step = list(many), len(many) / len(few)
    for number, service in enumerate(few):
        found.insert(int((number + 0.5) * step) + number, service)
    return found


def _endpoints(service: Service) -> list[str]:
    return [f"{e.address}:{e.ports[service.ports[0].name]}" for e in service.endpoints]


def iptables(few: Sequence[Service], many: Sequence[Service]) -> str:
    """For iptables-restore; `few` can be called."""
    chains, rules, walked = [":KUBE-SERVICES -", ":KUBE-SVC-CROWD -"], [], {service.name for service in few}
    for service in spread(few, many):
        one = service.name.upper() if service.name in walked else "CROWD"
        portal = f"-d {service.addresses[0]}/32 -p tcp -m tcp --dport {service.ports[0].port}"
        rules.append(f"-A KUBE-SERVICES {portal} -j KUBE-SVC-{one}")
    for service in few:
        one, endpoints = service.name.upper(), _endpoints(service)
        chains.append(f":KUBE-SVC-{one} -")
        for number, endpoint in enumerate(endpoints):
            left = len(endpoints) - number
            draw = f" -m statistic --mode random --probability {1 / left:.10f}" if left > 1 else ""
            chains.append(f":KUBE-SEP-{one}-{number} -")
            rules.append(f"-A KUBE-SVC-{one}{draw} -j KUBE-SEP-{one}-{number}")
            rules.append(f"-A KUBE-SEP-{one}-{number} -p tcp -m tcp -j DNAT --to-destination {endpoint}")
    return "\n".join(["*nat", *chains, "-A OUTPUT -j KUBE-SERVICES", *rules, "COMMIT", ""])


def nft(few: Sequence[Service], many: Sequence[Service]) -> str:
    """For nft -f; `few` can be called."""
    chains, portals, walked = ["chain service-crowd { }"], [], {service.name for service in few}
    for service in spread(few, many):
        one = service.name if service.name in walked else "crowd"
        portals.append(f"{service.addresses[0]} . tcp . {service.ports[0].port} : goto service-{one}")
    for service in few:
        endpoints = _endpoints(service)
        for number, endpoint in enumerate(endpoints):
            chains.append(f"chain endpoint-{service.name}-{number} {{ meta l4proto tcp dnat to {endpoint}; }}")
        drawn = ", ".join(f"{number} : goto endpoint-{service.name}-{number}" for number in range(len(endpoints)))
        draw = f"numgen random mod {len(endpoints)} vmap {{ {drawn} }};"
        chains.append(f"chain service-{service.name} {{ {draw} }}")
    parts = [
        "table ip kube-proxy {",
        *chains,
        "map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; elements = {",
        ",\n".join(portals),
        "} }",
        "chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }",
        "chain nat-output { type nat hook output priority -100; jump services; }",
        "}",
    ]
    return "\n".join([*parts, ""])
