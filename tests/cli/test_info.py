"""`maisi-ct info`: what a model can do, told from all but its weights."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.anatomy import CONTROLLABLE_ANATOMY, DUMMIES, LABELS
from maisi_diffusers.pipelines.input_rules import CT_RULES, MR_RULES
from maisi_diffusers.pipelines.recommended_grids import MR_FOVS, RECOMMENDED_CT_GRIDS
from tests.hub_server import HubServer, process_on
from tests.tiny import SIZE, SPACING, make_pipeline

from .running import error_of, run, run_json


def test_of_a_model_with_everything(model):
    facts = run_json("info", model)
    pipe = MaisiCTPipeline.from_pretrained(model)
    assert facts["model"] == {"name": "tiny", "source": str(model), "revision": None}
    assert facts["components"].keys() == {name for name in pipe.components if pipe.components[name] is not None}
    for name in ("vae", "unet", "controlnet", "mask_vae", "mask_unet"):
        network = getattr(pipe, name)
        assert facts["components"][name] == {
            "class": type(network).__name__,
            "parameters": network.num_parameters(),
            "dtype": "float32",
        }
    assert facts["components"]["scheduler"] == {"class": "MaisiRFlowScheduler"}
    assert (facts["modality"], facts["num_inference_steps"], facts["size_multiple"]) == ("ct", 2, 8)
    assert facts["label_map_from"] == ["--body-region", "--anatomy", "--size", "--mask", "--image-only"]
    assert facts["labels"] == {name: index for name, index in LABELS.items() if index not in DUMMIES}
    assert facts["controllable_sizes"] == list(CONTROLLABLE_ANATOMY) and facts["new_classes"] == {}
    assert (facts["default_output_size"], facts["default_spacing"]) == (list(SIZE), list(SPACING))
    assert facts["input_rules"] is None and facts["recommended_grids"] == [] and facts["licence"] is None

    database = facts["mask_database"]
    assert database["label_maps"] == 11
    assert database["regions"] == {"head": 1, "chest": 4, "abdomen": 6, "pelvis": 2}
    assert database["tumors"] == {"lung tumor": 1, "pancreatic tumor": 2, "hepatic tumor": 2}
    assert database["labels"]["liver"] == 6
    assert database["grids"][0] == {"output_size": list(SIZE), "spacing": list(SPACING), "label_maps": 9}


def test_of_a_bare_model(tmp_path):
    pipe = make_pipeline("ddpm-ct", with_mask_networks=False)
    pipe.register_modules(controlnet=None)
    pipe.save_pretrained(tmp_path / "bare")
    facts = run_json("info", tmp_path / "bare")
    assert facts["components"].keys() == {"vae", "unet", "scheduler"}
    assert facts["label_map_from"] == ["--image-only"]
    assert (facts["labels"], facts["controllable_sizes"], facts["mask_database"]) == ({}, [], None)
    assert facts["prediction_type"] == "epsilon"


def test_rules_of_the_published_models_and_a_new_class(tmp_path):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_to_config(input_rules=CT_RULES)
    pipe.controlnet.add_classes({"kidney tumor": 129}, {"kidney tumor": ["left kidney"]})
    pipe.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE\n---\n# A model\n"
    )
    facts = run_json("info", tmp_path / "model")
    assert facts["new_classes"] == {"kidney tumor": 129} and facts["labels"]["kidney tumor"] == 129
    assert facts["input_rules"] == CT_RULES and len(facts["recommended_grids"]) == len(RECOMMENDED_CT_GRIDS)
    assert facts["default_output_size"] == [512, 512, 512] and facts["licence"] == "some-licence LICENSE"

    result = run("info", tmp_path / "model")
    text = " ".join(result.stdout.split())
    assert (result.exit_code, result.stderr) == (0, "")
    for part in (
        "licence some-licence LICENSE",
        "new ones: kidney tumor (129)",
        "256 x 256 x 128, ",
        "0.5 to 3, 0.5 to 3, 0.5 to 5 mm along X, Y, Z, X = Y",
        "recommended head, chest: 512 x 512 x 128 voxels of 0.645 x 0.645 x 2.219 mm",
        "for 512 x 512 x 512 voxels",
        "are free on cpu",
    ):
        assert part in text, part


def test_of_an_mr_model(tmp_path):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.register_modules(controlnet=None)
    fovs = MR_FOVS["rflow-mr-brain"]
    pipe.register_to_config(modality="mri", input_rules=MR_RULES, recommended_fovs=fovs, guidance_scale=2.0)
    pipe.save_pretrained(tmp_path / "model")
    facts = run_json("info", tmp_path / "model")
    assert (facts["modality"], facts["guidance_scale"], facts["recommended_fovs"]) == ("mri", 2.0, fovs)
    assert facts["label_map_from"] == ["--image-only"] and facts["recommended_grids"] == []

    text = " ".join(run("info", tmp_path / "model").stdout.split())
    for part in ("makes mri in 2 steps", "mri_swi: head 230 x 230 x 145 or 140 x 230 x 230 or 230 x 155 x 230 mm"):
        assert part in text, part


@pytest.mark.parametrize("grid", RECOMMENDED_CT_GRIDS.values())
def test_recommended_grids_are_allowed(grid):
    size, spacing = grid
    assert list(size) in CT_RULES["sizes"]
    assert all(low <= mm <= high for low, mm, high in zip(CT_RULES["min_spacing"], spacing, CT_RULES["max_spacing"]))


def test_no_weights_are_read(model, tmp_path):
    """Of variants the one without a name counts, of shards the first."""
    shutil.copytree(model, tmp_path / "tiny")
    for file in (tmp_path / "tiny").rglob("*.safetensors"):
        header = file.read_bytes()[:8]
        file.write_bytes(file.read_bytes()[: 8 + int.from_bytes(header, "little")])
    weights = {"weight": torch.zeros(3, dtype=torch.float16)}
    unet = tmp_path / "tiny" / "unet"
    safetensors.torch.save_file(weights, unet / "diffusion_pytorch_model.fp16.safetensors")
    (tmp_path / "tiny" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for i in (1, 2):
        name = f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors"
        safetensors.torch.save_file(weights, tmp_path / "tiny" / "vae" / name)
    components = run_json("info", tmp_path / "tiny")["components"]
    assert (components["unet"]["dtype"], components["vae"]["dtype"]) == ("float32", "float16")


def test_memory(model):
    memory = run_json("info", model, "--plan", 512, 512, 512)["memory"]
    assert memory["output_size"] == [512, 512, 512]
    # The VAE has 16 channels on its finest level, twice of which are kept; the rest is small against it.
    feature = 512**3 * 16
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        plan = memory["plans"][dtype]
        assert plan["stages"]["kept exact"] == 2 * feature * itemsize
        in_memory, in_file = plan["modes"]["exact"], plan["modes"]["exact, scratch file"]
        assert in_memory > plan["stages"]["decode exact"] > 2 * feature * itemsize
        assert in_memory - in_file > feature * itemsize and plan["modes"]["off"] > in_memory
    text = " ".join(run("info", model, "--plan", 512, 512, 512).stdout.split())
    assert "kept exact 17.18 in float32, 8.59 in bfloat16" in text
    assert "all, exact, scratch file" in text and "does not fit" in text
    assert "kept exact" not in run("info", model).stdout


def test_errors(model, tmp_path):
    for size in ([9, 9, 9], [0, 8, 8], [-8, 8, 8]):
        assert "is not allowed: this model needs multiples of 8" in error_of("info", model, "--plan", *size)
    assert "--revision v1 is for a model on the Hub" in error_of("info", model, "--revision", "v1")
    assert "neither a folder nor a Hub id" in error_of("info", tmp_path / "missing")
    shutil.copytree(model, tmp_path / "tiny")
    (tmp_path / "tiny" / "unet" / "config.json").write_text("{")
    assert error_of("info", tmp_path / "tiny").startswith(f"{tmp_path / 'tiny'} cannot be read: ")
    shutil.copytree(model, tmp_path / "clone")
    weights = tmp_path / "clone" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert error_of("info", tmp_path / "clone").endswith("download it again (a clone: git lfs pull)")
    index = tmp_path / "tiny" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "OtherPipeline"}))
    assert error_of("info", tmp_path / "tiny").endswith("cannot be read: it is not of a MaisiCTPipeline")
    assert json.loads(run("info", tmp_path / "missing", "--json").stdout)["exit_code"] == 1


def stdout_of(*arguments: str) -> str:
    """What a command prints besides warnings, such as those of a Hub that does not answer."""
    return run(*arguments).stdout


@pytest.mark.slow
def test_of_the_hub(model, tmp_path):
    """No weights are downloaded."""
    shutil.copytree(model, tmp_path / "root" / "owner" / "tiny")
    hub = HubServer(tmp_path / "root")
    try:
        with process_on(hub, tmp_path / "home") as process:
            facts = process.submit(run_json, "info", "owner/tiny").result()
            with hub.paused():
                unreached = json.loads(process.submit(stdout_of, "info", "owner/tiny", "--json").result())
    finally:
        hub.stop()
    assert facts["model"] == {"name": "tiny", "source": "owner/tiny", "revision": hub.commit("owner/tiny")}
    local = run_json("info", model)
    for one in (facts, local, unreached):  # which differ in this alone, and in what else the machine does
        one["model"] = one["memory"]["free"] = one["memory"]["usable"] = None
    assert facts == local
    # Of the weights the networks' configurations tell all but the dtype.
    for component in facts["components"].values():
        if "dtype" in component:
            component["dtype"] = None
    assert unreached == facts
    assert not list((tmp_path / "home").rglob("*.safetensors"))
