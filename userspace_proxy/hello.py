"""Reads the name that a TLS client asks for (server name indication) out of its first message, opening nothing.

The rule: the finding depends on the bytes alone, never on how they were cut into reads. What is not understood is no
error: it has no name, and the endpoint, which gets every byte as it came, answers it as it would without us.
Structure by RFC 8446 (4.1.2, 5.1) and RFC 6066 (3); the name in lower case, as Envoy's tls_inspector has it, and its
limit of size. Stricter than Envoy about the name: two names, or bytes that no host name has, are none, so that nobody
is routed by another name than the one the endpoint reads.
"""

from __future__ import annotations

import re
from enum import Enum, auto

LIMIT = 16 * 1024  # bytes, record headers included
MAX_RECORD = 16 * 1024
HANDSHAKE, CLIENT_HELLO, HOST_NAME = 22, 1, 0
SERVER_NAME = b"\0\0"
VERSION_AND_RANDOM = 34
_HOST = re.compile(rb"[\x21-\x7e]{1,255}")


class Found(Enum):
    NAME = auto()
    NO_NAME = auto()  # TLS, of a client that names no server
    NOT_TLS = auto()  # plaintext, SSLv2, or malformed
    TOO_LARGE = auto()


class Hello:
    """A client's first message as it comes in. `name` is there when `found` is NAME; `found` is None until known."""

    __slots__ = ("_left", "_message", "_rest", "_seen", "found", "name")

    def __init__(self) -> None:
        self.found: Found | None = None
        self.name: str | None = None
        self._message = bytearray()  # without the record headers
        self._left = 0  # bytes of the current record that have not come
        self._rest = b""  # part of a record header
        self._seen = 0

    def feed(self, data: bytes) -> Found | None:
        """Read on; what comes behind the message, and behind LIMIT, is not looked at."""
        if self.found is None:
            room = LIMIT - self._seen
            self._seen += len(data)
            self.found = self._records(self._rest + data[:room])
            if self.found is None and self._seen >= LIMIT:
                self.found = Found.TOO_LARGE
        return self.found

    def _records(self, data: bytes) -> Found | None:
        """The message may be cut into any number of records."""
        at = 0
        while at < len(data):
            if not self._left:
                header = data[at : at + 5]
                if header[0] != HANDSHAKE or header[1:2] not in (b"", b"\3"):
                    return Found.NOT_TLS
                if len(header) < 5:
                    break
                self._left = int.from_bytes(header[3:])
                if not 0 < self._left <= MAX_RECORD:
                    return Found.NOT_TLS
                at += 5
            part = data[at : at + self._left]
            self._message += part
            self._left -= len(part)
            at += len(part)
            if (found := self._look()) is not None:
                return found
        self._rest = data[at:]
        return None

    def _look(self) -> Found | None:
        message = self._message
        if message and message[0] != CLIENT_HELLO:
            return Found.NOT_TLS
        if len(message) < 4:
            return None
        end = 4 + int.from_bytes(message[1:4])
        if end > LIMIT:
            return Found.TOO_LARGE
        if len(message) < end:
            return None
        try:
            self.name = server_name(bytes(message[4:end]))
        except ValueError:
            return Found.NOT_TLS
        return Found.NO_NAME if self.name is None else Found.NAME


def server_name(body: bytes) -> str | None:
    """The name in the body of a ClientHello, in lower case; None when it has none. ValueError when malformed."""
    at = VERSION_AND_RANDOM
    for width in (1, 2, 1):  # session id, cipher suites, compression methods
        _, at = _vector(body, at, width)
    if at == len(body):  # before TLS 1.2 a client could leave all extensions out
        return None
    extensions, at = _vector(body, at, 2)
    names: list[bytes] = []
    behind = 0
    while behind < len(extensions):
        content, end = _vector(extensions, behind + 2, 2)
        if extensions[behind : behind + 2] == SERVER_NAME:
            names.append(content)
        behind = end
    if at != len(body) or len(names) > 1:
        raise ValueError
    return _host(names[0]) if names else None


def _host(content: bytes) -> str:
    """A list of exactly one name, of the only kind there is."""
    entries, end = _vector(content, 0, 2)
    if not entries or entries[0] != HOST_NAME or end != len(content):
        raise ValueError
    name, end = _vector(entries, 1, 2)
    if end != len(entries) or _HOST.fullmatch(name) is None:
        raise ValueError
    return name.decode("ascii").lower()


def _vector(data: bytes, at: int, width: int) -> tuple[bytes, int]:
    """What stands at `at` behind its own length, which is `width` bytes, and where it ends. ValueError: cut short."""
    start = at + width
    end = start + int.from_bytes(data[at:start])
    if end > len(data):
        raise ValueError
    return data[start:end], end
