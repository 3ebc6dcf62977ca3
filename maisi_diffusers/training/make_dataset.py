"""From folders of volumes and segmentations to a data set: label maps, the data list, and a summary of them."""

import argparse
import hashlib
import json
import statistics
import sys
import warnings
from collections import Counter
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import nibabel as nib
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..anatomy import (
    REGIONS,
    label_name,
    new_vocabulary,
    one_hot,
    regions_from_labels,
    regions_from_words,
)
from ..files import write_atomically
from ..imaging import load_volume, modality_code, spacing_of
from ..imaging.nifti import is_up_to_date
from .checks import check_case, problem_lines, read_entries, repeated_images
from .data_list import Case, DataList, check_new_labels, write_data_list
from .prepare import NewClass, assign_folds, find_new_class, find_volumes, label_volumes, prepare_label_map


def read_new_classes(args: argparse.Namespace, cases: list[str]) -> tuple[list[NewClass], dict[str, list[str]]]:
    """
    The new classes, and of those that are tumors the organs.

    Raises:
        ValueError: for names, indices, sources and organs that there are not or that are given twice.
    """
    classes = [
        find_new_class(name, int(index) if index.isdecimal() else index, source, args.vocabulary)
        for name, index, source in args.new_class
    ]
    organs: dict[str, list[str]] = {}
    for name, *names in args.class_organs:
        organs.setdefault(name, []).extend(names)
    for name, count in Counter(new.name for new in classes).items():
        if count > 1:
            raise ValueError(f"--new_class {name!r} is given {count} times: give it once")
    for label, count in Counter(new.source for new in classes if isinstance(new.source, int)).items():
        if count > 1:
            raise ValueError(f"--new_class: {count} classes take all of {label_name(label)!r}: give it to one")
    check_new_labels({new.name: new.index for new in classes}, organs)
    for name, names in organs.items():
        if not names:
            raise ValueError(f"--class_organs {name!r} names no organ: give those that it sits in, or leave it out")
    for new in classes:
        if isinstance(new.source, dict) and not new.source.keys() & set(cases):
            raise ValueError(
                f"--new_class {new.name!r}: no mask has the name of a case, the first are {next(iter(new.source))!r} "
                f"and {cases[0]!r}: rename the masks"
            )
    return classes, organs


def label_settings(args: argparse.Namespace) -> dict:
    """The options that label maps depend on, as JSON has them."""
    return {
        "images": str(args.images.resolve()),
        "labels": str(args.labels.resolve()),
        "vocabulary": args.vocabulary,
        "modality": args.modality,
        "new_class": [
            [name, index, str(Path(source).resolve()) if Path(source).is_dir() else source]
            for name, index, source in args.new_class
        ],
    }


def check_output(args: argparse.Namespace) -> None:
    """Refuse a folder that has inputs, others' files, or label maps of other settings; raises a `ValueError`."""
    folder, data_list, record = (args.output_dir / name for name in ("labels", "dataset.json", "prepare.json"))
    inputs = [args.images, args.labels, *(Path(source) for _, _, source in args.new_class if Path(source).is_dir())]
    for path in inputs:
        if path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} is where label maps are to be written: choose another --output_dir")
    if folder.is_dir() and any(folder.iterdir()) and not record.is_file():
        raise ValueError(f"{folder} has files that this script did not write: choose another --output_dir")
    if data_list.exists() and not record.is_file():
        raise ValueError(f"{data_list} is a file that this script did not write: choose another --output_dir")
    if args.overwrite or not record.is_file():
        return
    recorded = json.loads(record.read_text())
    for name, value in label_settings(args).items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{args.output_dir} has label maps made with {name}={recorded.get(name)!r}, not {value!r} (see "
                "prepare.json): --overwrite them, or choose another --output_dir"
            )


def prepare_case(
    name: str, image: Path, segmentation: Path, classes: list[NewClass], args: argparse.Namespace
) -> tuple[Case, dict[int, float]]:
    """
    Write the label map of a case, unless it is there.

    Returns:
        the entry of the case, and label -> volume in ml.

    Raises:
        OSError, ValueError: a file that is missing, damaged or not what it should be; a region that no label tells.
    """
    label = args.output_dir / "labels" / f"{name}.nii.gz"
    masks = {new.index: new.source[name] for new in classes if isinstance(new.source, dict) and name in new.source}
    sources = [image, segmentation, *masks.values()]
    recipe = json.dumps([label_settings(args), [str(source.resolve()) for source in sources]])
    description = f"prepared label map; {hashlib.sha256(recipe.encode()).hexdigest()[:8]}"
    if args.overwrite or not is_up_to_date(label, description, sources):
        relabelled = {new.source: new.index for new in classes if isinstance(new.source, int)}
        made = prepare_label_map(image, segmentation, args.vocabulary, args.modality, relabelled, masks)
        made.header["descrip"] = description
        with write_atomically(label) as temporary:
            nib.save(made, temporary)

    written = load_volume(label)
    volumes = label_volumes(written)
    try:
        # A new class may have a label that the published models took for a region.
        top, bottom = regions_from_labels(volumes.keys() - {new.index for new in classes})
    except ValueError:
        if args.body_region is None:
            raise
        top, bottom = regions_from_words(args.body_region)
    return Case(
        image,
        label,
        dim=written.shape,
        spacing=tuple(round(mm, 6) for mm in spacing_of(written)),
        top_region_index=one_hot(top),
        bottom_region_index=one_hot(bottom),
        modality=args.modality,
    ), volumes


