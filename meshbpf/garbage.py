"""When Python looks for cycles. Large meshes are long-lived and have none, yet each look walks all of them."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


def not_yet() -> None:
    """For a process that makes much to keep before it is ready, and then looks `rarely`."""
    gc.disable()


def rarely(first: bool = True) -> None:
    """For a process that stays: what is loaded by now is never looked at, the rest rarely. `first`: but once, now."""
    if first:
        gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """While much is made and little thrown away: reading a large file takes half the time. For the whole process, so
    keep it short; who pauses inside a pause changes nothing.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
