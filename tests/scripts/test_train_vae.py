"""Training of the VAE: reconstructions, posterior, discriminator."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.anatomy import MASK_VAE_LABELS, label_bits
from maisi_diffusers.training.checkpoints import list_checkpoints
from maisi_diffusers.training.data_list import DataList, read_data_list, split_fold, write_data_list
from maisi_diffusers.training.discriminator import MaisiPatchDiscriminator
from maisi_diffusers.training.patches import LabelPatchDataset, PatchDataset
from maisi_diffusers.training.randomness import case_generator
from maisi_diffusers.training.trackers import read_log
from maisi_diffusers.training.vae_losses import adversarial_loss

from .training_data import error_of, interrupt, on_volumes, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
OPTIONS = ["--patch_size", 24, "--max_train_steps", 5, "--checkpointing_steps", 2, "--train_batch_size", 2]
OPTIONS += ["--gradient_accumulation_steps", 2, "--patches_per_case", 2, "--checkpoints_total_limit", 1]
VALIDATION = ["--validation_steps", 5]


@pytest.fixture(scope="module")
def trained(train_vae, volumes, tmp_path_factory):
    output = tmp_path_factory.mktemp("training") / "vae"
    vae = ["--vae_model_name_or_path", volumes / "vae"]
    run(train_vae, *on_volumes(volumes, output, *vae, *OPTIONS, *VALIDATION))
    return output


def test_output(trained, volumes):
    names = {"config.json", WEIGHTS, "discriminator", "README.md", "args.json", "log.jsonl", "checkpoint-4"}
    assert {path.name for path in trained.iterdir()} == names
    vae, base = (AutoencoderKLMaisi.from_pretrained(folder) for folder in (trained, volumes / "vae"))
    before = base.state_dict()
    assert not [name for name, weight in vae.state_dict().items() if torch.equal(weight, before[name])]
    assert vae.config.scaling_factor == base.config.scaling_factor
    AutoencoderKLMaisi.from_pretrained(trained / "checkpoint-4" / "vae")
    discriminator = MaisiPatchDiscriminator.from_pretrained(trained / "discriminator")
    assert discriminator.conv_out.bias.any()  # it starts at zero
    assert "4 volumes" in (trained / "README.md").read_text()


def test_log(trained):
    log = read_log(trained / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 5]
    for line in log[:5]:
        parts = line["reconstruction_loss"] + 1e-7 * line["kl_loss"] + 0.1 * line["adversarial_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert line["discriminator_loss"] > 0
    assert log[5].keys() == {"step", "validation_l1", "validation_psnr"}


def test_validation(trained, volumes):
    """L1 and PSNR of the middle of the held-out volumes, decoded from the posterior's mean."""
    vae = AutoencoderKLMaisi.from_pretrained(trained)
    _, held_out = split_fold(read_data_list(volumes / "list.json").cases, 0)
    dataset = PatchDataset(held_out, 24, augmentation="none")
    errors = []
    for i in range(len(dataset)):
        image = dataset[i]["image"][None]
        with torch.no_grad():
            errors.append((vae.decode(vae.encode(image).latent_dist.mode()).sample - image).abs().numpy())
    logged = read_log(trained / "log.jsonl")[-1]
    assert logged["validation_l1"] == pytest.approx(np.mean([error.mean() for error in errors]), rel=1e-5)
    psnr = np.mean([-10 * np.log10(np.square(error).mean()) for error in errors])
    assert logged["validation_psnr"] == pytest.approx(psnr, rel=1e-5)


