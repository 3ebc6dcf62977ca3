"""A saved pipeline gives the same image again, bit for bit, in a fresh process."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from maisi_diffusers import MaisiCTPipeline, MaisiMaskPipeline, MaisiRFlowScheduler
from tests.tiny import make_label_map, make_pipeline, seeded

GENERATE = """
import hashlib, sys
import torch
{imports}
for dtype, variant in {kinds}:
    folder = sys.argv[1] + "/" + dtype
    pipe = {pipeline}.from_pretrained(folder, torch_dtype=getattr(torch, dtype), variant=variant)
    pipe.set_progress_bar_config(disable=True)
    out = pipe(mask=sys.argv[2], generator=torch.Generator().manual_seed(0), output_type="np")
    print("RESULT", type(pipe).__name__, pipe.unet.dtype, hashlib.sha256(out.images.tobytes()).hexdigest())
"""
KINDS = [("float32", None), ("bfloat16", None), ("float16", "fp16")]
LOADERS = {
    "MaisiCTPipeline": ("from maisi_diffusers import MaisiCTPipeline", "MaisiCTPipeline"),
    "DiffusionPipeline": ("import maisi_diffusers\nfrom diffusers import DiffusionPipeline", "DiffusionPipeline"),
    "DiffusionPipeline first": (
        "from diffusers import DiffusionPipeline\nimport maisi_diffusers",
        "DiffusionPipeline",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with the pipeline in every dtype and a label map, and what a fresh process is to print."""
    folder = tmp_path_factory.mktemp("saved")
    make_label_map().to_filename(folder / "mask.nii.gz")
    expected = []
    for dtype, variant in KINDS:
        pipe = make_pipeline("rflow-ct").to(getattr(torch, dtype))
        pipe.save_pretrained(folder / dtype, variant=variant)
        images = pipe(mask=folder / "mask.nii.gz", generator=seeded(), output_type="np").images
        expected.append(f"RESULT MaisiCTPipeline torch.{dtype} {hashlib.sha256(images.tobytes()).hexdigest()}")
    assert len(set(expected)) == len(KINDS)
    return folder, expected


@pytest.mark.parametrize("loader", LOADERS)
def test_fresh_process(saved, loader):
    folder, expected = saved
    imports, pipeline = LOADERS[loader]
    code = GENERATE.format(imports=imports, pipeline=pipeline, kinds=KINDS)
    run = subprocess.run([sys.executable, "-c", code, folder, folder / "mask.nii.gz"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line for line in run.stdout.splitlines() if line.startswith("RESULT")] == expected


@pytest.mark.parametrize("version", ["rflow-ct", "ddpm-ct"])
def test_round_trip(tmp_path, version):
    """Configuration, optional components, and nothing but safetensors and JSON."""
    pipe = make_pipeline(version)
    pipe.register_to_config(input_rules={"sizes": [[24, 16, 32]]}, modality="ct_contrast", modalities=["ct_contrast"])
    pipe.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["maisi_diffusers", "MaisiUNet3DConditionModel"]  # whatever file the class is in
    assert index["_class_name"] == "MaisiCTPipeline"

    again = MaisiCTPipeline.from_pretrained(tmp_path)
    names = ("num_inference_steps", "modality", "modalities", "prediction_type", "input_rules", "mask_latent_size")
    assert {name: again.config[name] for name in names} == {name: pipe.config[name] for name in names}
    for name, component in pipe.components.items():
        loaded = again.components[name]
        assert type(loaded) is type(component)
        if isinstance(component, torch.nn.Module):
            for key, value in component.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value), (name, key)
        else:
            config = {key: value for key, value in component.config.items() if not key.startswith("_")}
            assert config.items() <= loaded.config.items()


def test_without_optional_components(tmp_path):
    make_pipeline("rflow-ct", with_mask_networks=False).save_pretrained(tmp_path)
    again = MaisiCTPipeline.from_pretrained(tmp_path, controlnet=None)
    assert again.controlnet is None and again.mask_unet is None and again.mask_scheduler is None
    assert isinstance(again.scheduler, MaisiRFlowScheduler)


def test_mask_pipeline_from_the_same_repository(tmp_path):
    pipe = make_pipeline("rflow-ct")
    pipe.save_pretrained(tmp_path)
    masks = MaisiMaskPipeline.from_pretrained(tmp_path)
    masks.set_progress_bar_config(disable=True)
    assert masks.config.mask_spacing == pipe.config.mask_spacing
    sizes = [("liver", 0.5)]
    expected = MaisiMaskPipeline.from_pipe(pipe)(controllable_anatomy_size=sizes, generator=seeded(), output_type="pt")
    found = masks(controllable_anatomy_size=sizes, generator=seeded(), output_type="pt")
    assert torch.equal(found.masks, expected.masks)


def test_swapped_scheduler_is_saved(tmp_path):
    """A pipeline remembers what its UNet predicts, whichever solver it was saved with."""
    from diffusers import UniPCMultistepScheduler

    pipe = make_pipeline("rflow-ct")
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    expected = pipe(mask=make_label_map(), generator=seeded(), output_type="np").images
    pipe.save_pretrained(tmp_path)
    again = MaisiCTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is UniPCMultistepScheduler
    assert again.config.prediction_type == "flow_prediction"
    assert (again(mask=make_label_map(), generator=seeded(), output_type="np").images == expected).all()


def test_import_is_light():
    """Names are there at once, diffusers and torch only when one is used."""
    code = (
        "import sys, maisi_diffusers; assert 'AutoencoderKLMaisi' in dir(maisi_diffusers); "
        "heavy = {'torch', 'diffusers', 'transformers', 'scipy', 'nibabel'} & set(sys.modules); "
        "assert not heavy, heavy; "
        "maisi_diffusers.MaisiCTPipeline; maisi_diffusers.models; assert 'monai' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_unknown_name():
    import maisi_diffusers

    with pytest.raises(AttributeError, match="MaisiPipeline"):
        maisi_diffusers.MaisiPipeline  # noqa: B018
