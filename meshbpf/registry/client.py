"""Talk to a registry: the agent's unix socket, or a registry's URL. One method per request, errors that say more.

Foreign errors end here: `RegistryAway` is worth another try, `RegistryRefused` is not, unless `passing` says so. An
ended lease is no error but a False, because whoever keeps a lease alive must expect it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import aiohttp

from meshbpf.errors import MeshError, NotFound

TIMEOUT = 5.0  # seconds per request; a wait adds its own


class RegistryAway(MeshError):
    """Nobody answers: the agent is stopped, restarting, or its socket is not ours to open."""


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
            connector = aiohttp.TCPConnector(force_close=True)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
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
        timeout = aiohttp.ClientTimeout(total=self._timeout + longer)
        try:
            # No redirects: a registry has none, and following one would carry the token elsewhere.
            async with self._session.request(
                method, self._base + path, data=data, timeout=timeout, allow_redirects=False
            ) as response:
                text = await response.text()
                status = response.status
        except TimeoutError as error:
            raise RegistryAway(
                f"the registry at {self.where} did not answer in {self._timeout + longer:g} s"
            ) from error
        except (aiohttp.ClientError, OSError, UnicodeDecodeError) as error:
            raise RegistryAway(f"cannot reach the registry at {self.where}: {error}") from error
        answer = _object(text)
        if 200 <= status < 300 or (status == 404 and missing_is_fine and "error" in answer):
            return status, answer
        if "error" in answer:
            raise RegistryRefused(status, str(answer.get("field", "")), str(answer["error"]))
        # Something else answers there, or an agent without these routes.
        raise RegistryRefused(status, "", f"{self.where} answered {status}: {text[:200]!r}")


def _object(text: str) -> dict[str, Any]:
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