def test_interrupted(train_vae, volumes, trained, tmp_path):
    """Between the VAE's update and the discriminator's."""
    vae = ["--vae_model_name_or_path", volumes / "vae"]
    arguments = on_volumes(volumes, tmp_path, *vae, *OPTIONS, *VALIDATION, "--resume_from_checkpoint", "latest")
    interrupt(train_vae, 15, *arguments)
    assert [checkpoint.name for checkpoint in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    run(train_vae, *arguments)
    assert (tmp_path / "log.jsonl").read_text() == (trained / "log.jsonl").read_text()
    for name in (
        WEIGHTS,
        f"discriminator/{WEIGHTS}",
        "checkpoint-4/model.safetensors",
        "checkpoint-4/model_1.safetensors",
    ):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes(), name


def reconstruct(volumes):
    """The middles of the training cases, (4, 1, 24, 24, 24), and what the VAE makes of them in the first step."""
    cases, _ = split_fold(read_data_list(volumes / "list.json").cases, 0)
    dataset = PatchDataset(cases, 24, augmentation="none")
    image = torch.stack([dataset[i]["image"] for i in range(4)])
    with torch.no_grad():
        vae = AutoencoderKLMaisi.from_pretrained(volumes / "vae")
        posterior = vae.encode(image).latent_dist
        draws = [
            torch.randn(posterior.mean.shape[1:], generator=case_generator(0, 0, i, "posterior")) for i in range(4)
        ]
        reconstruction = vae.decode(posterior.mean + posterior.std * torch.stack(draws)).sample
    return image, reconstruction


def test_without_discriminator(train_vae, volumes, tmp_path):
    vae = ["--vae_model_name_or_path", volumes / "vae"]
    options = ["--adversarial_weight", 0, "--kl_weight", 0.5, "--patch_size", 16, "--max_train_steps", 1]
    run(train_vae, *on_volumes(volumes, tmp_path, *vae, *options))
    (line,) = read_log(tmp_path / "log.jsonl")
    assert line.keys() == {"step", "loss", "reconstruction_loss", "kl_loss"}
    assert line["loss"] == pytest.approx(line["reconstruction_loss"] + 0.5 * line["kl_loss"], rel=1e-5)
    assert not (tmp_path / "discriminator").exists()


@pytest.mark.parametrize(("loss", "mean"), [("l1", np.abs), ("l2", np.square)])
def test_reconstruction_loss(train_vae, volumes, tmp_path, loss, mean):
    options = ["--vae_model_name_or_path", volumes / "vae", "--adversarial_weight", 0, "--augmentation", "none"]
    options += ["--reconstruction_loss", loss, "--patch_size", 24, "--train_batch_size", 4, "--max_train_steps", 1]
    run(train_vae, *on_volumes(volumes, tmp_path, *options))
    (line,) = read_log(tmp_path / "log.jsonl")
    image, reconstruction = reconstruct(volumes)
    assert line["reconstruction_loss"] == pytest.approx(mean((reconstruction - image).numpy()).mean(), rel=1e-4)


def test_new_vae_and_old_discriminator(train_vae, volumes, trained, tmp_path):
    new = ["--vae_config_name_or_path", volumes / "vae" / "config.json", "--augmentation", "none"]
    old = ["--discriminator_model_name_or_path", trained / "discriminator"]
    options = ["--patch_size", 24, "--max_train_steps", 1, "--learning_rate", 1e-12]
    run(train_vae, *on_volumes(volumes, tmp_path, *new, *old, *options))
    weights, base = load_file(tmp_path / WEIGHTS), load_file(volumes / "vae" / WEIGHTS)
    assert weights.keys() == base.keys()
    assert not torch.allclose(weights["encoder.conv_in.weight"], base["encoder.conv_in.weight"], atol=1e-3)
    before, after = (load_file(folder / "discriminator" / WEIGHTS) for folder in (trained, tmp_path))
    assert all(torch.allclose(weight, after[name], atol=1e-9) for name, weight in before.items())


def test_discriminator_learns_from_its_own_loss_alone(train_vae, volumes, trained, tmp_path):
    """However much its say weighs for the VAE: the first step of Adam goes against the sign of the gradient."""
    source = [
        "--vae_model_name_or_path",
        volumes / "vae",
        "--discriminator_model_name_or_path",
        trained / "discriminator",
    ]
    options = ["--augmentation", "none", "--patch_size", 24, "--train_batch_size", 4, "--max_train_steps", 1]
    run(train_vae, *on_volumes(volumes, tmp_path, *source, *options, "--adversarial_weight", 1000))

    image, reconstruction = reconstruct(volumes)
    discriminator = MaisiPatchDiscriminator.from_pretrained(trained / "discriminator")
    losses = adversarial_loss(discriminator(reconstruction), False), adversarial_loss(discriminator(image), True)
    (sum(losses) / 2).backward()
    (line,) = read_log(tmp_path / "log.jsonl")
    assert line["discriminator_loss"] == pytest.approx(sum(losses).item() / 2, rel=1e-4)
    after = load_file(tmp_path / "discriminator" / WEIGHTS)
    for name, before in discriminator.named_parameters():
        clear = before.grad.abs() > 1e-2 * before.grad.abs().max()
        assert torch.equal((before - after[name])[clear].sign(), before.grad[clear].sign()), name


def test_it_learns(train_vae, volumes, tmp_path):
    """Without augmentation, the error of what it sees falls."""
    vae = ["--vae_model_name_or_path", volumes / "vae", "--augmentation", "none", "--adversarial_weight", 0]
    options = ["--patch_size", 16, "--max_train_steps", 15, "--train_batch_size", 4, "--learning_rate", 3e-3]
    run(train_vae, *on_volumes(volumes, tmp_path, *vae, *options))
    losses = [line["reconstruction_loss"] for line in read_log(tmp_path / "log.jsonl")]
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])


# Label maps


MASK_OPTIONS = ["--patch_size", 16, "--max_train_steps", 10, "--checkpointing_steps", 4, "--train_batch_size", 2]
MASK_OPTIONS += ["--learning_rate", 3e-3, "--validation_steps", 10, "--checkpoints_total_limit", 1]


def on_label_maps(data, output, *options):
    """Arguments of a training on what [`make_label_maps`] wrote."""
    source = ["--vae_model_name_or_path", data / "vae", "--data_list", data / "list.json"]
    return [*source, "--output_dir", output, *options]


