"""A generation that ends before it is done: Ctrl-C, a full disk; and what it shows on a terminal."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from .test_generate import names

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "maisi_diffusers.cli", "generate"]


def start(model: Path, mask: Path, out: Path, *options: str, **kwargs) -> subprocess.Popen:
    """Such that it hears Ctrl-C, also where the tests themselves run in the background and do not."""
    return subprocess.Popen(
        [*COMMAND, "--model", model, "--mask", mask, "--output", out, *options],
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **kwargs},
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Until a file is there; not longer than a minute, and not if the process ends."""
    for _ in range(6000):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError(f"no {path} after a minute")


@pytest.mark.parametrize(("end", "delay"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.0)])
def test_ended_early(model, mask, tmp_path, end, delay):
    """By Ctrl-C, or by a batch system."""
    out = tmp_path / "out"
    process = start(model, mask, out, "--num", "1000")
    wait_for(out / "tiny_seed0.json", process)
    time.sleep(delay)
    process.send_signal(end)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "error: interrupted\n")
    left = {path.name for path in out.iterdir()}
    complete = {name.removesuffix(".json") for name in left if name.endswith(".json")}
    assert "tiny_seed0" in complete and left == names(*complete)


def test_ctrl_c_before_the_first_image(model, mask, tmp_path):
    out = tmp_path / "out"
    process = start(model, mask, out, "--steps", "1000", "--json")
    wait_for(out, process)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (130, '{"error": "interrupted", "exit_code": 130}\n', "")
    assert not out.exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for the volumes of an image, but not for its picture."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_full_disk(model, mask, small_disk):
    process = start(model, mask, small_disk / "out")
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stdout) == (1, "")
    assert stderr == f"error: {small_disk / 'out'} cannot be written to: No space left on device\n"
    assert list(small_disk.iterdir()) == []


def test_progress_on_a_terminal(model, mask, tmp_path):
    """And on no other file, see the tests of what is printed."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = start(model, mask, tmp_path / "out", "--num", "2", stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the end, of a terminal
            break
    os.close(ours)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and stdout.count("\n") == 2
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    for part in ("load", "denoise", "0/2", "1/2", "2/2", "images"):
        assert part in text, part
