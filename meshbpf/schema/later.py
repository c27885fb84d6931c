"""What the contract reserves and this version does not do yet: refused, because a policy that is written down and not
enforced is worse than none.

When a release starts to enforce one: give the model its field, read it in the kind's reader, delete the line here.
"""

from __future__ import annotations

from collections.abc import Mapping

KINDS: Mapping[str, str] = {
    "Hook": "hooks",
    "HTTPRoute": "HTTP routes",
    "GRPCRoute": "gRPC routes",
    "TCPRoute": "TCP routes",
    "TLSRoute": "TLS routes",
}

# Field of a kind, without list positions; `field=WORD` is one word of a field which has others.
FIELDS: Mapping[str, str] = {
    "Agent.spec.registries.http": "the registry of another agent",
    "Agent.spec.registries.etcd": "the etcd registry",
    "Agent.spec.registries.zookeeper": "the ZooKeeper registry",
    "Agent.spec.registries.kubernetes": "the Kubernetes registry",
    "Agent.spec.registries.consul": "the Consul registry",
    "ServicePolicy.spec.subsets": "subsets",
    "ServicePolicy.spec.retries": "retries",
    "ServicePolicy.spec.healthCheck": "active health checks",
    "ServicePolicy.spec.outlierDetection": "outlier detection",
    "ServicePolicy.spec.circuitBreaker": "the circuit breaker",
    "ServicePolicy.spec.rateLimits": "rate limits",
    "ServicePolicy.spec.fault": "fault injection",
    "ServicePolicy.spec.fallback": "the fallback answer",
    "ServicePolicy.spec.tracing": "tracing settings",
    "ServicePolicy.spec.loadBalancer.consistentHash.httpHeaderName": "consistent hashing by a header",
    "ServicePolicy.spec.loadBalancer.consistentHash.httpCookie": "consistent hashing by a cookie",
    "ServicePolicy.spec.loadBalancer.consistentHash.httpQueryParameterName": "consistent hashing by a query parameter",
    "ServicePolicy.spec.loadBalancer.consistentHash.ringHash": "ring hash tables",
    "ServicePolicy.spec.loadBalancer.warmup": "warm-up of new endpoints",
    "ServicePolicy.spec.loadBalancer.simple=PEAK_EWMA": "PEAK_EWMA balancing",
    "ServicePolicy.spec.connectionPool.http.http2MaxRequests": "HTTP/2",
    "ServicePolicy.spec.timeouts.perTry": "a timeout per try",
}


def refusal(what: str, remedy: str) -> str:
    return f"{what}: reserved, but this version does not enforce it yet: {remedy}"
