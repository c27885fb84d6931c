"""What makes sense only across documents: names, addresses and ports that collide, policies without a service.

Each fault stands at the later of the two places and names the earlier one, with what to change.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshbpf.carrier import Carrier, choose
from meshbpf.model import Agent, Mode, Protocol, ServicePolicy
from meshbpf.schema import addresses
from meshbpf.schema.agent import AgentDocument
from meshbpf.schema.policy import PolicyDocument
from meshbpf.schema.report import Report
from meshbpf.schema.service import EndpointDocument, ServiceDocument
from meshbpf.schema.words import meant
from meshbpf.yamlpos import Mark

ServicePlaces = dict[tuple[str, str, int], ServiceDocument]


def check(
    agents: Sequence[AgentDocument],
    services: Sequence[ServiceDocument],
    policies: Sequence[PolicyDocument],
    report: Report,
    *,
    complete: bool,
) -> None:
    """`complete` says that no service can have gone unseen (in a text that does not parse, or without a name)."""
    for second in agents[1:]:
        report.add(second.at, f"a second Agent: at most one is allowed, the first is at {agents[0].at}")
    agent = agents[0].agent if agents else Agent()
    known = _names(services, report)
    taken = _addresses(services, agent, report)
    _endpoints(services, agent, taken, report)
    _policies(policies, known, report, complete=complete and not any(document.registry for document in agents))


def _names(services: Sequence[ServiceDocument], report: Report) -> dict[tuple[str, str], ServiceDocument]:
    known: dict[tuple[str, str], ServiceDocument] = {}
    for document in services:
        if (first := known.setdefault(document.service.id, document)) is not document:
            report.add(
                document.at, f"service {document.service.label} is defined twice, first at {first.at}: remove one"
            )
    return known


def _addresses(services: Sequence[ServiceDocument], agent: Agent, report: Report) -> ServicePlaces:
    """Who owns each (address, tcp or udp, port); two services may share an address when their ports differ."""
    taken: ServicePlaces = {}
    told: set[tuple[str, Mark, Mark]] = set()  # two services on one address share all their ports, mostly
    suspect = addresses.suspect_ports(agent)
    for document in services:
        service = document.service
        for address, at in zip(service.addresses, document.addresses_at, strict=True):
            for port in service.ports:
                if port.port in suspect and (ours := addresses.our_listener(address, port.port, agent)):
                    place = addresses.joined(address, port.port)
                    report.add(at, f"{place} of service {service.label} is {ours}: use another address or port")
                    continue
                owner = taken.setdefault((address, addresses.layer4(port.protocol), port.port), document)
                if owner.service.id != service.id and (address, at, owner.at) not in told:
                    told.add((address, at, owner.at))
                    place = addresses.joined(address, port.port)
                    other = f"is also service {owner.service.label} at {owner.at}"
                    report.add(at, f"{place} of service {service.label} {other}: change the address or the port")
    return taken


def _endpoints(services: Sequence[ServiceDocument], agent: Agent, taken: ServicePlaces, report: Report) -> None:
    suspect = addresses.suspect_ports(agent)
    for document in services:
        layers = {port.name: addresses.layer4(port.protocol) for port in document.service.ports}
        for item in document.endpoints:
            address = item.endpoint.address
            for name, number in item.endpoint.ports.items():
                ours = addresses.our_port(address, number, agent) if number in suspect else ""
                owner = taken.get((address, layers.get(name, "tcp"), number))
                if ours or owner:
                    _looped(item, name, ours, owner, report)


def _looped(item: EndpointDocument, name: str, ours: str, owner: ServiceDocument | None, report: Report) -> None:
    place = addresses.joined(item.endpoint.address, item.endpoint.ports[name])
    if ours:
        report.add(item.ports_at[name], f"endpoint {place} is {ours}: an endpoint must be a server of yours")
    if owner is not None:
        loop = f"endpoint {place} is the address of service {owner.service.label} ({owner.at})"
        report.add(item.ports_at[name], f"{loop}: name the servers behind it instead")


def _policies(
    policies: Sequence[PolicyDocument],
    known: dict[tuple[str, str], ServiceDocument],
    report: Report,
    *,
    complete: bool,
) -> None:
    names: dict[tuple[str, str], PolicyDocument] = {}
    governed: dict[tuple[str, str], PolicyDocument] = {}
    for document in policies:
        policy = document.policy
        if not policy.service:
            continue
        first = governed.setdefault(policy.service_id, document)
        if first is not document:
            report.add(
                document.service_at,
                f"service {policy.service} has two policies, the first at {first.at}: join them in one",
            )
        elif (named := names.setdefault((policy.name, policy.namespace), document)) is not document:
            report.add(document.at, f"policy {policy.name} is defined twice, first at {named.at}: rename one")
        if policy.mode is Mode.PROXY and (udp := _udp_ports(known.get(policy.service_id))):
            report.add(
                document.mode_at,
                f"spec.mode proxy: no proxy carries UDP, and service {policy.service} has the UDP port {udp[0]}:"
                " leave mode out, or give that port a service of its own",
            )
        if (field := policy.load_balancer.by_client) and (port := _proxied(known.get(policy.service_id), policy)):
            report.add(
                document.balance_at,
                f"spec.loadBalancer.{field}: the proxy has none yet, and it carries port {port} of service"
                f" {policy.service}: set spec.mode to direct, or give that port a service of its own",
            )
        if policy.service_id not in known and complete:
            hint = _near(policy.service, policy.namespace, known)
            report.add(document.service_at, f"no service {policy.service} in namespace {policy.namespace}: {hint}")


def _udp_ports(document: ServiceDocument | None) -> list[str]:
    return [port.name for port in document.service.ports if port.protocol is Protocol.UDP] if document else []


def _proxied(document: ServiceDocument | None, policy: ServicePolicy) -> str:
    """The first port that the proxy carries."""
    ports = document.service.ports if document else ()
    return next((port.name for port in ports if choose(port, policy).carrier is Carrier.PROXY), "")


def _near(name: str, namespace: str, known: dict[tuple[str, str], ServiceDocument]) -> str:
    elsewhere = sorted(space for other, space in known if other == name)
    if elsewhere:
        return f"it is in namespace {elsewhere[0]}: set metadata.namespace of the policy"
    here = sorted(other for other, space in known if space == namespace)
    if (hint := meant(name, here)).startswith("did you mean"):
        return hint
    return "define it, or configure a registry that knows it"
