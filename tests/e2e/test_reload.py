"""The watched configuration: changes under load, bad files, SIGHUP, and a service that its callers wait for."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.support.machine import Machine, policy, service, until

ADDRESS = "127.96.0.10"
URL = f"http://{ADDRESS}/"


def generation(machine: Machine) -> int:
    return int(machine.agent_says()["generation"])


def files(machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = next(s for s in machine.show("status")["sources"] if s["name"] == "files")
    return found


@pytest.mark.parametrize("mode", ["direct", "proxy"])
def test_no_request_is_lost_or_late_while_endpoints_change(machine: Machine, mode: str) -> None:
    a, b, c = (machine.quick(name) for name in "abc")
    rules = policy("orders", mode=mode)
    machine.configure(service("orders", ADDRESS, [a]), rules)
    machine.run_agent()
    loads = [machine.load(ADDRESS, connections=8, rate=700), machine.load(ADDRESS, connections=4, rate=300, new=True)]
    effects = []
    for ports in ([a, b], [b], [b, c], [c, a], [a, b, c], [c]):
        before = generation(machine)
        begin = time.monotonic()
        machine.configure(service("orders", ADDRESS, ports), rules)
        until(lambda before=before: generation(machine) > before, "the change is in effect")
        effects.append(time.monotonic() - begin)
    print(f"change to effect: {', '.join(f'{seconds:.3f}' for seconds in effects)} s")
    assert machine.curl(URL)["endpoint"] == "c"
    kept, new = (load.stop() for load in loads)
    assert set(new["endpoints"]) == {"a", "b", "c"}, new
    assert mode == "direct" or set(kept["endpoints"]) == {"a", "b", "c"}, kept
    for result in (kept, new):
        assert not result["failed"] and not result["failed_kept"] and not result["stale"], result
        assert result["slowest_ms"] < 500, result


def test_an_endpoint_that_left_is_not_called_again(machine: Machine) -> None:
    a, b = machine.quick("a"), machine.quick("b")
    machine.configure(service("orders", ADDRESS, [a, b]))
    machine.run_agent()
    before = generation(machine)
    machine.configure(service("orders", ADDRESS, [b]))
    until(lambda: generation(machine) > before, "the change is in effect")
    assert {machine.curl(URL)["endpoint"] for _ in range(10)} == {"b"}
    assert machine.show("endpoints")["endpoints"][0]["endpoint"] == f"127.0.0.1:{b}"


def test_a_bad_file_keeps_the_last_good_mesh_and_says_where(machine: Machine) -> None:
    a, b = machine.quick("a"), machine.quick("b")
    path = machine.configure(service("orders", ADDRESS, [a]))
    machine.run_agent()
    good = path.read_text()
    for bad, why in (
        (good.replace("endpoints:", "endpoint:"), "endpoint"),
        (good + "\n---\n: [", ""),
        (good.replace("kind: Service", "kind: Servise"), "Servise"),
    ):
        path.write_text(bad)
        error = until(lambda why=why: files(machine)["error"] if why in files(machine)["error"] else "", "the fault")
        assert re.search(rf"{path}:\d+:\d+: ", error), error
        assert machine.curl(URL)["endpoint"] == "a"
        assert re.search(
            rf"last error: {path}:\d+:\d+", machine.meshbpf("status", "--instance", machine.instance.name).stdout
        )
    machine.configure(service("orders", ADDRESS, [b]))
    until(lambda: not files(machine)["error"], "the fault is gone")
    until(lambda: machine.curl(URL)["endpoint"] == "b", "the mended file counts")
    assert "source is well again source=files" in machine.log()


def test_a_service_added_while_its_callers_retry(machine: Machine) -> None:
    """Callers of an address that is no service yet are refused, and then served: no third thing in between. A thousand
    others make the time that a change takes long enough to be seen."""
    port = machine.quick("a")
    others = [service(f"s{n}", f"127.96.{100 + n // 250}.{n % 250}", [port]) for n in range(1000)]
    machine.configure(*others)
    machine.run_agent()
    impatient = """
import http.client, sys
seen = []
served = 0
while served < 50:
    client = http.client.HTTPConnection(sys.argv[1], 80, timeout=5)
    try:
        client.request("GET", "/")
        said = str(client.getresponse().status)
    except OSError as error:
        said = type(error).__name__
    client.close()
    if not seen:
        print("begun", flush=True)
    served += said == "200"
    if said not in seen:
        seen.append(said)
