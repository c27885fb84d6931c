"""Faults of a configuration, collected: all of them are reported at once, in the order of the files."""

from __future__ import annotations

from collections.abc import Sequence

from meshbpf.errors import ConfigError
from meshbpf.yamlpos import Mark


class ConfigErrors(ConfigError):
    """One or more faults; `errors` holds each, `str()` is one per line. `where` and `message` are the first one's."""

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__(errors[0].where, errors[0].message)
        self.errors = list(errors)

    def __str__(self) -> str:
        return "\n".join(f"{error.where}: {error.message}" for error in self.errors)


class Report:
    """Where readers and checks put what they find. Readers go on with a default, so that one run finds everything."""

    def __init__(self, files: Sequence[str]) -> None:
        self._order = {file: index for index, file in reversed(list(enumerate(files)))}
        self._found: set[tuple[Mark, str]] = set()

    def add(self, at: Mark, message: str) -> None:
        self._found.add((at, _line(message)))

    def withdraw(self, at: Mark, message: str) -> None:
        """What was added follows from another fault, which says it better."""
        self._found.discard((at, _line(message)))

    def __bool__(self) -> bool:
        return bool(self._found)

    def raise_any(self) -> None:
        if self._found:
            raise ConfigErrors([ConfigError(str(at), message) for at, message in sorted(self._found, key=self._place)])

    def _place(self, fault: tuple[Mark, str]) -> tuple[int, int, int, str]:
        at, message = fault
        return (self._order.get(at.file, len(self._order)), at.line, at.column, message)


def _line(message: str) -> str:
    """Messages quote the file: one fault stays one line, whatever a file's author put into a key."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in message)
