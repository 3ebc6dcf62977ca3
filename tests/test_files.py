"""Files and folders are there as a whole or not at all."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from maisi_diffusers.files import remove, write_atomically, write_files_atomically


def write(path, text, folder):
    """Write a text to a file, or to a file in a folder."""
    if folder:
        path.mkdir(exist_ok=True)
        path = path / "content.txt"
    path.write_text(text)


def read(path):
    return (path / "content.txt" if path.is_dir() else path).read_text()


@pytest.fixture(params=[False, True], ids=["file", "folder"])
def folder(request):
    return request.param


def test_written(tmp_path, folder):
    path = tmp_path / "new" / "a.nii.gz"
    with write_atomically(path) as temporary:
        assert temporary.parent == path.parent and not temporary.exists()
        assert temporary.name.startswith(".") and temporary.name.endswith(".nii.gz")
        write(temporary, "content", folder)
        assert not path.exists()
    assert read(path) == "content"
    assert os.listdir(path.parent) == ["a.nii.gz"]


def test_permissions_of_a_new_file(tmp_path, folder):
    """Whatever the library that wrote it gave it."""
    usual = tmp_path / "usual"
    usual.touch()
    with write_atomically(tmp_path / "a") as temporary:
        write(temporary, "content", folder)
        for path in [*temporary.rglob("*"), *([] if folder else [temporary])]:
            path.chmod(0o600)
    path = tmp_path / "a" / "content.txt" if folder else tmp_path / "a"
    assert path.stat().st_mode == usual.stat().st_mode


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="a.txt"):
        with write_atomically(tmp_path / "a.txt"):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_replaces(tmp_path, folder):
    path = tmp_path / "a"
    write(path, "old", folder)
    if folder:
        (path / "surplus.txt").touch()
    with write_atomically(path) as temporary:
        write(temporary, "new", folder)
    assert read(path) == "new"
    assert os.listdir(tmp_path) == ["a"]
    assert not folder or os.listdir(path) == ["content.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_failed_write_changes_nothing(tmp_path, folder, error, is_there):
    path = tmp_path / "a"
    if is_there:
        write(path, "old", folder)
    with pytest.raises(error):
        with write_atomically(path) as temporary:
            write(temporary, "half", folder)
            raise error
    assert os.listdir(tmp_path) == (["a"] if is_there else [])
    assert not is_there or read(path) == "old"


def test_a_block_that_writes_nothing_fails(tmp_path, folder):
    write(tmp_path / "a", "old", folder)
    with pytest.raises(FileNotFoundError):
        with write_atomically(tmp_path / "a"):
            pass
    assert read(tmp_path / "a") == "old"


KILLED = """
import os, signal, sys
from maisi_diffusers.files import write_atomically
with write_atomically(sys.argv[1]) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_write_changes_nothing(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    assert [name for name in os.listdir(tmp_path) if not name.startswith(".")] == ["a.json"]
    with write_atomically(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_removal_that_was_interrupted_is_finished(tmp_path):
    folder = tmp_path / "checkpoint"
    write(folder, "second", folder=True)
    write(tmp_path / ".checkpoint.removed", "first, half removed", folder=True)
    remove(folder)
    assert os.listdir(tmp_path) == []
    remove(folder)  # there is none


def test_files_join_a_folder(tmp_path):
    write(tmp_path / "kept.txt", "kept", folder=False)
    write(tmp_path / "a.txt", "old", folder=False)
    with write_files_atomically(tmp_path) as temporary:
        write(temporary / "a.txt", "new", folder=False)
        write(temporary / "b.txt", "new", folder=False)
        assert read(tmp_path / "a.txt") == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "kept.txt": "kept",
        "a.txt": "new",
        "b.txt": "new",
    }


def test_none_joins_a_folder_when_one_fails(tmp_path):
    write(tmp_path / "a.txt", "old", folder=False)
    with pytest.raises(ValueError):
        with write_files_atomically(tmp_path) as temporary:
            write(temporary / "a.txt", "new", folder=False)
            raise ValueError
    assert os.listdir(tmp_path) == ["a.txt"] and read(tmp_path / "a.txt") == "old"


def test_an_old_folder_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    """A failure or Ctrl-C between the two renames brings it back."""
    write(tmp_path / "a", "old", folder=True)
    replace, calls = os.replace, []

    def interrupted(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with write_atomically(tmp_path / "a") as temporary:
            write(temporary, "new", folder=True)
    assert read(tmp_path / "a") == "old" and os.listdir(tmp_path) == ["a"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, folder):
    write(tmp_path / "shared", "old", folder)
    (tmp_path / "a").symlink_to(tmp_path / "shared")
    with write_atomically(tmp_path / "a") as temporary:
        write(temporary, "new", folder)
    assert read(tmp_path / "a") == "new" and not (tmp_path / "a").is_symlink()
    assert read(tmp_path / "shared") == "old"
