"""The registry over HTTP: JSON in, JSON out, and who may ask at all. Decides nothing about leases.

Mounted twice: on the embedded listener (`application`), and among the routes of the agent's unix socket
(`routes(registrar, local=True)` with `middlewares()`).

| request | answers |
|---|---|
| PUT /v1/services/S/instances/ID | 201 new, 200 renewed, with the lease · 400 bad · 413 over 64 KiB · 429 no room |
| PUT …/ID/heartbeat | 204 · 404 the lease has ended: register again |
| DELETE …/ID | 204 · 404 there is none |
| GET /v1/services[?wait=30s&generation=N] | 200 everything |
| GET /v1/services/S[?wait=30s&generation=N] | 200 its instances · 404 it has none (`generation` tells since when) |

Always: 401 without the token where one is set, 403 for a foreign `Host` or any `Origin`. S is `name` or
`name.namespace`. With `wait`, a GET answers when the generation is no longer N (default: what it is now), after `wait`,
or after 60 s; 429 when too many wait. Errors are `{"error", "field"}`.

Host and Origin stand against browsers: a page may make its own name resolve to 127.0.0.1 (then Host is its name) and
may send requests to us (then there is an Origin). No program that registers services sends an Origin.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from http import HTTPStatus
from typing import Any

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from meshbpf import durations
from meshbpf.registry.instance import Refusal, ServiceId, parse_service
from meshbpf.registry.leases import MAX_GENERATION, Lease, NoRoom
from meshbpf.registry.registrar import Registrar

MAX_BODY = 64 * 1024
BODY_SECONDS = 10.0
MAX_WAIT = 60.0
MAX_WAITERS = 256
SCHEMA_VERSION = 1


def routes(registrar: Registrar, local: bool = False) -> list[web.RouteDef]:
    """`local`: whoever reaches these routes is on this machine, so 127.0.0.1 is the same to both (the unix socket)."""
    api = _Api(registrar, local)
    one = "/v1/services/{service}/instances/{id}"
    return [
        web.put(one, api.put),
        web.put(one + "/heartbeat", api.heartbeat),
        web.delete(one, api.delete),
        web.get("/v1/services", api.everything, allow_head=False),
        web.get("/v1/services/{service}", api.service, allow_head=False),
    ]


def middlewares(host: str | None = None, token: str = "") -> list[Middleware]:
    """What every request passes. `host`: the address listened on; None for a unix socket, whose Host says nothing."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if hdrs.ORIGIN in request.headers:
            return _error(HTTPStatus.FORBIDDEN, "requests from web pages are refused", hdrs.ORIGIN)
        if host is not None and not _host_allowed(request, host):
            return _error(HTTPStatus.FORBIDDEN, "is neither a loopback name nor the configured address", hdrs.HOST)
        if token and not _token_right(request, token):
            answer = _error(HTTPStatus.UNAUTHORIZED, "the bearer token is missing or wrong", hdrs.AUTHORIZATION)
            answer.headers[hdrs.WWW_AUTHENTICATE] = "Bearer"
            return answer
        return await handler(request)

    return [_errors_as_json, guard]


def application(registrar: Registrar, host: str, token: str = "") -> web.Application:
    """The app of the TCP listener. Whether loopback addresses are allowed is in `registrar.rules`."""
    app = web.Application(middlewares=middlewares(host, token))
    app.add_routes(routes(registrar))
    return app


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:  # aiohttp's own 404, 405, 413
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        answer = _error(HTTPStatus(error.status), error.reason, "path")
        if hdrs.ALLOW in error.headers:
            answer.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        return answer