print(" ".join(seen))
"""
    client = machine.start_client(sys.executable, "-c", impatient, "127.96.0.11", stdout=subprocess.PIPE, text=True)
    assert client.stdout.readline() == "begun\n"
    machine.configure(*others, service("users", "127.96.0.11", [port]))
    out, _ = client.communicate(timeout=20)
    assert out == "ConnectionRefusedError 200\n"


def test_hangup_reads_again_and_reopens_the_log(machine: Machine) -> None:
    machine.configure(service("orders", ADDRESS, [machine.quick("a")]))
    agent = machine.run_agent("--workers", "2")
    machine.curl(URL)
    machine.records(1)
    rotated = machine.access_log.rename(machine.access_log.with_suffix(".1"))
    agent.send_signal(signal.SIGHUP)
    until(machine.access_log.exists, "a new log")

    def moved() -> bool:
        machine.curl(URL)
        return len(rotated.read_text().splitlines()) == kept

    machine.curl(URL)
    kept = len(rotated.read_text().splitlines())
    until(moved, "everything goes to the new log")
    assert machine.records(1)


def test_settings_that_need_a_restart_stay_and_are_named(machine: Machine) -> None:
    a, b = machine.quick("a"), machine.quick("b")
    machine.configure(service("orders", ADDRESS, [a]))
    machine.run_agent()
    machine.agent_spec["maps"] = {"flows": 4096}
    machine.agent_spec["proxy"] = {"listen": f"127.0.0.1:{machine.proxy_port}", "workers": 3, "drain": "1s"}
    machine.configure(service("orders", ADDRESS, [b]))
    machine.until_logged("settings that need a restart have changed fields=maps,proxy")
    until(lambda: machine.curl(URL)["endpoint"] == "b", "the rest counts")
    said = machine.agent_says()
    assert (said["ready"], said["workers"]) == (1, 1)
    sizes = {fill["map"]: fill["capacity"] for fill in machine.show("status")["maps"]}
    assert sizes["flows"] == 65536
    assert machine.show("status")["restart"] == ["maps", "proxy"]
    del machine.agent_spec["maps"], machine.agent_spec["proxy"]["workers"]
    machine.configure(service("orders", ADDRESS, [b]))
    until(lambda: not machine.show("status")["restart"], "nothing waits any more")


def test_a_full_table_keeps_the_last_good_mesh(machine: Machine) -> None:
    machine.agent_spec["maps"] = {"slots": 4}
    a = machine.quick("a")
    machine.configure(service("orders", ADDRESS, [a]))
    machine.run_agent()
    machine.configure(service("orders", ADDRESS, [a]), service("users", "127.96.0.11", [a, a + 1, a + 2, a + 3, a + 4]))
    machine.until_logged("mesh refused")
    assert "maps.slots" in machine.show("status")["error"]
    assert machine.curl(URL)["endpoint"] == "a"
    assert machine.client("curl", "-sS", "http://127.96.0.11/").returncode == 7


def test_a_log_that_cannot_be_opened_keeps_the_last_one(machine: Machine) -> None:
    """The rest of the new mesh is followed, status says what is not."""
    first, second = machine.endpoint("a"), machine.endpoint("b")
    machine.configure(service("orders", "127.96.0.10", [first]))
    machine.run_agent()
    assert machine.curl("http://127.96.0.10/")["endpoint"] == "a"
    machine.records(1)
    machine.agent_spec["accessLog"] = {"format": "json", "path": str(machine.folder / "missing" / "access.log")}
    machine.configure(service("orders", "127.96.0.10", [second]))
    until(lambda: "accessLog.path" in machine.show("status")["error"], "status names the setting")
    assert machine.curl("http://127.96.0.10/")["endpoint"] == "b"
    assert len(machine.records(2)) == 2


def test_a_state_file_that_cannot_be_written_does_not_end_the_following(machine: Machine) -> None:
    first, second = machine.endpoint("a"), machine.endpoint("b")
    machine.configure(service("orders", "127.96.0.10", [first]))
    machine.run_agent()
    obstacle = machine.instance.state_file.with_suffix(".new")
    obstacle.mkdir()
    machine.configure(service("orders", "127.96.0.10", [second]))
    until(lambda: machine.curl(URL)["endpoint"] == "b", "the mesh serves all the same")
    until(lambda: "state.json is old" in machine.agent_says()["error"], "status says so")
    obstacle.rmdir()
    machine.configure(service("orders", "127.96.0.10", [first]))
    until(lambda: machine.curl(URL)["endpoint"] == "a", "and goes on")
    until(lambda: not machine.agent_says()["error"], "all is well again")


def test_hangups_at_any_time_end_nobody(machine: Machine) -> None:
    """The agent's first second included; to a whole process group they reach workers too."""
    machine.configure(service("orders", "127.96.0.10", [machine.endpoint("a")]))
    agent = machine.run_agent("--workers", "2")
    workers = machine.agent_says()["worker_pids"]
    for pid in (agent.pid, *workers):
        os.kill(pid, signal.SIGHUP)
    assert machine.curl(URL)["endpoint"] == "a"
    assert machine.agent_says()["worker_pids"] == workers and machine.agent_says()["restarts"] == 0
