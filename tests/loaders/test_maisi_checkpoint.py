"""Checkpoints as they are published, and as MONAI's training scripts leave them, become pipelines."""

import operator
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.utils.enums import MetaKeys, SpaceKeys
from safetensors.torch import load_file

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.loaders.architecture import RELEASED, read_architecture
from maisi_diffusers.loaders.key_mapping import unet_source_keys
from maisi_diffusers.pipelines.input_rules import CT_RULES, MR_RULES
from maisi_diffusers.pipelines.recommended_grids import MR_FOVS
from tests.parity.monai_reference import (
    MASK_SCALE_FACTOR,
    SCALE_FACTOR,
    SIZES,
    build_networks,
    network_config,
    save_checkpoint,
)

from .checkpoints import CONFIG, FILES, TINY, remove_weights, rewrite, rewrite_config, weights_of

ROOT = Path(__file__).parents[2]
METADATA = {
    MetaKeys.SPACE: SpaceKeys.RAS,
    MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
    MetaKeys.SPATIAL_SHAPE: torch.tensor([512, 512, 128]),
    MetaKeys.PIXDIM: [np.float32(0.75), np.float64(2.5)],
    "qform_code": np.int16(1),
    "is_synthetic": np.bool_(True),
    "filename_or_obj": "ct.nii.gz",
}
NUMPY_SCALARS = {
    "epoch": np.int64(299),
    "loss": np.float64(0.25),
    "best_loss": np.float32(0.125),
    "num_train_timesteps": np.int64(1000),
    "finished": np.bool_(True),
    "rank": np.uint8(3),
}


def load(folder, version="rflow-ct", **kwargs):
    return MaisiCTPipeline.from_maisi_checkpoint(folder, version=version, **kwargs)


def state_dicts(pipe):
    return {
        name: component.state_dict() for name, component in pipe.components.items() if hasattr(component, "state_dict")
    }


def assert_same_weights(ours, expected):
    assert ours.keys() == expected.keys()
    for name in expected:
        assert ours[name].keys() == expected[name].keys()
        for key, weight in expected[name].items():
            assert ours[name][key].dtype == weight.dtype
            assert torch.equal(ours[name][key], weight), f"{name}.{key}"


@pytest.fixture(scope="module")
def expected(published):
    return state_dicts(load(published))


def as_meta_tensor(tensor):
    return MetaTensor(tensor, affine=torch.eye(4, dtype=torch.float64), meta=dict(METADATA))


def save_as_monai_does(checkpoint):
    """MetaTensors for all weights and the scale factor, numpy scalars beside them."""
    for name, file in FILES.items():

        def change(content, name=name):
            weights = weights_of(content)
            weights.update({key: as_meta_tensor(weight) for key, weight in weights.items()})
            if "scale_factor" in content:
                content["scale_factor"] = as_meta_tensor(torch.as_tensor(content["scale_factor"]))
            if weights is not content:
                content.update(NUMPY_SCALARS)

        rewrite(checkpoint / file, change)


READ_WITHOUT_MONAI = """
import sys
sys.modules["monai"] = None  # whatever imports it fails
from maisi_diffusers import MaisiCTPipeline
MaisiCTPipeline.from_maisi_checkpoint(sys.argv[1], version="rflow-ct").save_pretrained(sys.argv[2])
"""


