"""`maisi-ct preview`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer


def preview(
    ct: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, metavar="CT", help="A CT as NIfTI, any orientation.")
    ],
    labels: Annotated[
        Path | None,
        typer.Argument(exists=True, dir_okay=False, metavar="LABELS", help="Its label map.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="PNG", help="The picture; beside the CT if not given.", show_default=False
        ),
    ] = None,
    window: Annotated[
        Literal["soft", "lung", "bone", "wide"],
        typer.Option(metavar="NAME", help="HU to show: soft, lung, bone, wide."),
    ] = "soft",
    hu_range: Annotated[
        tuple[float, float] | None,
        typer.Option(
            "--range",
            metavar="LOW HIGH",
            help="Instead of --window: the HU that are black and white.",
            show_default=False,
        ),
    ] = None,
    vocabulary: Annotated[
        Literal["maisi", "totalsegmentator"],
        typer.Option(metavar="NAME", help="Whose labels LABELS has: maisi, totalsegmentator."),
    ] = "maisi",
    title: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="A line above; the name of the CT if not given.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a picture that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, also of an error.")] = False,
) -> None:
    """Draw three planes of a CT as a PNG, and again with its labels and a legend of them.

    The planes cross in a tumor if there is one, else in the middle of the organs.

    Examples:

    ```
    maisi-ct preview ct.nii.gz -o ct.png --window lung
    maisi-ct preview ct.nii.gz segmentation.nii.gz --vocabulary totalsegmentator -o ct.png
    ```
    """
    if hu_range is not None and not hu_range[0] < hu_range[1]:
        raise typer.BadParameter(f"--range {hu_range[0]:g} {hu_range[1]:g} is none: give the lower number first")
    stem = ct.name.removesuffix(".gz").removesuffix(".nii")
    output = output or ct.with_name(f"{stem}.png")
    if output.suffix != ".png":
        raise typer.BadParameter(f"--output {output} is no name for a PNG: let it end in .png")
    if output.exists() and not force:
        raise FileExistsError(f"{output} is there already: give another --output, or --force to replace it")

    # What follows takes seconds to import.
    import numpy as np

    from ..anatomy import BODY, TUMORS, label_colours, legend_names, load_label_map
    from ..imaging import WINDOWS, load_volume, resample_like, save_preview
    from ..imaging.nifti import DESCRIPTION
    from .warned import collect_warnings

    image = load_volume(ct)
    with collect_warnings() as messages:
        label_map = None if labels is None else load_label_map(labels, vocabulary)
    if label_map is not None and (label_map.shape != image.shape or not np.allclose(label_map.affine, image.affine)):
        label_map = resample_like(label_map, image, order=0, fill=0)
    is_synthetic = image.header["descrip"].item().decode(errors="replace").startswith(DESCRIPTION)
    save_preview(
        output,
        image,
        label_map,
        hidden_labels=(BODY,),
        window=hu_range or WINDOWS[window],
        title=title or f"{'SYNTHETIC · ' if is_synthetic else ''}{stem}",
        names=legend_names(),
        colours=label_colours(),
        focus=TUMORS,
    )
    if as_json:
        print(json.dumps({"picture": str(output), "warnings": messages}))
        return
    for message in messages:
        print(f"warning: {message}", file=sys.stderr)
    print(output)
