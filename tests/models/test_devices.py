"""The package leaves devices and dtypes to its caller."""

import ast
from pathlib import Path

import pytest

import maisi_diffusers

PACKAGE = Path(maisi_diffusers.__file__).parent
SOURCES = [path for part in ("models", "schedulers", "pipelines") for path in sorted((PACKAGE / part).glob("*.py"))]
DEVICES = ("cuda", "mps", "xpu", "npu")


def chosen_for_the_caller(source, half_allowed=False):
    """Devices and casts that a source file names itself, outside of documentation."""
    found = []
    methods = {"cuda", "autocast", "bfloat16"} | (set() if half_allowed else {"half"})
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in methods:
            found.append(f"line {node.lineno}: .{node.attr}")
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.split(":")[0] in DEVICES:
            found.append(f"line {node.lineno}: {node.value!r}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_device_is_chosen(path):
    # The rectified-flow scheduler rounds its timesteps through float16 on purpose.
    rounds = path.name == "scheduling_maisi_rflow.py"
    assert not chosen_for_the_caller(path.read_text(), half_allowed=rounds)


@pytest.mark.parametrize(
    "source", ["x.cuda()", "x.half()", "torch.autocast('cpu')", "x.to('cuda')", "x.to(device='cuda:0')", "torch.cuda"]
)
def test_it_would_be_found(source):
    assert chosen_for_the_caller(source)
