r"""
How far the VAE's fast tiling is from the exact one, and whether slabs show.

    python -m benchmarks.fast_tiling
    python -m benchmarks.fast_tiling --size 256 --memory 1GiB

The latents are those of phantoms' CTs, of the model inside the package and of the published architecture with random
weights. Told are the mean of the absolute differences in HU, of all planes and of those on either side of where slabs
meet, and seconds.
"""

import argparse
import time

import numpy as np
import torch

from maisi_diffusers import PHANTOM_TINY, AutoencoderKLMaisi
from maisi_diffusers.imaging import from_hu, to_hu
from maisi_diffusers.models.finest_level import FinestLevel
from maisi_diffusers.phantom import make_phantom
from tests.parity.monai_reference import randomize

from . import markdown

SEED = 300_000
FIELD_OF_VIEW = 384.0


def load_vaes() -> dict[str, AutoencoderKLMaisi]:
    """By what they are."""
    vaes = {"published architecture, random weights": randomize(AutoencoderKLMaisi(), seed=0)}
    if PHANTOM_TINY.is_dir():
        vaes["the model inside the package"] = AutoencoderKLMaisi.from_pretrained(PHANTOM_TINY, subfolder="vae")
    return vaes


@torch.no_grad()
def measure(vae: AutoencoderKLMaisi, size: int, memory: str) -> dict[str, float]:
    """Differences in HU and seconds."""
    phantom = make_phantom(SEED, size=(size,) * 3, spacing=(FIELD_OF_VIEW / size,) * 3)
    ct = torch.from_numpy(phantom.image.get_fdata(dtype=np.float32))
    z = vae.encode(from_hu(ct, 1)[None, None]).latent_dist.mode()
    ends, read = set(), FinestLevel.read

    def record(level: FinestLevel, start: int, stop: int) -> torch.Tensor:
        ends.update((start - 1, start))
        return read(level, start, stop)

    images, seconds = {}, {}
    FinestLevel.read = record
    try:
        for name, enable in (("exact", vae.enable_exact_tiling), ("fast", vae.enable_tiling)):
            enable(memory)
            start = time.perf_counter()
            images[name] = to_hu(vae.decode(z).sample, 1)
            seconds[name] = time.perf_counter() - start
    finally:
        FinestLevel.read = read
    by_plane = (images["fast"] - images["exact"]).abs().mean((0, 1, 3, 4))
    borders = sorted(ends & set(range(1, size)))
    inside = [plane for plane in range(size) if plane not in ends]
    return {
        "mean": by_plane.mean().item(),
        "borders": by_plane[borders].mean().item(),
        "inside": by_plane[inside].mean().item(),
        "num_borders": len(borders) // 2,
        "seconds": seconds["fast"],
        "exact_seconds": seconds["exact"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="edge of the volume in voxels")
    parser.add_argument("--memory", default="500MB", help="what features may take at once")
    args = parser.parse_args()
    rows = []
    for name, vae in load_vaes().items():
        result = measure(vae, args.size, args.memory)
        hu = [f"{result[place]:.2f}" for place in ("mean", "borders", "inside")]
        seconds = [f"{result[way]:.1f}" for way in ("seconds", "exact_seconds")]
        rows.append([name, *hu, str(result["num_borders"]), *seconds])
    print(markdown.table(["VAE", "mean, HU", "at borders", "inside", "borders", "seconds, fast", "exact"], rows))


if __name__ == "__main__":
    main()
