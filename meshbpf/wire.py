"""Model values ↔ plain JSON values, by their type hints: for the state file, the workers and `-o json`. Pure.

Covers what model.py uses: frozen dataclasses, enums, tuples, mappings, optional values. Mapping keys that are tuples
(service identities) become `name.namespace`-like text joined by a slash, which no name can contain.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from enum import Enum
from functools import cache
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


def encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {"/".join(k) if isinstance(k, tuple) else k: encode(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(kind: type[T], data: Any) -> T:
    """The value of type `kind` that `encode` gave. Raises KeyError or ValueError for data of another shape."""
    return typing.cast(T, _decode(kind, data))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _decode(kind: Any, data: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is tuple:
        item = typing.get_args(kind)
        if len(item) == 2 and item[1] is Ellipsis:
            return tuple(_decode(item[0], entry) for entry in data)
        return tuple(_decode(each, entry) for each, entry in zip(item, data, strict=True))
    if origin is Mapping:
        key, value = typing.get_args(kind)
        pairs = typing.get_origin(key) is tuple
        return MappingProxyType({tuple(k.split("/")) if pairs else k: _decode(value, v) for k, v in data.items()})
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        return _decode(next(k for k in typing.get_args(kind) if k is not type(None)), data)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _decode(hints[name], entry) for name, entry in data.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(data)
    return data
