"""Model values ↔ plain JSON values, by their type hints: for the state file, the workers and `-o json`. Pure.

Covers what model.py uses: frozen dataclasses and unions of them, enums, tuples, mappings, optional values. Mapping
keys that are tuples (service identities) become `name.namespace`-like text joined by a slash, which is in no name.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from enum import Enum
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypeVar

from meshbpf.model import Mesh, Service

T = TypeVar("T")
Convert = Callable[[Any], Any]
_PLAIN = frozenset({str, int, float, bool})


def encode(value: Any) -> Any:
    return _encoder(typing.cast(Any, type(value)))(value)


def text(mesh: Mesh) -> str:
    """JSON of `encode(mesh)`; a service that is the same object as in the last mesh costs nothing."""
    rest = json.dumps(encode(dataclasses.replace(mesh, services=())))
    held = _texts[0] = _held(mesh)
    # No string of `rest` holds that: its quotes would be escaped.
    return rest.replace('"services": []', f'"services": [{",".join(text for _service, text in held.values())}]', 1)


def texts(mesh: Mesh) -> list[str]:
    """JSON of each service, in the mesh's order; they are remembered until `text` is asked for a mesh without them."""
    held = _held(mesh)
    _texts[0] = {**_texts[0], **held}
    return [text for _service, text in held.values()]


def _held(mesh: Mesh) -> dict[int, tuple[Service, str]]:
    """By id: who is remembered has not given its own to another."""
    last = _texts[0]
    return {id(service): last.get(id(service)) or (service, service_text(service)) for service in mesh.services}


_texts: list[dict[int, tuple[Service, str]]] = [{}]


def service_text(service: Service) -> str:
    """Its JSON, without what has the model's default: of hundreds of thousands of endpoints that is most."""
    return _brief.encode(service)


def _told(value: Any) -> dict[str, Any]:
    kind: Any = type(value)
    return _teller(kind)(value)


@cache
def _teller(kind: Any) -> Callable[[Any], dict[str, Any]]:
    """What a mapping says, or a dataclass with these fields that its defaults do not."""
    if issubclass(kind, Mapping):
        return dict
    known = dataclasses.fields(kind)
    names, read = _names(kind), attrgetter(*_names(kind))
    usual = [
        field.default if field.default_factory is dataclasses.MISSING else field.default_factory() for field in known
    ]
    return lambda value: {
        n: is_ for n, is_, was in zip(names, read(value), usual, strict=True) if is_ is not was and is_ != was
    }


_brief = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_told)


@cache
def _encoder(kind: Any) -> Convert:
    """How to encode values of this very type; found out once, since a mesh has hundreds of thousands of some."""
    if issubclass(kind, Enum):
        return lambda value: value.value
    if issubclass(kind, Mapping):
        return lambda value: {"/".join(k) if isinstance(k, tuple) else k: encode(v) for k, v in value.items()}
    if issubclass(kind, tuple | list):
        return lambda value: [encode(item) for item in value]
    if dataclasses.is_dataclass(kind):
        names = _names(typing.cast(Any, kind))

        def read(value: Any) -> dict[str, Any]:
            fields = [(name, getattr(value, name)) for name in names]
            return {name: field if type(field) in _PLAIN else encode(field) for name, field in fields}

        return read
    return _same


def decode(kind: type[T], data: Any) -> T:
    """The value of type `kind` that `encode` gave. Raises KeyError or ValueError for data of another shape."""
    return typing.cast(T, _decoder(typing.cast(Any, kind))(data))


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@cache
def _decoder(kind: Any) -> Convert:
    """How to read a value of this type; found out once per type, since a mesh has hundreds of thousands of some."""
    origin = typing.get_origin(kind)
    if origin is tuple:
        items = typing.get_args(kind)
        if len(items) == 2 and items[1] is Ellipsis:
            one = _decoder(items[0])
            return tuple if one is _same else lambda data: tuple([one(entry) for entry in data])
        several = [_decoder(item) for item in items]
        return lambda data: tuple([each(entry) for each, entry in zip(several, data, strict=True)])
    if origin is Mapping:
        key, value = typing.get_args(kind)
        pairs, inner = typing.get_origin(key) is tuple, _decoder(value)
        if not pairs and inner is _same:
            return lambda data: MappingProxyType(dict(data)) if data else _EMPTY
        return lambda data: MappingProxyType(
            {tuple(k.split("/")) if pairs else k: inner(entry) for k, entry in data.items()}
        )
    if origin in (typing.Union, types.UnionType):
        some = [k for k in typing.get_args(kind) if k is not type(None)]
        if len(some) > 1:
            return _one_of(some)
        one = _decoder(some[0])
        return lambda data: None if data is None else one(data)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _dataclass_decoder(kind)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind
    return _same


_EMPTY: Mapping[str, Any] = MappingProxyType({})


def _same(data: Any) -> Any:
    return data


def _one_of(kinds: list[Any]) -> Convert:
    """Of several dataclasses, the one that has just these fields."""
    by_fields = {frozenset(_names(kind)): _decoder(kind) for kind in kinds}
    return lambda data: by_fields[frozenset(data)](data)


def _dataclass_decoder(kind: type) -> Convert:
    hints = typing.get_type_hints(kind)
    known = {name: _decoder(hints[name]) for name in _names(kind)}
    special = [(name, convert) for name, convert in known.items() if convert is not _same]

    def read(data: Any) -> Any:
        values = dict(data)
        if not values.keys() <= known.keys():
            raise KeyError(*(values.keys() - known.keys()))
        for name, convert in special:
            if name in values:
                values[name] = convert(values[name])
        return kind(**values)

    return read
