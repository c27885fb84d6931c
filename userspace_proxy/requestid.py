"""Request ids in the shape of UUIDs (version 4), cut from random bytes that are drawn in batches, for that is cheap."""

from __future__ import annotations

import os

_BATCH = 256


class RequestIds:
    __slots__ = ("_at", "_hex")

    def __init__(self) -> None:
        self._hex = ""
        self._at = 0

    def next(self) -> str:
        at = self._at
        if at == len(self._hex):
            self._hex = os.urandom(16 * _BATCH).hex()
            at = 0
        self._at = at + 32
        text = self._hex[at : at + 32]
        return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-a{text[17:20]}-{text[20:]}"
