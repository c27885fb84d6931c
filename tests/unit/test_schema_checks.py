"""Across documents: collisions, loops, our own ports, and policies without a service; each with place and remedy."""

from __future__ import annotations

import pytest

from meshbpf.schema import ConfigErrors, parse

API = "apiVersion: meshbpf.io/v1\n"


def service(name: str, spec: str = "", *, namespace: str = "default", port: str = "http, port: 80") -> str:
    """Line 2: metadata, line 3: ports, line 4: whatever else."""
    metadata = f"kind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
    return f"{API}{metadata}spec:\n  ports: [{{name: {port}}}]\n  {spec}\n"


def policy(name: str, service: str, more: str = "", *, namespace: str = "default") -> str:
    metadata = f"kind: ServicePolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n"
    return f"{API}{metadata}spec:\n  service: {service}\n  {more}\n"


def agent(spec: str) -> str:
    return f"{API}kind: Agent\nspec: {spec}\n"


def found(*texts: str) -> list[str]:
    """Every fault of texts a, b, c…; none is an empty list."""
    try:
        parse([(chr(ord("a") + index), text) for index, text in enumerate(texts)])
    except ConfigErrors as errors:
        return str(errors).splitlines()
    return []


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # names
        ([agent("{}"), agent("{}")], ["b:1:1: a second Agent: at most one is allowed, the first is at a:1:1"]),
        ([service("orders"), service("orders")],
         ["b:3:18: service orders is defined twice, first at a:3:18: remove one"]),
        ([service("orders"), service("orders", namespace="shop")], []),
        # UDP
        ([service("dns", port="names, port: 53, protocol: udp"), policy("p", "dns", "mode: proxy")],
         ["b:6:9: spec.mode proxy: no proxy carries UDP, and service dns has the UDP port names:"
          " leave mode out, or give that port a service of its own"]),
        ([service("dns", port="names, port: 53, protocol: udp"), policy("p", "dns", "mode: direct")], []),
        # by client
        ([service("a", port="http, port: 80, protocol: http"),
          policy("p", "a", "loadBalancer: {consistentHash: {useSourceIp: true}}")],
         ["b:6:17: spec.loadBalancer.consistentHash: the proxy has none yet, and it carries port http of service a:"
          " set spec.mode to direct, or give that port a service of its own"]),
        ([service("a", port="names, port: 53, protocol: udp"),
          policy("p", "a", "loadBalancer: {consistentHash: {useSourceIp: true}}")], []),
        ([service("a", port="http, port: 80, protocol: http"),
          policy("p", "a", "mode: direct\n  loadBalancer: {consistentHash: {useSourceIp: true}}")], []),
        # addresses
        ([service("a", "addresses: [127.96.0.10]"),
          service("b", "addresses: [127.96.0.9, 127.96.0.10]", namespace="x")],
         ["b:6:27: 127.96.0.10:80 of service b.x is also service a at a:3:18: change the address or the port"]),
        ([service("a", "addresses: [127.96.0.10]"),
          service("b", "addresses: [127.96.0.10]", port="web, port: 81")], []),
        ([service("a", "addresses: ['fd00::1']"), service("b", "addresses: ['FD00::0:1']")],
         ["b:6:15: [fd00::1]:80 of service b is also service a at a:3:18: change the address or the port"]),
        ([agent("{admin: {listen: 0.0.0.0:8080}}"), service("a", "addresses: [127.96.0.10]", port="http, port: 8080")],
         ["b:6:15: 127.96.0.10:8080 of service a is Agent.spec.admin.listen: use another address or port"]),
        ([service("a", "addresses: [127.96.0.10]", port="http, port: 15001")], []),
        ([agent("{admin: {listen: '0.0.0.0:9100'}}"),
          service("a", "addresses: [127.96.0.10]", port="http, port: 9100")],
         ["b:6:15: 127.96.0.10:9100 of service a is Agent.spec.admin.listen: use another address or port"]),
        # endpoints
        ([service("a", "addresses: [127.96.0.10]"),
          service("b", "endpoints: [{address: 127.96.0.10, ports: {http: 80}}]")],
         ["b:6:52: endpoint 127.96.0.10:80 is the address of service a (a:3:18): name the servers behind it instead"]),
        ([service("a", "endpoints: [{address: 127.96.0.10, ports: {http: 80}}]\n  addresses: [127.96.0.10]")],
         ["a:6:52: endpoint 127.96.0.10:80 is the address of service a (a:3:18): name the servers behind it instead"]),
        ([service("a", "addresses: [127.96.0.10]"),
          service("b", "endpoints: [{address: 127.96.0.10, ports: {http: 81}}]")], []),
        ([service("a", "endpoints: [{address: 169.254.169.254, ports: {http: 80}}]")],
         ["a:6:25: spec.endpoints[0].address 169.254.169.254 is a metadata address of the platform: use an address "
          "that a host can have"]),
        ([service("a", "endpoints: [{address: 'fe80::1', ports: {http: 80}}]")],
         ["a:6:25: spec.endpoints[0].address fe80::1 is a link-local address: use an address that a host can have"]),
        ([service("a", "endpoints: [{address: 0.0.0.0, ports: {http: 80}}]")],
         ["a:6:25: spec.endpoints[0].address 0.0.0.0 is an unspecified address: use an address that a host can have"]),
        ([service("a", "endpoints: [{address: 255.255.255.255, ports: {http: 80}}]")],
         ["a:6:25: spec.endpoints[0].address 255.255.255.255 is the broadcast address: use an address that a host can "
          "have"]),
        ([agent("{proxy: {listen: '127.0.0.1:25001'}}"),
          service("a", "endpoints: [{address: '::1', ports: {http: 25001}}]")],
         ["b:6:46: endpoint [::1]:25001 is Agent.spec.proxy.listen: an endpoint must be a server of yours"]),
        ([agent("{registries: [{embedded: {listen: '192.0.2.1:7000', tokenFile: t}}]}"),
          service("a", "endpoints: [{address: 192.0.2.1, ports: {http: 7000}}]")],
         ["b:6:50: endpoint 192.0.2.1:7000 is Agent.spec.registries.embedded.listen: an endpoint must be a server of "
          "yours"]),
        *[
            ([service("a", f"endpoints: [{{address: 127.9.9.9, ports: {{http: {own}}}}}]")],
             [f"a:6:50: endpoint 127.9.9.9:{own} is a port of meshbpf: an endpoint must be a server of yours"])
            for own in (15001, 15006, 15010, 15020)
        ],
        ([service("a", "endpoints: [{address: 192.0.2.1, ports: {http: 15001}}]")], []),
        # policies
        ([policy("p", "orders")],
         ["a:5:12: no service orders in namespace default: define it, or configure a registry that knows it"]),
        ([service("orders"), policy("p", "ordres")],
         ['b:5:12: no service ordres in namespace default: did you mean "orders"?']),
        ([service("orders", namespace="shop"), policy("p", "orders")],
         ["b:5:12: no service orders in namespace default: it is in namespace shop: set metadata.namespace "
          "of the policy"]),
        ([agent("{registries: [embedded: {}]}"), policy("p", "orders")], []),
        ([service("orders"), policy("p", "orders"), policy("q", "orders")],
         ["c:5:12: service orders has two policies, the first at b:3:18: join them in one"]),
        ([service("a"), service("b"), policy("p", "a"), policy("p", "b")],
         ["d:3:18: policy p is defined twice, first at c:3:18: rename one"]),
        ([service("a"), service("a", namespace="x"), policy("p", "a"), policy("p", "a", namespace="x")], []),
        ([service("dns"), policy("p", "dns", "mode: proxy")], []),
    ],
)  # fmt: skip
def test_faults_between_documents(texts: list[str], expected: list[str]) -> None:
    assert found(*texts) == expected


def test_a_service_that_cannot_be_read_does_not_make_its_policy_wrong() -> None:
    """One mistake is reported once: the service may well be in the part that does not parse."""
    broken = f"{API}kind: Service\nmetadata: {{name: orders\n"
    (fault,) = found(broken, policy("p", "orders"))
    assert fault.startswith("a:3:24: not YAML")
    (fault,) = found(service("orders").replace("Service", "Servise"), policy("p", "orders"))
    assert fault == 'a:2:7: unknown kind "Servise": did you mean "Service"?'
    (fault,) = found(service("orders", "typo: 1"), policy("p", "orders"))
    assert fault.startswith('a:6:3: unknown field "typo" in spec')


def test_a_registry_that_is_refused_still_counts_as_one_for_unknown_services() -> None:
    (fault,) = found(agent("{registries: [etcd: {}]}"), policy("p", "orders"))
    assert fault.startswith("a:3:21: the etcd registry: reserved")