@pytest.fixture(scope="module")
def mask_vae(train_vae, label_maps, tmp_path_factory):
    output = tmp_path_factory.mktemp("training") / "mask-vae"
    run(train_vae, *on_label_maps(label_maps, output, *MASK_OPTIONS))
    return output


def test_mask_vae_learns(mask_vae, label_maps):
    names = {"config.json", WEIGHTS, "README.md", "args.json", "log.jsonl", "checkpoint-8"}
    assert {path.name for path in mask_vae.iterdir()} == names
    assert "2 label maps" in (mask_vae / "README.md").read_text()
    log = read_log(mask_vae / "log.jsonl")
    losses = log[:-1]
    for line in losses:
        assert line.keys() == {"step", "loss", "cross_entropy_loss", "dice_loss", "kl_loss"}
        parts = line["cross_entropy_loss"] + line["dice_loss"] + 1e-7 * line["kl_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
    assert np.mean([line["loss"] for line in losses[-3:]]) < 0.8 * np.mean([line["loss"] for line in losses[:3]])
    vae, base = (AutoencoderKLMaisi.from_pretrained(folder) for folder in (mask_vae, label_maps / "vae"))
    assert not [name for name, weight in vae.state_dict().items() if torch.equal(weight, base.state_dict()[name])]


def test_validation_of_a_mask_vae(mask_vae, label_maps):
    """Dice of the labels that the middle of a held-out map has, and accuracy, decoded from the posterior's mean."""
    vae = AutoencoderKLMaisi.from_pretrained(mask_vae)
    _, held_out = split_fold(read_data_list(label_maps / "list.json").cases, 0)
    dataset = LabelPatchDataset(held_out, 16, augmentation="none")
    accuracies, scores = [], []
    for i in range(len(dataset)):
        labels = dataset[i]["labels"]
        with torch.no_grad():
            logits = vae(label_bits(labels[None])).sample[0]
        predicted = torch.tensor(MASK_VAE_LABELS)[logits.argmax(0)]
        accuracies.append((predicted == labels[0]).float().mean().item())
        pairs = [(predicted == label, labels[0] == label) for label in labels.unique()]
        scores.append(np.mean([2 * (p & t).sum().item() / (p.sum() + t.sum()).item() for p, t in pairs]))
    logged = read_log(mask_vae / "log.jsonl")[-1]
    assert logged.keys() == {"step", "validation_dice", "validation_accuracy"}
    assert logged["validation_accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-4)
    assert logged["validation_dice"] == pytest.approx(np.mean(scores), abs=1e-4)


def test_mask_vae_interrupted(train_vae, label_maps, mask_vae, tmp_path):
    arguments = on_label_maps(label_maps, tmp_path, *MASK_OPTIONS, "--resume_from_checkpoint", "latest")
    interrupt(train_vae, 6, *arguments)
    run(train_vae, *arguments)
    assert (tmp_path / "log.jsonl").read_text() == (mask_vae / "log.jsonl").read_text()
    assert (tmp_path / WEIGHTS).read_bytes() == (mask_vae / WEIGHTS).read_bytes()


def test_weights_of_a_mask_vae(train_vae, label_maps, tmp_path):
    options = ["--patch_size", 16, "--max_train_steps", 1, "--class_balance", 0, "--augmentation", "none"]
    weights = ["--cross_entropy_weight", 0.5, "--dice_weight", 2, "--kl_weight", 1e-3]
    run(train_vae, *on_label_maps(label_maps, tmp_path, *options, *weights))
    (line,) = read_log(tmp_path / "log.jsonl")
    parts = 0.5 * line["cross_entropy_loss"] + 2 * line["dice_loss"] + 1e-3 * line["kl_loss"]
    assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_what_a_mask_vae_cannot_learn(train_vae, label_maps, tmp_path):
    """New classes without an output, and VAEs of another kind, before anything is trained."""
    cases = read_data_list(label_maps / "list.json").cases
    write_data_list(tmp_path / "list.json", DataList(cases, {"kidney tumor": 130}))
    arguments = on_label_maps(label_maps, tmp_path / "output")
    arguments[arguments.index("--data_list") + 1] = tmp_path / "list.json"
    assert "list.json' has labels [130], which the mask VAE has no output for" in error_of(train_vae, *arguments)

    arguments = on_label_maps(label_maps, tmp_path / "output", "--discriminator_model_name_or_path", tmp_path)
    assert "leave --discriminator_model_name_or_path out" in error_of(train_vae, *arguments)

    AutoencoderKLMaisi(8, 100, (16, 16), 1, norm_num_groups=8).save_pretrained(tmp_path / "other")
    arguments = on_label_maps(label_maps, tmp_path / "output")
    arguments[arguments.index("--vae_model_name_or_path") + 1] = tmp_path / "other"
    assert "in_channels=8 and out_channels=100 is neither one of images, 1 and 1" in error_of(train_vae, *arguments)
    assert not list((tmp_path / "output").glob("*.json"))
