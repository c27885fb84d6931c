"""docs/configuration.md is complete: every field with its default, everything refused, and nothing left over."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

from meshbpf import durations
from meshbpf.accesslog_format import KEYS, Seconds, text_line
from meshbpf.model import Agent, EmbeddedRegistry, Endpoint, HttpRegistry, Port, Service, ServicePolicy
from meshbpf.record import Record
from meshbpf.schema import later, parse

NUMBERS = (
    "response_code", "bytes_received", "bytes_sent", "duration_ms", "upstream_service_time_ms", "attempts",
)  # fmt: skip
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "configuration.md").read_text()
SECTIONS = {part.partition("\n")[0]: part for part in TEXT.split("\n## ")}
ROW = re.compile(r"^\| `([^`]+)` \| (.+?) \|", re.M)
REQUIRED, NONE = "required", "none"


def rows(section: str) -> dict[str, str]:
    return dict(ROW.findall(SECTIONS[section]))


def key(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.capitalize() for word in rest)


def shown(name: str, value: object) -> str:
    match value:
        case bool():
            return f"`{str(value).lower()}`"
        case float() if name != "sample_percent":
            return f"`{durations.render(value)}`"
        case StrEnum() | int() | float():
            return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"
        case str() if value:
            return f"`{value}`"
    return NONE


def fields(path: str, value: Any, leave: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(path in YAML, default as the page writes it) of every field of a model value, and below."""
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if field.name in leave:
            continue
        if dataclasses.is_dataclass(inner):
            yield from fields(f"{path}.{key(field.name)}", inner, CONCLUDED)
        else:
            yield f"{path}.{key(field.name)}", shown(field.name, inner)


METADATA = {"metadata.name": REQUIRED, "metadata.namespace": "`default`", "metadata.labels": NONE}
OURS = ("name", "namespace", "labels", "source", "state")
CONCLUDED = ("limits_direct",)  # from what else is given
EXPECTED: Mapping[str, Mapping[str, str]] = {
    "Agent": {
        **dict(fields("spec", Agent())),
        **dict(fields("spec.registries[].embedded", EmbeddedRegistry())),
        **dict(fields("spec.registries[].http", HttpRegistry(""))),
        "spec.registries[].http.url": REQUIRED,
    },
    "Service": {
        **METADATA,
        **dict(fields("spec", Service(""), OURS)),
        **dict(fields("spec.ports[]", Port("", 0))),
        **dict(fields("spec.endpoints[]", Endpoint("", {}), ("state", "source"))),
        "spec.addresses": "one of the pool",
        **dict.fromkeys(("spec.ports", "spec.ports[].name", "spec.ports[].port"), REQUIRED),
        **dict.fromkeys(("spec.endpoints[].address", "spec.endpoints[].ports"), REQUIRED),
    },
    "ServicePolicy": {**METADATA, **dict(fields("spec", ServicePolicy(), OURS)), "spec.service": REQUIRED},
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_field_is_documented_with_its_default(kind: str) -> None:
    assert rows(kind) == EXPECTED[kind]


def test_everything_refused_is_documented() -> None:
    expected = {f"kind: {kind}": what for kind, what in later.KINDS.items()} | later.FIELDS
    assert rows("Refused in this version") == expected


def test_the_examples_are_valid_together() -> None:
    """An example for each kind that a first configuration has, as it may be copied."""
    examples = re.findall(r"^```yaml\n(.*?)^```", TEXT, re.M | re.S)
    parsed = parse([(f"example {place}", text) for place, text in enumerate(examples)])
    assert parsed.services and parsed.agent not in (None, Agent())


def test_the_access_log_is_described_as_it_is_written() -> None:
    """Every key of the JSON record, in its order; and what Envoy's line has no place for."""
    page = SECTIONS["Agent"].partition("### The access log\n")[2].partition("\n### ")[0]
    listed = re.search(r"`(start_time[^`]*)`", page)
    assert listed and tuple(listed[1].split()) == KEYS
    line = re.search(r"^```\n(.*?)^```", page, re.M | re.S)
    assert line is not None
    shown = set(re.findall(r"[A-Z_]{4,}", line[1]))
    record = Record("a-service", 1e9, "a-workload", "a-remote")
    for key in KEYS:
        if key not in ("start_time", *NUMBERS):
            setattr(record, key, f"a-{key}")
    text = text_line(record, Seconds())
    assert {key.upper() for key in KEYS if f"a-{key}" in text} == shown - {
        key.upper() for key in ("start_time", *NUMBERS)
    }
    for key in ("service", "workload", "reason", "carrier", "response_code_details"):
        assert f"`{key}`" in page and f"a-{key}" not in text
