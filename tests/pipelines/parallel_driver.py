"""What each of several processes makes of the same, saved for [`test_parallel`]: `parallel_driver.py FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

from maisi_diffusers.models.activations import Activations
from tests.tiny import make_pipeline

# Latents of 7 planes, which 3 processes cannot have the same number of.
GRID = (7, 6, 5)
IMAGE = {"output_size": (56, 16, 24), "spacing": (2.0, 2.0, 3.0), "image_only": True, "guidance_scale": 2.0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def make(is_shared: bool) -> dict[str, torch.Tensor]:
    """Results of a VAE and of a pipeline."""
    results, pipe = {}, make_pipeline()
    for name, dtype in DTYPES.items():
        vae = pipe.vae.to(dtype)
        for memory in ("1KB", "1GiB"):
            vae.enable_exact_tiling(memory, group=torch.distributed.group.WORLD if is_shared else None)
            results[f"decode {name} {memory}"] = vae.decode(draw(1, 4, *GRID).to(dtype)).sample
            x = draw(2, 1, *(4 * n for n in GRID)).to(dtype)
            results[f"encode {name} {memory}"] = vae.encode(x).latent_dist.mode()
    pipe.vae.to(torch.float32)
    pipe.mask_vae.enable_exact_tiling(group=torch.distributed.group.WORLD if is_shared else None)
    results["classes"] = pipe.mask_vae.decode_classes(draw(1, 4, *GRID))
    if is_shared:
        pipe.enable_parallelism()
    results["image"] = pipe(**IMAGE, generator=torch.Generator().manual_seed(1), output_type="pt").images
    sizes = {"controllable_anatomy_size": [("liver", 0.5)], "output_size": (56, 16, 24), "spacing": (2.0, 2.0, 3.0)}
    made = pipe(**sizes, generator=torch.Generator().manual_seed(1), output_type="pt")
    results["labelled image"], results["labels"] = made.images, made.labels

    def round_otherwise(pipe, step, timestep, tensors):
        """As another GPU does, but coarsely; in the last step, of which no prediction is shared any more."""
        is_other = is_shared and torch.distributed.get_rank() > 0 and step == pipe.num_timesteps - 1
        return {"latents": tensors["latents"] + 0.1 * is_other}

    arguments = {"generator": torch.Generator().manual_seed(1), "output_type": "pt"}
    results["image of the first"] = pipe(**IMAGE, **arguments, callback_on_step_end=round_otherwise).images
    return results


def main() -> None:
    state = PartialState(cpu=True)
    planes, original = [], Activations.__init__

    def record(self, *args):
        original(self, *args)
        planes.append(self.planes.stop - self.planes.start if len(args) == 6 else 0)

    Activations.__init__ = record
    results = make(is_shared=True)
    results["planes"] = torch.tensor(max(planes))
    for call in (
        lambda pipe: pipe(**IMAGE),
        lambda pipe: pipe.vae.decode(draw(1, 4, 2, 2, 2)),
    ):
        pipe = make_pipeline()
        pipe.enable_parallelism()
        try:
            call(pipe)
        except ValueError as error:
            results.setdefault("errors", []).append(str(error))
    torch.save(results, Path(sys.argv[1]) / f"{state.process_index}.pt")


if __name__ == "__main__":
    main()
