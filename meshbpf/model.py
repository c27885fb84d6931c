"""What a mesh is: inert, frozen values and their defaults. No parsing, no I/O, no decisions.

Defaults live here and nowhere else (sources: shared contract INTERFACE; Istio, Envoy and Linkerd as named per field).
Times are seconds (float) in the model; the YAML has duration strings. Shares of a whole are percent and say so.
A service's identity is (name, namespace), written `name.namespace`, with `.default` left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType


class Protocol(StrEnum):
    """What a port speaks. `http` is governed; `http2` and `grpc` are carried as `tcp` until HTTP/2 is served."""

    HTTP = "http"
    HTTP2 = "http2"
    GRPC = "grpc"
    TCP = "tcp"
    TLS = "tls"
    UDP = "udp"


class Mode(StrEnum):
    AUTO = "auto"
    DIRECT = "direct"
    PROXY = "proxy"


class Acceleration(StrEnum):
    """An upper bound: AUTO is what the self-test has proven, OFF is plain TCP."""

    AUTO = "auto"
    OFF = "off"
    REDIRECT = "redirect"
    KERNEL = "kernel"


class OnProxyDown(StrEnum):
    DIRECT = "direct"
    REFUSE = "refuse"


class Balance(StrEnum):
    """`loadBalancer.simple`. In `direct`, LEAST_REQUEST and PEAK_EWMA become weighted ROUND_ROBIN."""

    ROUND_ROBIN = "ROUND_ROBIN"
    LEAST_REQUEST = "LEAST_REQUEST"
    RANDOM = "RANDOM"


class SessionAffinity(StrEnum):
    """`loadBalancer.sessionAffinity`, in Kubernetes' words."""

    NONE = "None"
    CLIENT_IP = "ClientIP"


class EndpointState(StrEnum):
    """READY gets new connections; DRAINING keeps those it has and gets no new ones."""

    READY = "ready"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Port:
    name: str
    port: int
    protocol: Protocol = Protocol.TCP


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address that serves a service. `ports` maps the service's port name to this endpoint's port number."""

    address: str
    ports: Mapping[str, int]
    weight: int = 100
    zone: str = ""
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    state: EndpointState = EndpointState.READY
    source: str = ""  # which registry it came from, for people


@dataclass(frozen=True, slots=True)
class Service:
    name: str
    namespace: str = "default"
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    addresses: tuple[str, ...] = ()  # empty until the address pool has given one
    ports: tuple[Port, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    source: str = ""  # file:line:column, or the registry that alone knows it

    @property
    def id(self) -> tuple[str, str]:
        return (self.name, self.namespace)

    @property
    def label(self) -> str:
        """How people write it: `name`, or `name.namespace` outside the default namespace."""
        return self.name if self.namespace == "default" else f"{self.name}.{self.namespace}"


@dataclass(frozen=True, slots=True)
class Maglev:
    """`table_size` is a prime, about a hundred times the endpoints. Cilium's size for ten: 82 KB of the kernel's."""

    table_size: int = 1021


@dataclass(frozen=True, slots=True)
class ConsistentHash:
    """The same endpoint for the same client. In use when `use_source_ip` is."""

    use_source_ip: bool = False
    maglev: Maglev = Maglev()


@dataclass(frozen=True, slots=True)
class LoadBalancer:
    simple: Balance = Balance.LEAST_REQUEST  # Istio's default
    consistent_hash: ConsistentHash = ConsistentHash()
    session_affinity: SessionAffinity = SessionAffinity.NONE
    session_affinity_timeout: float = 10800.0  # Kubernetes; since the client's last connection

    @property
    def by_client(self) -> str:
        """The field that chooses by who calls, which only the kernel does; empty when none does."""
        if self.consistent_hash.use_source_ip:
            return "consistentHash"
        return "sessionAffinity" if self.session_affinity is not SessionAffinity.NONE else ""


@dataclass(frozen=True, slots=True)
class TcpPool:
    max_connections: int = 1024  # Envoy
    connect_timeout: float = 5.0  # Envoy
    idle_timeout: float = 3600.0  # Envoy's TCP proxy
    limits_direct: bool = False  # `max_connections` was written down: else direct ports have no limit


@dataclass(frozen=True, slots=True)
class HttpPool:
    http1_max_pending_requests: int = 1024  # Envoy
    max_requests_per_connection: int = 0  # 0: unlimited
    idle_timeout: float = 3.0  # Linkerd: below what common servers keep


@dataclass(frozen=True, slots=True)
class ConnectionPool:
    tcp: TcpPool = TcpPool()
    http: HttpPool = HttpPool()


@dataclass(frozen=True, slots=True)
class Timeouts:
    request: float = 0.0  # 0: none
    per_try: float = 0.0
    queue: float = 3.0  # Linkerd's outbound fail-fast


@dataclass(frozen=True, slots=True)
class AccessLogPolicy:
    sample_percent: float = 100.0
    slow: float = 1.0


@dataclass(frozen=True, slots=True)
class ServicePolicy:
    """How one service is governed. Policies of later releases are refused by the schema, never ignored."""

    name: str = ""
    namespace: str = "default"
    service: str = ""
    mode: Mode = Mode.AUTO
    acceleration: Acceleration = Acceleration.AUTO
    on_proxy_down: OnProxyDown = OnProxyDown.DIRECT
    load_balancer: LoadBalancer = LoadBalancer()
    connection_pool: ConnectionPool = ConnectionPool()
    timeouts: Timeouts = Timeouts()
    access_log: AccessLogPolicy = AccessLogPolicy()
    source: str = ""

    @property
    def service_id(self) -> tuple[str, str]:
        return (self.service, self.namespace)


DEFAULT_POLICY = ServicePolicy()


@dataclass(frozen=True, slots=True)
class EmbeddedRegistry:
    """`listen` host:port of the registry's HTTP API; `store` the SQLite file; `token_file` needed off loopback."""

    listen: str = "127.0.0.1:15010"
    store: str = "/var/lib/meshbpf/registry.db"
    token_file: str = ""
    allow_loopback: bool = True


