"""A proxy on a loopback port, with an injected origin, callers made of raw bytes, and endpoints that do as scripted."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import TypeVar

import httptools

from meshbpf.model import Endpoint as MeshEndpoint
from meshbpf.model import Mesh, Port, Protocol, Service, ServicePolicy
from meshbpf.record import Record
from userspace_proxy.acceleration import Accelerator
from userspace_proxy.limits import DEFAULT_LIMITS, Limits
from userspace_proxy.origin import Origin
from userspace_proxy.route import Route
from userspace_proxy.server import Proxy
from userspace_proxy.stats import Stats

ADDRESS, PORT, NETNS = "127.96.0.10", 80, 7
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
PATIENCE = 5.0
_ID = re.compile(rb"x-request-id: [0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}\r\n")
_LINE = re.compile(rb"(?m)^[A-Z]+ \S+ HTTP/1\.1\r\n")
T = TypeVar("T")


async def soon(work: Awaitable[T], patience: float = PATIENCE) -> T:
    """`work`, or a test that fails instead of hanging."""
    async with asyncio.timeout(patience):
        return await work


def plain(sent: bytes) -> bytes:
    """What an endpoint received, without the made-up request ids."""
    return _ID.sub(b"", sent)


class Peer:
    """One end of a connection, for tests: raw bytes in and out."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.seen = b""  # all that was read by `until` and `head`

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read(self, size: int) -> bytes:
        return await soon(self.reader.readexactly(size))

    async def until(self, end: bytes) -> bytes:
        """All bytes up to and with `end`."""
        data = await soon(self.reader.readuntil(end))
        self.seen += data
        return data

    async def head(self) -> bytes:
        return await self.until(b"\r\n\r\n")

    async def rest(self) -> bytes:
        """All bytes until the other side ends; ConnectionResetError when it resets."""
        return await soon(self.reader.read())

    async def answer(self, head_only: bool = False) -> tuple[int, bytes, bytes]:
        """One final answer: status, head, body as framed on the wire (chunks are not taken apart)."""
        head = await self.head()
        status = int(head[9:12])
        if head_only or status in (204, 304) or status < 200:
            return status, head, b""
        if (length := re.search(rb"(?i)content-length: (\d+)", head)) is not None:
            return status, head, await self.read(int(length[1]))
        if b"transfer-encoding: chunked" in head.lower():
            return status, head, await self.until(b"0\r\n\r\n")
        return status, head, await self.rest()

    async def ask(self, data: bytes, head_only: bool = False) -> tuple[int, bytes, bytes]:
        self.send(data)
        return await self.answer(head_only)

    def end(self) -> None:
        """FIN."""
        self.writer.write_eof()

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


Talk = Callable[[Peer], Awaitable[None]]


