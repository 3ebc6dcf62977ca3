"""The parser, and the end, of commands that also run as scripts under accelerate and torchrun."""

import argparse
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout

from safetensors import SafetensorError


class ScriptParser(argparse.ArgumentParser):
    """A parser with `--json`, which then also says in JSON what it does not understand."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_argument(
            "--json",
            action="store_true",
            dest="as_json",
            help="print one JSON object on stdout, also of an error, and what else there is to say on stderr",
        )

    def parse_known_args(self, args=None, namespace=None):
        """As `argparse` does it."""
        self.as_json = "--json" in (sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        """Say what is wrong with the command line, and exit with code 2."""
        if self.as_json:
            tell({"error": message}, 2)
        super().error(message)


def run(work: Callable[[], dict], as_json: bool) -> None:
    """
    Do a command's work. Where it fails, say why in one line on stderr, or as JSON, and exit with code 1.

    Args:
        work: gives what there is to tell of it to a program; with an `"error"` if some of it failed.
        as_json: tell that, on stdout; what the work prints goes to stderr.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        try:
            told = work()
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            told = {"error": " ".join(str(error).split())}
    if as_json:
        tell(told, int("error" in told))
    if "error" in told:
        sys.exit(f"error: {told['error']}")


def tell(told: dict, code: int) -> None:
    """Print one JSON object, from the first of several processes alone; exit unless the code is 0."""
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(told | ({"exit_code": code} if code else {})), flush=True)
    if code:
        sys.exit(code)


def of_cases(data_list: os.PathLike, count: int, failed: list[str]) -> dict:
    """What there is to tell of cases, some of which may have failed."""
    is_written = len(failed) < count
    told = {"data_list": str(data_list) if is_written else None, "cases": count, "failed": failed}
    if failed:
        told["error"] = f"{len(failed)} of {count} cases failed and are not in the list: {', '.join(failed)}"
    return told
