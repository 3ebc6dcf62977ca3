"""The five commands of docs/finetune.md, pasted as they stand, on a real CT and its segmentation."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from maisi_diffusers import MaisiControlNetModel
from maisi_diffusers.anatomy import label_index, totalsegmentator_to_maisi

ROOT = Path(__file__).resolve().parents[2]


def save_augmented_copy(source: Path, path: Path, seed: int, order: int, outside: int) -> None:
    """The volume turned, zoomed and moved a little; `seed` 0 leaves it as it is."""
    image = nib.load(source)
    data = np.asarray(image.dataobj).astype(np.int16)
    if seed:
        generator = np.random.default_rng(seed)
        angle, zoom, shift = generator.uniform(-0.08, 0.08), generator.uniform(0.95, 1.05), generator.uniform(-3, 3, 3)
        turn = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
        matrix, centre = np.array(turn) * zoom, (np.array(data.shape) - 1) / 2
        data = ndimage.affine_transform(data, matrix, centre - matrix @ centre + shift, order=order, cval=outside)
    nib.save(nib.Nifti1Image(data, image.affine), path)


@pytest.mark.slow
def test_five_commands(tmp_path, torso_ct, torso_labels):
    for folder in ("ct", "segmentations"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        save_augmented_copy(torso_ct, tmp_path / "ct" / f"case{i}.nii.gz", i, order=1, outside=-1000)
        save_augmented_copy(torso_labels, tmp_path / "segmentations" / f"case{i}.nii.gz", i, order=0, outside=0)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")

    text = (ROOT / "docs" / "finetune.md").read_text()
    section = text[text.index("## Five commands") : text.index("## For the real thing")]
    commands = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    assert len(commands) == 5
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-ec", "\n".join(commands)],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"

    log = [json.loads(line) for line in (tmp_path / "new-class" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 120 and np.mean(losses[-50:]) < 0.9 * np.mean(losses[:20])
    # A label that meant nothing has the HU of a bladder now, in the case that was held out.
    (validation,) = (line for line in log if "validation_loss" in line)
    ct, segmentation = (np.asarray(nib.load(path).dataobj) for path in (torso_ct, torso_labels))
    bladder = np.median(ct[totalsegmentator_to_maisi(segmentation.astype(np.uint8)) == label_index("bladder")])
    assert validation["hu/0-case3_label/bladder phantom"] == pytest.approx(bladder, abs=100)

    assert "bladder phantom (129): in 4 of 4 cases" in done.stdout
    assert done.stdout.strip().endswith("129")
    assert MaisiControlNetModel.from_pretrained(tmp_path / "new-class").config.label_names == {"bladder phantom": 129}
    image = nib.load(tmp_path / "synthetic_ct.nii.gz")
    labels = np.asarray(nib.load(tmp_path / "latents" / "case0_label.nii.gz").dataobj)
    assert image.shape == labels.shape and (np.asarray(image.dataobj)[labels == 0] == -1000).all()
    source = totalsegmentator_to_maisi(np.asarray(nib.load(torso_labels).dataobj).astype(np.uint8))
    prepared = np.asarray(nib.load(tmp_path / "dataset" / "labels" / "case0.nii.gz").dataobj)
    assert np.array_equal(prepared == 129, source == label_index("bladder"))
