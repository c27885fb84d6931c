"""Request ids in the shape of UUIDs (version 4), cut from random bytes that are drawn in batches, for that is cheap.

A batch shares its first 74 random bits; the last 48 are each id's own. They are names, not secrets.
"""

from __future__ import annotations

import os

_BATCH = 256
_OWN = 12  # hex digits


class RequestIds:
    __slots__ = ("_at", "_hex", "_shared")

    def __init__(self) -> None:
        self._shared = ""
        self._hex = ""
        self._at = 0

    def next(self) -> str:
        at = self._at
        if at == len(self._hex):
            shared = os.urandom(9).hex()
            self._shared = f"{shared[:8]}-{shared[8:12]}-4{shared[12:15]}-a{shared[15:18]}-"
            self._hex = os.urandom(_BATCH * _OWN // 2).hex()
            at = 0
        end = self._at = at + _OWN
        return self._shared + self._hex[at:end]
