"""The commands, how fast they are there, and how they end."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from maisi_diffusers import MaisiCTPipeline, __version__
from maisi_diffusers.cli.option_names import OPTIONS
from maisi_diffusers.cli.record import NOT_ASKED_FOR

from .running import error_of, run

COMMANDS = ("generate", "preview", "info", "convert", "prepare", "encode")


def test_help():
    for arguments in (["--help"], ["-h"], []):
        result = run(*arguments)
        assert result.exit_code == 0 and all(command in result.stdout for command in COMMANDS)
    assert "0 done, 1 failed, 2 not understood, 130 interrupted" in " ".join(result.stdout.split())


def test_version():
    assert run("--version").stdout == f"maisi-ct {__version__}\n"


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate", "--body-region"),
        ("preview", "--window"),
        ("info", "--plan"),
        ("convert", "--max_shard_size"),
        ("prepare", "--class_organs"),
        ("encode", "--posterior"),
    ],
)
def test_help_of_commands(command, option, capsys):
    result = run(command, "--help")
    assert result.exit_code == 0 and option in result.stdout
    assert f"maisi-ct {command}" in result.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], ["info", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "maisi_diffusers.cli", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported and not imported & {"torch", "numpy", "nibabel", "diffusers", "matplotlib"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generat"], "No such command 'generat'"),
        (["generate", "--bodyregion", "chest"], "No such option: --bodyregion"),
        (["generate", "--output-size", "9", "9"], "'--output-size'"),
        (["generate", "--steps", "many"], "'--steps'"),
        (["generate", "--num", "0"], "'--num'"),
        (["generate", "--seed", "-1"], "'--seed'"),
        (["generate", "--window", "liver"], "'liver' is not one of"),
        (["preview"], "Missing argument"),
        (["preview", "no-such-file.nii.gz"], "'no-such-file.nii.gz' does not exist"),
    ],
)
def test_not_understood(arguments, says):
    message = error_of(*arguments, code=2)
    assert says in message and "Value error" not in message
    command = "maisi-ct" if arguments[0] == "generat" else f"maisi-ct {arguments[0]}"
    assert message.endswith(f"(see {command} --help)")


def test_not_understood_as_json():
    result = run("generate", "--steps", "many", "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    said = json.loads(result.stdout)
    assert said["exit_code"] == 2 and "'--steps'" in said["error"]


def test_errors_of_commands_with_a_parser_of_their_own(tmp_path):
    assert run("prepare", "--images", "x").exit_code == 2
    result = run("convert", tmp_path / "missing", tmp_path / "out", "--version", "rflow-ct")
    assert result.exit_code == 1 and "neither a folder nor a Hub id" in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "maisi_diffusers.cli", "info", "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and done.stderr == "error: [Errno 28] No space left on device\n"


def test_every_argument_of_the_pipeline_has_an_option():
    arguments = inspect.signature(MaisiCTPipeline.__call__).parameters.keys() - {"self", *NOT_ASKED_FOR}
    assert OPTIONS.keys() == arguments
    help_page = run("generate", "--help").stdout  # narrow: the longest name is cut
    assert [option for option in OPTIONS.values() if option[:20] not in help_page] == []


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "maisi_diffusers.cli", "generat"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: No such command 'generat'. Did you mean 'generate'? (see maisi-ct --help)\n"
