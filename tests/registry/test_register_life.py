"""`meshbpf register` as a real process beside a real registry: in when ready, out before the server stops."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from meshbpf import checks, register, registration
from meshbpf.checks import CmdCheck, HttpCheck, TcpCheck
from meshbpf.errors import ConfigError, MeshError, NotFound
from meshbpf.model import EmbeddedRegistry
from meshbpf.register import Action, Upkeep
from meshbpf.registry.client import RegistryClient
from meshbpf.registry.embedded import EmbeddedSource

PROGRAM = """
import asyncio, sys
from meshbpf import register, registration
from meshbpf.registry.client import RegistryClient
async def main():
    url, port, ttl, check, *command = sys.argv[1:]
    options = dict(ttl=ttl, check=check, interval="100ms", with_command=bool(command))
    wanted = registration.registration("orders", [port], **options)
    async with RegistryClient(url=url) as client:
        return await register.register(client, wanted, command)
sys.exit(asyncio.run(main()))
"""

# Serves until SIGTERM; then writes down what the registry says at that moment, and whether it could still serve.
SERVER = """
import http.server, json, os, signal, sys, threading, urllib.error, urllib.request
port, registry, note = int(sys.argv[1]), sys.argv[2], sys.argv[3]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(503 if os.path.exists(note + ".sick") else 200)
        self.end_headers()
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
def stop(number, frame):
    try:
        urllib.request.urlopen(registry + "/v1/services/orders").read()
        seen = "still registered"
    except urllib.error.HTTPError as error:
        seen = f"{error.code} {signal.Signals(number).name}"
    with open(note, "w") as file:
        file.write(seen)
    os._exit(7)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
