"""A caller whose systemd unit has IPAddressDeny= or SocketBindDeny=: systemd's own programs on the unit's cgroup, under
a real systemd. They judge packets, which go to endpoints and to 127.0.0.1, never to a service's address.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import yaml

from tests.support.booted import Booted
from tests.support.machine import policy, service

SERVICE, ENDPOINT = "127.96.0.11", "127.0.0.1"
TIMED_OUT = 28  # of curl


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    with Booted(tmp_path_factory.mktemp("filters")) as made:
        port = made.endpoint("a")
        documents = [service("ledger", SERVICE, [port]), policy("ledger", mode="direct")]
        made.write("/etc/meshbpf/mesh.yaml", yaml.safe_dump_all(documents))
        made.run("mkdir", "/sys/fs/cgroup/mesh.slice", check=True)
        attached = made.meshbpf("attach", "--cgroup", "mesh.slice")
        assert attached.returncode == 0, attached.stderr
        yield made


@pytest.mark.parametrize(
    ("properties", "answered"),
    [
        ((), True),
        (("IPAddressDeny=any", f"IPAddressAllow={ENDPOINT}"), True),
        (("IPAddressDeny=any", f"IPAddressAllow={SERVICE}"), False),
        (("SocketBindDeny=any",), True),
    ],
    ids=["none", "endpoint-allowed", "service-allowed", "bind-denied"],
)
def test_a_unit_filter_judges_the_endpoint(booted: Booted, properties: tuple[str, ...], answered: bool) -> None:
    """What is dropped times out; connect() had led it all the same."""
    before = led(booted)
    options = [f"--property={each}" for each in ("Slice=mesh.slice", *properties)]
    curl = ("curl", "-sS", "--max-time", "2", f"http://{SERVICE}/")
    done = booted.run("systemd-run", "--pipe", "--quiet", "--wait", *options, *curl)
    assert done.returncode == (0 if answered else TIMED_OUT), (done, booted.journal()[-2000:])
    assert led(booted) == before + 1


def led(booted: Booted) -> int:
    rows = booted.show("reasons")["reasons"]
    return sum(row["count"] for row in rows if (row["program"], row["reason"]) == ("connect", "direct"))
