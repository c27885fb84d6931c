"""A pause ends as it began, whatever happens in it."""

from __future__ import annotations

import gc

import pytest

from meshbpf import garbage


def test_a_pause_ends_with_its_outermost_user() -> None:
    assert gc.isenabled()
    with pytest.raises(KeyError), garbage.paused():
        with garbage.paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_who_looks_rarely_looks_again() -> None:
    thresholds = gc.get_threshold()
    try:
        garbage.not_yet()
        with garbage.paused():
            pass
        assert not gc.isenabled()
        garbage.rarely(first=False)
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.enable()
        gc.set_threshold(*thresholds)
