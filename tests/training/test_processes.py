"""Two processes do together what one does with batches of twice the size."""

import json
import os
import socket
import subprocess
import sys
import warnings

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from safetensors.torch import load_file

from maisi_diffusers import AutoencoderKLMaisi, MaisiUNet3DConditionModel
from maisi_diffusers.training.checkpoints import list_checkpoints
from maisi_diffusers.training.processes import runs_on_cpu
from maisi_diffusers.training.trackers import read_log
from tests.scripts.training_data import SCRIPTS, error_of, load_script, on_latents, on_volumes, run
from tests.tiny import make_pipeline

# One start for all three trainings, which share what connects the processes.
DRIVER = """
import json, sys
from accelerate import PartialState
from tests.scripts.training_data import load_script, run
PartialState.destroy_process_group = lambda self, group=None: None
for name, arguments in json.loads(sys.argv[1]).items():
    run(load_script(name), *arguments)
"""
CONFIGS = SCRIPTS.parent / "configs" / "accelerate"
NAMES = ("train_controlnet", "train_unet", "train_vae")
CONTRAST = ["--use_region_contrastive_loss", "--region_contrastive_loss_weight", 0.5, "--weighted_loss", 10]


def arguments(name, latents, volumes, output, batch_size):
    """Of a training from which every epoch's cases divide by two."""
    shared = ["--max_train_steps", 4, "--checkpointing_steps", 2, "--train_batch_size", batch_size]
    if name == "train_controlnet":
        validation = ["--validation_steps", 4, "--validation_num_inference_steps", 2]
        return on_latents(latents, output, *CONTRAST, *shared, *validation)
    if name == "train_unet":
        return on_latents(latents, output, "--unet_config_name_or_path", latents / "base" / "unet", *shared)
    new = ["--vae_config_name_or_path", volumes / "vae", "--patch_size", 24]
    return on_volumes(volumes, output, *new, *shared)


@pytest.fixture(scope="module")
def outputs(latents, volumes, tmp_path_factory):
    """Folders of the trainings by one process and by two."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "driver.py").write_text(DRIVER)
    for name in NAMES:
        run(load_script(name), *arguments(name, latents, volumes, folder / "one" / name, batch_size=2))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "ddp.yaml"]
    launch += ["--num_processes", "2", "--mixed_precision", "no"]
    launch += ["--main_process_port", str(port), folder / "driver.py"]
    tasks = {name: arguments(name, latents, volumes, folder / "two" / name, batch_size=1) for name in NAMES}
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "OMP_NUM_THREADS": "1"}
    launched = subprocess.run(
        [*launch, json.dumps(tasks, default=str)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert launched.returncode == 0, launched.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_same_losses(outputs, name):
    one, two = (read_log(outputs / number / name / "log.jsonl") for number in ("one", "two"))
    assert [line["step"] for line in one] == [1, 2, 3, 4] + [4] * (name == "train_controlnet")
    assert len({line["loss"] for line in one if "loss" in line}) == 4
    parts = {
        "train_controlnet": {"loss", "reconstruction_loss", "region_contrastive_loss"},
        "train_unet": {"loss"},
        "train_vae": {"loss", "reconstruction_loss", "kl_loss", "adversarial_loss", "discriminator_loss"},
    }
    assert one[0].keys() == {"step", *parts[name]}
    for line, expected in zip(two, one, strict=True):
        assert line.keys() == expected.keys()
        for key, value in line.items():
            # Rounding grows from step to step, most in what two networks that learn from each other say.
            rel = 5e-3 if key in ("adversarial_loss", "discriminator_loss") else 3e-4
            absolute = 1 if key.startswith("hu/") else 1e-5  # medians of whole HU
            assert value == pytest.approx(expected[key], rel=rel, abs=absolute), key
    settings = [json.loads((outputs / number / name / "args.json").read_text()) for number in ("one", "two")]
    assert [values["num_processes"] for values in settings] == [1, 2]


@pytest.mark.slow
def test_same_scaling_factor(outputs, latents):
    one, two = (AutoencoderKLMaisi.load_config(outputs / number / "train_unet" / "vae") for number in ("one", "two"))
    assert two["scaling_factor"] == pytest.approx(one["scaling_factor"], abs=1e-5)
    base = AutoencoderKLMaisi.load_config(latents / "base" / "vae")["scaling_factor"]
    assert one["scaling_factor"] == pytest.approx(1, abs=0.1) and base == 1.3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_same_files(outputs, name):
    """Written once, and the state of every process."""
    files = {}
    for number in ("one", "two"):
        folder = outputs / number / name
        assert [checkpoint.name for checkpoint in list_checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
        files[number] = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    of_the_second = {f"checkpoint-{step}/random_states_1.pkl" for step in (2, 4)}
    assert files["two"] == files["one"] | of_the_second
    assert any(file.endswith("median_hu.json") for file in files["two"]) == (name == "train_controlnet")


@pytest.mark.slow
def test_saved_without_the_wrapping(outputs):
    for number in ("one", "two"):
        unet = MaisiUNet3DConditionModel.from_pretrained(outputs / number / "train_unet" / "unet")
        vae = AutoencoderKLMaisi.from_pretrained(outputs / number / "train_vae")
        for model, folder in ((unet, "train_unet/unet"), (vae, "train_vae")):
            saved = load_file(outputs / number / folder / "diffusion_pytorch_model.safetensors")
            assert saved.keys() == model.state_dict().keys()


# Configurations that need GPUs


@pytest.mark.parametrize("network", ["unet", "controlnet"])
def test_networks_are_sharded_block_by_block(network):
    """accelerate would refuse a class of blocks that a network does not have."""
    model = getattr(make_pipeline(with_mask_networks=False), network)
    config = yaml.safe_load((CONFIGS / "fsdp.yaml").read_text())["fsdp_config"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=config["fsdp_version"],
        auto_wrap_policy=config["fsdp_auto_wrap_policy"].lower(),
        transformer_cls_names_to_wrap=config.get("fsdp_transformer_layer_cls_to_wrap"),
    )
    is_sharded = fsdp2_prepare_auto_wrap_policy(plugin, model)
    blocks = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    assert len(blocks) >= 3 and all(is_sharded(block) for block in blocks) and not is_sharded(model.conv_in)


def test_a_vae_is_not_sharded(volumes, tmp_path, monkeypatch):
    script = load_script("train_vae")
    monkeypatch.setattr(script, "is_sharded", lambda accelerator: True)
    message = error_of(script, *on_volumes(volumes, tmp_path / "vae", "--max_train_steps", 1))
    assert "trained whole, without FSDP or DeepSpeed: launch with ddp.yaml" in message


# Where accelerate starts fewer processes than were asked for


def launched_environment(*options):
    """What `accelerate launch` would set, without `mpirun`."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args([*options, "script.py"]))
    return prepare_simple_launcher_cmd_env(args)[1]


def test_cpu_with_two_processes_warns(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in launched_environment("--cpu", "--num_processes", "2", "--main_process_port", "29501").items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match="starts one process without mpirun.*--multi_gpu --num_processes N"):
        assert runs_on_cpu()


def test_cpu_with_one_process_does_not_warn(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs_on_cpu()
