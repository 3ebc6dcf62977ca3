"""`maisi-ct info`."""

import json
from typing import Annotated

import typer

from .models import find_model
from .wording import grid_text, size_text


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A folder or a Hub id; the small model of the package if not given.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Branch, tag or commit of a model on the Hub.", show_default=False),
    ] = None,
    plan: Annotated[
        tuple[int, int, int] | None,
        typer.Option(
            metavar="X Y Z",
            help="Tell the memory that each stage of making so many voxels needs, and which modes fit.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with all labels; also of an error.")
    ] = False,
) -> None:
    """Say what a model can do: networks, regions, organs, sizes and spacings, licence, and the memory it needs.

    No weights are read or downloaded.

    Examples:

    ```
    maisi-ct info
    maisi-ct info maisi-rflow-ct --plan 512 512 256
    ```
    """
    found = find_model(model, revision)

    from .describe import describe  # takes seconds to import

    facts = describe(found, plan)
    if as_json:
        print(json.dumps(facts))
    else:
        show([*lines_of(facts), *memory_lines(facts["memory"], with_stages=plan is not None)])


def show(lines: list[tuple[str, str]]) -> None:
    """Print lines of name and value."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, value in lines:
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)  # names of folders may have brackets


def lines_of(facts: dict) -> list[tuple[str, str]]:
    """Names and values of what [`describe`] tells."""
    model, database, rules = (facts[name] for name in ("model", "mask_database", "input_rules"))
    lines = [
        ("model", f"{model['name']} ({model['source']}{' at ' + model['revision'] if model['revision'] else ''})"),
        ("licence", facts["licence"] or "not said in its model card: ask whoever made it"),
    ]
    modalities = ", ".join(facts["modalities"] or [facts["modality"]])
    steps, others = f"{facts['num_inference_steps']} steps", facts["image_only_num_inference_steps"]
    if others != facts["num_inference_steps"]:
        steps += f", or {others} without a label map"
    for name, component in facts["components"].items():
        of_network = (
            f", {component['parameters'] / 1e6:.1f} M parameters, {component['dtype'] or 'dtype not known from here'}"
            if "dtype" in component
            else ""
        )
        lines.append((name, f"{component['class']}{of_network}"))
    lines += [
        ("makes", f"{modalities} in {steps}, by {facts['prediction_type']}"),
        ("from", ", ".join(facts["label_map_from"])),
    ]
    if facts["labels"]:
        new = ", ".join(f"{name} ({index})" for name, index in facts["new_classes"].items())
        lines.append(("labels", f"{len(facts['labels'])}, listed by --json" + (f"; new ones: {new}" if new else "")))
    if facts["controllable_sizes"]:
        lines.append(("--size of", ", ".join(facts["controllable_sizes"])))
    if database is not None:
        counts = [
            ", ".join(f"{name} {count}" for name, count in database[key].items()) for key in ("regions", "tumors")
        ]
        grids = [
            grid_text(grid["output_size"], grid["spacing"]) + f" ({grid['label_maps']})"
            for grid in database["grids"][:5]
        ]
        lines += [
            ("mask database", f"{database['label_maps']} label maps: {counts[0]}"),
            ("  tumors", counts[1] or "none"),
            ("  grids", "\n".join(grids) + ("\n..." if len(database["grids"]) > 5 else "")),
        ]
    default = grid_text(facts["default_output_size"], facts["default_spacing"])
    lines += [("default grid", default), ("sizes", f"multiples of {facts['size_multiple']}")]
    if rules is not None:
        spacings = [f"{low:g} to {high:g}" for low, high in zip(rules["min_spacing"], rules["max_spacing"])]
        lines[-1] = ("sizes", ", ".join(map(size_text, rules["sizes"])))
        lines.append(
            ("spacing", f"{', '.join(spacings)} mm along X, Y, Z{', X = Y' if rules['equal_xy_spacing'] else ''}")
        )
    for i, grid in enumerate(facts["recommended_grids"]):
        text = f"{', '.join(grid['body_region'])}: {grid_text(grid['output_size'], grid['spacing'])}"
        lines.append(("" if i else "recommended", text))
    for i, (modality, by_region) in enumerate(facts["recommended_fovs"].items()):
        text = "; ".join(
            f"{region} {' or '.join(' x '.join(f'{mm:g}' for mm in fov) for fov in fovs)} mm"
            for region, fovs in by_region.items()
        )
        lines.append(("" if i else "fields of view", f"{modality}: {text}"))
    return lines


def memory_lines(memory: dict, with_stages: bool) -> list[tuple[str, str]]:
    """What [`describe_memory`] tells: of the ways to decode, and if wanted of every stage."""
    plans, usable = memory["plans"], memory["usable"]
    title = (
        f"GB for {size_text(memory['output_size'])} voxels; {memory['free'] / 1e9:.1f} are free on {memory['device']}"
    )
    title += f", {usable / 1e9:.1f} of them to plan with"
    lines = [("memory", f"{title}; the mode is that of maisi-ct generate --tiling")]
    first = next(iter(plans.values()))
    if with_stages:
        for stage in first["stages"]:
            values = [f"{plan['stages'][stage] / 1e9:.2f} in {dtype}" for dtype, plan in plans.items()]
            lines.append((f"  {stage}", ", ".join(values)))
    for mode in first["modes"]:
        values = [
            f"{plan['modes'][mode] / 1e9:.2f} in {dtype}{'' if plan['modes'][mode] <= usable else ' (does not fit)'}"
            for dtype, plan in plans.items()
        ]
        lines.append((f"  all, {mode}", ", ".join(values)))
    return lines