server.serve_forever()
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Scene:
    """A registry, and the process under test."""

    def __init__(self, source: EmbeddedSource, tmp_path: Path) -> None:
        self.source = source
        self.port = free_port()
        self.note = tmp_path / "note"
        self.sick = tmp_path / "note.sick"
        self._ended: list[asyncio.subprocess.Process] = []

    @property
    def url(self) -> str:
        assert self.source.address is not None
        return f"http://127.0.0.1:{self.source.address[1]}"

    @property
    def server(self) -> list[str]:
        return [sys.executable, "-c", SERVER, str(self.port), self.url, str(self.note)]

    def ids(self) -> list[str]:
        return [lease.instance.id for lease in self.source.registrar.leases.of(("orders", "default"))]

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for changes of the registry until `true()`."""
        async with asyncio.timeout(20):
            while not true():
                registrar = self.source.registrar
                await registrar.wait(None, registrar.generation(None), 20)

    async def register(self, *command: str, ttl: str = "10s", check: str = "") -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            PROGRAM,
            self.url,
            str(self.port),
            ttl,
            check,
            *command,
            stderr=asyncio.subprocess.PIPE,
        )
        self._ended.append(process)
        return process

    async def close(self) -> None:
        for process in self._ended:
            if process.returncode is None:
                process.terminate()
                await process.wait()
        await self.source.close()


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    source = EmbeddedSource(EmbeddedRegistry("127.0.0.1:0", str(tmp_path / "registry.db")))
    await source.start()
    scene = Scene(source, tmp_path)
    yield scene
    await scene.close()


async def hear(process: asyncio.subprocess.Process, text: str) -> str:
    """Wait until the process says `text`; everything it said until then."""
    assert process.stderr is not None
    heard = ""
    async with asyncio.timeout(20):
        while text not in heard:
            line = (await process.stderr.readline()).decode()
            assert line, f"ended without saying {text!r}"
            heard += line
    return heard


async def said(process: asyncio.subprocess.Process) -> str:
    assert process.stderr is not None
    return (await process.stderr.read()).decode()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
async def test_the_endpoint_is_out_before_the_server_is_told_to_stop(scene: Scene, name: str) -> None:
    process = await scene.register(*scene.server)
    await scene.until(lambda: scene.ids() == [f"127.0.0.1-{scene.port}"])
    process.send_signal(signal.Signals[name])
    assert await process.wait() == 7, "the command's own code"
    assert scene.note.read_text() == f"404 {name}"
    assert scene.ids() == []


async def test_heartbeats_outlive_the_ttl_and_a_lost_lease_is_put_again(scene: Scene) -> None:
    process = await scene.register(*scene.server, ttl="1s")
    await scene.until(lambda: bool(scene.ids()))
    first = scene.source.registrar.leases.of(("orders", "default"))[0]
    with pytest.raises(TimeoutError):  # nothing changes for longer than the TTL
        async with asyncio.timeout(1.5):
            registrar = scene.source.registrar
            await registrar.wait(None, registrar.generation(None), 20)
            raise AssertionError("the lease changed")
    await scene.source.registrar.delete(("orders", "default"), first.instance.id)
    await scene.until(lambda: bool(scene.ids()))
    process.terminate()
    await process.wait()
    assert "had lost its lease" in await said(process)


async def test_a_command_that_dies_is_taken_out_and_its_code_is_ours(scene: Scene) -> None:
    code = f"import socket; s = socket.create_server(('127.0.0.1', {scene.port})); input(); raise SystemExit(3)"
    process = await asyncio.create_subprocess_exec(
        *[sys.executable, "-c", PROGRAM, scene.url, str(scene.port), "10s", "", sys.executable, "-c", code],
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    await scene.until(lambda: bool(scene.ids()))
    assert process.stdin is not None
    process.stdin.write(b"\n")
    assert await process.wait() == 3
    assert scene.ids() == []


async def test_a_command_that_is_killed_gives_128_and_the_signal(scene: Scene) -> None:
    process = await scene.register(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    assert await process.wait() == 137


@pytest.mark.parametrize(("code", "ours"), [(0, 1), (3, 3)])
async def test_a_command_that_ends_before_it_was_ready(scene: Scene, code: int, ours: int) -> None:
    process = await scene.register("sh", "-c", f"exit {code}")
    assert await process.wait() == ours
    assert "sh ended before it was ready" in await said(process)


async def test_what_never_had_a_lease_has_none_that_ends(tmp_path: Path) -> None:
    wanted = registration.registration("orders", ["8081"])
    heard: list[str] = []
    async with RegistryClient(unix=tmp_path / "agent.sock") as client:
        keeper = register.Keeper(client, wanted, heard.append)
        keeping = asyncio.ensure_future(keeper.run())
        while not heard:
            await asyncio.sleep(0)
        keeping.cancel()
        assert not await keeper.leave()
    assert [line for line in heard if "its lease" in line] == [] and "no agent listens" in heard[-1]


async def test_three_failed_checks_take_it_out_and_one_success_puts_it_in(scene: Scene) -> None:
    process = await scene.register(*scene.server, check="http:/healthz")
    await hear(process, " registered\n")
    scene.sick.touch()
    await hear(process, "taken out after 3 failed checks: http:/healthz: status 503")
    assert scene.ids() == []
    scene.sick.unlink()
    await hear(process, " registered\n")
    assert len(scene.ids()) == 1
    process.terminate()
    assert await process.wait() == 7


async def test_without_a_command_it_registers_until_told_to_stop(scene: Scene) -> None:
    process = await scene.register()
    await scene.until(lambda: bool(scene.ids()))
    process.terminate()
    assert await process.wait() == 0
    assert scene.ids() == []


async def test_a_registry_that_is_away_is_said_once_and_found_again(scene: Scene, tmp_path: Path) -> None:
    assert scene.source.address is not None
    port = scene.source.address[1]
    process = await scene.register(*scene.server)
    await scene.until(lambda: bool(scene.ids()))
    await scene.source.close()
    await hear(process, "cannot reach")
    scene.source = EmbeddedSource(EmbeddedRegistry(f"127.0.0.1:{port}", str(tmp_path / "other.db")))
    await scene.source.start()
    assert "cannot reach" not in await hear(process, "the registry answers again")
    assert len(scene.ids()) == 1
    process.terminate()
    assert await process.wait() == 7


async def test_what_the_registry_refuses_ends_the_command(scene: Scene) -> None:
    scene.source.registrar.rules = replace(scene.source.registrar.rules, own_ports=frozenset({scene.port}))
    process = await scene.register(*scene.server)
    assert await process.wait() == 1
    assert "a port of meshbpf itself" in await said(process)
    assert scene.note.read_text() == "404 SIGTERM"


async def test_a_command_that_does_not_exist(scene: Scene) -> None:
    process = await scene.register("/no/such/command")
    assert await process.wait() == 127
    assert "/no/such/command" in await said(process)


async def test_deregister(scene: Scene) -> None:
    body = {"address": "127.0.0.1", "ports": {"http": {"port": 8081}}}
    async with RegistryClient(url=scene.url) as client:
        with pytest.raises(NotFound):
            await register.deregister(client, "orders")
        await client.put("orders", "a", body)
        with pytest.raises(NotFound):
            await register.deregister(client, "orders", "b")
        assert await register.deregister(client, "orders") == "a"
        await client.put("orders", "a", body)
        await client.put("orders", "b", body)
        with pytest.raises(MeshError, match="a, b"):
            await register.deregister(client, "orders")
        assert await register.deregister(client, "orders", "b") == "b"


async def test_an_agent_that_is_away_is_named_with_what_starts_it(tmp_path: Path) -> None:
    async with RegistryClient(unix=tmp_path / "agent.sock") as client:
        with pytest.raises(MeshError, match=r"^no agent listens on .*agent\.sock: start one with `meshbpf run`$"):
            await register.deregister(client, "orders")


async def test_a_program_that_starts_is_waited_for(scene: Scene) -> None:
    later = "import http.server, sys, time; time.sleep(0.5); "
    later += f"http.server.test(http.server.SimpleHTTPRequestHandler, port={scene.port}, bind='127.0.0.1')"
    process = await scene.register(sys.executable, "-c", later)
    heard = await hear(process, "registered")
    assert f"waiting until it is ready: tcp 127.0.0.1:{scene.port}\n" in heard
    assert "is not ready" not in heard
    process.terminate()
    await process.wait()


def test_what_follows_from_checks() -> None:
    upkeep = Upkeep()
    assert upkeep.after_check(False) is Action.NOTHING
    assert upkeep.after_check(True) is Action.PUT
    upkeep.registered = True
    assert [upkeep.after_check(passes) for passes in (True, False, False, True, False, False, False)] == [
        Action.HEARTBEAT,
        Action.NOTHING,
        Action.NOTHING,
        Action.HEARTBEAT,
        Action.NOTHING,
        Action.NOTHING,
        Action.DELETE,
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8081", ("http", 8081, "http")),
        ("8081/tcp", ("tcp", 8081, "tcp")),
        ("web=8081", ("web", 8081, "http")),
        ("rpc=9000/grpc", ("rpc", 9000, "grpc")),
    ],
)
def test_ports(text: str, expected: tuple[str, int, str]) -> None:
    spec = registration.parse_port(text)
    assert (spec.name, spec.port, spec.protocol) == expected


def test_a_port_without_a_name_says_which_it_took() -> None:
    notes = registration.registration("orders", ["web=8081", "9000/grpc", "8082"]).notes
    assert [note.partition(";")[0] for note in notes] == [
        "port 9000 has no name, so it takes its protocol's: grpc",
        "port 8082 has no name, so it takes its protocol's: http",
    ]
    assert notes[0].endswith(" --port NAME=9000/grpc")


async def test_it_is_said_before_anything_else(scene: Scene) -> None:
    heard = await hear(await scene.register(), " registered\n")
    assert heard.startswith(f"meshbpf register: port {scene.port} has no name, so it takes its protocol's: http; ")


def test_the_service_port_belongs_to_the_first_port() -> None:
    wanted = registration.registration("orders", ["8081", "9000/grpc"], service_port=80)
    assert wanted.body["ports"] == {
        "http": {"port": 8081, "protocol": "http", "servicePort": 80},
        "grpc": {"port": 9000, "protocol": "grpc", "servicePort": 9000},
    }
    assert (wanted.id, wanted.check, wanted.interval) == ("127.0.0.1-8081", None, pytest.approx(10 / 3))
    assert registration.registration("orders", ["1"], address="::1", with_command=True).id == "::1-1"


def test_a_check_is_of_the_first_port_that_is_not_udp() -> None:
    both = registration.registration("dns", ["dns=5353/udp", "tcp=5300/tcp"], service_port=53, with_command=True)
    assert both.check is not None
    assert (both.check.text, both.port, both.id) == ("tcp", 5300, "127.0.0.1-5353")
    alone = registration.registration("dns", ["5353/udp"], service_port=53, with_command=True)
    assert alone.check is None
    assert registration.registration("dns", ["5353/udp"], check="cmd:true").check is not None


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"ports": []}, "--port"),
        ({"ports": ["x"]}, "--port"),
        ({"ports": ["=1"]}, "--port"),
        ({"ports": ["1/"]}, "--port"),
        ({"ports": ["1/quic"]}, "--port"),
        ({"ports": ["70000"]}, "--port"),
        ({"ports": ["1", "2"]}, "--port"),
        ({"service": "Orders"}, "SERVICE"),
        ({"address": "localhost"}, "--address"),
        ({"ttl": "0s"}, "--ttl"),
        ({"check": "ping"}, "--check"),
        ({"check": "cmd:"}, "--check"),
        ({"check": "cmd:'"}, "--check"),
        ({"check": "http:healthz"}, "--check"),
        ({"ports": ["53/udp"], "check": "tcp"}, "--check"),
        ({"ports": ["53/udp"], "check": "http:/"}, "--check"),
        ({"interval": "10s"}, "--interval"),
        ({"interval": "often"}, "--interval"),
    ],
)
def test_bad_options_name_the_option(options: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError) as bad:
        registration.registration(**{"service": "orders", "ports": ["8081"], **options})
    assert bad.value.where == where


async def test_checks(tmp_path: Path) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=int(request.match_info["status"]))

    app = web.Application()
    app.add_routes([web.get("/{status}", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    run = checks.run
    assert await run(TcpCheck(), "127.0.0.1", port, 5) == ""
    assert await run(HttpCheck("/204"), "127.0.0.1", port, 5) == ""
    assert await run(HttpCheck("/302"), "127.0.0.1", port, 5) == ""
    assert "500" in await run(HttpCheck("/500"), "127.0.0.1", port, 5)
    await runner.cleanup()
    assert "refused" in (await run(TcpCheck(), "127.0.0.1", port, 5)).lower()
    assert "http:/x" in await run(HttpCheck("/x"), "127.0.0.1", port, 5)
    assert checks.parse("cmd:sh -c 'exit 0'") == CmdCheck(("sh", "-c", "exit 0"))
    assert await run(CmdCheck(("true",)), "127.0.0.1", port, 5) == ""
    assert "3" in await run(CmdCheck(("sh", "-c", "exit 3")), "127.0.0.1", port, 5)
    assert "/no/such" in await run(CmdCheck(("/no/such",)), "127.0.0.1", port, 5)


async def test_a_check_that_hangs_ends_with_all_it_started(tmp_path: Path) -> None:
    fifo = tmp_path / "held"
    os.mkfifo(fifo)
    end = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    script = f"sleep 600 >{fifo} & wait"
    assert "no answer" in await checks.run(CmdCheck(("sh", "-c", script)), "127.0.0.1", 1, 0.5)
    held = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().add_reader(end, lambda: held.done() or held.set_result(os.read(end, 1)))
    async with asyncio.timeout(5):
        assert await held == b"", "the writer's end is closed: the sleep is gone"
    asyncio.get_running_loop().remove_reader(end)
    os.close(end)


async def test_a_server_that_never_answers_fails_in_time() -> None:
    held: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda reader, writer: held.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    assert "no answer in 0.1 s" in await checks.run(HttpCheck("/"), "127.0.0.1", port, 0.1)
    silent.close()
    for writer in held:
        writer.close()
        await writer.wait_closed()