@dataclass(frozen=True, slots=True)
class HttpRegistry:
    """Another agent's embedded registry, `url` http://ADDRESS:PORT; `token_file` holds the token that it asks for."""

    url: str
    token_file: str = ""
    allow_loopback: bool = False  # its 127.0.0.1 is another machine


@dataclass(frozen=True, slots=True)
class ProxySettings:
    listen: str = "127.0.0.1:15001"  # the port serves [::1] as well, in every namespace
    workers: int = 1
    drain: float = 5.0


@dataclass(frozen=True, slots=True)
class AdminSettings:
    listen: str = "127.0.0.1:15020"


@dataclass(frozen=True, slots=True)
class AccessLogSettings:
    format: str = "json"  # json | text
    path: str = "/dev/stdout"


@dataclass(frozen=True, slots=True)
class MapSizes:
    """Entries per kernel table. `slots` holds each endpoint as often as its reduced weight says (at most 100)."""

    services: int = 16384
    slots: int = 262144
    endpoints: int = 131072
    policies: int = 16384
    flows: int = 65536
    members: int = 65536
    datagrams: int = 16384
    affinities: int = 16384


@dataclass(frozen=True, slots=True)
class Agent:
    registries: tuple[EmbeddedRegistry | HttpRegistry, ...] = ()  # in order of precedence
    address_pool: str = "127.96.0.0/16"
    proxy: ProxySettings = ProxySettings()
    admin: AdminSettings = AdminSettings()
    acceleration: Acceleration = Acceleration.AUTO
    access_log: AccessLogSettings = AccessLogSettings()
    maps: MapSizes = MapSizes()

    @property
    def embedded(self) -> EmbeddedRegistry | None:
        """The embedded registry, if one is configured."""
        return next((registry for registry in self.registries if isinstance(registry, EmbeddedRegistry)), None)


@dataclass(frozen=True, slots=True)
class Mesh:
    """One immutable snapshot of everything: what the kernel, the proxy and the CLI are told. Compared by value."""

    agent: Agent = Agent()
    services: tuple[Service, ...] = ()  # sorted by (namespace, name)
    policies: Mapping[tuple[str, str], ServicePolicy] = field(default_factory=lambda: MappingProxyType({}))
    generation: int = 0

    def policy_for(self, service: Service) -> ServicePolicy:
        return self.policies.get(service.id, DEFAULT_POLICY)
