"""Every error that meshbpf raises on purpose; foreign errors are translated into these once, at the border.

MeshError
├── ConfigError      a configuration that cannot be used; names file:line:column          exit 65
├── EnvironmentLack  this machine lacks something; names it and its remedy                exit 69
├── NotFound         the named service or instance is unknown                             exit 1
├── CannotRun        the command we were to become or to start cannot be run              exit 127 or 126
└── DataplaneError   the kernel refused something we asked of it                          exit 1
    ├── MapFull      a table is full; names the field of `Agent.spec.maps` to raise
    └── Busy         another process or instance holds what we need; names the owner
"""

from __future__ import annotations


class MeshError(Exception):
    """Root of the tree. `exit_code` is what the CLI returns when nothing else catches it."""

    exit_code = 1


class ConfigError(MeshError):
    """A bad configuration: `where` is `file:line:column` (or an API field), `message` says what and the remedy."""

    exit_code = 65

    def __init__(self, where: str, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.where = where
        self.message = message


class EnvironmentLack(MeshError):
    """This machine lacks `what`; `remedy` is the command or setting that gives it."""

    exit_code = 69

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(f"{what}\n  remedy: {remedy}")
        self.what = what
        self.remedy = remedy


class NotFound(MeshError):
    """The named service or instance is unknown."""


class CannotRun(MeshError):
    """`command` does not start, because of `error`: 127 when there is no such program, else 126, as env(1) has it."""

    def __init__(self, command: str, error: OSError) -> None:
        super().__init__(f"cannot run {command}: {error.strerror or error}")
        self.exit_code = 127 if isinstance(error, FileNotFoundError) else 126


class DataplaneError(MeshError):
    """The kernel refused something we asked of it."""


class MapFull(DataplaneError):
    """Table `name` holds `size` entries and needs more: raise `Agent.spec.maps.<name>`."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(f"map {name} is full at {size} entries: raise Agent.spec.maps.{name}")
        self.name = name
        self.size = size


class Busy(DataplaneError):
    """Something exclusive is held by somebody else, whom the message names."""
