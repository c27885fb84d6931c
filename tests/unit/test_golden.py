"""What people read, to the letter, at 80 and at 120 columns: every list and `status` and `check`, from fixed inputs.

`make golden` writes the files anew; look at the difference before you commit it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from meshbpf.cli import calls, changes, check, columns, diff, explain, findings, inside, layout, maps, status
from meshbpf.cli.around import ForeignProgram, Neighbours
from meshbpf.cli.facts import CgroupFacts, InstanceFacts, MachineFacts, SelfTestRow
from meshbpf.cli.layout import Screen
from meshbpf.model import (
    Agent,
    Balance,
    Endpoint,
    LoadBalancer,
    MapSizes,
    Mesh,
    Mode,
    OnProxyDown,
    Port,
    Protocol,
    ProxySettings,
    Service,
    ServicePolicy,
)

FOLDER = Path(__file__).parent / "golden"
WIDTHS = (80, 120)
POD = "pod c0ffee00-1234-4abc-9def-0123456789ab"
POD_CGROUP = (
    "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc0ffee00_1234_4abc_9def_0123456789ab.slice/"
    f"cri-containerd-{'4f3c2b1a' * 8}.scope"
)

# --- status and check ------------------------------------------------------------------------------------------------

FILLS = [
    {"map": name, "entries": entries, "capacity": capacity}
    for name, entries, capacity in (
        ("services", 412, 16384), ("policies", 412, 16384), ("slots", 218_000, 262_144), ("endpoints", 4120, 131_072),
        ("flows", 37, 65536),
    )
]  # fmt: skip
WELL: dict[str, Any] = {
    "instance": "default",
    "cgroups": [{"path": "/sys/fs/cgroup/mesh.slice", "exists": True}],
    "generation": 118,
    "age_seconds": 7385.2,
    "services": 206,
    "carriers": {"proxy": 150, "direct": 262},
    "open": {"proxy": 37, "direct": 1904},
    "agent": {
        "pid": 4711, "ready": 4, "workers": 4, "restarts": 1, "namespaces": 23,
        "acceleration": "redirect (the self-test has proven this kernel)",
    },
    "proxy_serves": True,
    "sources": [
        {"name": "files", "services": 12, "age_seconds": 7385.2, "stale_seconds": 0.0, "error": ""},
        {"name": "registry", "services": 194, "age_seconds": 2.4, "stale_seconds": 0.0, "error": ""},
    ],
    "error": "",
    "restart": [],
    "maps": FILLS[:2] + FILLS[3:],
    "warnings": [],
}  # fmt: skip
ILL: dict[str, Any] = {
    **WELL,
    "cgroups": [*WELL["cgroups"], {"path": "/sys/fs/cgroup/shop.slice", "exists": False}],
    "agent": {**WELL["agent"], "ready": 3, "acceleration": "off (no BTF: the order cannot be proven)"},
    "sources": [
        {**WELL["sources"][0], "error": "/etc/meshbpf/orders.yaml:14:7: unknown key prot; did you mean protocol?"},
        WELL["sources"][1],
    ],
    "error": "orders left out: does not fit into map slots: raise Agent.spec.maps.slots",
    "restart": ["registries", "maps"],
    "maps": FILLS,
    "warnings": status.warnings([("slots", 218_000, 262_144)]),
}
REFUSED: dict[str, Any] = {**WELL, "sources": ILL["sources"]}
WAITING: dict[str, Any] = {**WELL, "restart": ["proxy"]}
DOWN: dict[str, Any] = {
    **WELL,
    "agent": None,
    "proxy_serves": False,
    "sources": [],
    "open": {"proxy": 0, "direct": 1941},
}
MACHINE = MachineFacts(
    release="6.1.0-18-amd64", btf=True, cgroup2="/sys/fs/cgroup", bpffs=True, missing_capabilities=(),
    netns_cookies=True, bcc="", libbpf="", bpftool="7.1.0", neighbours=Neighbours(elsewhere=14),
    self_test=(
        SelfTestRow("order", True, "in the order sent", ""),
        SelfTestRow("credit", True, "bounded at 1 MiB", ""),
    ),
)  # fmt: skip
BAD_MACHINE = MachineFacts(
    release="5.4.0-150-generic", btf=False, cgroup2="", bpffs=True, missing_capabilities=(), netns_cookies=False,
    bcc="No module named 'bcc'", libbpf="", bpftool="7.1.0", self_test=None,
    self_test_lack=("not run: no BTF", "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y"),
    neighbours=Neighbours(
        (
            ForeignProgram(9, "cil_sock4_connect", "connect4", "/sys/fs/cgroup"),
            ForeignProgram(8, "only_me", "sock_ops", "/sys/fs/cgroup/shop.slice", mode=""),
        ),
        ("theirs",), 3,
    ),
)  # fmt: skip
AGENT = {"pid": 4711, "ready": 2, "workers": 2, "error": "", "sources": [{"name": "files", "error": ""}]}
INSTANCE = InstanceFacts(
    "default", True, (CgroupFacts("/sys/fs/cgroup/mesh.slice", True, True),), 206, 150, (("slots", 10, 100),), AGENT
)
BAD_INSTANCE = InstanceFacts(
    "shop", True, (CgroupFacts("/sys/fs/cgroup/shop.slice", False, False),), 3, 2, (("slots", 95, 100),), refused=1
)


def checked(machine: MachineFacts, instance: InstanceFacts) -> Callable[[Screen], str]:
    return lambda screen: check.text(findings.machine(machine) + findings.instance(instance), screen)


# --- lists -----------------------------------------------------------------------------------------------------------


def listed(shown: tuple[layout.Column, ...], rows: list[dict[str, Any]], wide: bool = False) -> Callable[[Screen], str]:
    return lambda screen: layout.table(shown, rows, screen, wide)


SERVICES = [
    {
        "service": name, "address": address, "port": port, "carrier": carrier, "why": why, "endpoints": ready,
        "open": still, "connections": 100 * still, "source": source,
    }
    for name, address, port, carrier, why, ready, still, source in (
        ("billing", "127.96.26.31", "80/http", "proxy", "protocol_http", "1/1", 3, "registry"),
        ("ledger", "127.96.77.20", "7000/tcp", "direct", "protocol_tcp", "0/2", 1204, "/etc/meshbpf/shop.yaml:31:1"),
        ("orders.checkout", "127.96.77.10,fd00:9::10", "80/http", "proxy", "not_in_kernel", "12/14", 0, "registry"),
        ("search", "127.96.77.30", "9000/grpc", "direct", "http2_not_yet", "3/3", 17, "/etc/meshbpf/shop.yaml:58:1"),
    )
]  # fmt: skip
ENDPOINTS = [
    {
        "service": "orders.checkout", "endpoint": endpoint, "port": "http", "state": state, "weight": weight, "ok": ok,
        "failed": failed, "last_error": last, "last_error_seconds": ago, "failing": ago == 3.2, "zone": zone,
        "source": source,
    }
    for endpoint, state, weight, ok, failed, last, ago, zone, source in (
        ("198.18.77.21:8080", "ready", 100, 69, 0, None, None, "a", "registry"),
        ("198.18.77.22:8080", "draining", 50, 12_345_678, 3, "upstream_reset", 93_784.5, "b", "registry"),
        ("198.18.77.23:8080", "ready", 100, 0, 41, "connect_failed", 3.2, "", "/etc/meshbpf/shop.yaml:40:7"),
        ("[fd00:9::23]:8080", "not_in_kernel", 0, None, None, None, None, "", "registry"),
    )
]  # fmt: skip
OPEN = [
    {"service": "ledger", "port": "7000/tcp", "carrier": "direct", "open": 1204, "opened": 90_211},
    {"service": "orders", "port": "80/http", "carrier": "direct", "open": 0, "opened": 2},
    {"service": "orders", "port": "80/http", "carrier": "proxy", "open": 2, "opened": 118},
]
CLIENTS = [
    {
        "service": service, "port": port, "carrier": carrier, "client": client, "workload": workload, "pid": pid,
        "asked": asked, "endpoint": endpoint, "cgroup": cgroup, "cgroup_id": 77, "netns": netns,
    }
    for service, port, carrier, client, workload, pid, asked, endpoint, cgroup, netns in (
        ("ledger", "7000/tcp", "direct", "198.18.77.5:51514", "cart.service", 812, "127.96.77.20:7000",
         "198.18.77.40:7000", "/mesh.slice/cart.service", 1),
        ("orders", "80/http", "proxy", "127.0.0.1:40112", POD, 20731, "127.96.77.10:80", None, POD_CGROUP, 4026532201),
        ("orders", "80/http", "proxy", "127.0.0.1:40114", POD, 20731, "127.96.77.10:80", None, POD_CGROUP, 4026532201),
    )
]  # fmt: skip
EDGES = calls.edges(
    [{"service": one["service"], "workload": one["workload"], "carrier": one["carrier"]} for one in CLIENTS],
    {
        "connections_total": [
            ["outbound", POD, "orders", "proxy", 118],
            ["outbound", "cron.service", "orders", "proxy", 1],
        ],
        "requests_total": [
            ["outbound", POD, "orders", "-", "200", "-", "proxy", 1_204_311],
            ["outbound", POD, "orders", "-", "503", "UF", "proxy", 4],
            ["outbound", "cron.service", "orders", "-", "-", "DC", "proxy", 1],
        ],
    },
    True,
)
REASONS = explain.verdicts(
    {
        ("connect", "proxy"): 41_118, ("connect", "direct"): 90_213, ("connect", "proxy_absent"): 2,
        ("connect", "no_endpoint"): 7, ("sockops", "opened"): 131_331, ("command", "reader_blocks"): 12,
    },
    [["orders", "connect_failed", 4], ["billing", "connect_failed", 1], ["orders", "head_too_large", 1]],
)  # fmt: skip
HELD = [
    maps.Held(name, kind, entries, capacity, memory)
    for name, kind, entries, capacity, memory in (
        ("services", "hash", 412, 16384, 1_318_912), ("policies", "hash", 412, 16384, 1_187_840),
        ("slots", "hash", 218_000, 262_144, 18_878_464), ("endpoints", "hash", 4120, 131_072, 10_489_856),
        ("rounds", "hash", 412, 16384, 1_187_840), ("agent", "array", None, 1, 288),
        ("heartbeat", "array", None, 1, 272),
        ("listeners", "sk_storage", None, 0, 2240), ("origins", "sk_storage", None, 0, 2240),
        ("flows", "lru_hash", 37, 65536, 10_487_936), ("connections", "percpu_hash", 412, 16384, 133_568),
        ("counters", "percpu_array", None, 256, 4352), ("events", "ringbuf", None, 262_144, 275_800),
        ("serving", "hash", 12, 131_072, 1_049_000),
        ("connected", "hash", 3, 65536, 525_000), ("talks", "lru_hash", 40, 65536, 8_390_000),
        ("answers", "lru_hash", 40, 65536, 6_290_000), ("socks", "sockhash", 8, 65536, 1_049_536),
        ("members", "sk_storage", None, 0, 2240),
        ("pairs", "lru_hash", 4, 65536, 12_585_088), ("stages", "prog_array", None, 1, 272),
    )
]  # fmt: skip


def service(name: str, address: str, protocol: Protocol, *hosts: str, weight: int = 100) -> Service:
    endpoints = tuple(Endpoint(host, {"main": 8080}, weight) for host in hosts)
    return Service(name, addresses=(address,), ports=(Port("main", 80, protocol),), endpoints=endpoints)


BEFORE = Mesh(
    services=(
        service("ledger", "127.96.77.20", Protocol.TCP, "198.18.77.40", "198.18.77.41"),
        service("old", "127.96.77.99", Protocol.TCP, "198.18.77.50"),
        service("orders", "127.96.77.10", Protocol.HTTP, "198.18.77.21", "198.18.77.22"),
    )
)
AFTER = Mesh(
    Agent(maps=MapSizes(slots=524_288), proxy=ProxySettings(drain=30.0)),
    (
        service("billing", "127.96.26.31", Protocol.HTTP, "198.18.77.31"),
        service("ledger", "127.96.77.20", Protocol.TCP, "198.18.77.41", weight=50),
        service("orders", "127.96.77.10", Protocol.HTTP, "198.18.77.21", "198.18.77.22", "fd00:9::23"),
    ),
    {
        ("orders", "default"): ServicePolicy(
            service="orders",
            mode=Mode.PROXY,
            on_proxy_down=OnProxyDown.REFUSE,
            load_balancer=LoadBalancer(Balance.RANDOM),
        )
    },
)
WRITES = [{"map": "services", "set": 1, "deleted": 1}, {"map": "slots", "set": 5, "deleted": 2}]

SCENES: dict[str, Callable[[Screen], str]] = {
    "status": lambda screen: status.text(WELL, screen),
    "status-ill": lambda screen: status.text(ILL, screen),
    "status-no-agent": lambda screen: status.text(DOWN, screen),
    "status-brief": lambda _screen: "\n".join(map(status.in_brief, (WELL, REFUSED, WAITING, ILL, DOWN))),
    "check": checked(MACHINE, INSTANCE),
    "check-endpoints": checked(MACHINE, replace(INSTANCE, failing=tuple(ENDPOINTS[1:3]))),
    "check-bad": checked(BAD_MACHINE, BAD_INSTANCE),
    "services": listed(columns.SERVICES, SERVICES),
    "services-wide": listed(columns.SERVICES, SERVICES, True),
    "endpoints": listed(columns.ENDPOINTS, ENDPOINTS),
    "endpoints-wide": listed(columns.ENDPOINTS, ENDPOINTS, True),
    "connections": lambda screen: inside.connections_text(OPEN, CLIENTS * 8, "", inside.MOST, screen, False),
    "connections-wide": lambda screen: inside.connections_text(OPEN, CLIENTS, "", len(CLIENTS), screen, True),
    "connections-lack": lambda screen: inside.connections_text(
        OPEN, CLIENTS[1:], "may not enter the network namespace of a caller", inside.MOST, screen, False
    ),
    "edges": listed(columns.EDGES, EDGES),
    "reasons": listed(columns.REASONS, REASONS),
    "reasons-wide": listed(columns.REASONS, REASONS, True),
    "maps": listed(columns.MAPS, maps.rows(HELD)),
    "maps-wide": listed(columns.MAPS, maps.rows(HELD), True),
    "diff": lambda screen: diff.text(changes.changes(BEFORE, AFTER), WRITES, screen, False),
    "diff-nothing": lambda screen: diff.text([], [], screen, False),
}
CASES = [(scene, width) for scene in SCENES for width in WIDTHS]


def golden(scene: str, width: int) -> Path:
    return FOLDER / f"{scene}-{width}.txt"


@pytest.mark.parametrize(("scene", "width"), CASES)
def test_to_the_letter(scene: str, width: int) -> None:
    assert SCENES[scene](Screen(width)) + "\n" == golden(scene, width).read_text(), "make golden, if this is meant"


@pytest.mark.parametrize(("scene", "width"), CASES)
def test_it_fits(scene: str, width: int) -> None:
    """But for -o wide, which leaves nothing out, and so may be wider than a narrow screen, and --brief: one line."""
    lines = SCENES[scene](Screen(width)).splitlines()
    if not scene.endswith(("-wide", "-brief")):
        assert max(map(len, lines)) <= width
    assert [line for line in lines if line != line.rstrip()] == []


@pytest.mark.parametrize(("scene", "width"), CASES)
def test_colours_change_nothing_but_colours(scene: str, width: int) -> None:
    painted = SCENES[scene](Screen(width, colour=True))
    assert re.sub(r"\x1b\[\d+m", "", painted) == SCENES[scene](Screen(width))
    assert "\x1b[" in painted or scene in ("diff-nothing", "status-brief")


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {golden(*case).name for case in CASES}


def write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for left in FOLDER.iterdir():
        left.unlink()
    for scene, width in CASES:
        golden(scene, width).write_text(SCENES[scene](Screen(width)) + "\n")
    print(f"{len(CASES)} files in {FOLDER}")


if __name__ == "__main__":
    write()
