"""Which carrier serves a port, and why: the whole table of INTERFACE, `mode: auto` follows the port's protocol."""

from __future__ import annotations

import pytest

from meshbpf.carrier import Carrier, Choice, choose
from meshbpf.model import Mode, Port, Protocol, ServicePolicy

DIRECT, PROXY = Carrier.DIRECT, Carrier.PROXY
TABLE = {
    (Protocol.HTTP, Mode.AUTO): (PROXY, "protocol_http"),
    (Protocol.HTTP, Mode.DIRECT): (DIRECT, "policy_mode_direct"),
    (Protocol.HTTP, Mode.PROXY): (PROXY, "policy_mode_proxy"),
    (Protocol.HTTP2, Mode.AUTO): (DIRECT, "http2_not_yet"),
    (Protocol.HTTP2, Mode.DIRECT): (DIRECT, "policy_mode_direct"),
    (Protocol.HTTP2, Mode.PROXY): (PROXY, "http2_not_yet"),
    (Protocol.GRPC, Mode.AUTO): (DIRECT, "http2_not_yet"),
    (Protocol.GRPC, Mode.DIRECT): (DIRECT, "policy_mode_direct"),
    (Protocol.GRPC, Mode.PROXY): (PROXY, "http2_not_yet"),
    (Protocol.TCP, Mode.AUTO): (DIRECT, "protocol_tcp"),
    (Protocol.TCP, Mode.DIRECT): (DIRECT, "policy_mode_direct"),
    (Protocol.TCP, Mode.PROXY): (PROXY, "policy_mode_proxy"),
    (Protocol.TLS, Mode.AUTO): (DIRECT, "protocol_tls"),
    (Protocol.TLS, Mode.DIRECT): (DIRECT, "policy_mode_direct"),
    (Protocol.TLS, Mode.PROXY): (PROXY, "policy_mode_proxy"),
    (Protocol.UDP, Mode.AUTO): (DIRECT, "protocol_udp"),
    (Protocol.UDP, Mode.DIRECT): (DIRECT, "protocol_udp"),
    (Protocol.UDP, Mode.PROXY): (DIRECT, "protocol_udp"),
}


def test_the_table_is_whole() -> None:
    assert set(TABLE) == {(protocol, mode) for protocol in Protocol for mode in Mode}


@pytest.mark.parametrize(("protocol", "mode"), TABLE)
def test_choice(protocol: Protocol, mode: Mode) -> None:
    assert choose(Port("a", 1, protocol), ServicePolicy(mode=mode)) == Choice(*TABLE[protocol, mode])
