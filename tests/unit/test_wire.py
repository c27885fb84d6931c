"""Model values through JSON and back: for the state file, the workers and `-o json`."""

from __future__ import annotations

import json
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf import wire
from meshbpf.model import (
    Agent,
    EmbeddedRegistry,
    Endpoint,
    EndpointState,
    HttpRegistry,
    Mesh,
    OnProxyDown,
    Port,
    Protocol,
    Service,
    ServicePolicy,
)

text = st.text("abcxyz0-", min_size=1, max_size=5)
ports = st.builds(Port, text, st.integers(1, 65535), st.sampled_from(Protocol))
endpoints = st.builds(
    Endpoint,
    text,
    st.dictionaries(text, st.integers(1, 65535), max_size=2),
    labels=st.dictionaries(text, text, max_size=2),
    state=st.sampled_from(EndpointState),
)
services = st.builds(
    Service, text, text, addresses=st.lists(text, max_size=2).map(tuple), ports=st.lists(ports, max_size=2).map(tuple),
    endpoints=st.lists(endpoints, max_size=2).map(tuple),
)  # fmt: skip
policies = st.builds(ServicePolicy, text, text, on_proxy_down=st.sampled_from(OnProxyDown))
meshes = st.builds(
    Mesh,
    services=st.lists(services, max_size=3).map(tuple),
    policies=st.dictionaries(st.tuples(text, text), policies, max_size=2),
    generation=st.integers(0, 1 << 40),
)


@settings(max_examples=100, deadline=None)
@given(meshes)
def test_a_mesh_comes_back_equal(mesh: Mesh) -> None:
    assert wire.decode(Mesh, json.loads(json.dumps(wire.encode(mesh)))) == mesh


@settings(max_examples=100, deadline=None)
@given(services)
def test_a_service_comes_back_equal_from_its_text(service: Service) -> None:
    assert wire.decode(Service, json.loads(wire.service_text(service))) == service


def test_the_text_of_a_service_leaves_out_what_is_usual() -> None:
    told = wire.service_text(Service("s", endpoints=(Endpoint("192.0.2.1", {"main": 1}), Endpoint("::1", {}, 7))))
    endpoints = [{"address": "192.0.2.1", "ports": {"main": 1}}, {"address": "::1", "ports": {}, "weight": 7}]
    assert json.loads(told) == {"name": "s", "endpoints": endpoints}


def test_texts_of_a_part_are_remembered_beside_those_of_the_whole() -> None:
    a, b = Service("a"), Service("b")
    whole = wire.texts(Mesh(services=(a, b)))
    assert wire.texts(Mesh(services=(b,)))[0] is whole[1]
    assert wire.texts(Mesh(services=(a,)))[0] is whole[0]
    wire.text(Mesh(services=(b,)))
    assert wire.texts(Mesh(services=(a,)))[0] is not whole[0]


def test_a_registry_comes_back_as_what_it_was() -> None:
    mesh = Mesh(Agent(registries=(HttpRegistry("http://192.0.2.1:1", "token"), EmbeddedRegistry())))
    assert wire.decode(Mesh, json.loads(json.dumps(wire.encode(mesh)))) == mesh
    other = wire.encode(mesh)
    other["agent"]["registries"][0] = {"url": "http://192.0.2.1:1"}
    with pytest.raises(KeyError):
        wire.decode(Mesh, other)


def test_what_comes_back_is_frozen() -> None:
    mesh = Mesh(policies={("a", "default"): ServicePolicy()})
    decoded = wire.decode(Mesh, wire.encode(mesh))
    assert isinstance(decoded.policies, MappingProxyType)
    assert isinstance(decoded.services, tuple)
    assert hash(decoded.agent) == hash(mesh.agent)


def test_plain_values_and_keys() -> None:
    assert wire.encode({("orders", "shop"): Protocol.HTTP2}) == {"orders/shop": "http2"}
    assert wire.encode((1, "a", None, 2.5)) == [1, "a", None, 2.5]
    assert wire.decode(int | None, None) is None  # type: ignore[arg-type]
    assert wire.decode(Protocol | None, "tcp") is Protocol.TCP  # type: ignore[arg-type]


@pytest.mark.parametrize("data", [{"nonsense": 1}, {"protocol": "smoke signals"}])
def test_another_shape_is_an_error(data: dict[str, object]) -> None:
    whole = {**wire.encode(Port("a", 1)), **data}
    with pytest.raises((KeyError, ValueError)):
        wire.decode(Port, whole)
