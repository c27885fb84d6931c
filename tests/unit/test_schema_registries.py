"""`registries`: the http source's fields, each refused with its place; one embedded registry, each URL once."""

from __future__ import annotations

import pytest

from meshbpf.model import EmbeddedRegistry, HttpRegistry
from meshbpf.schema import ConfigErrors, parse

URL = "http://ADDRESS:PORT of another agent's embedded registry"
NO_NAMES = f"{URL} (names are not resolved, IPv6 stands in brackets)"


def agent(registries: str) -> str:
    return f"apiVersion: meshbpf.io/v1\nkind: Agent\nspec: {{registries: [{registries}]}}\n"


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        parse([("f", text)])
    return [line.removeprefix("f:") for line in str(caught.value).splitlines()]


def test_the_order_of_the_list_is_kept_and_the_default_is_no_token_and_no_loopback() -> None:
    parsed = parse(
        [("f", agent("{http: {url: 'http://192.0.2.1:1'}}, {embedded: {}}, {http: {url: 'http://[::1]:2'}}"))]
    )
    assert parsed.agent is not None
    assert parsed.agent.registries == (
        HttpRegistry("http://192.0.2.1:1", "", allow_loopback=False),
        EmbeddedRegistry(),
        HttpRegistry("http://[::1]:2"),
    )
    assert parsed.agent.embedded == EmbeddedRegistry()


@pytest.mark.parametrize(
    ("registries", "expected"),
    [
        ("{http: }", [f"3:28: spec.registries[0].http.url is missing: it must be {URL}"]),
        ("{http: {}}", [f"3:28: spec.registries[0].http.url is missing: it must be {URL}"]),
        ("{http: {url: }}", [f"3:34: spec.registries[0].http.url is missing: it must be {URL}"]),
        ("{http: {url: 7}}", ["3:34: spec.registries[0].http.url must be a string (in quotes), got 7"]),
        ("{http: {url: 'https://192.0.2.1:1'}}",
         [f'3:34: spec.registries[0].http.url must be {URL}, which speaks plain HTTP, got "https://192.0.2.1:1"']),
        ("{http: {url: 'http://0.0.0.0:1'}}",
         [f'3:34: spec.registries[0].http.url must be {URL}: 0.0.0.0 is an unspecified address, got '
          '"http://0.0.0.0:1"']),
        ("{http: {url: 'http://192.0.2.1:1', token: t}}",
         ['3:56: unknown field "token" in spec.registries[0].http: did you mean "tokenFile"?']),
        ("{http: {url: 'http://192.0.2.1:1', tokenFile: ''}}",
         ['3:67: spec.registries[0].http.tokenFile must be a path, got ""']),
        ("{http: {url: 'http://192.0.2.1:1'}, embedded: {}}",
         ["3:21: spec.registries[0] must name one registry, for example embedded: {}"]),
        ("{http: {url: 'http://192.0.2.1:1'}}, {http: {url: 'HTTP://192.0.2.1:1/'}}",
         ["3:58: spec.registries[1] is the registry at http://192.0.2.1:1, and so is spec.registries[0]: remove one"]),
        ("{hhtp: {}}", ['3:22: unknown field "hhtp" in spec.registries[0]: did you mean "http"?']),
    ],
)  # fmt: skip
def test_faults(registries: str, expected: list[str]) -> None:
    assert faults(agent(registries)) == expected


@pytest.mark.parametrize(
    "url",
    [
        "192.0.2.1:15010", "http://registry.example:15010", "http://192.0.2.1", "http://192.0.2.1:0",
        "http://[fe80::1%25eth0]:1", "http://[::ffff:192.0.2.1]:1", "http://::1:15010", "http://me:secret@192.0.2.1:1",
        "http://192.0.2.1:1/v1", "http://192.0.2.1:1?x", "http://192.0.2.1:1//", "http://", "http", "",
    ],
)  # fmt: skip
def test_urls_that_name_no_registry(url: str) -> None:
    assert faults(agent(f"{{http: {{url: '{url}'}}}}"))[0].startswith(
        f"3:34: spec.registries[0].http.url must be {URL}"
    )
