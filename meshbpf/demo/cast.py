"""Who plays in the demo: names, addresses, and the configuration that the agent reads. Pure; nothing is made here.

Everything is called `meshbpf-demo-*`, so that a later demo knows what a killed one left. Addresses of endpoints exist
only inside the demo's own network namespaces.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

INSTANCE = "demo"
PREFIX = "meshbpf-demo"
CGROUP = PREFIX  # below the cgroup2 mount; each part has a child of its own
WORK = Path("/run/meshbpf-demo")
ACCESS_LOG = WORK / "access.log"
AGENT_LOG = WORK / "agent.log"
CONFIG = WORK / "mesh.yaml"

NETWORK = "198.18.77.0/24"
HTTP, WRONG, TCP = 8080, 8088, 7000
# part → address; `web` is the one who calls
PARTS: dict[str, str] = {
    "web": "198.18.77.10",
    "orders-1": "198.18.77.21",
    "orders-2": "198.18.77.22",
    "orders-3": "198.18.77.23",
    "billing": "198.18.77.31",
    "ledger": "198.18.77.41",
}
FAULTY = "orders-3"
ORDERS = "127.96.77.10"
LEDGER = "127.96.77.20"


def namespace(part: str) -> str:
    return f"{PREFIX}-{part}"


def configuration(proxy: int, registry: int, admin: int, mended: bool = False) -> str:
    """mesh.yaml. The planted fault: orders-3 listens on another port than the one written here, until `mended`."""
    orders = [
        {"address": PARTS[part], "ports": {"http": WRONG if mended and part == FAULTY else HTTP}}
        for part in PARTS
        if part.startswith("orders-")
    ]
    agent = {
        "registries": [{"embedded": {"listen": f"127.0.0.1:{registry}", "store": str(WORK / "registry.db")}}],
        "proxy": {"listen": f"127.0.0.1:{proxy}", "drain": "1s"},
        "admin": {"listen": f"127.0.0.1:{admin}"},
        "accessLog": {"format": "json", "path": str(ACCESS_LOG)},
    }
    documents = [
        {"apiVersion": "meshbpf.io/v1", "kind": "Agent", "spec": agent},
        _service("orders", ORDERS, "http", 80, orders),
        _service("ledger", LEDGER, "tcp", TCP, [{"address": PARTS["ledger"], "ports": {"tcp": TCP}}]),
    ]
    return yaml.safe_dump_all(documents, sort_keys=False)


def _service(name: str, address: str, protocol: str, port: int, endpoints: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "meshbpf.io/v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "addresses": [address],
            "ports": [{"name": protocol, "port": port, "protocol": protocol}],
            "endpoints": endpoints,
        },
    }