def test_tensors_of_monai_without_monai(tmp_path):
    networks = build_networks("rflow-ct", SIZES["two levels"])
    config = network_config("rflow-ct", SIZES["two levels"])
    folder = save_checkpoint(tmp_path / "checkpoint", "rflow-ct", networks, config)
    expected = load(folder)
    save_as_monai_does(folder)
    with zipfile.ZipFile(folder / FILES["unet"]) as archive:
        (pickled,) = (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    for name in (b"MetaTensor", b"MetaKeys", b"SpaceKeys", b"numpy._core.multiarray\nscalar"):
        assert name in pickled

    output = tmp_path / "output"
    subprocess.run([sys.executable, "-c", READ_WITHOUT_MONAI, folder, output], check=True, cwd=ROOT)
    read = {name: load_file(output / name / "diffusion_pytorch_model.safetensors") for name in state_dicts(expected)}
    assert_same_weights(read, state_dicts(expected))
    pipe = MaisiCTPipeline.from_pretrained(output)
    assert pipe.vae.config.scaling_factor == torch.tensor(SCALE_FACTOR).item()
    assert pipe.mask_vae.config.scaling_factor == torch.tensor(MASK_SCALE_FACTOR).item()
    shutil.rmtree(tmp_path)


def test_tensors_of_monai_with_monai(checkpoint, expected):
    """MONAI allows its own class in `torch.load` when it is imported; the weights must be plain all the same."""
    save_as_monai_does(checkpoint)
    pipe = load(checkpoint)
    assert_same_weights(state_dicts(pipe), expected)
    for name, weights in state_dicts(pipe).items():
        for key, weight in weights.items():
            assert type(weight) is torch.Tensor and not hasattr(weight, "_meta"), f"{name}.{key}"
    assert type(pipe.vae.config.scaling_factor) is float


@pytest.mark.parametrize(
    "scale_factor",
    [1.25, np.float32(1.25), np.float64(1.25), torch.tensor(1.25), torch.tensor([1.25]), torch.tensor(1.25).half()],
    ids=repr,
)
def test_scale_factor(checkpoint, scale_factor):
    rewrite(checkpoint / FILES["unet"], lambda content: content.update({"scale_factor": scale_factor}))
    factor = load(checkpoint).vae.config.scaling_factor
    assert factor == 1.25 and type(factor) is float


def test_released_mask_scale_factor_where_the_file_has_none(checkpoint):
    rewrite(checkpoint / FILES["mask_unet"], lambda content: operator.delitem(content, "scale_factor"))
    rewrite_config(checkpoint, lambda config: operator.delitem(config, "mask_generation_scale_factor"))
    assert load(checkpoint).mask_vae.config.scaling_factor == 1.0055984258651733


def test_scalars_of_numpy_1(checkpoint, expected):
    """Its module had another name in the pickle."""
    path = checkpoint / FILES["unet"]
    rewrite(path, lambda content: content.update(NUMPY_SCALARS, scale_factor=np.float64(SCALE_FACTOR)))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            archive.writestr(name, data)
    pipe = load(checkpoint)
    assert pipe.vae.config.scaling_factor == SCALE_FACTOR
    assert_same_weights(state_dicts(pipe), expected)


def test_dtype(checkpoint, expected):
    pipe = load(checkpoint, torch_dtype=torch.float16)
    halves = {name: {key: weight.half() for key, weight in weights.items()} for name, weights in expected.items()}
    assert_same_weights(state_dicts(pipe), halves)


def test_vae_under_unet_state_dict(checkpoint, expected):
    for name in ("vae", "mask_vae"):
        rewrite(checkpoint / FILES[name], lambda content: {"unet_state_dict": content, "epoch": 3})
    assert_same_weights(state_dicts(load(checkpoint)), expected)


def test_partial_controlnet(checkpoint, expected):
    lent = [
        key
        for key in unet_keys(expected["controlnet"])
        if key in set(unet_keys(expected["unet"])) and not key.endswith("time_emb_proj.weight")
    ]
    assert len(lent) > 30
    remove_weights(checkpoint / FILES["controlnet"], lent)
    pipe = load(checkpoint)
    own, unet = pipe.controlnet.state_dict(), pipe.unet.state_dict()
    storages = {weight.untyped_storage().data_ptr() for weight in unet.values()}
    for name, weight in own.items():
        if unet_source_keys(name)[0] in lent:
            assert torch.equal(weight, unet[name])
            assert not torch.equal(weight, expected["controlnet"][name])
            assert weight.untyped_storage().data_ptr() not in storages
        else:
            assert torch.equal(weight, expected["controlnet"][name])


def unet_keys(weights):
    return [unet_source_keys(name)[0] for name in weights]


@pytest.mark.parametrize("part", ["controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"])
def test_controlnet_lacks_what_the_unet_has_not(checkpoint, expected, part):
    keys = [key for key in unet_keys(expected["controlnet"]) if key.startswith(part)]
    remove_weights(checkpoint / FILES["controlnet"], keys)
    with pytest.raises(ValueError) as caught:
        load(checkpoint)
    assert f"lacks {len(keys)} key(s)" in str(caught.value) and keys[0] in str(caught.value)


def test_controlnet_of_another_width_borrows_nothing(checkpoint):
    """A weight of the UNet that does not fit is not taken for a missing one."""
    rewrite_config(checkpoint, lambda config: config["controlnet_def"].update({"num_channels": [64, 32]}))
    rewrite(checkpoint / FILES["controlnet"], lambda content: {"controlnet_state_dict": {}})
    with pytest.raises(ValueError, match="lacks") as caught:
        load(checkpoint)
    assert "time_embed.0.weight" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("absent", ["controlnet", "mask_vae", "mask_unet"])
def test_optional_networks(checkpoint, absent):
    (checkpoint / FILES[absent]).unlink()
    pipe = load(checkpoint)
    assert (pipe.controlnet is None) == (absent == "controlnet")
    for name in ("mask_vae", "mask_unet", "mask_scheduler"):
        assert (getattr(pipe, name) is None) == absent.startswith("mask")


def test_older_bundle(tmp_path):
    networks = build_networks("ddpm-ct", TINY)
    folder = save_checkpoint(tmp_path / "checkpoint", "ddpm-ct", networks, network_config("ddpm-ct", TINY))
    expected = state_dicts(load(folder, "ddpm-ct"))
    older = {
        "autoencoder_v1.pt": "autoencoder_epoch273.pt",
        "diff_unet_3d_ddpm-ct.pt": "input_unet3d_data-all_steps1000size512ddpm_random_current_inputx_v1.pt",
        "controlnet_3d_ddpm-ct.pt": "controlnet-20datasets-e20wl100fold0bc_noi_dia_fsize_current.pt",
    }
    for name, older_name in older.items():
        (folder / "models" / name).rename(folder / "models" / older_name)
    pipe = load(folder, "ddpm-ct")
    assert_same_weights(state_dicts(pipe), expected)
    assert set(expected) == {"vae", "unet", "controlnet", "mask_vae", "mask_unet"}
    assert type(pipe.scheduler).__name__ == "DDPMScheduler"
    assert pipe.config.num_inference_steps == 1000 and pipe.config.modality == "ct"
    assert pipe.config.input_rules == CT_RULES
    assert pipe.unet.config.use_region_index and pipe.unet.class_embedding is None


@pytest.mark.parametrize(
    ("version", "vae", "unet"),
    [
        ("rflow-mr", "autoencoder_v2.pt", "diff_unet_3d_rflow-mr.pt"),
        ("rflow-mr-brain", "autoencoder_v1.pt", "diff_unet_3d_rflow-mr-brain_v1.pt"),
    ],
)
def test_mr(checkpoint, expected, version, vae, unet):
    models = checkpoint / "models"
    (checkpoint / FILES["vae"]).rename(models / vae)
    (checkpoint / FILES["unet"]).rename(models / unet)
    pipe = load(checkpoint, version)
    # The CT's files that lie beside them are not this model's.
    assert pipe.controlnet is None and pipe.mask_unet is None and pipe.mask_vae is None
    assert_same_weights(state_dicts(pipe), {name: expected[name] for name in ("vae", "unet")})
    assert type(pipe.scheduler).__name__ == "MaisiRFlowScheduler" and pipe.scheduler.config.monai_rounding
    assert pipe.config.num_inference_steps == 30 and pipe.config.modality == "mri"
    assert pipe.config.input_rules == MR_RULES
    assert pipe.config.guidance_scale == {"rflow-mr": 15.0, "rflow-mr-brain": 2.0}[version]
    assert pipe.config.recommended_fovs == MR_FOVS[version]
    with pytest.raises(ValueError, match="not one that this model was trained for"):
        pipe(image_only=True, output_size=(512, 512, 512))
    with pytest.raises(ValueError, match="no ControlNet"):
        pipe(output_size=(256, 256, 128))

    pipe.register_to_config(input_rules=None, recommended_fovs=None)  # whose smallest volume takes too long here
    request = {"image_only": True, "modality": "t1", "output_size": (16, 16, 16), "num_inference_steps": 2}
    images = [
        pipe(**request, **guidance, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for guidance in ({}, {"guidance_scale": pipe.config.guidance_scale}, {"guidance_scale": 0})
    ]
    assert images[0].shape == (1, 16, 16, 16) and images[0].std() > 0
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_fields_without_effect_and_references(checkpoint, expected):
    def change(config):
        config["channels_of_the_latent"] = config.pop("latent_channels")
        config["latent_channels"] = "@channels_of_the_latent"
        config["diffusion_unet_def"].update(use_flash_attention=True, _target_="DiffusionModelUNetMaisi")
        config["autoencoder_def"].update(norm_float16=True, num_splits=8, dim_split=2, save_mem=True)
        config["unknown_section"] = {"unknown": 1}

    rewrite_config(checkpoint, change)
    assert_same_weights(state_dicts(load(checkpoint)), expected)


def test_configuration_decides(checkpoint):
    """Its schedulers are those of the pipeline."""

    def change(config):
        config["noise_scheduler"].update(num_train_timesteps=500, use_timestep_transform=False)
        config["mask_generation_noise_scheduler"].update(beta_end=0.0205, schedule="linear_beta")
        config["mask_generation_scale_factor"] = 1.5

    rewrite_config(checkpoint, change)
    rewrite(checkpoint / FILES["mask_unet"], lambda content: operator.delitem(content, "scale_factor"))
    pipe = load(checkpoint)
    assert pipe.scheduler.config.num_train_timesteps == 500 and not pipe.scheduler.config.use_timestep_transform
    assert pipe.mask_scheduler.config.beta_end == 0.0205 and pipe.mask_scheduler.config.beta_schedule == "linear"
    assert pipe.mask_vae.config.scaling_factor == 1.5


def test_configuration_of_a_later_mask_unet(checkpoint):
    """It is of another file; the one that is read has the network that was released with it."""

    def change(config):
        config["mask_generation_diffusion_def"].update(
            adagn_condition_dim=19, adagn_context_embed_dim=256, cross_attention_dim=19
        )
        config["mask_generation_noise_scheduler"] = dict(config["noise_scheduler"])

    rewrite_config(checkpoint, change)
    architecture = read_architecture(checkpoint, "rflow")
    assert architecture["mask_unet"] == RELEASED["rflow"]["mask_unet"]
    assert architecture["mask_scheduler"] == RELEASED["rflow"]["mask_scheduler"]
    (checkpoint / FILES["mask_unet"]).unlink()
    assert load(checkpoint).mask_unet is None


def test_defaults_of_monai(checkpoint):
    """A configuration may leave fields out."""

    def change(config):
        for section in ("diffusion_unet_def", "controlnet_def"):
            del config[section]["num_head_channels"]
        del config["noise_scheduler"]["use_discrete_timesteps"]

    rewrite_config(checkpoint, change)
    architecture = read_architecture(checkpoint, "rflow")
    assert architecture["unet"]["attention_head_dim"] == architecture["controlnet"]["attention_head_dim"] == 8
    assert architecture["scheduler"]["use_discrete_timesteps"]


def test_configuration_of_another_kind_is_not_read(checkpoint, tmp_path):
    """A folder may hold both; `ddpm-ct` does not read `config_network_rflow.json`."""
    ddpm = build_networks("ddpm-ct", TINY)
    other = save_checkpoint(tmp_path / "ddpm", "ddpm-ct", ddpm, network_config("ddpm-ct", TINY))
    shutil.copytree(other, checkpoint, dirs_exist_ok=True)
    assert (checkpoint / CONFIG).is_file()
    assert_same_weights(state_dicts(load(checkpoint, "ddpm-ct")), state_dicts(load(other, "ddpm-ct")))


def test_networks_can_be_trained(checkpoint):
    pipe = load(checkpoint)
    for name in FILES:
        model = getattr(pipe, name)
        assert not model.training
        assert all(parameter.requires_grad and not parameter.is_meta for parameter in model.parameters())
