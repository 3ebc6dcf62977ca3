"""`maisi-ct` in this process."""

import json

from typer.testing import CliRunner, Result

from maisi_diffusers.cli.app import app


def run(*arguments: object) -> Result:
    """A command with its exit code, stdout and stderr; what it does not catch is raised."""
    return CliRunner().invoke(
        app, [str(argument) for argument in arguments], prog_name="maisi-ct", catch_exceptions=False
    )


def run_json(*arguments: object) -> dict:
    """What a command that succeeds prints with --json, which is all that it prints."""
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return json.loads(result.stdout)


def error_of(*arguments: object, code: int = 1) -> str:
    """The line that a command fails with, which is all that it prints."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").rstrip("\n")
