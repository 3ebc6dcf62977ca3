"""Classes that a ControlNet was fine-tuned to: known by name, as tumors, and from adapters."""

import numpy as np
import pytest
import torch
from peft import LoraConfig

from maisi_diffusers import MaisiCTPipeline
from maisi_diffusers.anatomy import LABELS, TUMORS, label_index, label_name
from tests.tiny import make_label_map, make_pipeline, seeded

NEW_CLASSES = {"kidney tumor": 129, "calcification": 130}
ORGANS = {"kidney tumor": ["liver", "spleen"]}


@pytest.fixture
def pipe():
    """Fine-tuned to a tumor and to a class that is none."""
    pipe = make_pipeline(with_mask_networks=False)
    pipe.controlnet.add_classes(NEW_CLASSES, ORGANS)
    return pipe


@pytest.fixture(scope="module")
def base():
    return make_pipeline(with_mask_networks=False)


@pytest.fixture
def mask():
    """The tumor in the liver is of the new class."""
    mask = make_label_map()
    labels = np.asarray(mask.dataobj)
    labels[labels == 26] = 129
    return mask


def make_image(pipe, mask, **kwargs):
    return pipe(mask=mask, generator=seeded(), output_type="np", **kwargs).images


def test_vocabulary(pipe, base):
    assert base.vocabulary == LABELS
    assert pipe.vocabulary.items() >= NEW_CLASSES.items() and len(pipe.vocabulary) == len(LABELS)
    assert sorted(pipe.vocabulary.values()) == sorted(LABELS.values())  # in the place of dummies
    assert label_name(129, LABELS) not in pipe.vocabulary
    assert label_name(129, pipe.vocabulary) == "kidney tumor"


def test_tumors(pipe, base):
    assert base.tumors == TUMORS
    assert pipe.tumors == TUMORS | {129: (LABELS["liver"], LABELS["spleen"])}


def test_without_controlnet():
    pipe = make_pipeline(with_mask_networks=False)
    pipe.controlnet = None
    assert pipe.vocabulary == LABELS and pipe.tumors == TUMORS


def test_names_in_errors(pipe, base):
    assert label_index("kidney tumor", pipe.vocabulary) == 129
    with pytest.raises(ValueError, match="No anatomy is called 'kidney tumour'; use 'kidney tumor'"):
        pipe(anatomy_list=["kidney tumour"])
    with pytest.raises(ValueError, match="No anatomy is called 'kidney tumor'"):
        base(anatomy_list=["kidney tumor"])
    with pytest.raises(ValueError, match="no mask database"):  # the name is known
        pipe(anatomy_list=["kidney tumor"])


def test_name_of_what_is_lost(pipe, mask):
    labels = np.asarray(mask.dataobj)
    labels[labels == 129] = 1
    labels[9, 6, 13] = 129
    with pytest.warns(UserWarning, match="kidney tumor: not in the label map any more"):
        pipe(mask=mask, output_size=(8, 8, 8), generator=seeded(), output_type="latent", num_inference_steps=1)


def test_more_classes_later(pipe):
    pipe.controlnet.add_classes({"cyst": 131}, None)
    assert pipe.vocabulary.items() >= (NEW_CLASSES | {"cyst": 131}).items()
    assert pipe.tumors[129] == (LABELS["liver"], LABELS["spleen"]) and 131 not in pipe.tumors


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = MaisiCTPipeline.from_pretrained(tmp_path)
    assert loaded.vocabulary == pipe.vocabulary and loaded.tumors == pipe.tumors


def test_guidance_compares_with_the_map_without_the_new_tumor(pipe, base, mask):
    """As with the tumors of the published models; to a model that does not know it, it is no tumor."""
    assert np.array_equal(make_image(pipe, mask), make_image(base, mask))
    guided, unaware = (make_image(one, mask, guidance_scale=3.0) for one in (pipe, base))
    assert np.abs(guided - unaware).mean() > 0.01

    healthy = make_label_map()
    labels = np.asarray(healthy.dataobj)
    labels[labels == 26] = 1
    assert np.array_equal(*(make_image(one, healthy, guidance_scale=3.0) for one in (pipe, base)))


# Adapters


@pytest.fixture(scope="module")
def adapted():
    """A pipeline whose ControlNet has an adapter that changes what it makes, and new classes."""
    pipe = make_pipeline(with_mask_networks=False)
    torch.manual_seed(1)
    targets = ["to_q", "to_v", "conv1", "controlnet_cond_embedding.conv_in"]
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights="gaussian")
    pipe.controlnet.add_adapter(config)
    for name, parameter in pipe.controlnet.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    pipe.controlnet.eval().add_classes(NEW_CLASSES, ORGANS)
    return pipe


@pytest.fixture(scope="module")
def adapter(adapted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    adapted.controlnet.save_lora_adapter(folder)
    adapted.controlnet.save_config(folder)
    return folder


def test_adapter(adapted, adapter, base, mask):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.load_lora_weights(adapter)
    image = make_image(pipe, mask)
    assert np.array_equal(image, make_image(adapted, mask))
    assert np.abs(image - make_image(base, mask)).mean() > 1
    assert pipe.vocabulary == adapted.vocabulary and pipe.tumors == adapted.tumors


def test_adapter_by_name(adapter, base, mask):
    """It can be switched off, weakened and removed as any other."""
    pipe = make_pipeline(with_mask_networks=False)
    pipe.load_lora_weights(str(adapter), adapter_name="kidney")
    full, without = make_image(pipe, mask), make_image(base, mask)
    pipe.controlnet.set_adapters("kidney", 0.5)
    half = make_image(pipe, mask)
    assert not np.array_equal(half, full) and not np.array_equal(half, without)
    pipe.controlnet.delete_adapters("kidney")
    assert np.array_equal(make_image(pipe, mask), without)


def test_adapter_keeps_the_classes_there_are(adapter):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.controlnet.add_classes({"cyst": 131}, {"cyst": ["liver"]})
    pipe.load_lora_weights(adapter)
    assert pipe.vocabulary.items() >= (NEW_CLASSES | {"cyst": 131}).items()
    assert pipe.tumors.keys() >= {129, 131}


def test_adapter_for_no_controlnet(adapter):
    pipe = make_pipeline(with_mask_networks=False)
    pipe.controlnet = None
    with pytest.raises(ValueError, match="no ControlNet that an adapter could be added to"):
        pipe.load_lora_weights(adapter)


# Precisions


@pytest.mark.parametrize("half", ["unet", "controlnet"])
def test_two_precisions(pipe, base, mask, half):
    """A ControlNet fine-tuned in float32 steers a UNet in half precision, and the other way round."""
    getattr(pipe, half).to(torch.bfloat16)
    image, expected = make_image(pipe, mask), make_image(base, mask)
    assert {pipe.unet.dtype, pipe.controlnet.dtype} == {torch.float32, torch.bfloat16}
    difference = np.abs(image - expected).mean()
    assert 0 < difference < 0.15 * expected.std()
