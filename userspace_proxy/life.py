"""The states of an exchange, and which may follow which. Whoever adds one adds its row.

A policy that makes a request wait is a state beside QUEUED; one that refuses it is no state but a move to ENDED.
"""

from __future__ import annotations

from enum import Enum, auto


class State(Enum):
    OPEN = auto()  # no endpoint is being tried: not yet, or not any more
    QUEUED = auto()  # the pool has no place for another connection
    DIALLING = auto()  # `target` is being connected to
    SENT = auto()  # `upstream` has what there is of the request; its answer has not begun
    ANSWERING = auto()  # the answer's head has been written: no local reply and no other try any more
    ENDED = auto()  # the record is written


OPEN, QUEUED, DIALLING, SENT, ANSWERING, ENDED = State  # looked up per request: the class's attributes cost more

MOVES: dict[State, frozenset[State]] = {
    OPEN: frozenset((QUEUED, DIALLING, SENT, ENDED)),
    QUEUED: frozenset((DIALLING, SENT, ENDED)),
    DIALLING: frozenset((OPEN, SENT, ENDED)),  # OPEN: it could not be reached, another one is tried
    SENT: frozenset((OPEN, ANSWERING, ENDED)),  # OPEN: its connection was dead; ENDED: the answer came in one piece
    ANSWERING: frozenset((ENDED,)),
    ENDED: frozenset(),
}
