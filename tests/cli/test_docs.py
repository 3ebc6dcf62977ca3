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
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "model_cards").glob("*.md"))]


def commands(text: str) -> list[tuple[str, ...]]:
    """Arguments of every `maisi-ct` in the code of a text, in blocks of it and in lines."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, re.DOTALL)
    lines = re.sub(r"\\\n", " ", "".join(blocks)).replace("&&", "\n").splitlines()
    lines += re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [tuple(shlex.split(line)[1:]) for line in lines if re.match(r"\s*maisi-ct [a-z]", line)]


TEXTS = [*(page.read_text() for page in PAGES), *(each.__doc__ for each in (generate, info, preview))]
DOCUMENTED = sorted({line for text in TEXTS for line in commands(text)})


def test_examples_are_found():
    assert len(DOCUMENTED) >= 25
    assert {"generate", "info", "preview", "convert", "prepare", "encode"} == {line[0] for line in DOCUMENTED}


@pytest.mark.parametrize("arguments", DOCUMENTED, ids=" ".join)
def test_options_are_known(arguments):
    words = set(re.split(r"[^\w-]+", run(arguments[0], "--help").stdout))
    options = {re.sub(r"=.*", "", argument) for argument in arguments if re.match(r"--?[a-z]", argument)}
    assert options <= words