def prepare(args: argparse.Namespace, state: PartialState) -> tuple[int, list[str]]:
    """
    Write the label maps and the data list, check them and say what is in them.

    Why a case fails is said on stderr at once.

    Returns:
        how many cases there are, and the names of those that failed.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: options that contradict each other or the folders; if what was written is not what it should be.
    """
    modality_code(args.modality)
    if args.body_region is not None:
        regions_from_words(args.body_region)
    images, segmentations = find_volumes(args.images), find_volumes(args.labels, in_subfolders=True)
    names = list(images)
    if not images.keys() & segmentations.keys():
        raise ValueError(
            f"--images and --labels have no case in common, the first are {names[0]!r} and "
            f"{next(iter(segmentations))!r}: rename the segmentations"
        )
    folds = assign_folds(names, args.num_folds, args.seed)
    classes, organs = read_new_classes(args, names)
    check_output(args)
    if state.is_main_process:
        with write_atomically(args.output_dir / "prepare.json") as temporary:
            temporary.write_text(json.dumps(label_settings(args), indent=2) + "\n")

        masks = {f"--new_class {new.name!r}": new.source for new in classes if isinstance(new.source, dict)}
        for option, files in {"--labels": segmentations, **masks}.items():
            if unused := sorted(files.keys() - images.keys()):
                report(option, f"warning: no image of {', '.join(unused)}, left out")

    made = []
    for name in tqdm(names[state.process_index :: state.num_processes], "Prepare", disable=not state.is_main_process):
        try:
            if name not in segmentations:
                raise ValueError(f"no segmentation of this name in {args.labels}")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                case, volumes = prepare_case(name, images[name], segmentations[name], classes, args)
            for warning in caught:
                report(name, f"warning: {warning.message}")
            made.append((name, replace(case, fold=folds[name]), volumes))
        except (OSError, ValueError, MemoryError) as error:
            report(name, f"{error}" or "does not fit in memory; check the size in the headers of its files")
    made = sorted(gather_object(made), key=itemgetter(0))

    if made:
        path = args.output_dir / "dataset.json"
        cases = [case for _, case, _ in made]
        data_list = DataList(cases, {new.name: new.index for new in classes}, organs)
        if state.is_main_process:
            write_data_list(path, data_list)
        state.wait_for_everyone()
        _, problems = check(path, state)
        if problems:
            raise ValueError(f"{path} has {len(problems)} problem(s), the first is {problems[0]}: see --check {path}")
        if state.is_main_process:
            print(f"wrote {path}: {len(cases)} cases, checked, nothing wrong")
            summarize(data_list, [volumes for _, _, volumes in made])
    succeeded = {name for name, _, _ in made}
    return len(names), [name for name in names if name not in succeeded]


def summarize(data_list: DataList, volumes: list[dict[int, float]]) -> None:
    """Print how many cases have which label, fold and region; `volumes` are label -> ml of each case."""
    total = len(volumes)
    vocabulary = new_vocabulary(data_list.label_names)
    for name, index in data_list.label_names.items():
        sizes = [of_case[index] for of_case in volumes if index in of_case]
        median = f", median volume {statistics.median(sizes):.4g} ml" if sizes else ""
        print(f"{name} ({index}): in {len(sizes)} of {total} cases{median}")
    counts = Counter(index for of_case in volumes for index in of_case)
    everywhere = [label_name(index, vocabulary) for index in sorted(counts) if counts[index] == total]
    elsewhere = [
        f"{label_name(index, vocabulary)} {counts[index]}" for index in sorted(counts) if counts[index] < total
    ]
    print(f"labels in every case: {', '.join(everywhere) or 'none'}")
    print(f"labels in some cases: {', '.join(elsewhere) or 'none'}")
    folds = Counter(case.fold for case in data_list.cases)
    print(f"cases in each fold: {', '.join(f'{fold}: {folds[fold]}' for fold in sorted(folds))}")
    regions = Counter((case.top_region_index.index(1), case.bottom_region_index.index(1)) for case in data_list.cases)
    spans = [f"{REGIONS[top]} to {REGIONS[bottom]}: {regions[top, bottom]}" for top, bottom in sorted(regions)]
    print(f"cases by region: {', '.join(spans)}")


def check(path: Path, state: PartialState) -> tuple[int, list[str]]:
    """
    Read all the files of a data list.

    Returns:
        how many entries it has, and what is wrong with them, one line a problem.

    Raises:
        FileNotFoundError: if there is no such list.
        ValueError: if it is none.
    """
    cases, head, problems = read_entries(path)
    vocabulary = new_vocabulary(head.label_names)
    latents = {"ratio": head.spatial_compression_ratio, "latent_channels": head.latent_channels}
    mine = list(cases.items())[state.process_index :: state.num_processes]
    found = []
    for number, case in tqdm(mine, "Check", disable=not state.is_main_process):
        found += [(number, problem) for problem in check_case(case, vocabulary, in_full=True, **latents)]
    count = len(cases) + len(problems)
    return count, problem_lines(problems + gather_object(found) + repeated_images(cases))


def report(name: str, reason: str) -> None:
    """Say in one line what is wrong with a case, above the progress bar."""
    tqdm.write(f"{name}: {' '.join(reason.split())}", file=sys.stderr)
