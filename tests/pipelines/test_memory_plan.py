"""What is said of memory before it is taken."""

import pytest
import torch

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.models.slab_tiling import kept_values, layers_of
from maisi_diffusers.models.tiling_choice import ONE_PIECE
from maisi_diffusers.pipelines.memory_plan import LivingTensors, plan_memory
from tests.tiny import make_pipeline

SIZE = (32, 16, 24)
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_living_tensors():
    """What lives is counted once, and no more when it is gone; of what was there before, nothing."""
    before = torch.ones(1000)
    with LivingTensors(CPU) as living:
        first = before + 1
        view = first.view(10, 100)
        second = view * 2
        assert living.now == living.highest == 2 * 4000
        del first, view
        third = second.add_(before.view(10, 100)) + 1
        assert living.now == 2 * 4000
        del second, third
        assert living.now == 0
    assert living.highest == 2 * 4000


@pytest.mark.parametrize(("channels_last", "device"), [(True, CPU), (False, CPU), (False, GPU)])
def test_convolutions_take_more(channels_last, device):
    conv = torch.nn.Conv3d(8, 4, 3)
    x = torch.ones(1, 8, 10, 10, 10)
    if channels_last:
        conv, x = (one.to(memory_format=torch.channels_last_3d) for one in (conv, x))
    with torch.no_grad(), LivingTensors(device) as living:
        y = conv(x)
    ordered = x.nbytes + conv.weight.nbytes + (y.nbytes if device is GPU else 0)
    assert living.highest == y.nbytes + (0 if channels_last else ordered)


@pytest.mark.parametrize("version", ["rflow-ct", "ddpm-ct"])
def test_stages(version):
    """Features of the VAE's finest level, 16 channels, are what counts."""
    pipe = make_pipeline(version)
    weights = sum(
        p.nbytes for one in pipe.components.values() if isinstance(one, torch.nn.Module) for p in one.parameters()
    )
    plans = {dtype: plan_memory(pipe, SIZE, dtype, CPU) for dtype in (torch.float32, torch.bfloat16)}
    single, half = plans.values()
    assert single["weights"] == weights == 2 * half["weights"]
    feature = 16 * 32 * 16 * 24 * 4
    assert single["kept exact"] == 2 * feature == 2 * half["kept exact"]
    # Beside them are four slabs of all planes, which are few, and their neighbours; and the image.
    slabs, image = 4 * 16 * 34 * 16 * 24 * 4, 32 * 16 * 24 * 4
    assert single["decode exact"] == single["kept exact"] + slabs + image == 2 * half["decode exact"]
    assert single["mask decode"] > half["mask decode"] > single["mask decode"] / 2
    # In 16 bits the channels lie side by side, and nothing is ordered anew.
    assert single["decode off"] / 2 > half["decode off"] > 3 * feature / 2 and single["step"] / 2 > half["step"] > 0
    assert single["embedding"] > half["embedding"] > 8 * 32 * 16 * 24
    assert next(pipe.unet.parameters()).device.type == "cpu" and next(pipe.unet.parameters()).dtype == torch.float32


def test_on_a_gpu():
    """Nothing is laid out for it, and so convolutions order more anew, in 16 bits too."""
    pipe = make_pipeline()
    on_cpu, on_gpu = (plan_memory(pipe, SIZE, torch.bfloat16, device) for device in (CPU, GPU))
    assert on_gpu["decode off"] > 1.3 * on_cpu["decode off"]
    assert all(on_gpu[stage] > on_cpu[stage] for stage in ("embedding", "step"))
    assert on_gpu["decode off"] == plan_memory(pipe, SIZE, torch.float32, GPU)["decode off"] / 2
    assert on_gpu["weights"] == on_cpu["weights"]


def test_one_piece_fits_where_it_is_chosen():
    """Of the published architecture, on a GPU."""
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKLMaisi()
        for network, x in (
            (vae.decoder, torch.empty(1, 4, 24, 24, 24)),
            (vae.encoder, torch.empty(1, 1, 96, 96, 96)),
        ):
            kept = kept_values(layers_of(network.blocks), tuple(x.shape[2:])) * x.element_size()
            with LivingTensors(GPU) as living:
                network(x)
            assert 0.9 * ONE_PIECE * kept < living.highest < ONE_PIECE * kept


def test_without_controlnet():
    pipe = make_pipeline()
    pipe.register_modules(controlnet=None)
    stages = plan_memory(pipe, SIZE, torch.float32, CPU)
    assert "embedding" not in stages and stages["step"] > 0
