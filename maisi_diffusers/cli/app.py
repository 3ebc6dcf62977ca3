"""`maisi-ct`: its commands, and how a run of it ends.

Exit codes: 0 done, 1 failed, 2 not understood, 130 interrupted. A failure is one line on stderr, or with `--json` an
object on stdout.
"""

import json
import os
import signal
import sys
import threading
from typing import Annotated

import typer
from typer.core import TyperGroup

from .. import __version__
from .generate import generate
from .info import info
from .preview import preview

FAILED, NOT_UNDERSTOOD, INTERRUPTED = 1, 2, 130


class Commands(TyperGroup):
    """The commands; what ends one of them early is said in one line."""

    def main(self, args: list[str] | None = None, prog_name: str | None = None, **extra) -> None:
        """Run a command and exit."""
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        extra["standalone_mode"] = False  # typer's own would box its errors
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's end is like Ctrl-C
        try:
            code = super().main(args, prog_name, **extra)
        except typer.TyperException as error:
            command = " ".join([self.name, *(args[:1] if args[0] in self.commands else [])])
            code = fail(f"{error.format_message().rstrip('.')} (see {command} --help)", NOT_UNDERSTOOD, args)
        except OSError as error:
            code = fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), FAILED, args)
        except (ValueError, MemoryError) as error:
            code = fail(str(error) or type(error).__name__, FAILED, args)
        if code == INTERRUPTED:
            fail("interrupted", INTERRUPTED, args)
        sys.exit(code or 0)


def fail(message: str, code: int, args: list[str]) -> int:
    """Say in one line why it failed; returns the exit code."""
    message = " ".join(message.replace("Value error, ", "").split())
    if "--json" in args:
        try:
            print(json.dumps({"error": message, "exit_code": code}), flush=True)
            return code
        except OSError:  # it cannot be written to, which may be why it failed
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for what is flushed at the end
    print(f"error: {message}", file=sys.stderr)
    return code


def show_version(wanted: bool) -> None:
    """Print the version and end, where it is asked for."""
    if wanted:
        print(f"maisi-ct {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="maisi-ct",
    cls=Commands,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(epilog="Exit codes: 0 done, 1 failed, 2 not understood, 130 interrupted.")
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Synthetic CT volumes with paired label maps, made by MAISI's networks."""


app.command()(generate)
app.command()(preview)
app.command()(info)

# These have a parser of their own, for they also run as scripts under accelerate.
OWN_PARSER = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "rich_help_panel": "Models and data",
}


@app.command(**OWN_PARSER)
def convert(context: typer.Context) -> None:
    """Convert a published MAISI checkpoint into a diffusers repository."""
    from .convert import main

    main(context.args)


@app.command(**OWN_PARSER)
def prepare(context: typer.Context) -> None:
    """Make a data set to train on from CTs and segmentations, or check one."""
    from .prepare import main

    main(context.args)


@app.command(**OWN_PARSER)
def encode(context: typer.Context) -> None:
    """Encode the volumes or the label maps of a data set to latents."""
    from .encode import main

    main(context.args)