class Endpoint:
    """An endpoint on a loopback port. `talk` is run for every connection; `peers` are those accepted so far."""

    def __init__(self, talk: Talk | None) -> None:
        self._talk = talk or polite
        self._server: asyncio.Server | None = None
        self.accepted: asyncio.Queue[Peer] = asyncio.Queue()
        self.peers: list[Peer] = []
        self.received = bytearray()  # of all connections, as far as `polite` read it
        self.port = 0
        self.broken: list[BaseException] = []

    async def start(self) -> Endpoint:
        self._server = await asyncio.start_server(self._run, "127.0.0.1", 0, limit=2**20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def _run(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        peer.endpoint = self  # type: ignore[attr-defined]
        self.peers.append(peer)
        self.accepted.put_nowait(peer)
        try:
            await self._talk(peer)
        except (ConnectionError, asyncio.IncompleteReadError):
            writer.transport.abort()  # the proxy broke off: some tests want just that
        except Exception as error:
            self.broken.append(error)
            writer.transport.abort()
            raise

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for peer in self.peers:
            peer.writer.transport.abort()


class _Requests:
    """Counts complete requests in a byte stream."""

    def __init__(self) -> None:
        self.complete = 0

    def on_message_complete(self) -> None:
        self.complete += 1


async def never() -> None:
    await asyncio.get_running_loop().create_future()


async def silent(peer: Peer) -> None:
    """Takes the connection, and does nothing with it."""
    await never()


async def polite(peer: Peer) -> None:
    """Answers every complete request with OK, and notes all bytes that came."""
    count = _Requests()
    parser = httptools.HttpRequestParser(count)
    endpoint: Endpoint = peer.endpoint  # type: ignore[attr-defined]
    answered = 0
    while data := await peer.reader.read(2**18):
        endpoint.received += data
        parser.feed_data(_LINE.sub(b"POST / HTTP/1.1\r\n", data))  # llhttp knows few methods, and no raw UTF-8
        while answered < count.complete:
            answered += 1
            peer.send(OK)
    peer.writer.close()


def script(*answers: bytes, close: bool = False) -> Talk:
    """Answers each request (without body) of a connection with the next of `answers`, then maybe closes."""

    async def talk(peer: Peer) -> None:
        for answer in answers:
            await peer.head()
            peer.send(answer)
        if close:
            peer.writer.close()
        else:
            await peer.reader.read()

    return talk


class Bed:
    """Endpoints, a mesh of one service (`orders`, HTTP), a proxy, callers; every record it wrote in `records`."""

    def __init__(self) -> None:
        self.records: asyncio.Queue[Record] = asyncio.Queue()
        self.origin: Origin | None = Origin(ADDRESS, PORT, "shop.service", NETNS)
        self.stats = Stats()
        self.proxy: Proxy = None  # type: ignore[assignment]
        self.port = 0
        self._endpoints: list[Endpoint] = []
        self._callers: list[Peer] = []
        self.service = Service("orders")

    async def endpoint(self, talk: Talk | None = None) -> Endpoint:
        endpoint = await Endpoint(talk).start()
        self._endpoints.append(endpoint)
        return endpoint

    def mesh(
        self, *endpoints: Endpoint | int, policy: ServicePolicy | None = None, protocol: Protocol = Protocol.HTTP
    ) -> Mesh:
        ports = [each if isinstance(each, int) else each.port for each in endpoints]
        self.service = Service(
            "orders",
            addresses=(ADDRESS,),
            ports=(Port("main", PORT, protocol),),
            endpoints=tuple(MeshEndpoint("127.0.0.1", {"main": port}) for port in ports),
        )
        return Mesh(services=(self.service,), policies={} if policy is None else {self.service.id: policy})

    async def serve(
        self,
        *endpoints: Endpoint | int,
        policy: ServicePolicy | None = None,
        limits: Limits = DEFAULT_LIMITS,
        accelerator: Accelerator | None = None,
        protocol: Protocol = Protocol.HTTP,
    ) -> Proxy:
        """Start the proxy in front of `endpoints`."""
        self.proxy = Proxy(
            lookup=lambda _netns, _address, _port: self.origin,
            sink=self.records.put_nowait,
            make_socket=lambda _netns, family: socket.socket(family, socket.SOCK_STREAM),
            stats=self.stats,
            limits=limits,
            accelerator=accelerator,
        )
        mesh = self.mesh(*endpoints, policy=policy, protocol=protocol)
        self.stats.adopt(mesh, 0.0)
        self.proxy.use(mesh)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.listen(128)
            self.port = sock.getsockname()[1]
            self.proxy.listen(NETNS, sock)
        return self.proxy

    async def caller(self, receive_buffer: int = 0) -> Peer:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        limit = receive_buffer or 2**20
        peer = Peer(*await asyncio.open_connection(sock=sock, limit=limit))
        self._callers.append(peer)
        return peer

    async def record(self) -> Record:
        return await soon(self.records.get())

    @property
    def route(self) -> Route:
        return self.proxy.table.by_address[(ADDRESS, PORT)]

    async def settle(self, condition: Callable[[], bool]) -> None:
        """Let the loop turn until `condition` holds: for what is seen only inside the proxy."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                await asyncio.sleep(0)

    async def close(self) -> None:
        for caller in self._callers:
            caller.writer.transport.abort()
        for endpoint in self._endpoints:
            await endpoint.close()
        if self.proxy is not None:
            await self.proxy.drain(0.0)
            assert self.route.in_flight[0] == 0
            await self.settle(lambda: self.route.pool.pending == 0)  # a dial that was under way
            assert all(target.active == 0 for target in self.route.targets)
        broken = [error for endpoint in self._endpoints for error in endpoint.broken]
        assert not broken, broken
