"""A model of label maps from label maps alone: VAE, latents, UNet."""

import json

import numpy as np
import pytest

from maisi_diffusers import AutoencoderKLMaisi, MaisiMaskPipeline, MaisiUNet3DConditionModel
from maisi_diffusers.anatomy import MASK_VAE_LABELS
from maisi_diffusers.cli import encode
from tests.tiny import seeded

from .training_data import run

VAE = {
    "in_channels": 8,
    "out_channels": 125,
    "block_out_channels": [16, 16, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "use_conv_transpose": True,
}
UNET = {
    "block_out_channels": [64, 64],
    "layers_per_block": 1,
    "attention_levels": [False, True],
    "attention_head_dim": 32,
    "resnet_updown": False,
    "num_class_embeds": None,
    "use_spacing": False,
    "cross_attention_dim": 10,
    "upcast_attention": True,
}


@pytest.mark.slow
def test_from_label_maps_to_label_maps(train_vae, train_unet, label_maps, tmp_path):
    (tmp_path / "vae.json").write_text(json.dumps({"_class_name": AutoencoderKLMaisi.__name__, **VAE}))
    (tmp_path / "unet.json").write_text(json.dumps({"_class_name": MaisiUNet3DConditionModel.__name__, **UNET}))
    content = json.loads((label_maps / "list.json").read_text())
    for i, entry in enumerate(content["training"]):
        entry |= {"label": str(label_maps / entry["label"]), "organ_size": [-1, 0.2 * i, *[-1] * 5, 0.5, -1, -1]}
    data_list = tmp_path / "list.json"
    data_list.write_text(json.dumps(content))

    new_vae = ["--vae_config_name_or_path", tmp_path / "vae.json", "--data_list", data_list]
    options = ["--patch_size", 16, "--train_batch_size", 2, "--patches_per_case", 8, "--learning_rate", 3e-3]
    run(train_vae, *new_vae, "--output_dir", tmp_path / "mask-vae", *options, "--max_train_steps", 40)

    arguments = ["--data_list", data_list, "--vae", tmp_path / "mask-vae", "--output_dir", tmp_path / "mask-latents"]
    encode.main([*map(str, arguments), "--size", "24", "16", "32"])

    new_unet = [
        "--vae_model_name_or_path",
        tmp_path / "mask-vae",
        "--unet_config_name_or_path",
        tmp_path / "unet.json",
    ]
    new_unet += ["--data_list", tmp_path / "mask-latents" / "latents.json", "--output_dir", tmp_path / "masks"]
    run(train_unet, *new_unet, "--learning_rate", 1e-3, "--train_batch_size", 2, "--max_train_steps", 20)

    pipe = MaisiMaskPipeline.from_pretrained(tmp_path / "masks")
    pipe.set_progress_bar_config(disable=True)
    sizes = [("liver", 0.4), ("hepatic tumor", 0.5)]
    first, second = (pipe(controllable_anatomy_size=sizes, generator=seeded()).masks[0] for _ in range(2))
    assert first.shape == (24, 16, 32) and np.array_equal(first.dataobj, second.dataobj)
    np.testing.assert_allclose(first.header.get_zooms(), (2, 2, 3), rtol=1e-3)
    labels = np.unique(first.dataobj)
    assert set(labels) <= set(MASK_VAE_LABELS) and len(labels) > 1
