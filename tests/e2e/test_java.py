"""Java's HttpClient gets through the mesh what it gets without it, speaking HTTP/1.1 or offering HTTP/2 in clear."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support.machine import ROOT, Done, Machine, which
from tests.support.ways import ADDRESSES, REDIRECT, Ways

QUICKER = ("-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")  # it runs for a second


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("java")
    command = [which("javac"), "-d", str(folder), str(ROOT / "tests/support/Calls.java")]
    made = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert made.returncode == 0, made.stderr
    with Machine(folder, f"mt-java-{folder.parent.name[-8:]}") as machine:
        web = machine.start([sys.executable, "-m", "tests.support.plainweb"], stdout=subprocess.PIPE, text=True)
        with Ways(machine, int(web.stdout.readline()), port=80, protocol="http") as made_ways:
            yield made_ways


@pytest.mark.parametrize("version", ["HTTP_1_1", "HTTP_2"])
@pytest.mark.parametrize("way", ADDRESSES)
def test_calls(ways: Ways, way: str, version: str) -> None:
    """HTTP_2 is Java's default: the first request on each connection asks for an upgrade to h2c."""
    java = [which("java"), *QUICKER, "-cp", str(ways.machine.folder), "Calls"]
    command = [*java, f"http://127.0.0.1:{ways.server}", version]
    without = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    redirected = ways.verdicts("redirected")
    with ways.carrying(way):
        meshed: Done = ways.machine.client(*java, f"http://{ADDRESSES[way]}", version, timeout=60)
    assert (without.returncode, meshed.returncode) == (0, 0), (without.stderr, meshed.stderr)
    assert meshed.stdout == without.stdout
    assert meshed.stdout.count("\n") == 22 + 160
    assert (ways.verdicts("redirected") > redirected) == (way == REDIRECT and ways.redirects)
