"""The README's first command."""

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"


def test_quickstart(tmp_path):
    command = [sys.executable, SCRIPT, "--output", tmp_path / "quickstart"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "random" in run.stdout

    output = tmp_path / "quickstart"
    names = {path.name for path in output.iterdir()}
    assert names == {"model", "mask.nii.gz", "ct.nii.gz", "labels.nii.gz", "preview.png"}
    image, labels = (nib.load(output / name) for name in ("ct.nii.gz", "labels.nii.gz"))
    assert image.get_data_dtype() == np.int16
    assert np.array_equal(labels.dataobj, nib.load(output / "mask.nii.gz").dataobj)
    assert (np.asarray(image.dataobj)[np.asarray(labels.dataobj) == 0] == -1000).all()
    assert (output / "preview.png").read_bytes().startswith(b"\x89PNG")

    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode != 0 and "not empty" in again.stderr and "Traceback" not in again.stderr
