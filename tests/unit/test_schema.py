"""The kinds: the contract's example as model values, the model's defaults, and every refusal with its exact place."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.model import (
    Acceleration,
    AccessLogPolicy,
    AccessLogSettings,
    AdminSettings,
    Agent,
    Balance,
    ConnectionPool,
    ConsistentHash,
    EmbeddedRegistry,
    Endpoint,
    HttpPool,
    HttpRegistry,
    LoadBalancer,
    Maglev,
    MapSizes,
    Mode,
    OnProxyDown,
    Port,
    Protocol,
    ProxySettings,
    Service,
    ServicePolicy,
    SessionAffinity,
    TcpPool,
    Timeouts,
)
from meshbpf.schema import ConfigErrors, Parsed, later, parse

CONTRACT = """\
apiVersion: meshbpf.io/v1
kind: Agent                       # at most one; every field has a default
spec:
  registries:                     # besides the files of -c, in order of precedence
    - embedded: {listen: 127.0.0.1:15010, store: /var/lib/meshbpf/registry.db}
    - http: {url: http://127.0.0.1:15010, tokenFile: /run/secrets/mesh}
  addressPool: 127.96.0.0/16
  proxy: {listen: 127.0.0.1:15001, workers: 1, drain: 5s}
  admin: {listen: 127.0.0.1:15020}
  acceleration: auto              # auto | off | redirect | kernel: the upper bound for every service
  accessLog: {format: json, path: /dev/stdout}      # json | text
  maps: {}
---
apiVersion: meshbpf.io/v1
kind: Service                     # what it is; how it is governed is ServicePolicy
metadata: {name: orders, namespace: default, labels: {team: shop}}
spec:
  addresses: [127.96.0.10]
  ports:
    - {name: http, port: 80, protocol: http}        # http | http2 | grpc | tcp | tls | udp
  endpoints:
    - {address: 127.0.0.1, ports: {http: 8081}, weight: 100, zone: a, labels: {version: v1}}
---
apiVersion: meshbpf.io/v1
kind: ServicePolicy
metadata: {name: orders}
spec:
  service: orders
  mode: auto                      # auto | direct | proxy
  acceleration: auto              # auto | off | redirect | kernel
  onProxyDown: direct             # direct (balanced, ungoverned) | refuse
  loadBalancer: {simple: LEAST_REQUEST}
  connectionPool:
    tcp: {maxConnections: 1024, connectTimeout: 5s, idleTimeout: 1h}
    http: {http1MaxPendingRequests: 1024, maxRequestsPerConnection: 0, idleTimeout: 3s}
  timeouts: {request: 0s, perTry: 0s, queue: 3s}      # 0s = none
  accessLog: {samplePercent: 100, slow: 1s}
"""

RESERVED = """\
subsets: [{name: v2, labels: {version: v2}}]
retries: {attempts: 2}
healthCheck: {http: {path: /healthz}}
outlierDetection: {consecutive5xxErrors: 5}
circuitBreaker: {strategy: slowRequestRatio}
rateLimits: [{tokens: 100}]
fault: {abort: {percent: 1, httpStatus: 503}}
fallback: {status: 503}
tracing: {samplingPercent: 1}
loadBalancer: {warmup: 10s}
loadBalancer: {consistentHash: {httpHeaderName: x-user}}
loadBalancer: {consistentHash: {httpCookie: {name: user, ttl: 0s}}}
loadBalancer: {consistentHash: {httpQueryParameterName: user}}
loadBalancer: {consistentHash: {useSourceIp: true, ringHash: {minimumRingSize: 1024}}}
loadBalancer: {simple: PEAK_EWMA}
connectionPool: {http: {http2MaxRequests: 1024}}
timeouts: {perTry: 1s}
"""


def faults(text: str, file: str = "f") -> list[str]:
    """Each fault as `line:column: message`."""
    with pytest.raises(ConfigErrors) as caught:
        parse([(file, text)])
    assert str(caught.value) == "\n".join(str(error) for error in caught.value.errors)
    return [str(error).removeprefix(f"{file}:") for error in caught.value.errors]


HEAD = "apiVersion: meshbpf.io/v1\nkind: Service\nmetadata: {name: orders}\n"
ENDPOINTS = "  endpoints:\n" + "".join(f"    - {{address: 127.0.0.{n}, ports: {{http: 80}}}}\n" for n in (1, 2, 3))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (f"{HEAD}spec:\naddresses: [127.96.0.10]\nports: [{{name: a, port: 1}}]\nendpoints: []\n",
         '5:1: "addresses", "ports", "endpoints" belong below spec: indent them'),
        (f"{HEAD}spec:\n  addresses: [127.96.0.10]\nports: [{{name: a, port: 1}}]\n",
         '6:1: "ports" belongs below spec: indent it'),
        (f"{HEAD}spec:\n  port: [{{name: a, port: 1}}]\n", '5:3: unknown field "port" in spec: did you mean "ports"?'),
        (f"{HEAD}spec:\n  ports: [http: 80]\n",
         '5:11: unknown field "http" in spec.ports[0]: known: name, port, protocol'),
        (f"{HEAD}spec:\n  ports: [{{http: 80, https: 443}}]\n",
         '5:12: unknown fields "http", "https" in spec.ports[0]: known: name, port, protocol'),
        (f"{HEAD}spec:\n  ports: [{{name: htp, port: 80}}]\n{ENDPOINTS}",
         '7:36: spec.endpoints[0].ports.http is not a port of the service (2 more endpoints have it):'
         ' did you mean "htp"?'),
        (f"{HEAD}spec: none\n", '4:7: spec must be a mapping, got "none"'),
        ("apiVersion: v1\nkind: Service\nmetadata: {name: orders}\nspec:\n  clusterIP: 192.0.2.1\n"
         "  ports: [{name: http, port: 80, targetPort: 8080, protocol: TCP}]\n---\n"
         "apiVersion: meshbpf.io/v1\nkind: ServicePolicy\nmetadata: {name: a}\nspec: {service: orders}\n",
         '1:13: apiVersion must be meshbpf.io/v1, got "v1"'),
        ("apiVersion: meshbpf.io/v1\nkind: Agent\nspec:\n  registries:\n    - embedded:\n      store: /x\n",
         "5:7: spec.registries[0] must name one registry, for example embedded: {}"),
        ("apiVersion: meshbpf.io/v1\nkind: Agent\nspec: {registries: [{http: 'http://192.0.2.1:1'}]}\n",
         '3:28: spec.registries[0].http must be a mapping, got "http://192.0.2.1:1"'),
        ("".join(f"apiVersion: meshbpf.io/v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n"
                 "  addresses: [127.96.0.10]\n  ports: [{name: a, port: 1}, {name: b, port: 2}]\n---\n"
                 for name in ("one", "two")),
         "12:15: 127.96.0.10:1 of service two is also service one at f:3:18: change the address or the port"),
    ],
)  # fmt: skip
def test_one_mistake_is_one_fault(text: str, says: str) -> None:
    assert faults(text) == [says]


def test_two_mistakes_are_two_faults() -> None:
    assert faults(f"{HEAD}spec:\n  ports: [{{}}]\n  endpoints: [{{adress: 127.0.0.1}}]\n") == [
        "5:11: spec.ports[0].name is missing: it must be the port's name, for example http",
        "5:11: spec.ports[0].port is missing: it must be the port's number",
        "6:15: spec.endpoints[0].ports is missing: it must be a mapping from port name to number, for example"
        " {http: 8080}",
        '6:16: unknown field "adress" in spec.endpoints[0]: did you mean "address"?',
    ]


def agent(spec: str) -> str:
    return f"apiVersion: meshbpf.io/v1\nkind: Agent\nspec: {spec}\n"


def service(spec: str, metadata: str = "{name: orders}") -> str:
    return f"apiVersion: meshbpf.io/v1\nkind: Service\nmetadata: {metadata}\nspec: {spec}\n"


def policy(spec: str) -> str:
    return (
        "apiVersion: meshbpf.io/v1\nkind: Service\nmetadata: {name: orders}\n"
        "spec: {ports: [{name: http, port: 80}]}\n---\n"
        f"apiVersion: meshbpf.io/v1\nkind: ServicePolicy\nmetadata: {{name: orders}}\nspec: {spec}\n"
    )


def test_the_example_of_the_contract_is_the_model_with_its_defaults() -> None:
    parsed = parse([("mesh.yaml", CONTRACT)])
    other = HttpRegistry("http://127.0.0.1:15010", "/run/secrets/mesh")
    assert parsed.agent == Agent(registries=(EmbeddedRegistry(), other))
    endpoint = Endpoint("127.0.0.1", {"http": 8081}, 100, "a", {"version": "v1"}, source="mesh.yaml:22:7")
    ports = (Port("http", 80, Protocol.HTTP),)
    orders = Service(
        "orders", "default", {"team": "shop"}, ("127.96.0.10",), ports, (endpoint,), source="mesh.yaml:16:18"
    )
    assert parsed.services == (orders,)
    assert parsed.policies == (
        ServicePolicy(
            "orders",
            service="orders",
            connection_pool=ConnectionPool(TcpPool(limits_direct=True)),
            source="mesh.yaml:26:18",
        ),
    )


@pytest.mark.parametrize("text", ["", "---\n---\n", "# nothing\n"])
def test_nothing_is_an_empty_mesh(text: str) -> None:
    assert parse([("f", text)]) == Parsed()


def test_every_default_of_the_model_survives_documents_that_leave_everything_out() -> None:
    text = policy("{service: orders}") + "---\n" + agent("{}")
    for spec in (text, text.replace("spec: {}", "spec:"), text.replace("\nspec: {}", "")):
        parsed = parse([("f", spec)])
        assert parsed.agent == Agent()
        assert parsed.services == (Service("orders", ports=(Port("http", 80),), source="f:3:18"),)
        assert parsed.policies == (ServicePolicy("orders", service="orders", source="f:8:18"),)


def test_every_field_reaches_the_model() -> None:
    parsed = parse(
        [
            (
                "etc/mesh.yaml",
                agent(
                    "{registries: [{http: {url: 'HTTP://[2001:DB8::0:7]:25010/', tokenFile: t, allowLoopback: true}},"
                    " {embedded: {listen: '[::]:25010', store: r.db, tokenFile: token}}],"
                    " addressPool: fd00:96::/64, proxy: {listen: '127.0.0.1:25001', workers: 4, drain: 1m},"
                    " admin: {listen: '0.0.0.0:25020'}, acceleration: off, accessLog: {format: text, path: log/a.log},"
                    " maps: {services: 1, slots: 2, endpoints: 3, policies: 4, flows: 5, members: 6}}"
                ),
            ),
            (
                "b.yaml",
                policy(
                    "{service: orders, mode: proxy, acceleration: kernel, onProxyDown: refuse, loadBalancer:"
                    " {simple: RANDOM}, connectionPool: {tcp: {maxConnections: 1, connectTimeout: 2s, idleTimeout: 3s},"
                    " http: {http1MaxPendingRequests: 0, maxRequestsPerConnection: 5, idleTimeout: 6s}},"
                    " timeouts: {request: 7s, queue: 8s}, accessLog: {samplePercent: 0.5, slow: 9s}}"
                ),
            ),
        ]
    )
    assert parsed.agent == Agent(
        registries=(
            HttpRegistry("http://[2001:db8::7]:25010", "etc/t", allow_loopback=True),
            EmbeddedRegistry("[::]:25010", "etc/r.db", "etc/token", allow_loopback=False),
        ),
        address_pool="fd00:96::/64",
        proxy=ProxySettings("127.0.0.1:25001", 4, 60.0),
        admin=AdminSettings("0.0.0.0:25020"),
        acceleration=Acceleration.OFF,
        access_log=AccessLogSettings("text", "etc/log/a.log"),
        maps=MapSizes(1, 2, 3, 4, 5, 6),
    )
    assert parsed.policies == (
        ServicePolicy(
            "orders",
            service="orders",
            mode=Mode.PROXY,
            acceleration=Acceleration.KERNEL,
            on_proxy_down=OnProxyDown.REFUSE,
            load_balancer=LoadBalancer(Balance.RANDOM),
            connection_pool=ConnectionPool(TcpPool(1, 2.0, 3.0, limits_direct=True), HttpPool(0, 5, 6.0)),
            timeouts=Timeouts(7.0, 0.0, 8.0),
            access_log=AccessLogPolicy(0.5, 9.0),
            source="b.yaml:8:18",
        ),
    )


def test_services_are_sorted_whatever_the_order_of_files() -> None:
    ports = "{ports: [{name: tcp, port: 1}]}"
    texts = [("a", service(ports, "{name: z}")), ("b", service(ports, "{name: y, namespace: a}"))]
    assert [found.label for found in parse(texts).services] == ["y.a", "z"]
    json = '{"apiVersion": "meshbpf.io/v1", "kind": "Service", "metadata": {"name": "j"}, "spec": ' + (
        '{"ports": [{"name": "tcp", "port": 1}], "endpoints": []}}'
    )
    assert parse([("c.json", json)]).services[0].endpoints == ()


@pytest.mark.parametrize("field", RESERVED.splitlines())
def test_what_is_reserved_is_refused_and_never_ignored(field: str) -> None:
    (fault,) = faults(policy(f"{{service: orders, {field}}}"))
    assert ": reserved, but this version does not enforce it yet: remove " in fault or "use one of ROUND_ROBIN" in fault


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ("consistentHash: {}", ".consistentHash does not say what to hash: give useSourceIp: true"),
        ("consistentHash: {useSourceIp: true, maglev: {tableSize: 1000}}",
         ".consistentHash.maglev.tableSize must be a prime (the next smaller one is 997), got 1000"),
        ("consistentHash: {useSourceIp: true, maglev: {tableSize: 131072}}",
         ".consistentHash.maglev.tableSize must be a whole number from 251 to 131071, got 131072"),
        ("simple: RANDOM, consistentHash: {useSourceIp: true}",
         " has simple and consistentHash: give one of them"),
    ],
)  # fmt: skip
def test_a_hash_that_cannot_be(field: str, fault: str) -> None:
    (found,) = faults(policy(f"{{service: orders, mode: direct, loadBalancer: {{{field}}}}}"))
    assert found.partition(": ")[2] == f"spec.loadBalancer{fault}"


@pytest.mark.parametrize(
    ("field", "fault"),
    [
        ("sessionAffinity: ClientIp", '.sessionAffinity must be one of None, ClientIP, got "ClientIp"'),
        ("sessionAffinity: ClientIP, sessionAffinityTimeout: 0s",
         '.sessionAffinityTimeout must be a duration above zero, got "0s"'),
        ("sessionAffinity: ClientIP, sessionAffinityTimeout: 25h",
         '.sessionAffinityTimeout must be a duration of at most 24h, got "25h"'),
        ("sessionAffinityTimeout: 1h", ".sessionAffinityTimeout is of no use without sessionAffinity: ClientIP"),
    ],
)  # fmt: skip
def test_an_affinity_that_cannot_be(field: str, fault: str) -> None:
    (found,) = faults(policy(f"{{service: orders, mode: direct, loadBalancer: {{{field}}}}}"))
    assert found.partition(": ")[2] == f"spec.loadBalancer{fault}"


def test_an_affinity() -> None:
    field = "loadBalancer: {simple: RANDOM, sessionAffinity: ClientIP, sessionAffinityTimeout: 90s}"
    (found,) = parse([("f", policy(f"{{service: orders, mode: direct, {field}}}"))]).policies
    assert found.load_balancer == LoadBalancer(
        Balance.RANDOM, session_affinity=SessionAffinity.CLIENT_IP, session_affinity_timeout=90
    )


def test_a_hash_by_source() -> None:
    field = "loadBalancer: {consistentHash: {useSourceIp: true, maglev: {tableSize: 65537}}}"
    (found,) = parse([("f", policy(f"{{service: orders, mode: direct, {field}}}"))]).policies
    assert found.load_balancer == LoadBalancer(consistent_hash=ConsistentHash(True, Maglev(65537)))


def test_every_reserved_field_has_been_tried() -> None:
    elsewhere = [name for name in later.FIELDS if ".registries." in name]
    assert len(RESERVED.splitlines()) + len(elsewhere) == len(later.FIELDS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (policy("{service: orders, retries: {attempts: 2}}"),
         "9:25: retries: reserved, but this version does not enforce it yet: remove spec.retries"),
        (policy("{service: orders, loadBalancer: {simple: PEAK_EWMA}}"),
         "9:48: PEAK_EWMA balancing: reserved, but this version does not enforce it yet: use one of ROUND_ROBIN, "
         "LEAST_REQUEST, RANDOM"),
        (policy("{service: orders, timeouts: {perTry: 1s}}"),
         "9:44: a timeout per try: reserved, but this version does not enforce it yet: remove spec.timeouts.perTry or "
         "set it to 0s"),
        ("apiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\n",
         "2:7: HTTP routes: reserved, but this version does not enforce it yet: remove this document"),
    ] + [
        (agent(f"{{registries: [{{{kind}: {{}}}}]}}"),
         f"3:22: {later.FIELDS[f'Agent.spec.registries.{kind}']}: reserved, but this version does not enforce it yet: "
         f"remove spec.registries[0].{kind}")
        for kind in ("etcd", "zookeeper", "kubernetes", "consul")
    ] + [
        (f"kind: {kind}\n", f"1:7: {what}: reserved, but this version does not enforce it yet: remove this document")
        for kind, what in later.KINDS.items()
    ],
)  # fmt: skip
def test_a_refusal_names_the_place_and_the_remedy(text: str, expected: str) -> None:
    assert faults(text) == [expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("- a\n", "1:1: a document must be a mapping with apiVersion and kind, got a list"),
        ("apiVersion: meshbpf.io/v1\n", "1:1: kind is missing: it must be one of Agent, Service, ServicePolicy"),
        ("kind: Servise\n", '1:7: unknown kind "Servise": did you mean "Service"?'),
        ("kind: [Service]\n", "1:7: unknown kind a list"),
        ("kind: Agent\n", "1:1: apiVersion is missing: it must be meshbpf.io/v1"),
        ("apiVersion: v1\nkind: Agent\n", '1:13: apiVersion must be meshbpf.io/v1, got "v1"'),
        (agent("{adress: 1}"), '3:8: unknown field "adress" in spec: did you mean "addressPool"?'),
        (agent("{proxy: {LISTEN: 1}}"), '3:16: unknown field "LISTEN" in spec.proxy: did you mean "listen"?'),
        (agent("{admin: {xyz: 1}}"), '3:16: unknown field "xyz" in spec.admin: known: listen'),
        (agent("{}") + "status: {}\n", '4:1: unknown field "status": known: kind, apiVersion, spec'),
        (agent("[]"), "3:7: spec must be a mapping, got a list"),
        (agent("{proxy: {workers: many}}"),
         '3:25: spec.proxy.workers must be a whole number from 1 to 256, got "many"'),
        (agent("{proxy: {workers: true}}"), "3:25: spec.proxy.workers must be a whole number from 1 to 256, got true"),
        (agent("{proxy: {workers: 0}}"), "3:25: spec.proxy.workers must be a whole number from 1 to 256, got 0"),
        (agent("{proxy: {drain: 5}}"), "3:23: spec.proxy.drain must be a duration like 5s, 250ms or 1h30m, got 5"),
        (agent("{proxy: {drain: 1.5s}}"),
         '3:23: spec.proxy.drain must be a duration like 5s, 250ms or 1h30m, got "1.5s"'),
        (agent("{proxy: {listen: '0.0.0.0:15001'}}"),
         "3:24: spec.proxy.listen must be 127.0.0.1:PORT, which calls are sent to in every network namespace, got "
         '"0.0.0.0:15001"'),
        (agent("{admin: {listen: 15020}}"), "3:24: spec.admin.listen must be a string (in quotes), got 15020"),
        (agent("{admin: {listen: ':15020'}}"),
         "3:24: spec.admin.listen must be ADDRESS:PORT, for example 127.0.0.1:15020 (0.0.0.0 for every address), got "
         '":15020"'),
        (agent("{admin: {listen: '::1:15020'}}"),
         '3:24: spec.admin.listen must be ADDRESS:PORT with an IPv6 address in brackets, got "::1:15020"'),
        (agent("{admin: {listen: 'localhost:15020'}}"),
         '3:24: spec.admin.listen must be an IPv4 or IPv6 address (names are not resolved), got "localhost:15020"'),
        (agent("{admin: {listen: '0.0.0.0:15001'}}"),
         "3:15: spec.admin.listen and spec.proxy.listen are both on port 15001: give one another port"),
        (agent("{acceleration: fast}"),
         '3:22: spec.acceleration must be one of auto, off, redirect, kernel, got "fast"'),
        (agent("{accessLog: {format: xml}}"), '3:28: spec.accessLog.format must be one of json, text, got "xml"'),
        (agent("{accessLog: {path: ''}}"), '3:26: spec.accessLog.path must be a path, got ""'),
        (agent("{maps: {slots: 0}}"), "3:22: spec.maps.slots must be a whole number from 1 to 16777216, got 0"),
        (agent("{maps: {slot: 1}}"), '3:15: unknown field "slot" in spec.maps: did you mean "slots"?'),
        (agent("{registries: {embedded: {}}}"), "3:20: spec.registries must be a list, got a mapping"),
        (agent("{registries: [embedded]}"), '3:21: spec.registries[0] must be a mapping, got "embedded"'),
        (agent("{registries: [{}]}"), "3:21: spec.registries[0] must name one registry, for example embedded: {}"),
        (agent("{registries: [{embedded: {listen: '192.0.2.1:15010'}}]}"),
         "3:41: spec.registries[0].embedded.listen 192.0.2.1:15010 is not loopback: set tokenFile, or listen on "
         "127.0.0.1"),
        (agent("{registries: [{embedded: {allowLoopback: 1}}]}"),
         "3:48: spec.registries[0].embedded.allowLoopback must be true or false, got 1"),
        (agent("{registries: [{embedded: {}}, {embedded: {}}]}"),
         "3:37: spec.registries[1] is an embedded registry, and so is spec.registries[0]: remove one"),
        (agent("{addressPool: 127.96.0.1/16}"),
         '3:21: spec.addressPool must be a network like 127.96.0.0/16 (did you mean "127.96.0.0/16"?), got '
         '"127.96.0.1/16"'),
        (agent("{addressPool: many}"), '3:21: spec.addressPool must be a network like 127.96.0.0/16, got "many"'),
        (agent("{addressPool: 127.96.0.0/31}"),
         '3:21: spec.addressPool must be a network of at least 4 addresses, got "127.96.0.0/31"'),
        (agent("{addressPool: 127.0.0.0/8}"),
         "3:21: spec.addressPool must be without 127.0.0.1, link-local, multicast and unspecified addresses, got "
         '"127.0.0.0/8"'),
    ],
)  # fmt: skip
def test_faults_of_documents_and_of_the_agent(text: str, expected: str) -> None:
    assert faults(text) == [expected]


PORTS = "ports: [{name: http, port: 80}]"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (service(f"{{{PORTS}}}", "{}"), "3:11: metadata.name is missing: it must be the service's name"),
        (service(f"{{{PORTS}}}", "{name: Orders}"),
         '3:18: metadata.name must be a DNS label (a-z, 0-9 and -, at most 63), got "Orders"'),
        (service(f"{{{PORTS}}}", "{name: 7}"), "3:18: metadata.name must be a string (in quotes), got 7"),
        (service(f"{{{PORTS}}}", "{name: a, namespace: a.b}"),
         '3:32: metadata.namespace must be a DNS label (a-z, 0-9 and -, at most 63), got "a.b"'),
        (service(f"{{{PORTS}}}", "{name: a, labels: {v: 1}}"),
         "3:33: metadata.labels.v must be a string (in quotes), got 1"),
        (service(f"{{{PORTS}}}", "{name: a, labels: [v]}"), "3:29: metadata.labels must be a mapping, got a list"),
        (service("{}"), "4:7: spec.ports is missing: it must be a list of at least one port"),
        (service("{ports: []}"), "4:15: spec.ports must be a list of at least one port, got a list"),
        (service("{ports: [{port: 80}]}"),
         "4:16: spec.ports[0].name is missing: it must be the port's name, for example http"),
        (service("{ports: [{name: http}]}"), "4:16: spec.ports[0].port is missing: it must be the port's number"),
        (service("{ports: [{name: http, port: 65536}]}"),
         "4:35: spec.ports[0].port must be a whole number from 1 to 65535, got 65536"),
        (service("{ports: [{name: http, port: 80, protocol: HTTP}]}"),
         '4:49: spec.ports[0].protocol must be one of http, http2, grpc, tcp, tls, udp, got "HTTP"'),
        (service("{ports: [{name: http, port: 80}, {name: http, port: 81}]}"),
         '4:47: spec.ports[1].name "http" is taken by the port at f:4:23: rename one'),
        (service("{ports: [{name: http, port: 80}, {name: web, port: 80}]}"),
         '4:58: spec.ports[1].port 80 is taken by port "http": change one'),
        (service(f"{{{PORTS}, addresses: [127.96.0.999]}}"),
         '4:53: spec.addresses[0] must be an IPv4 or IPv6 address (names are not resolved), got "127.96.0.999"'),
        (service(f"{{{PORTS}, addresses: [80]}}"),
         "4:53: spec.addresses[0] must be an IPv4 or IPv6 address (names are not resolved), got 80"),
        (service(f"{{{PORTS}, addresses: ['::ffff:192.0.2.1']}}"),
         '4:53: spec.addresses[0] must be written as IPv4: 192.0.2.1, got "::ffff:192.0.2.1"'),
        (service(f"{{{PORTS}, addresses: ['fe80::1%eth0']}}"),
         '4:53: spec.addresses[0] must be an address without zone, got "fe80::1%eth0"'),
        (service(f"{{{PORTS}, addresses: ['fd00::1', 'fd00:0::1']}}"),
         "4:64: spec.addresses[1] fd00::1 is listed twice: remove one"),
        (service(f"{{{PORTS}, addresses: [127.0.0.1]}}"),
         "4:53: spec.addresses[0] 127.0.0.1 is this host itself: use one of 127.96.0.0/16, or leave addresses out and "
         "the pool gives one"),
        (service(f"{{{PORTS}, addresses: [224.0.0.1]}}"),
         "4:53: spec.addresses[0] 224.0.0.1 is a multicast address: use an address that a host can have"),
        (service(f"{{{PORTS}, endpoints: {{}}}}"), "4:52: spec.endpoints must be a list, got a mapping"),
        (service(f"{{{PORTS}, endpoints: [127.0.0.1:8081]}}"),
         "4:53: spec.endpoints[0] must be a mapping, for example {address: 127.0.0.1, ports: {http: 8080}}, got "
         '"127.0.0.1:8081"'),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: 8081}}]}}"),
         "4:81: spec.endpoints[0].ports must be a mapping from port name to number, for example {http: 8080}, got "
         "8081"),
        (service(f"{{{PORTS}, endpoints: [{{ports: {{http: 1}}}}]}}"),
         "4:53: spec.endpoints[0].address is missing: it must be the endpoint's IP address"),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1}}]}}"),
         "4:53: spec.endpoints[0].ports is missing: it must be a mapping from port name to number, for example "
         "{http: 8080}"),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: {{}}}}]}}"),
         "4:81: spec.endpoints[0].ports must be a mapping from port name to number, for example {http: 8080}, got a "
         "mapping"),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: {{htpp: 8080}}}}]}}"),
         '4:82: spec.endpoints[0].ports.htpp is not a port of the service: did you mean "http"?'),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: {{http: 0}}}}]}}"),
         "4:88: spec.endpoints[0].ports.http must be a port number from 1 to 65535, got 0"),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: {{http: 1}}, weight: 10001}}]}}"),
         "4:100: spec.endpoints[0].weight must be a whole number from 0 to 10000, got 10001"),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: {{http: 1}}, wieght: 1}}]}}"),
         '4:92: unknown field "wieght" in spec.endpoints[0]: did you mean "weight"?'),
        (service(f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: {{http: 1}}}}, "
                 "{address: 192.0.2.1, ports: {http: 1}}]}"),
         "4:128: 192.0.2.1:1 is listed twice for port http, first at f:4:88: raise the weight of one instead"),
        (policy("{}"), "9:7: spec.service is missing: it must be the name of the governed service"),
        (policy("{service: orders, onProxyDown: ignore}"),
         '9:38: spec.onProxyDown must be one of direct, refuse, got "ignore"'),
        (policy("{service: orders, accessLog: {samplePercent: 101}}"),
         "9:52: spec.accessLog.samplePercent must be a percentage from 0 to 100, got 101"),
        (policy("{service: orders, connectionPool: {tcp: {connectTimeout: 0s}}}"),
         '9:64: spec.connectionPool.tcp.connectTimeout must be a duration above zero, got "0s"'),
        (policy("{service: orders, timeout: {request: 1s}}"),
         '9:25: unknown field "timeout" in spec: did you mean "timeouts"?'),
    ],
)  # fmt: skip
def test_faults_of_services_and_policies(text: str, expected: str) -> None:
    assert faults(text) == [expected]


@pytest.mark.parametrize("weight", [0, 10_000])
def test_weights_at_the_edges(weight: int) -> None:
    spec = f"{{{PORTS}, endpoints: [{{address: 192.0.2.1, ports: {{http: 1}}, weight: {weight}}}]}}"
    assert parse([("f", service(spec))]).services[0].endpoints[0].weight == weight


def test_addresses_become_canonical() -> None:
    text = service(f"{{{PORTS}, addresses: ['FD00:0::1'], endpoints: [{{address: '0:0::1', ports: {{http: 1}}}}]}}")
    (found,) = parse([("f", text)]).services
    assert (found.addresses, found.endpoints[0].address) == (("fd00::1",), "::1")


@given(st.data())
def test_whatever_stands_anywhere_is_accepted_or_refused_with_its_place(data: st.DataObject) -> None:
    """Any value of the contract's example replaced by anything: a mesh or faults with their place, never a crash."""
    spots = [match.span(1) for match in re.finditer(r"([\w./:-]+)(?=[,}\]\n])", CONTRACT)]
    start, end = data.draw(st.sampled_from(spots))
    odd = st.sampled_from(
        ["[]", "{}", "~", "-1", "1e400", "99999999999999999999", "''", '"\\n"', "{a: [b]}", "[1, x]", "5s"]
    )
    text = CONTRACT[:start] + data.draw(odd | st.text(max_size=6)) + CONTRACT[end:]
    try:
        parse([("f", text)])
    except ConfigErrors as errors:
        assert all(re.fullmatch(r"f:\d+:\d+: .+", line) for line in str(errors).split("\n"))


def test_a_message_is_one_line_whatever_the_file_says() -> None:
    assert faults(agent('{"a\\nb\\e[31m": 1}'))[0].startswith('3:8: unknown field "a\\nb\\x1b[31m" in spec')


def test_all_faults_of_all_files_are_reported_in_order() -> None:
    first = agent("{proxy: {workers: 0, drain: x}, typo: 1}")
    with pytest.raises(ConfigErrors) as caught:
        parse([("z.yaml", first), ("a.yaml", "kind: [\n"), ("b.yaml", service("{}") + "---\nkind: X\n")])
    assert [error.where for error in caught.value.errors] == [
        "z.yaml:3:25", "z.yaml:3:35", "z.yaml:3:39", "a.yaml:1:8", "b.yaml:4:7", "b.yaml:6:7",
    ]  # fmt: skip
    assert caught.value.where == "z.yaml:3:25"
    assert caught.value.exit_code == 65
