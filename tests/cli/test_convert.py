"""`maisi-ct convert`: a diffusers repository as a whole, or one line about why not."""

import json
import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from maisi_diffusers import MaisiCTPipeline, MaisiMaskDatabase
from maisi_diffusers.cli import convert as convert_module
from tests.loaders.checkpoints import BROKEN, FILES, MARKER
from tests.mask_databases import make_database
from tests.scripts.training_data import SCRIPTS


@pytest.fixture
def output(tmp_path):
    """A folder to write, in one where nothing else is."""
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs" / "maisi-rflow-ct"


def error_of(*arguments):
    """The line that the command ends in."""
    with pytest.raises(SystemExit) as exit_:
        convert_module.main([str(argument) for argument in arguments])
    message = exit_.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def convert(source, output, *options, version="rflow-ct"):
    convert_module.main([str(source), str(output), "--version", version, *options])


def files_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def settings(component):
    return {name: value for name, value in component.config.items() if not name.startswith("_")}


def assert_same(pipe, expected, dtype=torch.float32):
    for name in FILES:
        ours, theirs = getattr(pipe, name).state_dict(), getattr(expected, name).state_dict()
        assert ours.keys() == theirs.keys()
        for key, weight in theirs.items():
            assert torch.equal(ours[key], weight.to(dtype)), f"{name}.{key}"
    for name in ("scheduler", "mask_scheduler"):
        assert settings(getattr(pipe, name)) == settings(getattr(expected, name))
    assert settings(pipe) == settings(expected)
    assert pipe.vae.config.scaling_factor == expected.vae.config.scaling_factor


@pytest.fixture(scope="module")
def expected(published):
    return MaisiCTPipeline.from_maisi_checkpoint(published, version="rflow-ct")


def test_repository(published, output, expected, capsys):
    convert(published, output)
    assert os.listdir(output.parent) == [output.name]
    weights = {f"{name}/diffusion_pytorch_model.safetensors" for name in FILES}
    configs = {f"{name}/config.json" for name in FILES}
    schedulers = {f"{name}/scheduler_config.json" for name in ("scheduler", "mask_scheduler")}
    assert files_of(output) == weights | configs | schedulers | {"model_index.json"}
    assert not any(str(output.parent) in path.read_text() for path in output.rglob("*.json"))
    assert_same(MaisiCTPipeline.from_pretrained(output), expected)

    printed = capsys.readouterr().out
    for name in FILES:
        component = getattr(expected, name)
        assert f"{name}: {type(component).__name__}, {component.num_parameters():,} parameters" in printed
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert f"wrote {output}: 7 components in float32, {size / 1e6:,.1f} MB" in printed


def test_readable_as_any_folder(published, output, tmp_path):
    (tmp_path / "folder").mkdir()
    convert(published, output)
    assert output.stat().st_mode == (tmp_path / "folder").stat().st_mode


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_and_variant(published, output, expected, dtype, capsys):
    convert(published, output, "--dtype", dtype, "--variant", "half")
    weights = {path for path in files_of(output) if path.endswith(".safetensors")}
    assert weights == {f"{name}/diffusion_pytorch_model.half.safetensors" for name in FILES}
    pipe = MaisiCTPipeline.from_pretrained(output, variant="half", dtype=getattr(torch, dtype))
    assert_same(pipe, expected, getattr(torch, dtype))
    assert f"components in {dtype}" in capsys.readouterr().out


def test_shards(published, output, expected):
    convert(published, output, "--max_shard_size", "1MB")
    shards = [path for path in files_of(output) if path.endswith(".safetensors")]
    assert len(shards) > len(FILES) and all((output / shard).stat().st_size < 1.1e6 for shard in shards)
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in files_of(output)
    assert_same(MaisiCTPipeline.from_pretrained(output), expected)


def test_no_strict(checkpoint, output, expected, caplog):
    BROKEN["surplus key, controlnet"].change(checkpoint)
    with caplog.at_level("WARNING"):
        convert(checkpoint, output, "--no_strict")
    assert any("surplus.weight" in record.getMessage() for record in caplog.records)
    assert_same(MaisiCTPipeline.from_pretrained(output), expected)


@pytest.mark.parametrize("options", [(), ("--no_mask_database",)])
def test_mask_database(published, output, tmp_path, monkeypatch, options):
    load = MaisiCTPipeline.from_maisi_checkpoint

    def load_with_database(*args, **kwargs):
        pipe = load(*args, **kwargs)
        pipe.mask_database = MaisiMaskDatabase(make_database(tmp_path / "database"))
        pipe.anatomy_size_conditions = [[0.5] * 10]
        return pipe

    monkeypatch.setattr(MaisiCTPipeline, "from_maisi_checkpoint", load_with_database)
    convert(published, output, *options)
    assert (output / "mask_database" / "anatomy_size_conditions.json").is_file()
    assert (output / "mask_database" / "masks").exists() == (not options)


