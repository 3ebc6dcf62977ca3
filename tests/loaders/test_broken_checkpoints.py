"""Whatever is wrong with a checkpoint is said in one line, and no code in it runs."""

import pickle
import random
import zipfile

import pytest
import torch

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.loaders.safe_torch import load_torch_file

from .checkpoints import BROKEN, CODE, FILES, MARKER, rewrite


def load(folder, version="rflow-ct", **kwargs):
    return MaisiCTPipeline.from_maisi_checkpoint(folder, version=version, **kwargs)


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_error(checkpoint, case):
    case.change(checkpoint)
    with pytest.raises(case.error) as caught:
        load(checkpoint)
    message = str(caught.value)
    assert "\n" not in message and str(checkpoint) in message
    for part in case.says:
        assert part in message, message
    assert not (checkpoint / MARKER).exists()


@pytest.mark.parametrize("name", CODE)
def test_the_code_would_run(tmp_path, name):
    torch.save(CODE[name](tmp_path / MARKER), tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / MARKER).exists()


def test_names_allowed_elsewhere_stay_refused(checkpoint):
    torch.serialization.add_safe_globals([(eval, "builtins.eval")])
    try:
        BROKEN["code beside the weights, eval"].change(checkpoint)
        with pytest.raises(ValueError, match=r" (builtins\.)?eval, .* refused"):
            load(checkpoint)
        assert not (checkpoint / MARKER).exists()
        assert (eval, "builtins.eval") in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_only_a_damaged_file_fails_when_bytes_change(tmp_path):
    """Random damage to the pickle, and cuts of a file of the old format: refused as damaged, or read as data."""
    content = {"scale_factor": torch.tensor(1.5), "epoch": 3, "unet_state_dict": {"a.weight": torch.ones(2, 3)}}
    path = tmp_path / "file.pt"
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in members if name.endswith("data.pkl"))
    rng = random.Random(0)

    outcomes = {"read": 0, "refused": 0}
    for _ in range(400):
        damaged = bytearray(members[pickled])
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(2, len(damaged))] = rng.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, bytes(damaged) if name == pickled else data)
        try:
            load_torch_file(path)
            outcomes["read"] += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 10, outcomes

    torch.save(content, path, _use_new_zipfile_serialization=False)
    old_format = path.read_bytes()
    assert torch.equal(load_torch_file(path)["scale_factor"], content["scale_factor"])
    for cut in range(0, len(old_format), 7):
        path.write_bytes(old_format[:cut])
        with pytest.raises(ValueError, match="download it again|refused"):
            load_torch_file(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_python_objects(tmp_path):
    (tmp_path / "file.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    with pytest.raises(ValueError, match="file.pt is not a PyTorch checkpoint"):
        load_torch_file(tmp_path / "file.pt")


@pytest.mark.parametrize("name", FILES)
def test_surplus_keys_can_be_dropped(checkpoint, published, name, caplog):
    rewrite_surplus = BROKEN[f"surplus key, {name}"].change
    rewrite_surplus(checkpoint)
    with caplog.at_level("WARNING"):
        pipe = load(checkpoint, strict=False)
    (warning,) = (record.getMessage() for record in caplog.records if "unexpected" in record.getMessage())
    assert "surplus.weight" in warning and FILES[name] in warning and "dropped" in warning
    expected = load(published)
    for component in FILES:
        ours, reference = getattr(pipe, component).state_dict(), getattr(expected, component).state_dict()
        assert all(torch.equal(ours[key], reference[key]) for key in reference) and len(ours) == len(reference)


def test_unknown_version(published):
    with pytest.raises(ValueError, match="version='rflow' is not known: use one of rflow-ct, ddpm-ct, rflow-mr"):
        load(published, version="rflow")


def test_version_of_another_model(published):
    with pytest.raises(FileNotFoundError, match=r"no models/diff_unet_3d_ddpm-ct.pt, the unet of ddpm-ct: .*version"):
        load(published, version="ddpm-ct")


@pytest.mark.parametrize("source", ["no-such-folder", "./no/such", "/no/such/folder", "a/b/c", "../up"])
def test_source_is_neither_folder_nor_id(source):
    with pytest.raises(FileNotFoundError) as caught:
        load(source)
    assert repr(source) in str(caught.value) and "'nvidia/NV-Generate-CT'" in str(caught.value)


def test_source_is_a_path_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        load(tmp_path / "missing")
    (tmp_path / "file.pt").touch()
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        load(tmp_path / "file.pt")


def test_unknown_arguments_are_refused(published):
    with pytest.raises(TypeError, match="torch_dtyp"):
        load(published, torch_dtyp=torch.float16)


def test_errors_stay_errors_of_the_system(checkpoint):
    """A file that cannot be opened is not called damaged."""
    path = checkpoint / FILES["unet"]
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        load_torch_file(path)


def test_shapes_of_other_networks_name_the_configuration(checkpoint):
    (checkpoint / "configs" / "config_network_rflow.json").unlink()
    with pytest.raises(ValueError, match=r"configs/config_network_\*.json"):
        load(checkpoint)


def test_rewrite_keeps_the_shared_file(checkpoint, published):
    rewrite(checkpoint / FILES["unet"], lambda content: content.update({"epoch": 99}))
    assert torch.load(checkpoint / FILES["unet"], weights_only=True)["epoch"] == 99
    assert torch.load(published / FILES["unet"], weights_only=True)["epoch"] == 3
