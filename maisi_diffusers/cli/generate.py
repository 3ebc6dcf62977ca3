"""`maisi-ct generate`: its options, and the run from model to files."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .models import find_model
from .option_names import name_options
from .outputs import name_outputs, refuse_existing, refuse_others

ANATOMY, OWN_MAP, EDIT, GRID, SAMPLING, MODEL, OUTPUT = (
    "What to show",
    "A label map of your own",
    "A CT of your own to change",
    "Size and spacing",
    "Sampling",
    "Model and device",
    "Output",
)
# Where nothing says what to show.
DEFAULT_REGION = "abdomen"
# Of torch's generators.
MAX_SEED = 2**63


def option(panel: str, *names: str, **settings: Any) -> Any:
    """An option in a panel of the help page, without the line that would say that its default is nothing."""
    return typer.Option(*names, rich_help_panel=panel, **{"show_default": False, **settings})


def existing_file(panel: str, **settings: Any) -> Any:
    """An option for a file that must be there."""
    return option(panel, metavar="FILE", exists=True, dir_okay=False, **settings)


def generate(
    body_region: Annotated[
        list[str] | None,
        option(ANATOMY, metavar="WORD", help="A region to show: head, chest, abdomen, pelvis. Repeat it for several."),
    ] = None,
    anatomy: Annotated[
        list[str] | None,
        option(ANATOMY, metavar="NAME", help='An organ or a tumor to show, e.g. "lung tumor". Repeat it for several.'),
    ] = None,
    size: Annotated[
        list[str] | None,
        option(
            ANATOMY,
            metavar="NAME=SIZE",
            help='Make a label map with an organ or a tumor of this size, 0 to 1, or -1 for absent: "liver=0.5". '
            "Repeat it for several.",
        ),
    ] = None,
    anatomy_size: Annotated[
        tuple[float, float, float, float, float, float, float, float, float, float] | None,
        option(
            ANATOMY,
            metavar="10 SIZES",
            help="All of them instead: gallbladder, liver, stomach, pancreas, colon; tumors of lung, pancreas, liver, "
            "colon, bone.",
        ),
    ] = None,
    as_is: Annotated[
        bool,
        option(
            ANATOMY,
            "--as-is",
            help="Take a label map of the database as it is, and make no variant of it.",
        ),
    ] = False,
    keep_only_anatomy: Annotated[
        bool,
        option(ANATOMY, "--keep-only-anatomy", help="Labels of nothing but --anatomy or --size; the image is of all."),
    ] = False,
    image_only: Annotated[bool, option(ANATOMY, "--image-only", help="An image without a label map.")] = False,
    modality: Annotated[
        str | None, option(ANATOMY, metavar="NAME", help="ct, ct_contrast, mri_t1, ...; the model's own if not given.")
    ] = None,
    mask: Annotated[
        Path | None, existing_file(OWN_MAP, help="The label map to make a CT of: NIfTI, any orientation and affine.")
    ] = None,
    mask_vocabulary: Annotated[
        Literal["maisi", "totalsegmentator"] | None,
        option(OWN_MAP, metavar="NAME", help="Whose labels it has: maisi, which is the default, or totalsegmentator."),
    ] = None,
    body_image: Annotated[
        Path | None, existing_file(OWN_MAP, help="The CT it was drawn on, for the outline of the body.")
    ] = None,
    restore_grid: Annotated[
        bool, option(OWN_MAP, "--restore-grid", help="Put the results on the grid of the label map.")
    ] = False,
    image: Annotated[
        Path | None, existing_file(EDIT, help="The CT, on the grid of --mask, which says what it is to show.")
    ] = None,
    strength: Annotated[
        float | None, option(EDIT, metavar="X", help="How far it may change: 0 not at all, to 1; 1 if not given.")
    ] = None,
    repaint: Annotated[
        list[str] | None,
        option(
            EDIT,
            metavar="NAME",
            help="Paint this label of --mask anew, and leave the rest of the CT as it is. Repeat it for several.",
        ),
    ] = None,
    feather: Annotated[
        float | None, option(EDIT, metavar="MM", help="How far around it the CT may change; 6 if not given.")
    ] = None,
    output_size: Annotated[
        tuple[int, int, int] | None,
        option(GRID, metavar="X Y Z", help="Voxels. What a model allows: maisi-ct info."),
    ] = None,
    spacing: Annotated[
        tuple[float, float, float] | None, option(GRID, metavar="X Y Z", help="Voxel size in mm.")
    ] = None,
    seed: Annotated[
        int, option(SAMPLING, min=0, metavar="N", show_default=True, help="The same seed, the same files.")
    ] = 0,
    num: Annotated[
        int,
        option(
            SAMPLING, min=1, metavar="N", show_default=True, help="Images, one after the other; image i has seed + i."
        ),
    ] = 1,
    steps: Annotated[
        int | None, option(SAMPLING, min=1, metavar="N", help="Denoising steps; the model's own number if not given.")
    ] = None,
    quality_retries: Annotated[
        int | None,
        option(
            SAMPLING,
            min=0,
            metavar="N",
            help="How many times an image whose organs have the wrong HU is made again; 2 if not given.",
        ),
    ] = None,
    no_quality_check: Annotated[
        bool, option(SAMPLING, "--no-quality-check", help="Do not look at the HU of the organs at all.")
    ] = False,
    guidance_scale: Annotated[
        float | None,
        option(
            SAMPLING,
            metavar="X",
            help="How much tumors and modality are stressed; 0 is off. The model's own if not given.",
        ),
    ] = None,
    controlnet_conditioning_scale: Annotated[
        float | None, option(SAMPLING, metavar="X", help="How closely the label map is followed; 1 if not given.")
    ] = None,
    model: Annotated[
        str | None,
        option(MODEL, metavar="MODEL", help="A folder or a Hub id; a small model inside the package if not given."),
    ] = None,
    revision: Annotated[
        str | None, option(MODEL, metavar="NAME", help="Branch, tag or commit of a model on the Hub.")
    ] = None,
    variant: Annotated[
        str | None, option(MODEL, metavar="NAME", help="Variant of its weights, e.g. fp16 for *.fp16.safetensors.")
    ] = None,
    device: Annotated[
        str,
        option(
            MODEL,
            metavar="NAME",
            show_default=True,
            help="auto (an accelerator if there is one), cpu, cuda, mps, xpu.",
        ),
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        option(
            MODEL,
            metavar="NAME",
            show_default=True,
            help="auto (float32 on the CPU, else float16), float32, float16, bfloat16.",
        ),
    ] = "auto",
    tiling: Annotated[
        Literal["auto", "off", "exact", "lean"],
        option(
            MODEL,
            metavar="NAME",
            show_default=True,
            help="Slabs of the decoder: auto (by the memory there is), off (one piece), exact (slabs), lean (slabs, "
            "keeps a quarter and takes longer). The image is the same.",
        ),
    ] = "auto",
    memory: Annotated[
        str | None,
        option(
            MODEL,
            metavar="SIZE",
            help="With --tiling exact or lean: what slabs may take, e.g. 4GiB; what is free if not given.",
        ),
    ] = None,
    output: Annotated[
        Path,
        option(
            OUTPUT,
            "-o",
            "--output",
            metavar="FOLDER",
            show_default=True,
            help="Folder of the results; made if it is not there.",
        ),
    ] = Path("."),
    name: Annotated[
        str | None, option(OUTPUT, metavar="NAME", help="What their names begin with; model and seed if not given.")
    ] = None,
    window: Annotated[
        Literal["soft", "lung", "bone", "wide"],
        option(OUTPUT, metavar="NAME", show_default=True, help="HU that the picture shows: soft, lung, bone, wide."),
    ] = "soft",
    force: Annotated[bool, option(OUTPUT, "--force", help="Replace results that are there.")] = False,
    resume: Annotated[bool, option(OUTPUT, "--resume", help="Skip images that are there and complete.")] = False,
    as_json: Annotated[
        bool, option(OUTPUT, "--json", help="Print one JSON object, also of an error, and nothing else.")
    ] = False,
) -> None:
    """Make synthetic CT volumes with paired label maps.

    A label map is looked up in the model's database by --body-region and --anatomy, or made by --size, or your own
    with --mask; the model makes a CT of it. Without any of these it is an abdomen, and without --model the small
    model inside the package makes it.

    Every image has four files in the output folder: NAME_ct.nii.gz (int16 HU), NAME_labels.nii.gz (the label map on
    the same grid), NAME.png (a picture of both) and, last, NAME.json (how it was made, volumes of the organs, and a
    quality check of their HU).

    Examples:

    ```
    maisi-ct generate --output out

    maisi-ct generate --output out --body-region chest --anatomy "lung tumor" --num 10

    maisi-ct generate --output out --size liver=0.5 --size "hepatic tumor=0.3"

    maisi-ct generate --model maisi-rflow-ct --output out \\
        --mask segmentation.nii.gz --mask-vocabulary totalsegmentator \\
        --body-image ct.nii.gz
    ```
    """
    if force and resume:
        raise typer.BadParameter("--force replaces what is there and --resume keeps it: give one of them")
    if seed + num > MAX_SEED:
        raise typer.BadParameter(f"--seed {seed} is too large: the last image's must be below 2^63")
    if memory is not None and tiling not in ("exact", "lean"):
        raise typer.BadParameter(f"--memory {memory} bounds slabs: give it with --tiling exact or --tiling lean")
    if name is not None and (not name or name != Path(name).name or name.startswith(".")):
        raise typer.BadParameter(
            f"--name {name!r} is no name of a file: give one without folders; --output is for these"
        )
    request = {
        "body_region": body_region,
        "anatomy_list": anatomy,
        "controllable_anatomy_size": None if size is None else [read_size(text) for text in size],
        "anatomy_size": None if anatomy_size is None else list(anatomy_size),
        "mask": None if mask is None else str(mask),
        "mask_vocabulary": mask_vocabulary,
        "body_image": None if body_image is None else str(body_image),
        "image_only": image_only or None,
        "output_size": output_size,
        "spacing": spacing,
        "modality": modality,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "controlnet_conditioning_scale": controlnet_conditioning_scale,
        "restore_grid": restore_grid or None,
        "augment_mask": False if as_is else None,
        "quality_retries": quality_retries,
        "quality_check": False if no_quality_check else None,
        "keep_only_anatomy_list": keep_only_anatomy or None,
        "image": None if image is None else str(image),
        "strength": strength,
        "repaint_labels": repaint,
        "feather": feather,
    }
    # What is not asked for is the pipeline's to choose.
    request = {argument: value for argument, value in request.items() if value is not None}
    if not request.keys() & {
        "body_region",
        "anatomy_list",
        "controllable_anatomy_size",
        "anatomy_size",
        "mask",
        "image_only",
    }:
        request["body_region"] = [DEFAULT_REGION]

    found = find_model(model, revision, variant)
    outputs = name_outputs(output, name, found.name, seed, num)
    done = {one for one in outputs if one.is_made_from(found.description, request)} if resume else set()
    if resume:
        refuse_others([one for one in outputs if one not in done])
    elif not force:
        refuse_existing(outputs)

    from .generation import generate_images  # takes seconds to import

    try:
        results = generate_images(found, request, outputs, done, device, dtype, tiling, memory, window, quiet=as_json)
    except ValueError as error:
        raise ValueError(name_options(str(error))) from error
    if as_json:
        print(json.dumps({"images": results}))


def read_size(text: str) -> tuple[str, float]:
    """A pair of name and size from "liver=0.5"."""
    name, _, size = text.rpartition("=")
    try:
        return name.strip(), float(size)
    except ValueError:
        raise typer.BadParameter(
            f"--size {text!r} is no pair of name and size: give it like --size liver=0.5"
        ) from None
