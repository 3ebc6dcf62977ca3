"""The VAE in slabs gives what it gives in one piece."""

import errno
import gc
import math
import os
import shutil
import tempfile
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import dispatch_model

from maisi_diffusers import AutoencoderKLMaisi
from maisi_diffusers.models import slab_convolution, slab_tiling, winograd
from maisi_diffusers.models.activations import Activations
from maisi_diffusers.models.finest_level import RollingPlanes
from maisi_diffusers.models.group_statistics import GroupStatistics
from maisi_diffusers.models.shares import Shares
from maisi_diffusers.models.slab_convolution import SlabConvolution
from maisi_diffusers.models.slab_tiling import SlabTiling, kept_values, layers_of
from maisi_diffusers.models.tiling_choice import choose_tiling
from maisi_diffusers.pipelines.memory_plan import LivingTensors

SIZE = (7, 5, 6)
# Everything in a file and one plane at a time; some planes; all that is kept in memory; the whole in one slab.
MEMORIES = ["1KB", "200KB", "3MB", "1GiB"]


def make_vae(seed=0, **kwargs) -> AutoencoderKLMaisi:
    torch.manual_seed(seed)
    config = {"block_out_channels": (8, 16, 16), "norm_num_groups": 4, "latent_channels": 4} | kwargs
    vae = AutoencoderKLMaisi(**config).eval()
    vae.disable_tiling()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, 0.02, 0.15)
    return vae


