"""What is read out of a TLS client's first message: made by OpenSSL, made up, cut, broken, and random."""

from __future__ import annotations

import contextlib
import ssl
from functools import cache
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from userspace_proxy.hello import LIMIT, Found, Hello

NAME = "shop.example.org"
GREASE = b"\x3a\x3a"
V2, V3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
SSLV2 = bytes.fromhex("802e0100020015000000100100800300800700c0060040020080040080") + b"\1" * 19
POSTGRESQL = bytes.fromhex("0000000804d2162f")  # its SSLRequest, which comes before TLS
PLAIN = b"GET / HTTP/1.1\r\nHost: shop.example.org\r\n\r\n"


@cache
def openssl(version: ssl.TLSVersion = V3, name: str | None = NAME) -> bytes:
    """The first bytes that OpenSSL sends."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2", "http/1.1"])
    out = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), out, server_hostname=name).do_handshake()
    return out.read()


def read_by_openssl(data: bytes) -> list[str | None]:
    """The name that OpenSSL, as a server, takes from these bytes; empty when it refuses them before that."""
    names: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.sni_callback = lambda _socket, name, _context: names.append(name)
    into = ssl.MemoryBIO()
    into.write(data)
    with contextlib.suppress(ssl.SSLError):
        context.wrap_bio(into, ssl.MemoryBIO(), server_side=True).do_handshake()
    return names


def vector(width: int, content: bytes) -> bytes:
    return len(content).to_bytes(width) + content


def extension(kind: bytes, content: bytes) -> bytes:
    return kind + vector(2, content)


def sni(*names: bytes, kind: bytes = b"\0") -> bytes:
    return extension(b"\0\0", vector(2, b"".join(kind + vector(2, name) for name in names)))


def message(*extensions: bytes, session: bytes = b"", ciphers: bytes = b"\x13\1", bare: bool = False) -> bytes:
    """A ClientHello without record headers. `bare`: without even an empty list of extensions."""
    body = b"\3\3" + b"r" * 32 + vector(1, session) + vector(2, ciphers) + vector(1, b"\0")
    return b"\1" + vector(3, body if bare else body + vector(2, b"".join(extensions)))


def records(content: bytes, *cuts: int) -> bytes:
    """`content` in records, cut at these places; a record is never empty."""
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(content)}), len(content)]
    return b"".join(b"\x16\3\1" + vector(2, content[a:b]) for a, b in pairwise(places))


def read(*parts: bytes) -> tuple[Found | None, str | None]:
    hello = Hello()
    for part in parts:
        assert hello.feed(part) is hello.found
    return hello.found, hello.name


def one_by_one(data: bytes) -> tuple[Found | None, str | None]:
    return read(*(data[at : at + 1] for at in range(len(data))))


@pytest.mark.parametrize("version", [V2, V3])
def test_openssl(version: ssl.TLSVersion) -> None:
    assert read(openssl(version)) == (Found.NAME, NAME)
    assert read(openssl(version, None)) == (Found.NO_NAME, None)
    assert read(openssl(version) + b"\x14\3\3\0\1\1 and more") == (Found.NAME, NAME)  # early data, for one
    assert read(records(openssl(version)[5:] + b"and more, in the same record")) == (Found.NAME, NAME)


@pytest.mark.parametrize("version", [V2, V3])
def test_truncated_at_every_byte(version: ssl.TLSVersion) -> None:
    whole = openssl(version)
    for size in range(len(whole)):
        assert read(whole[:size]) == (None, None)
        assert read(whole[:size], whole[size:]) == (Found.NAME, NAME)


def test_cut_into_records_at_every_byte() -> None:
    whole = message(sni(NAME.encode()))
    for cut in range(1, len(whole)):
        assert read(records(whole, cut)) == (Found.NAME, NAME)
    assert one_by_one(records(whole, *range(len(whole)))) == (Found.NAME, NAME)


def test_a_name_is_read_in_lower_case() -> None:
    assert read(records(message(sni(b"Shop.EXAMPLE.org")))) == (Found.NAME, NAME)


@pytest.mark.parametrize(
    "extensions",
    [
        (),
        (extension(GREASE, b""),),
        (extension(GREASE, b"\0"), extension(b"\0\x0b", b"\1\0"), extension(b"\xfe\x0d", bytes(300))),
    ],
)
def test_without_a_name(extensions: tuple[bytes, ...]) -> None:
    assert read(records(message(*extensions))) == (Found.NO_NAME, None)
    assert read(records(message(bare=True))) == (Found.NO_NAME, None)


@pytest.mark.parametrize(
    "whole",
    [
        SSLV2, PLAIN, POSTGRESQL, b"\x15\3\1\0\2\2\x28", b"\x16\2\0\0\5", b"\x16\3\1\0\0", b"\x16\3\1\xff\xff",
        records(b"\2" + message()[1:]),  # a ServerHello
        records(b"\1\0\0\0"), records(b"\1\0\0\x22" + bytes(34)),
        records(b"\1" + vector(3, message(sni(b"a"))[4:-1])),  # the list of extensions is longer than the message
        records(b"\1" + vector(3, message(sni(b"a"))[4:] + b"x")),
        records(message(sni(b"a"), b"\0\x0b\0")),
        records(message(sni(b"a", b"b"))), records(message(sni(b"a"), sni(b"a"))),
        records(message(sni(b"a", kind=b"\1"))), records(message(sni())),
        records(message(sni(b""))), records(message(sni(b"x" * 256))),
        records(message(sni(b"a\0b"))), records(message(sni(b"a b"))), records(message(sni(b"a\n"))),
        records(message(sni("\u00e9".encode()))), records(message(extension(b"\0\0", b""))),
        records(message(extension(b"\0\0", vector(2, b"\0\0\1a") + b"x"))),
        records(message(extension(b"\0\0", vector(2, b"\0\0\1ab")))),
    ],
)  # fmt: skip
def test_what_is_no_hello_is_known_at_once(whole: bytes) -> None:
    assert read(whole) == one_by_one(whole) == (Found.NOT_TLS, None)


@pytest.mark.parametrize("whole", [SSLV2, PLAIN, POSTGRESQL])
def test_other_protocols_are_told_by_their_first_byte(whole: bytes) -> None:
    assert read(whole[:1]) == (Found.NOT_TLS, None)


def test_the_size_is_bounded() -> None:
    fits = records(message(extension(GREASE, bytes(LIMIT - 100)), sni(b"a")))
    fits = records(message(extension(GREASE, bytes(LIMIT - 100 + LIMIT - len(fits))), sni(b"a")))
    assert len(fits) == LIMIT
    assert read(fits) == one_by_one(fits) == (Found.NAME, "a")
    assert read(b"\x16\3\1\0\4\1\0\x40\0") == (Found.TOO_LARGE, None)  # it says so itself
    longer = records(message(extension(GREASE, bytes(LIMIT)), sni(b"a")), LIMIT)
    headers = records(message(sni(b"a"), extension(GREASE, bytes(4000))), *range(8000))  # small, but for its records
    a_little = records(fits[5:], LIMIT - 10)  # by one more header
    for whole in (longer, headers, a_little):
        assert read(whole) == one_by_one(whole) == read(whole[:10], whole[10:]) == (Found.TOO_LARGE, None)
    assert read(headers[:LIMIT]) == read(a_little[:LIMIT]) == (Found.TOO_LARGE, None)
    assert read(headers[: LIMIT - 1]) == read(a_little[: LIMIT - 1]) == (None, None)


names = st.text(alphabet="abcxyz019-_.", min_size=1, max_size=255)
others = st.tuples(st.binary(min_size=2, max_size=2).filter(lambda kind: kind != b"\0\0"), st.binary(max_size=60))


@st.composite
def hellos(draw: st.DrawFn) -> tuple[bytes, str | None]:
    """Records of a well-formed hello, and the name in it."""
    name = draw(st.none() | names)
    extensions = [extension(*other) for other in draw(st.lists(others, max_size=6))]
    if name is not None:
        extensions.insert(draw(st.integers(0, len(extensions))), sni(name.encode()))
    session, ciphers = draw(st.binary(max_size=32)), draw(st.binary(max_size=64))
    whole = message(*extensions, session=session, ciphers=ciphers)
    return records(whole, *draw(st.lists(st.integers(1, len(whole)), max_size=5))), name


def parted(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(places)]


@given(hellos(), st.lists(st.integers(0, 2**16), max_size=8), st.binary(max_size=20))
def test_every_way_to_read_gives_the_same(made: tuple[bytes, str | None], cuts: list[int], behind: bytes) -> None:
    data, name = made
    expected = (Found.NO_NAME if name is None else Found.NAME, name)
    assert read(data + behind) == expected
    assert read(*parted(data + behind, cuts)) == expected
    assert read(data[:-1]) == (None, None)


@given(st.binary(max_size=200), st.lists(st.integers(0, 2**16), max_size=8), st.booleans())
@example(b"", [], False)
def test_random_bytes_never_raise(noise: bytes, cuts: list[int], in_a_record: bool) -> None:
    data = records(b"\1" + vector(3, noise)) if in_a_record else noise
    found, name = read(data)
    assert read(*parted(data, cuts)) == one_by_one(data) == (found, name)
    assert (name is not None) == (found is Found.NAME)


@given(st.sampled_from([V2, V3]), st.integers(5, 2**16), st.integers(0, 255))
def test_a_changed_byte_never_gives_another_name_than_the_endpoint_reads(
    version: ssl.TLSVersion, place: int, value: int
) -> None:
    data = bytearray(openssl(version))
    data[place % len(data)] = value
    _, name = read(bytes(data))
    theirs = [None if each is None else each.lower() for each in read_by_openssl(bytes(data))]
    assert name is None or theirs in ([], [name])


def test_openssl_reads_what_we_read() -> None:
    """That the test above can fail: its witness does read names."""
    assert read_by_openssl(openssl()) == [NAME]
    assert read_by_openssl(openssl(name=None)) == [None]
