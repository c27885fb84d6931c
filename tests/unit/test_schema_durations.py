"""Durations: the form of the contract, nothing else, and there and back."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf import durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0.0), ("5s", 5.0), ("250ms", 0.25), ("1h30m", 5400.0), ("1h2m3s4ms", 3723.004), ("99999h", 359_996_400.0)],
)
def test_parse(text: str, seconds: float) -> None:
    assert durations.parse(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "5", "1.5s", "-1s", "5 s", "5S", "1d", "123456s", "1s1s1s1s1s", "5s\n", "٥s", "s"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration: write for example 5s, 250ms or 1h30m"):
        durations.parse(text)


@given(st.from_regex(durations.FORM, fullmatch=True))
def test_the_form_of_the_contract_is_what_is_parsed(text: str) -> None:
    if text.isascii() and not text.endswith("\n"):  # `$` and `[0-9]` are looser in Python than in the contract
        seconds = durations.parse(text)
        assert seconds > 99_999 * 3600 or durations.parse(durations.render(seconds)) == seconds


@given(st.integers(0, 99_999 * 3_600_000))
def test_there_and_back(milliseconds: int) -> None:
    text = durations.render(milliseconds / 1000)
    assert re.match(durations.FORM, text)
    assert durations.parse(text) == milliseconds / 1000


@pytest.mark.parametrize("seconds", [-1.0, 1e12])
def test_what_cannot_be_written(seconds: float) -> None:
    with pytest.raises(ValueError, match="cannot be written as a duration"):
        durations.render(seconds)
