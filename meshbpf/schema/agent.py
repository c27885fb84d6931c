"""Kind `Agent`: how the node process is set up. Relative paths are relative to the file that names them."""

from __future__ import annotations

import dataclasses
import ipaddress
import posixpath
from dataclasses import dataclass

from meshbpf.model import (
    AccessLogSettings,
    AdminSettings,
    Agent,
    EmbeddedRegistry,
    HttpRegistry,
    MapSizes,
    ProxySettings,
)
from meshbpf.schema import addresses
from meshbpf.schema.fields import Fields
from meshbpf.schema.words import meant
from meshbpf.yamlpos import Mark

_DEFAULT = Agent()
_LARGEST_MAP = 1 << 24
_MOST_WORKERS = 256


@dataclass(frozen=True, slots=True)
class AgentDocument:
    """`registry` says that one is configured, even if its fields were refused: then services may be unknown here."""

    agent: Agent
    at: Mark
    registry: bool


def read(document: Fields, at: Mark) -> AgentDocument:
    spec = document.below("spec")
    agent = Agent(
        registries=_registries(spec),
        address_pool=_pool(spec),
        proxy=_proxy(spec.below("proxy")),
        admin=AdminSettings(listen=_listen(spec.below("admin"), _DEFAULT.admin.listen)),
        acceleration=spec.word("acceleration", _DEFAULT.acceleration),
        access_log=_access_log(spec.below("accessLog")),
        maps=_maps(spec.below("maps")),
    )
    _same_port(spec, agent)
    return AgentDocument(agent, at, registry=spec.has("registries") and bool(spec.value("registries")))


def _registries(spec: Fields) -> tuple[EmbeddedRegistry | HttpRegistry, ...]:
    found: list[EmbeddedRegistry | HttpRegistry] = []
    first: dict[str, str] = {}  # what there may be once → where it is
    for item in spec.mappings("registries"):
        kinds = item.keys()
        if len(kinds) != 1:
            item.report.add(item.at, f"{item.path} must name one registry, for example embedded: {{}}")
            for key in kinds:
                item.value(key)  # one fault: fields of a registry that stand beside its name are not unknown as well
        for kind in ("embedded", "http"):
            item.value(kind)  # known, also where it is not
        if "embedded" in kinds:
            found.append(_embedded(item.below("embedded")))
            _once("an embedded registry", item, first)
        if "http" in kinds and (registry := _http(item.below("http"))) is not None:
            found.append(registry)
            _once(f"the registry at {registry.url}", item, first)
    return tuple(found)


def _once(what: str, item: Fields, first: dict[str, str]) -> None:
    if (before := first.setdefault(what, item.path)) != item.path:
        item.report.add(item.at, f"{item.path} is {what}, and so is {before}: remove one")


def _embedded(fields: Fields) -> EmbeddedRegistry:
    default = EmbeddedRegistry()
    listen = _listen(fields, default.listen)
    loopback = addresses.is_loopback(addresses.split(listen)[0])
    token_file = _path(fields, "tokenFile", default.token_file)
    if not loopback and not token_file:
        remedy = "set tokenFile, or listen on 127.0.0.1"
        fields.report.add(fields.where("listen"), f"{fields.name('listen')} {listen} is not loopback: {remedy}")
    return EmbeddedRegistry(
        listen=listen,
        store=_path(fields, "store", default.store),
        token_file=token_file,
        # Off loopback other machines write, and their 127.0.0.1 is not ours: only when asked for (INTERFACE).
        allow_loopback=fields.flag("allowLoopback", default.allow_loopback if loopback else False),
    )


def _http(fields: Fields) -> HttpRegistry | None:
    """None when there is no usable URL, which is reported."""
    default = HttpRegistry("")
    registry = HttpRegistry(
        url=_url(fields),
        token_file=_path(fields, "tokenFile", default.token_file),
        allow_loopback=fields.flag("allowLoopback", default.allow_loopback),
    )
    return registry if registry.url else None


