"""The quick readers say what the careful ones say, or nothing: held against each other on documents good and bad."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.model import Port, Protocol, Service
from meshbpf.schema import ConfigErrors, Parsed, _parse, addresses, jsontext, ordinary, parse, pieces
from meshbpf.yamlpos import Mark

ODD: list[Any] = [None, "", "x y", 0, -1, 1.5, True, [], {}, "off", 70_000, {"a": 1}, ["a"]]


BAD = ["169.254.1.1", "127.0.0.1", "01.2.3.4", "0.0.0.0", "::ffff:127.0.0.1", "224.0.0.1", "100.100.100.200"]


def rarely_odd(good: st.SearchStrategy[Any], odd: list[Any] = ODD) -> st.SearchStrategy[Any]:
    return st.integers(0, 39).flatmap(lambda n: st.sampled_from(odd) if n == 0 else good)


def mapping(needed: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy[Any]:
    whole = st.fixed_dictionaries(needed, optional=optional)
    lacking = st.fixed_dictionaries({}, optional={**needed, **optional, "more": st.just(1)})
    return st.integers(0, 29).flatmap(lambda n: lacking if n == 0 else whole)


names = rarely_odd(st.sampled_from(["main", "more", "a-1"]))
called = rarely_odd(st.sampled_from(["127.96.0.1", "127.96.0.2", "fd00::1", "FD00::2"]), [*ODD, *BAD])
hosts = rarely_odd(st.sampled_from(["192.0.2.3", "127.0.0.1", "198.51.100.7", "fd00::3", "FD00::4"]), [*ODD, *BAD])
numbers = rarely_odd(st.sampled_from([80, 81, 8080, 65535]), [*ODD, 15001])
texts = rarely_odd(st.sampled_from(["a", "zone b", "v1"]), [*ODD, "<<"])
labels = rarely_odd(st.dictionaries(rarely_odd(st.sampled_from(["team", "b"]), ["<<"]), texts, max_size=2))
endpoint = mapping(
    {
        "address": hosts,
        "ports": rarely_odd(st.dictionaries(st.sampled_from(["main", "more"]), numbers, min_size=1, max_size=2)),
    },
    {"weight": rarely_odd(st.integers(0, 10_000)), "zone": texts, "labels": labels},
)
port = mapping(
    {"name": st.sampled_from(["main", "more"]) | names, "port": numbers},
    {"protocol": rarely_odd(st.sampled_from(["http", "tcp", "grpc", "tls", "udp"]))},
)
document = mapping(
    {
        "apiVersion": st.just("meshbpf.io/v1"),
        "kind": rarely_odd(st.just("Service")),
        "metadata": mapping({"name": rarely_odd(st.sampled_from(["orders", "web", "cart"]))}, {"labels": labels}),
        "spec": mapping(
            {"ports": rarely_odd(st.lists(port, min_size=1, max_size=2))},
            {
                "addresses": rarely_odd(st.lists(called, max_size=2, unique_by=str)),
                "endpoints": st.lists(endpoint, max_size=3),
            },
        ),
    },
    {},
)


def outcome(texts: list[tuple[str, str]], quick: bool) -> Parsed | str:
    try:
        return _parse(texts, quick=quick)
    except ConfigErrors as errors:
        return str(errors)


def placeless(parsed: Parsed) -> list[Service]:
    return [
        replace(service, source="", endpoints=tuple(replace(e, source="") for e in service.endpoints))
        for service in parsed.services
    ]


def check_agreement(documents: list[Any]) -> None:
    for file, text in (
        ("a.yaml", yaml.safe_dump_all(documents)),
        ("a.json", "".join(f"---\n{json.dumps(document, indent=1)}\n" for document in documents)),
    ):
        quick, careful = outcome([(file, text)], True), outcome([(file, text)], False)
        if isinstance(careful, str):
            assert isinstance(quick, str), careful
            with pytest.raises(ConfigErrors) as caught:
                parse([(file, text)])
            assert str(caught.value) == careful
        else:
            assert isinstance(quick, Parsed), quick
            assert placeless(quick) == placeless(careful)
            if file == "a.yaml":
                assert quick == careful


@settings(max_examples=200, deadline=None)
@given(st.lists(document, min_size=1, max_size=3))
def test_quick_and_careful_readers_agree(documents: list[Any]) -> None:
    check_agreement(documents)


GOOD: dict[str, Any] = {
    "apiVersion": "meshbpf.io/v1", "kind": "Service", "metadata": {"name": "orders"},
    "spec": {
        "addresses": ["127.96.0.1"], "ports": [{"name": "main", "port": 80}],
        "endpoints": [{"address": "127.0.0.1", "ports": {"main": 8080}, "labels": {"v": "1"}}],
    },
}  # fmt: skip


def test_what_is_ordinary_is_read_quickly() -> None:
    """Else the comparison above compares the careful reader with itself."""
    assert ordinary.read(GOOD, Mark("f", 1, 1)) is not None
    for protocol in Protocol:
        ports = [{"name": "main", "port": 80, "protocol": str(protocol)}]
        quick = ordinary.read({**GOOD, "spec": {**GOOD["spec"], "ports": ports}}, Mark("f", 1, 1))
        assert quick is not None
        assert quick.service.ports == (Port("main", 80, protocol),)
    cut = pieces.cut(f"---\n{json.dumps(GOOD)}\n---\n\n  {json.dumps(GOOD, indent=1)}\n")
    found = [read for piece in cut if (read := jsontext.read(piece.text))]
    assert [piece.first_line for piece in cut] == [2, 4]
    assert [(read.line, read.column) for read in found] == [(1, 1), (2, 3)]


@pytest.mark.parametrize(
    "text",
    ['{"a": 1, "a": 2}',
     '{"<<": {}}', '{"a": "\\ud83d"}', '{"a": "\x7f"}', "{a: 1}", "[1]", "{}\n---\nx: 1", "[" * 9999,
     '{"a":' * 9999],
)  # fmt: skip
def test_what_yaml_could_read_otherwise_is_left_to_it(text: str) -> None:
    assert jsontext.read(text) is None


def test_an_unusual_document_of_a_json_file_knows_its_line() -> None:
    text = f"---\n{json.dumps(GOOD)}\n---\n" + '{"apiVersion": "meshbpf.io/v1", "kind": "ServicePolicy",\n'
    text += '"metadata": {"name": "orders"},\n "spec": {"service": "orders"}}\n'
    assert [policy.source for policy in parse([("f.json", text)]).policies] == ["f.json:5:22"]
    with pytest.raises(ConfigErrors, match=r"f\.json:6:22: no service nobody in namespace default"):
        parse([("f.json", text.replace('"service": "orders"', '"service": "nobody"'))])


@settings(max_examples=500, deadline=None)
@given(
    st.one_of(
        st.ip_addresses(v=4).map(str), st.sampled_from([*BAD, *addresses._METADATA, "255.255.255.255"]), st.text()
    )
)
def test_an_ordinary_address_is_canonical_and_usable(text: str) -> None:
    if addresses.ordinary(text):
        assert addresses.canonical(text) == text
        assert addresses.unusable(text) == ""


def test_most_addresses_are_ordinary() -> None:
    for text in ("10.1.2.3", "127.0.0.1", "172.16.0.1", "192.168.0.1", "192.0.2.7", "100.64.0.1", "223.255.255.255"):
        assert addresses.ordinary(text)
    for text in addresses._METADATA | {
        "0.1.2.3",
        "169.254.1.1",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.03",
        "fd00::1",
    }:
        assert not addresses.ordinary(text)


def places(value: Any) -> list[tuple[Any, ...]]:
    """The way to everything inside of `value`."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [(key, *way) for key, item in inside for way in [(), *places(item)]]


@pytest.mark.parametrize("way", places(GOOD), ids=lambda way: ".".join(map(str, way)))
def test_the_readers_agree_on_every_single_odd_value(way: tuple[Any, ...]) -> None:
    for odd in [*ODD, *BAD, "tcp", 15001, [], ["127.0.0.1"], {"<<": "a"}, {"main": 15001}, {"other": 1}]:
        changed = copy.deepcopy(GOOD)
        inner = changed
        for key in way[:-1]:
            inner = inner[key]
        inner[way[-1]] = odd
        check_agreement([changed])
