"""The command line: nouns read, verbs change. This file joins the groups and turns errors into exit codes."""

from __future__ import annotations

import errno
import sys

import typer

from meshbpf.cli import change, check, completion, demo, diff, inside, read, registry, status
from meshbpf.errors import MeshError
from meshbpf.schema import ConfigErrors

app = typer.Typer(
    name="meshbpf",
    help="A service mesh without sidecars and iptables: eBPF carries what Python decided.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MESHBPF"},
)
for group in (change, status, read, inside, diff, check, registry, demo, completion):
    group.register(app)


def main() -> None:
    completion.answering()
    try:
        app()
    except ConfigErrors as error:
        # One fault is one line; several begin with their number, so that every fault looks the same.
        several = len(error.errors) > 1
        print(f"meshbpf: {len(error.errors)} faults\n{error}" if several else f"meshbpf: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except MeshError as error:
        print(f"meshbpf: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO):
            raise
        print(f"meshbpf: cannot write the output: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None
