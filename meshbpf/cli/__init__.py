"""The command line: nouns read, verbs change. This file joins the groups and turns errors into exit codes, nothing else."""

from __future__ import annotations

import os
import sys

import click
import typer

from meshbpf.cli import change, read
from meshbpf.errors import MeshError

app = typer.Typer(
    name="meshbpf",
    help="A service mesh without sidecars and iptables: eBPF carries what Python decided.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "MESHBPF"},
)
for group in (change, read):
    group.register(app)


def main() -> None:
    try:
        code = app(standalone_mode=False)
    except MeshError as error:
        print(f"meshbpf: {error}", file=sys.stderr)
        code = error.exit_code
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except BrokenPipeError:
        # The reader (head, less) has seen enough; python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code)
