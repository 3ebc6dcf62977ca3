"""Work that several processes share."""

import os
import subprocess
import sys

import pytest

from maisi_diffusers.workers import map_in_processes


@pytest.mark.parametrize("num_processes", [1, 2])
def test_in_order(num_processes):
    assert list(map_in_processes(abs, range(-9, 0), num_processes)) == list(range(9, 0, -1))


def test_errors_come_through():
    with pytest.raises(ValueError, match="invalid literal for int"):
        list(map_in_processes(int, ["1", "x", "3"], 2))


def test_none():
    with pytest.raises(ValueError, match="num_processes=0 is not allowed: give 1 or more"):
        list(map_in_processes(abs, [1], 0))


def test_a_process_that_is_killed():
    with pytest.raises(RuntimeError, match="one of the 2 processes ended early"):
        list(map_in_processes(os._exit, [1], 2))


def test_a_script_without_main(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from maisi_diffusers.workers import map_in_processes\nlist(map_in_processes(abs, [1], 2))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and 'outside of `if __name__ == "__main__":`' in done.stderr