def draw(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()


@pytest.fixture(params=["enable_exact_tiling", "enable_tiling"])
def enable(request):
    """A way to tile."""
    return getattr(AutoencoderKLMaisi, request.param)


@torch.no_grad()
def run(vae: AutoencoderKLMaisi, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and moments of a latent."""
    z = draw(batch, 4, *SIZE)
    x = draw(batch, vae.config.in_channels, *(vae.spatial_compression_ratio * n for n in SIZE))
    return vae.decode(z).sample, vae.encode(x).latent_dist.parameters


def assert_same_in_slabs(vae: AutoencoderKLMaisi, enable, memory: str, batch: int = 1) -> None:
    """Decode and encode in one piece and in slabs."""
    image, moments = run(vae, batch)
    enable(vae, memory)
    tiled_image, tiled_moments = run(vae, batch)
    assert_equal(tiled_image, image)
    assert_equal(tiled_moments, moments)
    vae.disable_tiling()
    assert torch.equal(run(vae, batch)[0], image)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_conv_transpose": True},
        {"block_out_channels": (8, 8, 16, 32), "layers_per_block": (1, 2, 1, 2)},
        {"block_out_channels": (32, 32, 64)},
    ],
    ids=["trilinear", "transposed", "four levels", "winograd"],
)
def test_equal(enable, config, memory):
    assert_same_in_slabs(make_vae(**config), enable, memory)


def test_batch(enable):
    assert_same_in_slabs(make_vae(), enable, "200KB", batch=2)


def test_statistics_under_autocast():
    norm, slab = torch.nn.GroupNorm(2, 4), draw(1, 4, 8, 16, 16) + 3
    expected, found = GroupStatistics(norm), GroupStatistics(norm)
    expected.add(slab)
    with torch.autocast("cpu", torch.bfloat16):
        found.add(slab)
    assert torch.equal(found.pack(), expected.pack())
    mean, variance = expected.mean, expected.squares / expected.count
    assert torch.allclose(mean, slab.double().mean((0, 2, 3, 4)), atol=1e-6)
    assert torch.allclose(variance, slab.double().var((0, 2, 3, 4), correction=0), atol=1e-6)


def test_planes_are_made_once():
    """From front to back, and forgotten behind what is read."""
    made = []

    def make(planes):
        made.append((planes.start, planes.stop))
        return torch.arange(planes.start, planes.stop).view(1, 1, -1, 1, 1)

    features = RollingPlanes(make)
    for start, stop, kept in ((2, 5, 3), (3, 5, 3), (4, 9, 5), (8, 10, 2), (10, 12, 2)):
        slab = features.read(start, stop)
        assert slab.flatten().tolist() == list(range(start, stop))
        assert slab.untyped_storage().nbytes() == kept * slab.element_size()
    assert made == [(2, 5), (5, 9), (9, 10), (10, 12)]


@pytest.mark.parametrize("memory", MEMORIES)
@torch.no_grad()
def test_classes(enable, memory):
    vae = make_vae(out_channels=11)
    classes = vae.decode_classes(draw(1, 4, *SIZE))
    enable(vae, memory)
    found = vae.decode_classes(draw(1, 4, *SIZE))
    assert found.dtype == torch.int16 and classes.unique().numel() > 3 and torch.equal(found, classes)


@pytest.mark.parametrize("memory", ["200KB", "1GiB"])
@torch.no_grad()
def test_half_precision(enable, memory):
    """As near to float32 as in one piece."""
    vae = make_vae()
    expected = vae.decode(draw(1, 4, *SIZE)).sample
    vae.bfloat16()
    whole = vae.decode(draw(1, 4, *SIZE).bfloat16()).sample
    enable(vae, memory)
    found = vae.decode(draw(1, 4, *SIZE).bfloat16()).sample
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().mean() <= 1.2 * (whole - expected).abs().mean()


@pytest.mark.parametrize("is_hooked", [False, True])
def test_adapters_and_hooks(enable, is_hooked):
    """Convolutions that are more than themselves are called, not imitated."""
    vae = make_vae()
    if is_hooked:
        for module in vae.modules():
            if isinstance(module, torch.nn.Conv3d):
                module.register_forward_hook(lambda module, args, output: output * 1.1)
    else:
        peft = pytest.importorskip("peft")
        vae.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "conv2", "conv"], init_lora_weights=False))
    assert_same_in_slabs(vae, enable, "200KB")


@pytest.mark.parametrize("at_once", [40e6, 1, 3000])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_fewer_products(bias, at_once, monkeypatch):
    """Of all rows at once, of two, and of some."""
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    conv = torch.nn.Conv3d(5, 7, 3, bias=bias).double()
    x = draw(1, 5, 8, 16, 5).double()
    expected = conv(torch.nn.functional.pad(x, (1, 1)))
    found = winograd.convolve(x[0].transpose(0, 1), winograd.transform_weight(conv.weight), conv.bias)
    assert (found.transpose(0, 1)[None] - expected).abs().max() < 1e-12


@pytest.mark.parametrize("at_once", [40e6, 1, 3000])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_fewer_products_along_x(bias, at_once, monkeypatch):
    monkeypatch.setattr(winograd, "AT_ONCE", at_once)
    conv = torch.nn.Conv3d(5, 7, 3, padding=(0, 0, 1), bias=bias)
    x = draw(1, 5, 8, 13, 5)
    found = winograd.convolve(x[0].transpose(0, 1), winograd.transform_weight_along_x(conv.weight), conv.bias)
    assert_equal(found.transpose(0, 1)[None], conv(x))


@pytest.mark.parametrize("length", [5, 8])
@torch.no_grad()
def test_half_precision_with_fewer_products(length):
    """Of one layer: with twice the error of the same without."""
    conv = torch.nn.Conv3d(64, 64, 3, padding=1)
    x = draw(1, 64, length, 6, 7)
    plain = conv.to(torch.bfloat16)(x.to(torch.bfloat16))
    slab = SlabConvolution(conv)
    assert slab.saves_products and slab.is_along_x
    found = slab(x.to(torch.bfloat16), True, True)
    assert found.dtype == torch.bfloat16 and found.shape == plain.shape
    expected = conv.double()(x.double())
    errors = [(one.double() - expected).square().mean().sqrt() for one in (plain, found)]
    assert 0 < errors[1] < 2.2 * errors[0]


@torch.no_grad()
def test_fewer_products_under_autocast():
    """As with weights in 16 bits: along one axis alone, whose error is smaller."""
    conv = torch.nn.Conv3d(64, 64, 3, padding=1)
    x = draw(1, 64, 8, 6, 7)
    with torch.autocast("cpu", torch.bfloat16):
        slab = SlabConvolution(conv)
        found, plain = slab(x, True, True), conv(x)
    assert slab.saves_products and slab.is_along_x
    errors = [(one - conv(x)).square().mean().sqrt() for one in (plain, found)]
    assert 0 < errors[1] < 2.2 * errors[0]
    assert not SlabConvolution(conv).is_along_x


@torch.no_grad()
def test_statistics_of_slabs():
    """Also where the mean is large beside the deviation."""
    x = 1000 + draw(1, 8, 9, 6, 5)
    norm = torch.nn.GroupNorm(4, 8)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    statistics = GroupStatistics(norm)
    for slab in x.split([1, 4, 3, 1], dim=2):
        statistics.add(slab)
    expected = torch.nn.functional.group_norm(x.double(), 4, norm.weight.double(), norm.bias.double())
    statistics.normalize(x, out=x, activate=False)
    assert (x - expected).abs().max() < 1e-3


@pytest.mark.parametrize("is_file", [False, True])
def test_activations(is_file, tmp_path):
    x = draw(1, 3, 5, 4, 2)
    kept = Activations(3, (5, 4, 2), torch.float32, x.device, tmp_path if is_file else x.device)
    kept.write(0, x[:, :, :2])
    kept.write(2, x[:, :, 2:])
    assert torch.equal(kept.read(1, 4), x[:, :, 1:4])
    assert not list(tmp_path.iterdir())  # nothing that could be left behind


@pytest.mark.parametrize("keeps_finest", [True, False])
def test_a_disk_that_is_too_small(keeps_finest, monkeypatch, tmp_path):
    """It is said before the first layer, with the way that needs less if there is one."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10_000))
    monkeypatch.setattr(tempfile, "TemporaryFile", None)
    vae = make_vae()
    enable = vae.enable_exact_tiling if keeps_finest else vae.enable_tiling
    enable("1KB", tmp_path)
    with (
        torch.no_grad(),
        pytest.raises(OSError, match=r"0.0 GB are free, and the VAE keeps .* GB of features: choose") as error,
    ):
        vae.decode(draw(1, 4, *SIZE))
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert ("enable_tiling" in error.value.strerror) == keeps_finest


def test_a_disk_that_others_fill(monkeypatch, tmp_path):
    """It is said before a layer is through."""

    def refuse(descriptor, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    vae = make_vae()
    vae.enable_exact_tiling("1KB", tmp_path)
    with (
        torch.no_grad(),
        pytest.raises(OSError, match=r"no room for 0.0 GB of features, choose another folder=") as error,
    ):
        vae.decode(draw(1, 4, *SIZE))
    assert error.value.filename == str(tmp_path)


@pytest.mark.parametrize("keeps_finest", [True, False])
def test_where_features_are_kept(keeps_finest, monkeypatch, tmp_path):
    made = []
    original = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **kwargs: made.append(kwargs["dir"]) or original(**kwargs))
    vae = make_vae()
    enable = vae.enable_exact_tiling if keeps_finest else vae.enable_tiling
    enable("1GiB", tmp_path)
    run(vae)
    assert not made
    enable("1KB", tmp_path)
    run(vae)
    assert made and set(made) == {tmp_path}


def test_features_stay_in_memory_that_has_room_for_them():
    """And for slabs beside them."""
    kept, slabs, cpu = 700, 200, torch.device("cpu")
    tiling = SlabTiling(1000, keeps_finest=True)
    assert tiling.place(kept, slabs, cpu) == (cpu, 300)
    assert tiling.place(kept, 301, cpu) == (tiling.folder, 1000)
    assert tiling.place(kept, 301, torch.device("meta")) == (cpu, 1000)


@pytest.mark.parametrize("width, memories", [(32, (3, 4, 8, 16)), (48, (6, 8, 16))])
@pytest.mark.parametrize("network", ["decoder", "encoder"])
@torch.no_grad()
def test_memory_is_no_more_than_was_given(enable, network, width, memories, monkeypatch, recwarn):
    """Of features of either kind, be they kept in memory or in a file, and of slabs of all layers."""
    vae = make_vae(block_out_channels=(16, 32, 64), norm_num_groups=8)
    z, x = draw(1, 4, 8, width // 4, width // 4), draw(1, 1, 32, width, width)
    monkeypatch.setattr(slab_convolution, "CPU_SLAB", 0)  # planes are small here
    monkeypatch.setattr(winograd, "AT_ONCE", 1e5)

    def work():
        vae.decode(z) if network == "decoder" else vae.encode(x)

    enable(vae)
    if network == "decoder" and not vae.tiling.keeps_finest:  # has the most for one plane
        memories = memories[1:]
    for megabytes in memories:
        enable(vae, megabytes * 10**6)
        with LivingTensors(torch.device("cpu")) as living:
            work()
        assert living.highest <= 1.1 * megabytes * 10**6, megabytes
    assert not [one for one in recwarn if "more than was allowed" in str(one.message)]
    enable(vae, "500KB")
    with pytest.warns(UserWarning, match="memory=500000 is less than one plane .* about [0-9]+: more than"):
        work()


@pytest.mark.parametrize("block_out_channels", [(8, 8, 16), (8, 16, 32), (16, 16)])
@pytest.mark.parametrize("enable", [AutoencoderKLMaisi.enable_exact_tiling, AutoencoderKLMaisi.enable_tiling])
@torch.no_grad()
def test_what_is_kept(block_out_channels, enable, monkeypatch):
    """As much as is told, and nothing of it any longer: nothing waits for the garbage collector."""
    values = {"now": 0, "highest": 0}

    def change(number):
        values["now"] += number
        values["highest"] = max(values.values())

    original = Activations.__init__

    def record(self, *args):
        original(self, *args)
        change(self.memory.numel())
        weakref.finalize(self.memory.untyped_storage(), change, -self.memory.numel())

    vae = make_vae(block_out_channels=block_out_channels)
    z = draw(1, 4, *SIZE)
    x = draw(1, 1, *(vae.spatial_compression_ratio * n for n in SIZE))
    enable(vae, "1GiB")
    decoder_steps, encoder_steps, size = layers_of(vae.decoder.blocks), layers_of(vae.encoder.blocks), x.shape[2:]
    if not vae.tiling.keeps_finest:
        decoder_steps, encoder_steps = layers_of(vae.decoder.blocks[:-1])[:-1], layers_of(vae.encoder.blocks[1:])
        size = [n // 2 for n in size]
    vae.decode(z), vae.encode(x)  # what is made at the first call and stays
    monkeypatch.setattr(Activations, "__init__", record)
    gc.disable()
    try:
        for call, steps, shape in ((vae.decode, decoder_steps, z), (vae.encode, encoder_steps, x)):
            values["highest"] = 0
            call(shape)
            told = kept_values(steps, tuple(z.shape[2:]) if shape is z else tuple(size))
            assert values == {"now": 0, "highest": told}
    finally:
        gc.enable()


def test_less_is_kept_without_the_finest_level(monkeypatch):
    kept = []
    original = Activations.__init__

    def record(self, channels, size, *args):
        kept.append(channels * math.prod(size))
        original(self, channels, size, *args)

    monkeypatch.setattr(Activations, "__init__", record)
    largest, vae = [], make_vae(block_out_channels=(8, 8, 8))
    for enable in (vae.enable_exact_tiling, vae.enable_tiling):
        kept.clear()
        enable()
        run(vae)
        largest.append(max(kept))
    assert largest[0] == 8 * largest[1]


def test_slabs_are_as_thick_as_the_memory_lets():
    tiling = SlabTiling(10**6, keeps_finest=True)
    tiling.device, tiling.shares = torch.device("meta"), Shares(None, 1)
    tiling.for_slabs = 6 * 4 * slab_tiling.SLABS_AT_ONCE * 1000
    assert [(s.start, s.stop) for s in tiling.cut((9, 100, 2), 5)] == [(0, 4), (4, 8), (8, 9)]
    assert [(s.start, s.stop) for s in tiling.cut((10, 100, 2), 4, multiple=2)] == [(0, 4), (4, 8), (8, 10)]
    assert [(s.start, s.stop) for s in tiling.cut((4, 100, 2), 5, 10)] == [(0, 2), (2, 4)]
    assert [s.start for s in tiling.cut((4, 100, 100), 50, multiple=2)] == [0, 2]


def test_ways_to_tile():
    vae = AutoencoderKLMaisi.from_config(make_vae().config)
    assert vae.tiling == "auto"
    vae.enable_exact_tiling()
    assert (vae.tiling.keeps_finest, vae.tiling.memory) == (True, None)
    vae.enable_tiling(10**9)
    assert (vae.tiling.keeps_finest, vae.tiling.memory) == (False, 10**9)
    vae.disable_tiling()
    assert vae.tiling is None
    vae.enable_auto_tiling()
    assert vae.tiling == "auto"


@pytest.mark.parametrize("free", [2**30, 400_000])
def test_choice_on_the_cpu(monkeypatch, free):
    """Slabs, also with little memory."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    vae = make_vae()
    x = draw(1, 4, *SIZE)
    tiling = choose_tiling(vae.decoder, x)
    assert (tiling.keeps_finest, tiling.memory) == (True, None)
    with torch.no_grad():
        whole = vae.decode(x).sample
        vae.enable_auto_tiling()
        tiled = vae.decode(x).sample
    assert 0 < (tiled - whole).abs().max() < 1e-5 * whole.abs().max()


def test_choice_on_an_accelerator(monkeypatch):
    """One piece where there is room for it."""
    decoder, x = make_vae().decoder.to("meta"), torch.empty(1, 4, *SIZE, device="meta")
    for free, is_whole in ((2**30, True), (2**20, False)):
        # Half of what is free has been reserved before, and is not in use.
        monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device, free=free: (free // 2, 2**31))
        monkeypatch.setattr(torch.accelerator, "memory_reserved", lambda device, free=free: free // 2 + 1000)
        monkeypatch.setattr(torch.accelerator, "memory_allocated", lambda device: 1000)
        tiling = choose_tiling(decoder, x)
        assert (tiling is None) == is_whole
    assert (tiling.keeps_finest, tiling.memory) == (True, None)


def test_choice_without_room(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=400_000))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=400_000))
    with pytest.warns(UserWarning, match=r"neither the memory nor .* has room .* vae.enable_exact_tiling\(folder="):
        tiling = choose_tiling(make_vae().decoder, draw(1, 4, *SIZE))
    assert (tiling.keeps_finest, tiling.memory) == (False, None)


@pytest.mark.parametrize("enable", [AutoencoderKLMaisi.enable_exact_tiling, AutoencoderKLMaisi.enable_tiling])
def test_offloaded_layers_in_slabs(enable, tmp_path):
    vae = make_vae()
    vae.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    enable(vae)
    with torch.no_grad(), pytest.raises(ValueError, match="one by one: call vae.enable_auto_tiling"):
        vae.decode(draw(1, 4, *SIZE))


def test_layers_with_hooks_that_have_their_weights(enable):
    """As `device_map="balanced"` makes them."""
    vae = dispatch_model(make_vae(), {"": "cpu"}, force_hooks=True)
    assert choose_tiling(vae.decoder, draw(1, 4, *SIZE)) is not None
    assert_same_in_slabs(vae, enable, "200KB")


def test_one_piece_for_gradients():
    vae = make_vae()
    vae.enable_auto_tiling()
    z = draw(1, 4, *SIZE).requires_grad_()
    vae.decode(z).sample.sum().backward()
    assert z.grad.abs().max() > 0


def test_no_gradients_of_slabs(enable):
    vae = make_vae()
    enable(vae)
    z = draw(1, 4, *SIZE).requires_grad_()
    with pytest.raises(ValueError, match="slabs have no gradients, and the input wants one: call vae.enable_auto_t"):
        vae.decode(z)
    with torch.no_grad():
        assert not vae.decode(z).sample.requires_grad


@pytest.mark.parametrize("planes", [1, 2, 5])
@torch.no_grad()
def test_parts_of_a_thick_slab(planes, monkeypatch):
    monkeypatch.setattr(slab_convolution, "CPU_SLAB", 0)
    monkeypatch.setattr(slab_convolution, "CPU_PLANES", planes)
    layer = torch.nn.Conv3d(3, 2, 3, padding=1)
    conv, x = SlabConvolution(layer), draw(1, 3, 8, 4, 5)
    expected = layer(x)
    for start, stop in ((0, 8), (0, 6), (2, 8), (3, 5)):
        part = conv.in_parts(x[:, :, max(start - 1, 0) : stop + 1], start == 0, stop == 8)
        assert_equal(part, expected[:, :, start:stop])


@pytest.mark.parametrize("memory", [0, -1, "4 apples"])
def test_memory_that_is_none(memory):
    with pytest.raises(ValueError, match="memory='?-?[04]|is not in a valid format"):
        make_vae().enable_tiling(memory)


def test_no_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder '.*nowhere' for a scratch file: make it"):
        make_vae().enable_exact_tiling(folder=tmp_path / "nowhere")
