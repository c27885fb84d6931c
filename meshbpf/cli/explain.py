"""Why a connect would go where it goes: the same questions as the connect hook, answered from the same tables."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from loader import abi
from loader.dataplane import Dataplane
from loader.plan import service_key
from meshbpf import durations
from meshbpf.carrier import Carrier, choose
from meshbpf.cli.view import unknown
from meshbpf.errors import NotFound
from meshbpf.model import Balance, Mesh, OnProxyDown, Port, Protocol, Service, ServicePolicy, SessionAffinity
from meshbpf.reason import REMEDY, TEXT, Reason

Steps = list[tuple[str, str]]
CONVERSATION = (
    "a socket stays with its endpoint until that leaves the service; a retry after a second without an answer,"
    " from a socket that is not connected, goes to another one"
)
NOW = {
    OnProxyDown.DIRECT: f"no proxy runs: straight to an endpoint ({Reason.PROXY_ABSENT.word})",
    OnProxyDown.REFUSE: f"no proxy runs: refused ({Reason.PROXY_DOWN_REFUSED.word})",
}
CLIENT = "a client is the address that its socket is bound to, else its network namespace"


def verdicts(counters: Mapping[tuple[str, str], int], proxy: Sequence[Sequence[Any]] = ()) -> list[dict[str, Any]]:
    """Counted verdicts as rows, most frequent first: the kernel programs' and, as (service, reason, count), the
    proxy's, which alone knows of which service.
    """
    counted = {where: (count, dict[str, int]()) for where, count in counters.items()}
    for service, reason, count in proxy:
        total, of = counted.get(("proxy", reason), (0, {}))
        counted["proxy", reason] = (total + int(count), {**of, service: of.get(service, 0) + int(count)})
    rows = []
    for (program, word), (count, of) in counted.items():
        reason = Reason[word.upper()]
        by_service = dict(sorted(of.items(), key=lambda item: (-item[1], item[0])))
        rows.append(
            {
                "program": program, "reason": word, "count": count, "text": TEXT[reason],
                "remedy": REMEDY.get(reason, ""), "services": by_service,
            }
        )  # fmt: skip
    return sorted(rows, key=lambda row: (-row["count"], row["program"], row["reason"]))


def targets(mesh: Mesh, text: str) -> list[tuple[Service, Port]]:
    """The ports that `text` (a service, SERVICE:PORT or ADDRESS:PORT) means, by number or name. Raises NotFound."""
    whole = [service for service in mesh.services if _named(service, text)]
    if whole:
        return [(service, port) for service in whole for port in service.ports]
    host, colon, number = text.rpartition(":")
    if _is_address(text.strip("[]")) or not colon:
        host, number = text, ""
    owners = [service for service in mesh.services if _is(service, host)]
    ports = [(service, port) for service in owners for port in service.ports]
    found = [(service, port) for service, port in ports if number in (str(port.port), port.name)]
    if found:
        return found
    if ports:
        there = ", ".join(f"{port.port} ({service.label} {port.name})" for service, port in ports)
        if not number:
            raise NotFound(f"{text} has no port: give a port: {there}")
        raise NotFound(f"{host} has no port {number}: a connect to it is left alone; it has {there}")
    if _is_address(host.strip("[]")):
        give = "" if number else "; give a port: ADDRESS:PORT"
        raise NotFound(f"{text} is no service: a connect to it is left alone{give}")
    raise unknown(mesh, host)


def _is(service: Service, text: str) -> bool:
    """Whether `text` names the service, or is one of its addresses."""
    return _named(service, text) or _canonical(text.strip("[]")) in map(_canonical, service.addresses)


def _named(service: Service, text: str) -> bool:
    return text in (service.label, f"{service.name}.{service.namespace}")


def _is_address(text: str) -> bool:
    try:
        abi.pack_address(text)
    except ValueError:
        return False
    return True


def _canonical(address: str) -> str:
    """One text for one address; what is none stays as it is."""
    try:
        return abi.unpack_address(abi.pack_address(address))
    except ValueError:
        return address


def explain(plane: Dataplane, mesh: Mesh, text: str) -> Steps:
    """One (step, what it says) per decision, in the order in which the kernel takes them."""
    steps: Steps = []
    for service, port in targets(mesh, text):
        steps += _port(plane, mesh, service, port)
    return steps


def _port(plane: Dataplane, mesh: Mesh, service: Service, port: Port) -> Steps:
    policy = mesh.policy_for(service)
    choice, serves = choose(port, policy), plane.proxy_serves(time.monotonic_ns())
    named = f"{service.label} port {port.name} ({port.port}/{port.protocol}), from {service.source or 'unknown'}"
    steps: Steps = [("service", named)]
    raw = [plane.maps["services"].lookup(service_key(a, port.port, port.protocol)) for a in service.addresses]
    held = next((value for value in raw if value is not None), None)
    for address, value in zip(service.addresses, raw, strict=True):
        known = "known to the kernel" if value else "NOT known to the kernel: connects to it are left alone"
        steps.append(("address", f"{address}:{port.port}, {known}"))
    origin = f"policy {policy.name}, from {policy.source}" if policy.source else "defaults, no ServicePolicy names it"
    steps.append(("policy", origin))
    steps.append(("carrier", f"{choice.carrier}: {choice.why}"))
    if choice.carrier is Carrier.PROXY:
        fallback = "led to an endpoint, ungoverned" if policy.on_proxy_down is OnProxyDown.DIRECT else "refused"
        steps.append(("without proxy", f"onProxyDown {policy.on_proxy_down}: while no proxy serves, {fallback}"))
        if not serves:
            steps.append(("now", NOW[policy.on_proxy_down]))
    steps.append(("balance", _balance(policy, choice.carrier)))
    if policy.load_balancer.session_affinity is SessionAffinity.CLIENT_IP:
        timeout = durations.render(policy.load_balancer.session_affinity_timeout)
        steps.append(("affinity", f"ClientIP: the endpoint it had last, until {timeout} pass without a call; {CLIENT}"))
    if held is not None and (limit := _policy(plane, held).limit):
        open_now = int.from_bytes(plane.maps["limits"].lookup(held) or b"", "little")
        steps.append(("limit", f"maxConnections {limit}: {open_now} open now, one more than that is refused"))
    if port.protocol is Protocol.UDP:
        steps.append(("conversation", CONVERSATION))
    through_proxy = choice.carrier is Carrier.PROXY and (serves or policy.on_proxy_down is OnProxyDown.REFUSE)
    steps += _endpoints(plane, service, port, held, _shared(port, policy), _without_endpoint(port, through_proxy))
    return steps


def _without_endpoint(port: Port, through_proxy: bool) -> str:
    """The verdict on a call while no endpoint takes any: the reason that is counted, and what the caller sees."""
    if not through_proxy:
        reason, sees = Reason.NO_ENDPOINT, "the caller gets an error"
    elif port.protocol is Protocol.HTTP:
        reason, sees = Reason.NO_HEALTHY_UPSTREAM, "the proxy answers 503"
    else:
        reason, sees = Reason.NO_HEALTHY_UPSTREAM, "the proxy closes the connection"
    return f"{reason.word}: the service has no endpoint that takes new connections: {sees}"


def _balance(policy: ServicePolicy, carrier: Carrier) -> str:
    simple, hashed = policy.load_balancer.simple, policy.load_balancer.consistent_hash
    if hashed.use_source_ip:
        return f"consistentHash by weight, Maglev table of {hashed.maglev.table_size}: {CLIENT}"
    if carrier is Carrier.DIRECT and simple is Balance.LEAST_REQUEST:
        return "ROUND_ROBIN by weight: in direct nobody counts requests, so LEAST_REQUEST becomes this"
    return f"{simple}" + ("" if simple is Balance.RANDOM else ", by weight")


def _shared(port: Port, policy: ServicePolicy) -> str:
    """What endpoints have their shares of."""
    if policy.load_balancer.consistent_hash.use_source_ip:
        return "clients"
    if policy.load_balancer.session_affinity is SessionAffinity.CLIENT_IP:
        return "new clients"
    return "new sockets" if port.protocol is Protocol.UDP else "new connections"


def _policy(plane: Dataplane, held: bytes) -> abi.PolicyValue:
    raw = plane.maps["policies"].lookup(held)
    return abi.PolicyValue.from_buffer_copy(raw) if raw else abi.PolicyValue()


def _slots(plane: Dataplane, held: bytes) -> range:
    """Those that a socket which can reach every endpoint is led by."""
    policy = _policy(plane, held)
    return range(2 * policy.slots4 if policy.pick == abi.Pick.HASH_OF_BOTH else 0, policy.slots)


def _endpoints(plane: Dataplane, service: Service, port: Port, held: bytes | None, shared: str, without: str) -> Steps:
    slots: dict[int, int] = {}
    if held is not None:
        for index in _slots(plane, held):
            slot = plane.maps["slots"].lookup(bytes(abi.SlotKey(int.from_bytes(held, "little"), index)))
            if slot is not None:
                slots[int.from_bytes(slot, "little")] = slots.get(int.from_bytes(slot, "little"), 0) + 1
    total = sum(slots.values())
    shares = {}
    for endpoint_id, count in slots.items():
        value = plane.maps["endpoints"].lookup(endpoint_id.to_bytes(4, "little"))
        if value is not None:
            shares[bytes(value[:18])] = count
    steps: Steps = []
    for endpoint in service.endpoints:
        number = endpoint.ports.get(port.name)
        if number is None:
            steps.append(("endpoint", f"{endpoint.address}: has no port {port.name}, never picked"))
            continue
        count = shares.get(bytes(abi.EndpointValue(abi.pack_address(endpoint.address), number))[:18], 0)
        why = (
            f"{100 * count / total:.3g}% of {shared}"
            if count
            else f"never picked: {endpoint.state}, weight {endpoint.weight}"
        )
        steps.append(("endpoint", f"{endpoint.address}:{number}, {why}"))
    if held is None:
        steps.append(("verdict", "left alone: the kernel leads no connect to this port"))
    elif not total:
        steps.append(("verdict", without))
    return steps
