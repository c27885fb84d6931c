"""The agent's own log: one line per record, whatever is in it; and tasks that die are heard of there."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import pytest

from meshbpf import tasks
from meshbpf.logs import Json, Text


def record(message: str, *arguments: object, error: bool = False) -> logging.LogRecord:
    caught = None
    if error:
        try:
            raise ValueError("two\nlines")
        except ValueError:
            caught = sys.exc_info()
    made = logging.LogRecord("agent", logging.WARNING, "", 0, message, arguments, caught)
    made.created, made.msecs = 86400.25, 250.0
    return made


def test_text() -> None:
    assert Text().format(record("ready pid=%d", 7)) == "1970-01-02T00:00:00.250Z warning agent ready pid=7"
    line = Text().format(record("name=%s", "a\nb", error=True))
    assert "\n" not in line
    assert "name=a\\nb trace=" in line


def test_json() -> None:
    found = json.loads(Json().format(record('said "%s"', "x")))
    assert found == {"time": "1970-01-02T00:00:00.250Z", "level": "warning", "area": "agent", "message": 'said "x"'}
    line = Json().format(record("died", error=True))
    assert "\n" not in line
    assert "ValueError: two\nlines" in json.loads(line)["trace"]


async def test_a_task_that_dies_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def dies() -> None:
        raise ValueError("why")

    task = tasks.spawn(dies(), "careless")
    await asyncio.wait([task])
    await asyncio.sleep(0)  # its callback runs in the loop's next turn
    assert "task died task=careless error=ValueError('why')" in caplog.text


async def test_a_task_that_ends_or_is_cancelled_is_not(caplog: pytest.LogCaptureFixture) -> None:
    ended = tasks.spawn(asyncio.sleep(0), "ended")
    cancelled = tasks.spawn(asyncio.sleep(60), "cancelled")
    cancelled.cancel()
    await asyncio.wait([ended, cancelled])
    await asyncio.sleep(0)
    assert caplog.text == ""
