"""The embedded model is put together of trained parts."""

import pytest
import torch
from safetensors.torch import load_file

from maisi_diffusers import MaisiCTPipeline, MaisiMaskPipeline
from maisi_diffusers.training.data_list import read_data_list
from tests.tiny import make_pipeline

from .training_data import load_script


@pytest.fixture
def arguments(tmp_path):
    """Parts with random weights, and two phantoms."""
    pipe = make_pipeline()
    parts = pipe.vae, pipe.unet, pipe.scheduler, pipe.controlnet
    MaisiCTPipeline(*parts, num_inference_steps=3, modality="ct").save_pretrained(tmp_path / "images")
    masks = MaisiMaskPipeline(
        pipe.mask_vae, pipe.mask_unet, pipe.mask_scheduler, mask_latent_size=(4, 4, 4), mask_spacing=(24.0,) * 3
    )
    masks.save_pretrained(tmp_path / "masks")
    phantoms = ["--num_cases", "2", "--size", "32", "32", "32", "--spacing", "12", "--other_spacings", "0"]
    load_script("make_phantoms").main(["--output_dir", str(tmp_path / "phantoms"), *phantoms])
    options = {
        "--image_model": "images",
        "--mask_model": "masks",
        "--label_maps": "phantoms",
        "--anatomy_sizes": "phantoms/dataset.json",
        "--output_dir": "model",
    }
    return [text for name, path in options.items() for text in (name, str(tmp_path / path))]


def test_a_whole_model(arguments, tmp_path):
    load_script("assemble_phantom_model").main([*arguments, "--num_inference_steps", "5"])
    pipe = MaisiCTPipeline.from_pretrained(tmp_path / "model")
    assert {name for name, component in pipe.components.items() if component is not None} == set(pipe.components)
    assert pipe.config.num_inference_steps == 5 and pipe.config.default_output_size == [128, 128, 128]
    assert pipe.config.modalities == ["unknown", "ct", "ct_wo_contrast", "ct_contrast"]
    assert pipe.config.mask_latent_size == [4, 4, 4] and pipe.config.mask_spacing == [24.0] * 3
    cases = read_data_list(tmp_path / "phantoms" / "dataset.json").cases
    assert len(pipe.mask_database) == len(pipe.anatomy_size_conditions) == 2
    assert pipe.mask_database.load(pipe.mask_database.entries[0]).shape == (32, 32, 32)
    assert pipe.anatomy_size_conditions[1] == [round(size, 3) for size in cases[1].organ_size]
    for path in (tmp_path / "model").rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    for path in (tmp_path / "model").glob("*/*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}, path
    assert "not for" in (tmp_path / "model" / "README.md").read_text()


def test_another_controlnet(arguments, tmp_path):
    controlnet = make_pipeline().controlnet
    torch.nn.init.constant_(controlnet.conv_in.bias, 0.5)
    controlnet.save_pretrained(tmp_path / "controlnet")
    load_script("assemble_phantom_model").main([*arguments, "--controlnet", str(tmp_path / "controlnet")])
    bias = MaisiCTPipeline.from_pretrained(tmp_path / "model").controlnet.conv_in.bias
    assert (bias == 0.5).all()


def test_a_folder_that_is_no_model_is_not_replaced(arguments, tmp_path):
    with pytest.raises(ValueError, match="holds no model: choose another --output_dir"):
        load_script("assemble_phantom_model").main([*arguments, "--output_dir", str(tmp_path)])
    assert (tmp_path / "images").is_dir()


def test_nothing_by_half(arguments, tmp_path):
    assemble = load_script("assemble_phantom_model")
    assemble.main(arguments)
    before = {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()}
    (tmp_path / "phantoms" / "phantom000001_labels.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match="phantom000001_labels"):
        assemble.main(arguments)
    assert {path: path.read_bytes() for path in (tmp_path / "model").rglob("*") if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
