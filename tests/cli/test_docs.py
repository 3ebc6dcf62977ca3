"""What README, docs and the help pages write is understood."""

import re
import shlex
from pathlib import Path

import pytest

from maisi_diffusers.cli.generate import generate
from maisi_diffusers.cli.info import info
from maisi_diffusers.cli.preview import preview

from .running import run

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """Arguments of every `maisi-ct` line of the code in a text."""
    code = "".join(re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL))
    lines = re.sub(r"\\\n", " ", code).splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip().startswith("maisi-ct")]


DOCUMENTED = [
    *(line for page in PAGES for line in commands(page.read_text())),
    *(line for each in (generate, info, preview) for line in commands(each.__doc__)),
]


def test_examples_are_found():
    assert len(DOCUMENTED) >= 12 and {line[0] for line in DOCUMENTED} == {"generate", "info", "preview"}


@pytest.mark.parametrize("arguments", DOCUMENTED, ids=" ".join)
def test_options_are_known(arguments):
    words = set(re.split(r"[^\w-]+", run(arguments[0], "--help").stdout))
    assert {argument for argument in arguments if re.match(r"--?[a-z]", argument)} <= words
