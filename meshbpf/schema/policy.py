"""Kind `ServicePolicy`: how one service is governed. What `later` lists is refused there, not here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshbpf.model import (
    AccessLogPolicy,
    ConnectionPool,
    ConsistentHash,
    HttpPool,
    LoadBalancer,
    Maglev,
    ServicePolicy,
    SessionAffinity,
    TcpPool,
    Timeouts,
)
from meshbpf.schema import later
from meshbpf.schema.fields import Fields
from meshbpf.yamlpos import Mark

_DEFAULT = ServicePolicy()
_LARGEST_COUNT = (1 << 31) - 1
_LONGEST_AFFINITY = 86_400.0  # Kubernetes
_SMALLEST_TABLE, _LARGEST_TABLE = 251, 131_071  # Cilium's


@dataclass(frozen=True, slots=True)
class PolicyDocument:
    policy: ServicePolicy
    at: Mark
    service_at: Mark
    mode_at: Mark
    balance_at: Mark


def read(document: Fields) -> PolicyDocument:
    metadata = document.below("metadata")
    name = metadata.label("name") if metadata.required("name", "the policy's name") else ""
    at = metadata.where("name")
    namespace = metadata.label("namespace", _DEFAULT.namespace)
    metadata.labels("labels")
    spec = document.below("spec")
    service = ""
    if spec.required("service", "the name of the governed service"):
        service = spec.label("service")
    policy = ServicePolicy(
        name=name,
        namespace=namespace,
        service=service,
        mode=spec.word("mode", _DEFAULT.mode),
        acceleration=spec.word("acceleration", _DEFAULT.acceleration),
        on_proxy_down=spec.word("onProxyDown", _DEFAULT.on_proxy_down),
        load_balancer=_load_balancer(spec.below("loadBalancer")),
        connection_pool=_connection_pool(spec.below("connectionPool")),
        timeouts=_timeouts(spec.below("timeouts")),
        access_log=_access_log(spec.below("accessLog")),
        source=str(at),
    )
    return PolicyDocument(policy, at, spec.where("service"), spec.where("mode"), spec.where("loadBalancer"))


def _load_balancer(fields: Fields) -> LoadBalancer:
    default = LoadBalancer()
    simple = fields.word("simple", default.simple)
    hashed = fields.below("consistentHash")
    if fields.has("simple") and hashed.given:
        fields.report.add(
            fields.where("consistentHash"), f"{fields.path} has simple and consistentHash: give one of them"
        )
    affinity = fields.word("sessionAffinity", default.session_affinity)
    timeout = fields.duration("sessionAffinityTimeout", default.session_affinity_timeout, positive=True)
    if timeout > _LONGEST_AFFINITY:
        fields.wrong("sessionAffinityTimeout", "a duration of at most 24h")
    if fields.has("sessionAffinityTimeout") and affinity is SessionAffinity.NONE:
        where = fields.where("sessionAffinityTimeout")
        fields.report.add(where, f"{fields.path}.sessionAffinityTimeout is of no use without sessionAffinity: ClientIP")
    return LoadBalancer(simple, _consistent_hash(hashed), affinity, timeout)


def _consistent_hash(fields: Fields) -> ConsistentHash:
    default = ConsistentHash()
    by_source = fields.flag("useSourceIp", default.use_source_ip)
    if fields.given and not by_source and not set(fields.keys()) - {"useSourceIp", "maglev"}:
        fields.report.add(fields.at, f"{fields.path} does not say what to hash: give useSourceIp: true")
    table = fields.below("maglev")
    size = table.whole("tableSize", default.maglev.table_size, _SMALLEST_TABLE, _LARGEST_TABLE)
    if (prime := next(number for number in range(size, 0, -1) if _is_prime(number))) != size:
        table.wrong("tableSize", f"a prime (the next smaller one is {prime})")
    return ConsistentHash(by_source, Maglev(prime))


def _is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _connection_pool(fields: Fields) -> ConnectionPool:
    tcp, http = fields.below("tcp"), fields.below("http")
    default = ConnectionPool()
    return ConnectionPool(
        tcp=TcpPool(
            max_connections=tcp.whole("maxConnections", default.tcp.max_connections, 1, _LARGEST_COUNT),
            limits_direct=tcp.has("maxConnections"),
            connect_timeout=tcp.duration("connectTimeout", default.tcp.connect_timeout, positive=True),
            idle_timeout=tcp.duration("idleTimeout", default.tcp.idle_timeout),
        ),
        http=HttpPool(
            http1_max_pending_requests=http.whole(
                "http1MaxPendingRequests", default.http.http1_max_pending_requests, 0, _LARGEST_COUNT
            ),
            max_requests_per_connection=http.whole(
                "maxRequestsPerConnection", default.http.max_requests_per_connection, 0, _LARGEST_COUNT
            ),
            idle_timeout=http.duration("idleTimeout", default.http.idle_timeout),
        ),
    )


def _timeouts(fields: Fields) -> Timeouts:
    default = Timeouts()
    if per_try := fields.duration("perTry", default.per_try):
        what = later.FIELDS["ServicePolicy.spec.timeouts.perTry"]
        fields.report.add(
            fields.where("perTry"), later.refusal(what, f"remove {fields.name('perTry')} or set it to 0s")
        )
    return Timeouts(
        request=fields.duration("request", default.request),
        per_try=per_try,
        queue=fields.duration("queue", default.queue),
    )


def _access_log(fields: Fields) -> AccessLogPolicy:
    default = AccessLogPolicy()
    return AccessLogPolicy(
        sample_percent=fields.percent("samplePercent", default.sample_percent),
        slow=fields.duration("slow", default.slow),
    )