def _url(fields: Fields) -> str:
    """Its one spelling; empty when it is wrong, which is reported. It names the source in `status`, so it has no path
    and no password.
    """
    expected = "http://ADDRESS:PORT of another agent's embedded registry"
    if not fields.required("url", expected) or not isinstance(fields.value("url"), str):
        fields.text("url")  # says that it is none
        return ""
    text = fields.text("url")
    scheme, _, place = text.partition("://")
    try:
        host, port = addresses.split(place.removesuffix("/"))
    except ValueError:
        fields.wrong("url", f"{expected} (names are not resolved, IPv6 stands in brackets)")
        return ""
    if scheme.lower() != "http":
        fields.wrong("url", f"{expected}, which speaks plain HTTP")
    elif why := addresses.unusable(host):
        fields.wrong("url", f"{expected}: {host} is {why}")
    else:
        return f"http://{addresses.joined(host, port)}"
    return ""


def _proxy(fields: Fields) -> ProxySettings:
    default = _DEFAULT.proxy
    listen = _listen(fields, default.listen)
    if addresses.split(listen)[0] != addresses.split(default.listen)[0]:
        # connect() is rewritten to loopback in the caller's namespace; a listener elsewhere would never be called.
        fields.wrong("listen", "127.0.0.1:PORT, which calls are sent to in every network namespace")
        listen = default.listen
    return ProxySettings(
        listen=listen,
        workers=fields.whole("workers", default.workers, 1, _MOST_WORKERS),
        drain=fields.duration("drain", default.drain),
    )


def _access_log(fields: Fields) -> AccessLogSettings:
    default = _DEFAULT.access_log
    form = fields.text("format", default.format)
    if form not in ("json", "text"):
        fields.wrong("format", "one of json, text")
        form = default.format
    return AccessLogSettings(format=form, path=_path(fields, "path", default.path))


def _maps(fields: Fields) -> MapSizes:
    sizes = {
        size.name: fields.whole(size.name, getattr(_DEFAULT.maps, size.name), 1, _LARGEST_MAP)
        for size in dataclasses.fields(MapSizes)
    }
    return MapSizes(**sizes)


def _listen(fields: Fields, default: str) -> str:
    text = fields.text("listen", default)
    try:
        return addresses.joined(*addresses.split(text))
    except ValueError as error:
        fields.wrong("listen", str(error))
        return default


def _path(fields: Fields, key: str, default: str) -> str:
    text = fields.text(key, default)
    if fields.has(key) and (not text or "\0" in text):
        fields.wrong(key, "a path")
        return default
    return text if text == default else posixpath.join(posixpath.dirname(fields.at.file), text)


def _pool(spec: Fields) -> str:
    text = spec.text("addressPool", _DEFAULT.address_pool)
    try:
        network = ipaddress.ip_network(text)
    except ValueError:
        spec.wrong("addressPool", f"a network like {_DEFAULT.address_pool}{_without_host_bits(text)}")
        return _DEFAULT.address_pool
    if network.num_addresses < 4:
        spec.wrong("addressPool", "a network of at least 4 addresses")
    elif any(network.overlaps(bad) for bad in _NO_POOL if bad.version == network.version):
        spec.wrong("addressPool", "without 127.0.0.1, link-local, multicast and unspecified addresses")
    else:
        return str(network)
    return _DEFAULT.address_pool


_NO_POOL = [
    ipaddress.ip_network(text)
    for text in ("0.0.0.0/8", "127.0.0.1/32", "169.254.0.0/16", "224.0.0.0/3", "::/127", "fe80::/10", "ff00::/8")
]


def _without_host_bits(text: str) -> str:
    try:
        return f" ({meant(text, [str(ipaddress.ip_network(text, strict=False))])})"
    except ValueError:
        return ""


def _same_port(spec: Fields, agent: Agent) -> None:
    """Our own listeners must not take each other's port."""
    seen: list[tuple[str, str, int]] = []
    for field, host, port in addresses.listeners(agent):
        for other, other_host, other_port in seen:
            if port == other_port and (host == other_host or {"0.0.0.0", "::"} & {host, other_host}):
                where = spec.where(field.split(".", maxsplit=1)[0])
                message = f"spec.{field} and spec.{other} are both on port {port}: give one another port"
                spec.report.add(where, message)
        seen.append((field, host, port))
