"""Items of a training set: what is drawn for a case depends on the seed, the epoch and the case alone."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from maisi_diffusers import MaisiRFlowScheduler
from maisi_diffusers.anatomy import TUMORS, remove_tumors
from maisi_diffusers.training.data_list import read_data_list
from maisi_diffusers.training.dataset import LatentDataset, draw_timestep
from maisi_diffusers.training.latents import load_latent
from tests.scripts.training_data import NEW_LABEL, save_latent
from tests.tiny import SIZE, SPACING, seeded

LATENT_SIZE = (6, 4, 8)
NEW_TUMORS = TUMORS | {NEW_LABEL: (1,)}


@pytest.fixture
def cases(latents):
    return read_data_list(latents / "list.json").cases


def make_dataset(cases, seed=0, epoch=0, **kwargs):
    dataset = LatentDataset(cases, MaisiRFlowScheduler(), seed, **kwargs)
    dataset.set_epoch(epoch)
    return dataset


def assert_same(item, other):
    assert item.keys() == other.keys()
    for name, value in item.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def differs(item, other):
    """Names of what is different."""
    return {name for name, value in item.items() if not torch.equal(value, other[name])}


def test_item(cases, latents):
    item = make_dataset(cases, with_labels=True, tumors=NEW_TUMORS)[2]
    kinds = {name: (tuple(value.shape), value.dtype) for name, value in item.items()}
    assert kinds == {
        "latents": ((4, *LATENT_SIZE), torch.float32),
        "noise": ((4, *LATENT_SIZE), torch.float32),
        "timesteps": ((), torch.float32),
        "class_labels": ((), torch.int64),
        "spacing": ((3,), torch.float32),
        "top_region_index": ((4,), torch.float32),
        "bottom_region_index": ((4,), torch.float32),
        "labels": ((1, *SIZE), torch.uint8),
        "tumor_free_labels": ((1, *SIZE), torch.uint8),
        "index": ((), torch.int64),
    }
    stored = nib.load(latents / "case-2_emb.nii.gz").get_fdata(dtype=np.float32)
    assert torch.equal(item["latents"], torch.from_numpy(stored).movedim(-1, 0))
    assert item["spacing"].tolist() == [200, 200, 300]
    assert item["top_region_index"].tolist() == [0, 0, 100, 0]
    assert (item["class_labels"], item["index"]) == (1, 2)
    labels = np.asarray(nib.load(latents / "case-2_label.nii.gz").dataobj)
    assert np.array_equal(item["labels"][0], labels) and NEW_LABEL in labels
    healthy = remove_tumors(labels, SPACING, NEW_TUMORS)
    assert np.array_equal(item["tumor_free_labels"][0], healthy) and NEW_LABEL not in healthy


def test_only_what_the_cases_have(cases):
    bare = replace(cases[0], spacing=None, top_region_index=None, bottom_region_index=None)
    assert make_dataset([bare])[0].keys() == {"latents", "noise", "timesteps", "class_labels", "index"}
    assert make_dataset([cases[0], bare])[0].keys() == make_dataset([bare])[0].keys(), "else they are no batch"


def test_sizes_of_the_anatomy(cases):
    sizes = (0.25, *[-1.0] * 8, 1.0)
    item = make_dataset([replace(cases[0], organ_size=sizes)])[0]
    assert item["encoder_hidden_states"].dtype == torch.float32
    assert item["encoder_hidden_states"].tolist() == [list(sizes)]


def test_order_does_not_matter(cases):
    dataset = make_dataset(cases, modality_dropout=0.5)
    forwards = [dataset[i] for i in range(len(dataset))]
    torch.manual_seed(7)  # nor does the global generator
    for i in reversed(range(len(dataset))):
        assert_same(forwards[i], dataset[i])


def test_workers_do_not_matter(cases):
    dataset = make_dataset(cases, epoch=3, modality_dropout=0.5, with_labels=True)
    batches = list(torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=2))
    items = [
        {name: value[i] for name, value in batch.items()} for batch in batches for i in range(len(batch["index"]))
    ]
    assert len(items) == len(dataset) == 8
    for i, item in enumerate(items):
        assert_same(item, dataset[i])


@pytest.mark.parametrize("change", [{"seed": 1}, {"epoch": 1}])
def test_seed_and_epoch_draw_anew(cases, change):
    item, other = make_dataset(cases)[0], make_dataset(cases, **change)[0]
    assert differs(item, other) == {"noise", "timesteps"}


def test_every_case_has_draws_of_its_own(cases):
    dataset = make_dataset([cases[0]] * 4)
    noise = torch.stack([dataset[i]["noise"] for i in range(4)])
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.15
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    assert len({dataset[i]["timesteps"].item() for i in range(4)}) == 4


def test_draw_from_the_posterior(tmp_path, cases):
    """A file of means and log-variances gives another latent every epoch, the same one for the same epoch."""
    moments = np.full((40, 40, 40, 8), 3, dtype=np.float32)
    moments[..., 4:] = 2 * np.log(0.25)
    save_latent(tmp_path / "moments.nii.gz", moments)
    case = replace(cases[0], image=tmp_path / "moments.nii.gz")
    first, second = make_dataset([case])[0], make_dataset([case], epoch=1)[0]
    assert differs(first, second) == {"latents", "noise", "timesteps"}
    assert_same(first, make_dataset([case])[0])
    for latent, noise in ((first["latents"], first["noise"]), (second["latents"], second["noise"])):
        assert abs(latent.mean() - 3) < 0.01 and abs(latent.std() - 0.25) < 0.01
        assert abs(torch.corrcoef(torch.stack([latent.flatten(), noise.flatten()]))[0, 1]) < 0.02


def test_latent_with_nan(tmp_path, cases):
    latent = np.zeros((*LATENT_SIZE, 4), dtype=np.float32)
    latent[1, 2, 3, 0] = np.nan
    save_latent(tmp_path / "broken_emb.nii.gz", latent)
    dataset = make_dataset([replace(cases[0], image=tmp_path / "broken_emb.nii.gz")])
    with pytest.raises(ValueError, match="broken_emb.nii.gz' has NaN or infinite values; encode it again"):
        dataset[0]
    with pytest.raises(ValueError, match=r"\(6, 4, 8, 4\), must be a latent \(X, Y, Z, 3\) or its moments"):
        load_latent(cases[0].image, latent_channels=3)


# Modality


def codes(cases, modality, share, number=3000):
    dataset = make_dataset([replace(cases[0], modality=modality)], modality_dropout=share)
    drawn = []
    for epoch in range(number):
        dataset.set_epoch(epoch)
        drawn.append(dataset._class_label(dataset.cases[0], 0).item())
    return {code: drawn.count(code) / number for code in set(drawn)}


@pytest.mark.parametrize(
    ("modality", "code", "parent"), [("ct_contrast", 3, 1), ("mri_t1", 9, 8), ("mri_mra_skull_stripped", 33, 8)]
)
def test_modality_dropout(cases, modality, code, parent):
    """A tenth of all becomes unknown; of the rest, a tenth becomes its parent."""
    shares = codes(cases, modality, 0.1)
    assert shares.keys() == {0, parent, code}
    assert abs(shares[0] - 0.1) < 0.02 and abs(shares[parent] - 0.09) < 0.02


def test_modality_dropout_of_parents_and_of_the_unknown(cases):
    shares = codes(cases, "ct", 0.1)
    assert shares.keys() == {0, 1} and abs(shares[0] - 0.1) < 0.02
    assert codes(cases, "unknown", 0.5, 100) == {0: 1.0}


def test_no_modality_dropout(cases):
    assert codes(cases, "ct_contrast", 0.0, 100) == {3: 1.0}


def test_modality_dropout_leaves_the_other_draws(cases):
    case = replace(cases[0], modality="ct_contrast")
    assert differs(make_dataset([case])[0], make_dataset([case], modality_dropout=1.0)[0]) == {"class_labels"}


# Timesteps


def draw(scheduler, size, number=4000):
    generator = seeded()
    return torch.stack([draw_timestep(scheduler, torch.empty(4, *size), generator) for _ in range(number)])


def test_timesteps_are_uniform():
    timesteps = draw(MaisiRFlowScheduler(), (32, 32, 32))
    assert timesteps.dtype == torch.float32 and 0 <= timesteps.min() < 5 and 995 < timesteps.max() <= 1000
    deciles = torch.histc(timesteps, 10, 0, 1000) / len(timesteps)
    assert (deciles - 0.1).abs().max() < 0.02


def test_timesteps_of_large_latents_are_noisier():
    """t -> r t / (1 + (r - 1) t) with r = 2, the ratio of the edges, takes the median from 500 to 667."""
    assert abs(draw(MaisiRFlowScheduler(), (64, 64, 64)).median() - 2000 / 3) < 15
    assert abs(draw(MaisiRFlowScheduler(), (16, 16, 16)).median() - 1000 / 3) < 15


def test_timesteps_of_ddpm():
    timesteps = draw(DDPMScheduler(num_train_timesteps=10), LATENT_SIZE)
    assert timesteps.dtype == torch.int64
    assert (timesteps.bincount(minlength=10) / len(timesteps) - 0.1).abs().max() < 0.02 and timesteps.max() == 9
