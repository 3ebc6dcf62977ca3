"""`log.jsonl`: a line a step, and no line twice when a run goes on."""

import json

import pytest

from maisi_diffusers.training.trackers import JSONLinesTracker, read_log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def write(path, text):
    path.write_text(text)
    return path


def test_log(path):
    tracker = JSONLinesTracker(path.parent, 0)
    tracker.log({"loss": 0.5}, step=1)
    tracker.log({"loss": 0.25, "other": 1}, step=2)
    assert tracker.tracker == path
    assert [json.loads(line) for line in path.read_text().splitlines()] == read_log(path)
    assert read_log(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "other": 1}]


def test_what_came_after_the_checkpoint_is_dropped(path):
    tracker = JSONLinesTracker(path.parent, 0)
    for step in range(1, 6):
        tracker.log({"loss": step}, step=step)
    tracker.log({"validation_loss": 3.5}, step=3)
    JSONLinesTracker(path.parent, 3).log({"loss": 40}, step=4)
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 3, 4]
    assert read_log(path)[-1]["loss"] == 40


def test_new_run_starts_anew(path):
    JSONLinesTracker(path.parent, 0).log({"loss": 1}, step=1)
    JSONLinesTracker(path.parent, 0)
    assert read_log(path) == [] and path.read_text() == ""


def test_line_cut_short(path):
    """By a kill: it is not read, and the next does not go on in it."""
    write(path, '{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 1.0}]
    JSONLinesTracker(path.parent, 2).log({"loss": 3.0}, step=3)
    assert read_log(path) == [{"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0}]


def test_log_stays_when_it_cannot_be_rewritten(path, monkeypatch):
    write(path, '{"step": 1, "loss": 1.0}\n')

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        JSONLinesTracker(path.parent, 1)
    assert read_log(path) == [{"step": 1, "loss": 1.0}]


def test_no_log(path):
    assert read_log(path) == []