class _Api:
    def __init__(self, registrar: Registrar, local: bool) -> None:
        self._registrar = registrar
        self._local = local

    async def put(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if isinstance(body, web.Response):
            return body
        service, id = request.match_info["service"], request.match_info["id"]
        written = await self._registrar.put(service, id, body, self._local)
        if isinstance(written, NoRoom):
            return _error(HTTPStatus.TOO_MANY_REQUESTS, written.message, written.field)
        if isinstance(written, Refusal):
            return _error(HTTPStatus.BAD_REQUEST, written.message, written.field)
        identity = written.lease.instance.service
        answer = {
            **_names(identity),
            "generation": self._registrar.generation(identity),
            "durable": written.durable,
            "lease": self._lease(written.lease),
        }
        return _answer(HTTPStatus.CREATED if written.created else HTTPStatus.OK, answer)

    async def heartbeat(self, request: web.Request) -> web.Response:
        service = _service(request)
        if isinstance(service, web.Response):
            return service
        if await self._registrar.heartbeat(service, request.match_info["id"]):
            return web.Response(status=HTTPStatus.NO_CONTENT)
        return _error(HTTPStatus.NOT_FOUND, "no such lease, or it has ended: register again", "id")

    async def delete(self, request: web.Request) -> web.Response:
        service = _service(request)
        if isinstance(service, web.Response):
            return service
        if await self._registrar.delete(service, request.match_info["id"]):
            return web.Response(status=HTTPStatus.NO_CONTENT)
        return _error(HTTPStatus.NOT_FOUND, "no such instance", "id")

    async def everything(self, request: web.Request) -> web.Response:
        if refused := await self._wait(request, None):
            return refused
        leases = self._registrar.leases
        answer = {
            "generation": leases.generation,
            "problem": self._registrar.problem,
            "services": [self._entry(service) for service in leases.services()],
        }
        return _answer(HTTPStatus.OK, answer)

    async def service(self, request: web.Request) -> web.Response:
        service = _service(request)
        if isinstance(service, web.Response):
            return service
        if refused := await self._wait(request, service):
            return refused
        entry = self._entry(service)
        if not entry["instances"]:
            gone = {"error": f"{entry['service']} has no instances", "field": "service", **entry}
            return _answer(HTTPStatus.NOT_FOUND, gone)
        return _answer(HTTPStatus.OK, entry)

    async def _wait(self, request: web.Request, service: ServiceId | None) -> web.Response | None:
        text = request.query.get("wait")
        if text is None:
            return None
        try:
            seconds = min(durations.parse(text), MAX_WAIT)
        except ValueError as error:
            return _error(HTTPStatus.BAD_REQUEST, str(error), "wait")
        known = request.query.get("generation", str(self._registrar.generation(service)))
        if not known.isascii() or not known.isdigit() or len(known) > 16 or int(known) > MAX_GENERATION:
            return _error(HTTPStatus.BAD_REQUEST, "must be the generation of an earlier answer", "generation")
        if self._registrar.waiting >= MAX_WAITERS:
            return _error(HTTPStatus.TOO_MANY_REQUESTS, f"{MAX_WAITERS} others wait already", "wait")
        await self._registrar.wait(service, int(known), seconds)
        return None

    def _entry(self, service: ServiceId) -> dict[str, Any]:
        leases = self._registrar.leases.of(service)
        return {
            **_names(service),
            "generation": self._registrar.generation(service),
            "instances": [self._lease(lease) for lease in leases],
        }

    def _lease(self, lease: Lease) -> dict[str, Any]:
        left = max(0, round((lease.deadline - self._registrar.now) * 1000))
        return {"id": lease.instance.id, **lease.instance.body(), "expiresInMs": left}


def _names(service: ServiceId) -> dict[str, str]:
    name, namespace = service
    return {"service": name if namespace == "default" else f"{name}.{namespace}", "name": name, "namespace": namespace}


def _service(request: web.Request) -> ServiceId | web.Response:
    service = parse_service(request.match_info["service"])
    if isinstance(service, Refusal):
        return _error(HTTPStatus.BAD_REQUEST, service.message, service.field)
    return service


async def _body(request: web.Request) -> Any:
    """The parsed JSON, or the Response that says why not. Limited here: the app we are mounted on may allow more."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.content.iter_any():
                data += chunk
                if len(data) > MAX_BODY:
                    return _error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"must be at most {MAX_BODY} bytes", "body")
    except TimeoutError:
        return _error(HTTPStatus.REQUEST_TIMEOUT, f"did not arrive within {BODY_SECONDS:.0f} s", "body")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        return _error(HTTPStatus.BAD_REQUEST, f"is no JSON: {type(error).__name__}: {error}", "body")


def _host_allowed(request: web.Request, configured: str) -> bool:
    hosts = request.headers.getall(hdrs.HOST, [])
    if len(hosts) != 1:
        return False
    host = hosts[0].lower()
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if host in ("localhost", configured.lower()):
        return True
    try:
        address = ipaddress.ip_address(host)
        wildcard = ipaddress.ip_address(configured).is_unspecified
    except ValueError:
        return False
    if address.is_loopback:
        return True
    # Listening everywhere: the address this connection came in on is the configured one.
    sockname = request.transport.get_extra_info("sockname") if request.transport else None
    return wildcard and sockname is not None and str(address) == sockname[0]


def _token_right(request: web.Request, token: str) -> bool:
    scheme, _, given = request.headers.get(hdrs.AUTHORIZATION, "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), token.encode())


def _answer(status: HTTPStatus, body: dict[str, Any]) -> web.Response:
    return web.json_response({"schemaVersion": SCHEMA_VERSION, **body}, status=status)


def _error(status: HTTPStatus, message: str, field: str) -> web.Response:
    return _answer(status, {"error": message, "field": field})