def test_output_in_new_folders(published, output):
    convert(published, output / "a" / "b")
    assert (output / "a" / "b" / "model_index.json").is_file()
    assert os.listdir(output.parent) == [output.name] and os.listdir(output / "a") == ["b"]


def test_output_that_is_empty(published, output):
    output.mkdir()
    convert(published, output)
    assert (output / "model_index.json").is_file() and os.listdir(output.parent) == [output.name]


@pytest.mark.parametrize("kind", ["folder with a file", "file"])
def test_output_that_is_not_empty(output, kind):
    kept = output if kind == "file" else output / "kept"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    # Refused before the source is read: this one is not there.
    message = error_of("no-such-source", output, "--version", "rflow-ct")
    assert str(output) in message and "not an empty folder" in message and "remove it or choose another" in message
    assert kept.read_text() == "kept" and len(list(output.parent.rglob("*"))) == (1 if kind == "file" else 2)


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_nothing_is_left_of_a_broken_checkpoint(checkpoint, output, case):
    case.change(checkpoint)
    message = error_of(checkpoint, output, "--version", "rflow-ct")
    assert all(part in message for part in case.says)
    assert os.listdir(output.parent) == [] and not (checkpoint / MARKER).exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--version", "rflow"], "use one of rflow-ct, ddpm-ct, rflow-mr, rflow-mr-brain"),
        (["--version", "rflow-mr"], "models/autoencoder_v2.pt"),
        (["--version", "rflow-ct", "--max_shard_size", "5XB"], "5XB"),
    ],
)
def test_nothing_is_left_of_wrong_options(published, output, options, says):
    assert says in error_of(published, output, *options)
    assert os.listdir(output.parent) == []


def test_no_such_source(output):
    assert "neither a folder nor a Hub id" in error_of("./missing", output, "--version", "rflow-ct")
    assert os.listdir(output.parent) == []


def test_nothing_is_left_of_a_write_that_fails(published, output):
    """As on a full disk: no file may grow beyond 2 MB, which some of the weights do."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, limits[1]))
    try:
        message = error_of(published, output, "--version", "rflow-ct")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "large" in message
    assert os.listdir(output.parent) == []


def test_for_programs(published, output, expected, capsys):
    convert(published, output, "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["output"], told["dtype"]) == (str(output), "float32")
    assert told["bytes"] == sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    assert told["components"]["unet"] == {
        "class": "MaisiUNet3DConditionModel",
        "parameters": expected.unet.num_parameters(),
    }
    assert told["components"]["scheduler"] == {"class": "MaisiRFlowScheduler"}

    with pytest.raises(SystemExit) as exit_:
        convert(published, output, "--json")
    assert exit_.value.code == 1
    told = json.loads(capsys.readouterr().out)
    assert told["exit_code"] == 1 and told["error"].startswith(f"{output} exists")


def test_push_to_hub(published, output, monkeypatch, capsys):
    calls = []

    def create_repo(repo_id, exist_ok):
        calls.append(("create", repo_id, exist_ok))
        return SimpleNamespace(repo_id=f"owner/{repo_id}")

    def upload_folder(repo_id, folder_path, commit_message):
        calls.append(("upload", repo_id, folder_path, (folder_path / "model_index.json").is_file(), commit_message))
        return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr(convert_module, "create_repo", create_repo)
    monkeypatch.setattr(convert_module, "upload_folder", upload_folder)
    convert(published, output, "--push_to_hub", "converted")
    assert calls == [("create", "converted", True), ("upload", "owner/converted", output, True, "Add MAISI rflow-ct")]
    assert "https://hub/commit/1" in capsys.readouterr().out


def test_upload_that_fails_keeps_the_output(published, output, monkeypatch):
    def create_repo(repo_id, exist_ok):
        raise ConnectionError("401 Client Error.\n\nlog in first")

    monkeypatch.setattr(convert_module, "create_repo", create_repo)
    message = error_of(published, output, "--version", "rflow-ct", "--push_to_hub", "owner/converted")
    assert f"{output} is complete, but not uploaded to owner/converted: 401 Client Error. log in first" in message
    assert (output / "model_index.json").is_file()


@pytest.fixture
def without_monai(tmp_path):
    """The environment of a process in which MONAI cannot be imported."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys\nsys.modules['monai'] = None\n")
    paths = [str(tmp_path / "site"), str(SCRIPTS.parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_as_a_command(published, output, expected, without_monai):
    command = [
        sys.executable,
        str(SCRIPTS / "convert_maisi_checkpoint.py"),
        str(published),
        str(output),
        "--version",
        "rflow-ct",
    ]
    done = subprocess.run(command, env=without_monai, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 8
    assert_same(MaisiCTPipeline.from_pretrained(output), expected)

    again = subprocess.run(command, env=without_monai, capture_output=True, text=True)
    assert again.returncode == 1 and again.stdout == ""
    assert again.stderr.startswith(f"error: {output} exists") and again.stderr.count("\n") == 1
