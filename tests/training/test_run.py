"""What a training does after its last step, up to the upload; and how it says that something is not installed."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from maisi_diffusers.training import run as run_module
from maisi_diffusers.training.run import run_script, write_model_card
from tests.hub_server import HubServer, process_on
from tests.scripts.training_data import NEW_CLASS, NEW_LABEL, error_of, load_script, on_latents, run

WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "pytorch_lora_weights.safetensors"
TOKEN = "hf_secret"
OPTIONS = ["--max_train_steps", 1, "--checkpointing_steps", 1, "--push_to_hub"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    hub = HubServer(folder, token=TOKEN)
    yield hub
    hub.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def process(hub, tmp_path_factory):
    with process_on(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


def train(arguments):
    """In a process that knows the Hub: the line that the training ends in, if it ends in one."""
    try:
        run(load_script("train_controlnet"), *arguments)
    except SystemExit as exit_:
        return exit_.code


def weights_from_hub(repo):
    from maisi_diffusers import MaisiControlNetModel

    controlnet = MaisiControlNetModel.from_pretrained(repo)
    return controlnet.state_dict(), controlnet.config.label_names


def test_upload(hub, process, latents, tmp_path):
    """Model card and weights; no checkpoints, no arguments, and nothing of the patients. It loads from there."""
    options = [
        *OPTIONS,
        "--validation_steps",
        1,
        "--validation_num_inference_steps",
        1,
        "--hub_model_id",
        "somebody/tuned",
        "--hub_token",
        TOKEN,
    ]
    assert process.submit(train, on_latents(latents, tmp_path, *options)).result() is None
    files = hub.files("somebody/tuned")
    assert files.keys() == {"README.md", "config.json", WEIGHTS}
    assert (tmp_path / "validation" / "step-1").is_dir()
    card = files["README.md"].read_text()
    assert 'from_pretrained("somebody/tuned")' in card and str(latents) not in card
    for name, file in files.items():
        assert file.read_bytes() == (tmp_path / name).read_bytes(), name
    assert not any(TOKEN.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert hub.commits == [("somebody/tuned", "End of training")]

    weights, label_names = process.submit(weights_from_hub, "somebody/tuned").result()
    assert label_names == {NEW_CLASS: NEW_LABEL}
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(tmp_path / WEIGHTS).items())


def image_with_adapter(base, source):
    from maisi_diffusers import MaisiCTPipeline
    from tests.tiny import make_label_map, seeded

    pipe = MaisiCTPipeline.from_pretrained(base)
    pipe.load_lora_weights(source)
    return pipe(mask=make_label_map(), generator=seeded(), output_type="np").images, pipe.vocabulary


def test_upload_of_an_adapter(hub, process, latents, tmp_path):
    """Under the folder's name, to the owner of the token."""
    options = [*OPTIONS, "--use_lora", "--rank", 2, "--hub_token", TOKEN]
    assert process.submit(train, on_latents(latents, tmp_path / "adapter", *options)).result() is None
    assert hub.files("owner/adapter").keys() == {"README.md", "config.json", ADAPTER}
    sources = ("owner/adapter", str(tmp_path / "adapter"))
    (image, vocabulary), (expected, _) = (
        process.submit(image_with_adapter, latents / "base", source).result() for source in sources
    )
    assert (image == expected).all() and vocabulary[NEW_CLASS] == NEW_LABEL


def assert_kept(output):
    names = {"README.md", "config.json", "log.jsonl", "args.json", "checkpoint-1", WEIGHTS}
    assert {path.name for path in output.iterdir()} == names


def test_refused_upload(hub, process, latents, tmp_path):
    options = [*OPTIONS, "--hub_model_id", "somebody/refused", "--hub_token", "hf_wrong"]
    message = process.submit(train, on_latents(latents, tmp_path, *options)).result()
    assert message.startswith(f"error: {tmp_path} is complete, but not uploaded to somebody/refused: ")
    assert "403" in message and "\n" not in message and "hf_wrong" not in message
    assert hub.files("somebody/refused") == {}
    assert_kept(tmp_path)


def test_no_hub(hub, process, latents, tmp_path):
    options = [*OPTIONS, "--hub_model_id", "somebody/tuned", "--hub_token", TOKEN]
    with hub.paused():
        message = process.submit(train, on_latents(latents, tmp_path, *options)).result()
    assert "is complete, but not uploaded to somebody/tuned: " in message and "\n" not in message
    assert_kept(tmp_path)


def test_model_card(tmp_path):
    write_model_card(tmp_path, "nvidia/NV-Generate-CT", "What it is.", ["controlnet"])
    card = (tmp_path / "README.md").read_text()
    assert "base_model: nvidia/NV-Generate-CT" in card and "- controlnet" in card and "What it is." in card
    write_model_card(tmp_path, str(tmp_path), "What it is.", [])
    assert "base_model" not in (tmp_path / "README.md").read_text()  # a folder is none on the Hub


# What is not installed


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_tracker_that_is_not_installed(train_controlnet, latents, tmp_path, monkeypatch, name):
    monkeypatch.setattr(run_module, "get_available_trackers", list)
    message = error_of(train_controlnet, *on_latents(latents, tmp_path / "output", "--report_to", name))
    assert message == f"error: --report_to {name} needs {name}: pip install {name}, or leave it out"
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("module", "option"), [("bitsandbytes", "--use_8bit_adam"), ("peft", "--use_lora")], ids=["bitsandbytes", "peft"]
)
def test_library_that_is_not_installed(train_controlnet, latents, tmp_path, monkeypatch, module, option):
    load_base_model = train_controlnet.load_base_model

    def load_and_hide(args):  # diffusers looks for peft while it loads
        pipe = load_base_model(args)
        monkeypatch.setitem(sys.modules, module, None)
        return pipe

    monkeypatch.setattr(train_controlnet, "load_base_model", load_and_hide)
    message = error_of(train_controlnet, *on_latents(latents, tmp_path / "output", option))
    assert message == f"error: {option} needs {module}: pip install {module}, or leave it out"
    assert not (tmp_path / "output").exists()


# How a script ends


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("a\n\n  b"), "error: a b"),
        (FloatingPointError("step 3"), "error: step 3"),
        (torch.OutOfMemoryError("out of\nmemory"), "error: out of memory"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory"),
            "error: DefaultCPUAllocator: can't allocate memory",
        ),
        (
            ValueError(
                "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback:\n  File\nValueError: a: b"
            ),
            "error: a: b",
        ),
    ],
)
def test_ends_in_one_line(error, says):
    def fail(args):
        raise error

    with pytest.raises(SystemExit) as exit_:
        run_script(fail, SimpleNamespace())
    assert exit_.value.code == says


@pytest.mark.parametrize("error", [KeyError("a"), RuntimeError("shapes differ")])
def test_mistakes_of_the_program_are_not_hidden(error):
    def fail(args):
        raise error

    with pytest.raises(type(error)):
        run_script(fail, SimpleNamespace())
