"""What `meshbpf check` concludes. Pure: facts in, findings out. Ids are stable; docs/troubleshooting.md has each.

A finding that is not ok carries its remedy: a command or a setting, never advice to read something. The rows of the
kernel self-test come with their own ids and remedies from the loader; they are only put in their category here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from loader.environment import LET_BPF, WHOLE_TREE
from loader.instance import Instance
from meshbpf.cli.facts import InstanceFacts, MachineFacts
from meshbpf.cli.layout import age
from meshbpf.cli.output import counted
from meshbpf.model import EndpointState
from meshbpf.reason import REMEDY, Reason

OLDEST = (5, 10)
COOKIES = (5, 14)
RECENT_SECONDS = 600.0  # an endpoint that failed and was not called since is news for so long
FULL_PERCENT = 80  # from here on a table deserves a warning: a full one refuses a configuration


class Result(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


ACCELERATION = "acceleration"
# id → category, in the order in which they are shown
CATALOGUE: Mapping[str, str] = {
    "capabilities": "machine",
    "kernel-version": "machine",
    "btf": "machine",
    "cgroup2": "machine",
    "bpffs": "machine",
    "netns-cookies": "machine",
    "bcc": "tools",
    "libbpf": "tools",
    "bpftool": "tools",
    "foreign-programs": "neighbours",
    "exclusive-hook": "neighbours",
    "foreign-sk-msg": "neighbours",
    "self-test": ACCELERATION,
    "attached": "instance",
    "attached-cgroup": "instance",
    "map-fill": "instance",
    "agent": "instance",
    "proxy-ready": "instance",
    "mesh-applied": "instance",
    "sources": "instance",
    "endpoints": "instance",
}


@dataclass(frozen=True, slots=True)
class Finding:
    id: str
    result: Result
    detail: str
    remedy: str = ""
    category: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "category", self.category or CATALOGUE[self.id])


def _judge(id: str, good: bool, detail: str, otherwise: str, remedy: str, result: Result = Result.ERROR) -> Finding:
    return Finding(id, Result.OK, detail) if good else Finding(id, result, otherwise, remedy)


def version(release: str) -> tuple[int, int]:
    """`6.1.0-18-amd64` → (6, 1); (0, 0) for what does not look like one."""
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def machine(facts: MachineFacts) -> list[Finding]:
    """What this machine can do, agent or not."""
    oldest = ".".join(map(str, OLDEST))
    return [
        _capabilities(facts),
        _judge(
            "kernel-version", version(facts.release) >= OLDEST, facts.release, f"{facts.release} is before {oldest}",
            f"boot a kernel from {oldest} on",
        ),
        _judge(
            "btf", facts.btf, "/sys/kernel/btf/vmlinux", "no /sys/kernel/btf/vmlinux: no order proof, so no redirect",
            "boot a kernel built with CONFIG_DEBUG_INFO_BTF=y (all of Debian's and Ubuntu's are)", Result.WARNING,
        ),
        _cgroup2(facts),
        _judge(
            "bpffs", facts.bpffs, "/sys/fs/bpf",
            "not mounted at /sys/fs/bpf", "mount -t bpf -o mode=0700 bpf /sys/fs/bpf",
        ),
        _judge(
            "netns-cookies", facts.netns_cookies, "one agent serves every network namespace",
            f"kernel {facts.release} cannot tell namespaces apart: only the agent's own is governed",
            f"boot a kernel from {COOKIES[0]}.{COOKIES[1]} on, or run the callers in the agent's namespace",
            Result.WARNING,
        ),
        _judge(
            "bcc", not facts.bcc, "Python sees it", facts.bcc,
            "apt-get install python3-bpfcc, in a virtual environment with --system-site-packages (make setup)",
        ),
        _judge("libbpf", not facts.libbpf, "libbpf.so.1", facts.libbpf, "apt-get install libbpf1"),
        *_neighbours(facts),
        *_self_test(facts),
    ]  # fmt: skip


def _cgroup2(facts: MachineFacts) -> Finding:
    if facts.namespaced:
        inside = f"{facts.cgroup2} is the top of a container's cgroup namespace: nobody outside of it can be led"
        return Finding("cgroup2", Result.WARNING, inside, WHOLE_TREE)
    mount = "mount -t cgroup2 none /sys/fs/cgroup"
    return _judge("cgroup2", bool(facts.cgroup2), facts.cgroup2, "not mounted", mount)


def _capabilities(facts: MachineFacts) -> Finding:
    if facts.missing_capabilities:
        missing = ", ".join(facts.missing_capabilities)
        return Finding("capabilities", Result.ERROR, f"missing: {missing}", "run as root (sudo)")
    if facts.bpf_refused:
        return Finding("capabilities", Result.ERROR, facts.bpf_refused, LET_BPF)
    if facts.missing_to_serve:
        missing = ", ".join(facts.missing_to_serve)
        return Finding(
            "capabilities", Result.WARNING, f"enough to attach; run lacks {missing}: it governs its own namespace only",
            f"grant {missing} too, or run the callers in the agent's namespace",
        )  # fmt: skip
    return Finding("capabilities", Result.OK, "all that is needed")


def _neighbours(facts: MachineFacts) -> list[Finding]:
    if facts.neighbours is None:
        remedy = "apt-get install bpftool (Ubuntu: linux-tools-generic), and run as root"
        if facts.bpf_refused:
            remedy = LET_BPF
        return [Finding("bpftool", Result.WARNING, f"{facts.bpftool}: other programs cannot be listed", remedy)]
    found = facts.neighbours
    hooks = [str(each) for each in found.hooks if each.mode]
    alone = [each for each in found.hooks if not each.mode]
    # With an instance attached nothing of it is undone; without, nothing can be attached anywhere.
    hopeless = not facts.led and any(each.cgroup == facts.cgroup2 for each in alone)
    quiet = f"none that meets ours; {found.elsewhere} on other hooks or cgroups"
    return [
        Finding("bpftool", Result.OK, facts.bpftool),
        _judge(
            "foreign-programs", not hooks, quiet, f"{len(hooks)} on our hooks: {_listed(hooks)}",
            "none needed if it is above ours and no endpoint is a service's address of its own; else attach to another"
            " cgroup, or turn off its socket load balancing", Result.WARNING,
        ),
        _judge(
            "exclusive-hook", not alone, "nobody keeps others out",
            f"{_listed(list(map(str, alone)))}: lets no other in on its cgroup and below",
            "have it attached with BPF_F_ALLOW_MULTI or by link, or attach to a cgroup that is not below it",
            Result.ERROR if hopeless else Result.WARNING,
        ),
        _judge(
            "foreign-sk-msg", not found.sk_msg, "none", f"{_listed(list(found.sk_msg))}: another sockmap user",
            "none needed: a socket that it holds goes by plain TCP with the reason socket_taken", Result.WARNING,
        ),
    ]  # fmt: skip


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _self_test(facts: MachineFacts) -> list[Finding]:
    if facts.self_test is None:
        remedy = facts.self_test_lack[1]
        return [Finding("self-test", Result.WARNING, facts.self_test_lack[0], remedy)]
    return [
        Finding(self_test_id(row.id), Result.OK if row.ok else Result.WARNING, row.detail, row.remedy, ACCELERATION)
        for row in facts.self_test
    ]


def self_test_id(trial: str) -> str:
    """The loader names its trials (`order`); beside other checks they say what they are about (`redirect-order`)."""
    return trial if trial in CATALOGUE else f"redirect-{trial}"


def instance(facts: InstanceFacts) -> list[Finding]:
    """What the named instance does; `attached` alone when there is nothing more to say."""
    again = f"meshbpf attach --cgroup PATH -c FILE{Instance(facts.name).option}"
    if not facts.attached:
        return [Finding("attached", Result.ERROR, f"instance {facts.name} is not attached", again)]
    gone = [cgroup.path for cgroup in facts.cgroups if not cgroup.exists]
    remade = [cgroup.path for cgroup in facts.cgroups if cgroup.exists and not cgroup.linked]
    lost = f"gone: {_listed(gone)}" if gone else f"made anew since the attach, not led: {_listed(remade)}"
    remedy = f"mkdir {gone[0]}, then attach or run again" if gone else "attach or run again"
    full = [f"{name} {entries}/{room}" for name, entries, room in nearly_full(facts.fills)]
    return [
        Finding("attached", Result.OK, f"instance {facts.name}, {counted(facts.services, 'service')}"),
        _judge("attached-cgroup", not (gone or remade), _listed([c.path for c in facts.cgroups]), lost, remedy),
        _judge(
            "map-fill", not full, f"every table is below {FULL_PERCENT}%", f"nearly full: {', '.join(full)}",
            f"raise Agent.spec.maps.{full[0].split()[0] if full else ''}, then attach again", Result.WARNING,
        ),
        *_agent(facts),
    ]  # fmt: skip


def nearly_full(fills: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """Of (table, entries, room) those that deserve a warning."""
    return [fill for fill in fills if 100 * fill[1] >= FULL_PERCENT * fill[2]]


def _agent(facts: InstanceFacts) -> list[Finding]:
    if facts.agent_error:
        restart = "restart the agent: it holds the socket but does not answer"
        return [Finding("agent", Result.ERROR, facts.agent_error, restart)]
    if facts.agent is None:
        if not facts.governed:
            return [Finding("agent", Result.OK, "not running, and not needed: every port is direct")]
        remedy = f"meshbpf run --cgroup PATH -c FILE{Instance(facts.name).option}"
        if facts.proxy_serves:
            detail = "not running: its workers still serve, but follow no registry and no file any more"
            return [Finding("agent", Result.WARNING, detail, remedy)]
        if facts.refused:
            detail = (
                f"not running: calls to {counted(facts.refused, 'governed port')} are refused (onProxyDown: refuse)"
            )
            return [Finding("agent", Result.ERROR, detail, remedy)]
        which = "goes" if facts.governed == 1 else "go"
        detail = f"not running: {counted(facts.governed, 'governed port')} {which} straight to endpoints, ungoverned"
        return [Finding("agent", Result.WARNING, detail, remedy)]
    agent: Mapping[str, Any] = facts.agent
    ready, wanted = int(agent["ready"]), int(agent["workers"])
    refused = str(agent.get("error") or "")
    failing = [f"{source['name']}: {source['error']}" for source in agent.get("sources", []) if source["error"]]
    return [
        Finding("agent", Result.OK, f"pid {agent['pid']}"),
        _judge(
            "proxy-ready", ready >= wanted, f"{ready}/{wanted} workers", f"{ready}/{wanted} workers ready",
            "look for `worker died` in the agent's log",
        ),
        _judge(
            "mesh-applied", not refused, "the kernel holds the newest mesh", refused,
            "mend what it names; the last good mesh is served meanwhile",
        ),
        _judge(
            "sources", not failing, f"{len(agent.get('sources', []))} without an error", _listed(failing),
            "mend what it names; the last good state is served meanwhile", Result.WARNING,
        ),
        _endpoints(facts),
    ]  # fmt: skip


def _endpoints(facts: InstanceFacts) -> Finding:
    """Retries hide from callers that an endpoint fails; those that take no new calls anyway harm nobody."""
    failing = [
        row
        for row in facts.failing
        if row["state"] == EndpointState.READY and row["weight"] and row["last_error_seconds"] <= RECENT_SECONDS
    ]
    if not failing:
        return Finding("endpoints", Result.OK, "none failed when the proxy called it last")
    told = [
        f"{row['service']} {row['endpoint']} {row['last_error']} {age(row['last_error_seconds'])} ago"
        f" ({row['failed']} of {row['failed'] + row['ok']} attempts failed)"
        for row in failing
    ]
    words = dict.fromkeys(row["last_error"] for row in failing)
    remedies = [f"; {word}: {REMEDY[Reason[word.upper()]]}" for word in words if Reason[word.upper()] in REMEDY]
    look = f"meshbpf endpoints {failing[0]['service']}{Instance(facts.name).option}"
    return Finding("endpoints", Result.WARNING, _listed(told), look + "".join(remedies))


def exit_code(findings: Sequence[Finding], may_look: bool) -> int:
    """0 all ok, 79 warnings only, 1 an error, 69 when we are not even allowed to look."""
    if not may_look:
        return 69
    if any(finding.result is Result.ERROR for finding in findings):
        return 1
    return 79 if any(finding.result is Result.WARNING for finding in findings) else 0
