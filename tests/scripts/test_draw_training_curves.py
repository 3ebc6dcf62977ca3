"""Losses of trainings as a table and a picture."""

import json

import pytest

from .training_data import load_script


def write_log(folder, losses):
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": i + 1, "loss": loss, "lr": 1e-3}) for i, loss in enumerate(losses)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_table_and_picture(tmp_path):
    runs = [write_log(tmp_path / "vae", [4.0, 2.0, 1.0]), write_log(tmp_path / "unet", [0.5])]
    output = tmp_path / "out" / "training"
    load_script("draw_training_curves").main(["--runs", *runs, "--every", "2", "--output", str(output)])
    assert output.with_suffix(".csv").read_text().splitlines() == [
        "run,loss,step,mean",
        "vae,loss,2,3",
        "vae,loss,3,1",
        "unet,loss,1,0.5",
    ]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_equal_names(tmp_path, capsys):
    runs = [write_log(tmp_path / which / "unet", [1.0]) for which in ("a", "b")]
    with pytest.raises(SystemExit):
        load_script("draw_training_curves").main(["--runs", *runs, "--output", str(tmp_path / "x")])
    assert "two folders have one name" in capsys.readouterr().err


def test_no_log(tmp_path):
    with pytest.raises(FileNotFoundError, match="no log.jsonl"):
        load_script("draw_training_curves").main(["--runs", str(tmp_path), "--output", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())
