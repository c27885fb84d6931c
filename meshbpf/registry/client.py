"""Talk to a registry: the agent's unix socket, or a registry's URL. One method per request, errors that say more.

Foreign errors end here: `RegistryAway` is worth another try, `RegistryRefused` is not, unless `passing` says so. An
ended lease is no error but a False, because whoever keeps a lease alive must expect it.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp

from meshbpf.errors import MeshError, NotFound

TIMEOUT = 5.0  # seconds per request; a wait adds its own
CONNECT_TIMEOUT = 2.0
MAX_ANSWER = 32 * 1024 * 1024  # bytes; a hundred times what a full registry says in common cases
LARGE = 256 * 1024  # bytes: from here on reading takes an event loop too long


class RegistryAway(MeshError):
    """Nobody answers: the agent is stopped, restarting, or its socket is not ours to open."""


class RegistryUnreached(RegistryAway):
    """There was no connection: what was asked cannot have been heard."""


class RegistryRefused(MeshError):
    """The registry understood and said no. `field` is what it objects to; `passing` whether time may heal it."""

    def __init__(self, status: int, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.status = status
        self.field = field

    @property
    def passing(self) -> bool:
        return self.status in (408, 429) or self.status >= 500


class RegistryClient:
    """`async with RegistryClient(unix="/run/meshbpf/default/agent.sock")`, or `url="http://127.0.0.1:15010"`."""

    def __init__(self, unix: str | Path = "", url: str = "", token: str = "", timeout: float = TIMEOUT) -> None:
        if bool(unix) == bool(url):
            raise ValueError("give either the agent's socket or a registry's URL")
        self.where = str(unix or url)
        self._base = "http://localhost" if unix else url.rstrip("/")
        self._unix = str(unix)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._timeout = timeout
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # A connection per request: requests are seconds apart, and a kept one would break with every agent restart.
        connector: aiohttp.BaseConnector
        if self._unix:
            connector = aiohttp.UnixConnector(self._unix, force_close=True)
        else:
            connector = aiohttp.TCPConnector(force_close=True, socket_factory=_lively)
        # Not compressed: then the size of an answer is what comes over the wire.
        headers = {"Accept-Encoding": "identity", **self._headers}
        self._session = aiohttp.ClientSession(connector=connector, headers=headers, auto_decompress=False)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def put(self, service: str, id: str, body: Mapping[str, Any]) -> bool:
        """Register (True) or renew (False)."""
        status, _ = await self._ask("PUT", _path(service, id), body=body)
        return status == 201

    async def heartbeat(self, service: str, id: str) -> bool:
        """Renew; False when the lease has ended and must be put again."""
        status, _ = await self._ask("PUT", _path(service, id) + "/heartbeat", missing_is_fine=True)
        return status != 404

    async def delete(self, service: str, id: str) -> bool:
        """Take it out; False when it was not there."""
        status, _ = await self._ask("DELETE", _path(service, id), missing_is_fine=True)
        return status != 404

    async def services(self, wait: float = 0.0, generation: int | None = None) -> dict[str, Any]:
        """Everything; with `wait` seconds, once the generation is no longer `generation`."""
        _, answer = await self._ask("GET", "/v1/services" + _query(wait, generation), longer=wait)
        return answer

    async def instances(self, service: str, wait: float = 0.0, generation: int | None = None) -> dict[str, Any]:
        """One service. Raises NotFound when it has no instances."""
        path = f"/v1/services/{quote(service, safe='')}" + _query(wait, generation)
        status, answer = await self._ask("GET", path, longer=wait, missing_is_fine=True)
        if status == 404:
            raise NotFound(f"service {service} has no instances in the registry at {self.where}")
        return answer

    async def _ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        longer: float = 0.0,
        missing_is_fine: bool = False,
    ) -> tuple[int, dict[str, Any]]:
        if self._session is None:
            raise RuntimeError("use the client in `async with`")
        data = None if body is None else json.dumps(body).encode()
        timeout = aiohttp.ClientTimeout(total=self._timeout + longer, sock_connect=CONNECT_TIMEOUT)
        try:
            # No redirects: a registry has none, and following one would carry the token elsewhere.
            async with self._session.request(
                method, self._base + path, data=data, timeout=timeout, allow_redirects=False
            ) as response:
                status = response.status
                text = await self._body(response)
        except aiohttp.ConnectionTimeoutError as error:
            raise RegistryUnreached(
                f"cannot reach the registry at {self.where}: no connection within {CONNECT_TIMEOUT:g} s"
            ) from error
        except TimeoutError as error:
            raise RegistryAway(
                f"the registry at {self.where} did not answer in {self._timeout + longer:g} s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            away = RegistryUnreached if isinstance(error, aiohttp.ClientConnectorError) else RegistryAway
            raise away(f"cannot reach the registry at {self.where}: {_why(error)}") from error
        answer = _object(text) if len(text) < LARGE else await asyncio.to_thread(_object, text)
        if 200 <= status < 300 or (status == 404 and missing_is_fine and "error" in answer):
            return status, answer
        if "error" in answer:
            raise RegistryRefused(status, str(answer.get("field", "")), str(answer["error"]))
        # Something else answers there, or an agent without these routes.
        raise RegistryRefused(status, "", f"{self.where} answered {status}: {bytes(text[:200])!r}")

    async def _body(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER:
                most = f"more than {MAX_ANSWER >> 20} MiB"
                raise RegistryRefused(response.status, "", f"{self.where} answered {most}")
        return bytes(body)


def _lively(info: tuple[Any, ...]) -> socket.socket:
    """A socket that notices within seconds that the other machine is gone, also while we wait for its answer and send
    nothing: a machine that lost power says no goodbye.
    """
    made = socket.socket(*info[:3])
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 4000)
    return made


def _why(error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    said = " ".join(str(error).split()) or type(error).__name__  # aiohttp's go over several lines
    return os.strerror(number) if number and number > 0 else said


def _object(text: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return answer if isinstance(answer, dict) else {}


def _path(service: str, id: str) -> str:
    return f"/v1/services/{quote(service, safe='')}/instances/{quote(id, safe='')}"


def _query(wait: float, generation: int | None) -> str:
    if wait <= 0:
        return ""
    known = "" if generation is None else f"&generation={generation}"
    return f"?wait={round(min(wait, 60.0) * 1000)}ms{known}"
