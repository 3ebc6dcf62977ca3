"""One image after another through the pipeline, each with a seed of its own, and onto the disk."""

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers.utils import logging

from ..anatomy import BODY, label_colours, legend_names
from ..imaging import WINDOWS, is_ct, modality_code, save_preview
from ..memory import is_out_of_memory
from ..models import TILINGS
from ..pipelines import MaisiCTPipeline, MaisiCTPipelineOutput
from .devices import pick_device, pick_dtype
from .models import Model, load_pipeline
from .outputs import Outputs, publish_outputs, staging
from .progress import Stages
from .record import make_record
from .warned import collect_warnings
from .wording import grid_text


def generate_images(
    model: Model,
    request: dict,
    outputs: list[Outputs],
    done: set[Outputs],
    device: str,
    dtype: str,
    tiling: str,
    memory: str | None,
    window: str,
    quiet: bool,
) -> list[dict]:
    """
    Make the images that are not done, and say in a line what each of them is.

    Args:
        model: to make them with.
        request: arguments of the pipeline, by their names.
        outputs: of all images.
        done: those of them that are there.
        device: a name for [`pick_device`].
        dtype: a name for [`pick_dtype`].
        tiling: how the VAE decodes, one of [`TILINGS`].
        memory: what its slabs may take, for the two that have a bound.
        window: what the pictures of CTs show, one of [`WINDOWS`].
        quiet: say nothing.

    Returns:
        what there is to know of every image, as JSON has it.
    """
    device = pick_device(device)
    logging.disable_progress_bar()  # of diffusers, where the stages have theirs
    results = []
    with staging(outputs[0].folder) as staged, Stages(len(outputs), quiet) as stages:
        pipe = None
        for i, one in enumerate(outputs):
            if one in done:
                record = json.loads(one.record.read_text())
            else:
                if pipe is None:
                    stages.begin("load")
                    with tell_of_memory(device, "for this model: try --dtype bfloat16, or another --device"):
                        pipe = load_pipeline(model, pick_dtype(dtype, device)).to(device)
                    pipe.set_progress_bar_config(disable=True)
                    TILINGS[tiling](pipe.vae, *filter(None, [memory]))
                start = time.monotonic()
                output, messages = make_image(pipe, request, one.seed, stages)
                stages.begin("write")
                record = make_record(pipe, model, request, one, output, messages, tiling)
                try:
                    write_image(staged, one, output, pipe, record, window)
                except OSError as error:
                    raise OSError(f"{one.folder} cannot be written to: {error.strerror or error}") from error
                if not quiet:
                    report(one, record, time.monotonic() - start, stages)
            stages.finish_image(i + 1)
            results.append(summarize(one, record, skipped=one in done))
    return results


def make_image(
    pipe: MaisiCTPipeline, request: dict, seed: int, stages: Stages
) -> tuple[MaisiCTPipelineOutput, list[str]]:
    """
    Call the pipeline.

    Args:
        pipe: on its device.
        request: its arguments, by their names.
        seed: of the noise, which is drawn on the CPU: the same on every device.
        stages: told of the label map, every step, and the decoder.

    Returns:
        what the pipeline returns, and what it warned of.
    """

    def tell(pipe: MaisiCTPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        stages.step(step + 1, pipe.num_timesteps)
        if step + 1 == pipe.num_timesteps:
            stages.begin("decode")
        return {}

    if not request.get("image_only"):
        stages.begin("label map")
    with (
        shown_from_the_first_step(pipe, stages),
        collect_warnings() as messages,
        tell_of_memory(pipe.device, "for this size: try a smaller --output-size"),
    ):
        output = pipe(**request, generator=torch.Generator().manual_seed(seed), callback_on_step_end=tell)
    return output, messages


@contextmanager
def shown_from_the_first_step(pipe: MaisiCTPipeline, stages: Stages) -> Iterator[None]:
    """Tell stages of what no callback is called for: that sampling begins, and the steps of a label map."""
    steps = itertools.count(1)

    def begin(network: torch.nn.Module, args: tuple) -> None:
        if stages.stage != "denoise":
            stages.begin("denoise", pipe.num_timesteps)

    def count(network: torch.nn.Module, args: tuple, output: object) -> None:
        stages.step(next(steps), len(pipe.mask_scheduler.timesteps))

    networks = [network for network in (pipe.controlnet, pipe.unet) if network is not None]
    hooks = [network.register_forward_pre_hook(begin) for network in networks]
    if pipe.mask_unet is not None:
        hooks.append(pipe.mask_unet.register_forward_hook(count))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def tell_of_memory(device: torch.device, remedy: str) -> Iterator[None]:
    """Have a line say what to do where a device has too little memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        raise MemoryError(f"there is not enough memory on {device} {remedy}") from error


def write_image(
    staged: Path, outputs: Outputs, output: MaisiCTPipelineOutput, pipe: MaisiCTPipeline, record: dict, window: str
) -> None:
    """Write the files of an image into the temporary folder, and then give them their names."""
    image, labels = output.images[0], None if output.labels is None else output.labels[0]
    image.to_filename(staged / outputs.ct.name)
    if labels is not None:
        labels.to_filename(staged / outputs.labels.name)

    made_ct = is_ct(modality_code(record["arguments"]["modality"]))
    save_preview(
        staged / outputs.picture.name,
        image,
        labels,
        hidden_labels=(BODY,),
        window=WINDOWS[window] if made_ct else (0.0, float(np.percentile(image.dataobj, 99.5))),
        title=f"SYNTHETIC {'CT' if made_ct else 'MR'} · {record['model']['name']} · seed {outputs.seed}",
        names=legend_names(pipe.vocabulary),
        colours=label_colours(),
        focus=pipe.tumors,
    )
    (staged / outputs.record.name).write_text(json.dumps(record, indent=2) + "\n")
    publish_outputs(staged, outputs)


def report(outputs: Outputs, record: dict, seconds: float, stages: Stages) -> None:
    """Say what an image is in a line on stdout, and what is to be said against it."""
    labels = "no labels" if record["labels"] is None else f"{len(record['labels'])} labels"
    print(f"{outputs.ct}: {grid_text(record['size'], record['spacing'])}, {labels}, {seconds:.0f} s")
    for message in record["warnings"]:
        stages.warn(message)


def summarize(outputs: Outputs, record: dict, skipped: bool) -> dict:
    """What a program wants to know of an image."""
    return {
        "name": outputs.name,
        "seed": outputs.seed,
        "skipped": skipped,
        "ct": str(outputs.ct),
        "labels": None if record["labels"] is None else str(outputs.labels),
        "picture": str(outputs.picture),
        "record": str(outputs.record),
        "quality": record["quality"],
        "warnings": record["warnings"],
    }
