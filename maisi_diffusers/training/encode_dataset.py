"""From a data list to its latents: volumes or label maps encoded one by one, and the data list of what came of it."""

import argparse
import hashlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..anatomy import label_name, labels_present, load_label_map, new_vocabulary
from ..files import write_atomically
from ..imaging import labels_to_nifti, load_volume, modality_code, resample_like, spacing_of, to_ras
from ..imaging.nifti import is_up_to_date
from ..loaders import load_maisi_checkpoint
from ..memory import is_out_of_memory
from ..models import TILINGS, AutoencoderKLMaisi
from .data_list import Case, DataList, read_data_list, write_data_list
from .latents import (
    draw_latent,
    encode_volume,
    encodes_labels,
    nearest_multiple,
    resize_volume,
    save_latent,
    to_intensities,
)
from .mask_classes import load_mask_labels
from .processes import TIMEOUT, runs_on_cpu
from .randomness import case_generator

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
POSTERIORS = ("moments", "sample", "mean")
NIFTI = re.compile(r"\.nii(\.gz)?$")


def read_cases(args: argparse.Namespace) -> tuple[DataList, Path]:
    """The volumes to encode, and the folder that their names are relative to."""
    if args.data_list is not None:
        return read_data_list(args.data_list, args.data_root), args.data_root or args.data_list.parent
    modality_code(args.modality)
    output_dir = args.output_dir.resolve()
    paths = [
        path
        for path in sorted(args.images.rglob("[!.]*"))
        if NIFTI.search(path.name) and not path.resolve().is_relative_to(output_dir)
    ]
    if not paths:
        raise ValueError(
            f"--images {args.images} has no .nii or .nii.gz file outside of --output_dir: give a folder of volumes"
        )
    return DataList([Case(path, modality=args.modality) for path in paths]), args.images


def cases_of_labels(cases: list[Case], args: argparse.Namespace) -> list[Case]:
    """
    The cases as a mask VAE encodes them, those of a folder with its files as label maps.

    Raises:
        ValueError: if one has no label map.
    """
    if args.images is not None:
        return [replace(case, label=case.image) for case in cases]
    bare = [case.image for case in cases if case.label is None]
    if bare:
        raise ValueError(
            f"--vae {args.vae} encodes label maps, and {len(bare)} of the {len(cases)} cases have none, that of "
            f"{bare[0]} first: add them to the data list, or give a VAE of images"
        )
    return cases


def name_cases(cases: list[Case], root: Path, output_dir: Path) -> list[str]:
    """
    A name for every case: its path below a folder, or its file name if it lies elsewhere, without .nii.gz.

    Raises:
        ValueError: if two have the same, or if an output would take the place of an input.
    """
    names: dict[str, Path] = {}
    inputs = {path.resolve() for case in cases for path in (case.image, case.label) if path is not None}
    folder = Path(os.path.abspath(root))
    for case in cases:
        image = Path(os.path.abspath(case.image))  # not resolved: a link keeps its own name
        relative = image.relative_to(folder) if image.is_relative_to(folder) else Path(image.name)
        name = NIFTI.sub("", relative.as_posix())
        if name in names:
            raise ValueError(
                f"{names[name]} and {case.image} would both be encoded to {latent_path(output_dir, name)}: "
                "rename one, or leave it out"
            )
        names[name] = case.image
        for path in (latent_path(output_dir, name), label_path(output_dir, name)):
            if path.resolve() in inputs:
                raise ValueError(f"{path} is an input and would be overwritten: choose another --output_dir")
    return list(names)


def latent_path(output_dir: Path, name: str) -> Path:
    """Where the latent of a case is written."""
    return output_dir / f"{name}_emb.nii.gz"


def label_path(output_dir: Path, name: str) -> Path:
    """Where the label map that goes with it is written."""
    return output_dir / f"{name}_label.nii.gz"


def load_vae(args: argparse.Namespace) -> AutoencoderKLMaisi:
    """
    A VAE of a published checkpoint, of a pipeline, or by itself.

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged, or neither of images nor of label maps.
    """
    dtype = DTYPES[args.dtype]
    if args.version is not None:
        name = args.subfolder or "vae"
        vae = load_maisi_checkpoint(args.vae, args.version, dtype, revision=args.revision).get(name)
        if not isinstance(vae, AutoencoderKLMaisi):
            raise ValueError(f"--vae {args.vae} has no VAE called {name!r}: give --subfolder vae or mask_vae")
        return vae
    for subfolder in ("vae", None, "mask_vae") if args.subfolder is None else (args.subfolder,):
        source = {"subfolder": subfolder, "revision": args.revision}
        try:
            config = AutoencoderKLMaisi.load_config(args.vae, **source)
            break
        except OSError as error:
            reason = error
    else:
        raise FileNotFoundError(
            f"--vae {args.vae} has no config.json, nor has its folder {args.subfolder or 'vae or mask_vae'}, or the "
            "Hub cannot be reached: give a VAE or a pipeline in diffusers' layout, or say with --version which "
            "published checkpoint it is"
        ) from reason
    given = config.get("_class_name"), config.get("in_channels")
    if given not in ((AutoencoderKLMaisi.__name__, 1), (AutoencoderKLMaisi.__name__, 8)):
        raise ValueError(
            f"--vae {args.vae} holds {given[0]} with in_channels={given[1]}, must be AutoencoderKLMaisi with "
            "in_channels=1 for images or 8 for label maps: give one of these, or the pipeline it belongs to"
        )
    return AutoencoderKLMaisi.from_pretrained(args.vae, variant=args.variant, dtype=dtype, **source)


def fingerprint(vae: AutoencoderKLMaisi) -> str:
    """SHA-256 of the configuration and the weights."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_size(args: argparse.Namespace, ratio: int) -> None:
    """Refuse what the VAE cannot encode; raises a `ValueError`."""
    option, values = ("--size_multiple", [args.size_multiple]) if args.size is None else ("--size", args.size)
    if any(value <= 0 or value % ratio for value in values):
        given = " ".join(map(str, values))
        raise ValueError(f"{option} {given} is not allowed: the VAE needs positive multiples of {ratio}")


def settings_of(args: argparse.Namespace, vae: AutoencoderKLMaisi) -> dict:
    """What the latents depend on besides the volumes, for `encode.json`."""
    return {
        "posterior": args.posterior,
        "seed": args.seed,
        "dtype": args.dtype,
        "size": args.size,
        "size_multiple": args.size_multiple if args.size is None else None,
        "vae": fingerprint(vae),
    }


def check_output(output_dir: Path, names: list[str], settings: dict) -> None:
    """Refuse a folder that has others' files, or latents of other settings; raises a `ValueError`."""
    record = output_dir / "encode.json"
    outputs = [path(output_dir, name) for name in names for path in (latent_path, label_path)]
    there = [path for path in (*outputs, output_dir / "latents.json") if path.exists()]
    if there and not record.is_file():  # looked for last: another process of this run writes it before any of these
        raise ValueError(
            f"{there[0]} is a file that this script did not write: choose another --output_dir, or --overwrite it"
        )
    recorded = json.loads(record.read_text()) if record.is_file() else settings
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise ValueError(
                f"{output_dir} has latents made with {name}={recorded.get(name)!r}, not {value!r} (see encode.json): "
                "choose another --output_dir, or --overwrite them"
            )


def describe(settings: dict, modality: str | None) -> str:
    """What the header of a latent tells of the settings, and of the modality if it is one of an image."""
    values = json.dumps(settings | {"modality": modality})
    return f"MAISI latent: {settings['posterior']}; encode.json {hashlib.sha256(values.encode()).hexdigest()[:8]}"


def is_encoded(case: Case, name: str, output_dir: Path, description: str) -> bool:
    """Whether the files of a case are there, made with the settings from what its files are now."""
    sources = [path for path in (case.image, case.label) if path is not None and path.is_file()]
    if case.label is not None and not label_path(output_dir, name).is_file():
        return False
    return is_up_to_date(latent_path(output_dir, name), description, sources)


def wanted_size(size: tuple[int, int, int], args: argparse.Namespace) -> tuple[int, int, int]:
    """Voxels along X, Y, Z that a volume of this size is resized to."""
    return args.size or nearest_multiple(size, args.size_multiple)


def write_labels(path: Path, labels: nib.Nifti1Image, on_grid: nib.Nifti1Image) -> set[int]:
    """
    Write a label map as it is on the grid of what is encoded.

    Args:
        path: of the file.
        labels: the label map.
        on_grid: the same on the grid.

    Returns:
        the labels that are too small for the grid.
    """
    array = np.asarray(on_grid.dataobj)
    image = labels_to_nifti(array, on_grid.affine)
    image.header["descrip"] = "labels of an encoded volume"
    with write_atomically(path) as temporary:
        image.to_filename(temporary)
    return set(labels_present(np.asarray(labels.dataobj))) - set(labels_present(array))


def encode_case(
    case: Case,
    name: str,
    vae: AutoencoderKLMaisi,
    args: argparse.Namespace,
    vocabulary: dict[str, int],
    description: str,
) -> None:
    """
    Encode one case. What is there is replaced once all is encoded, the latent last, so that whatever has one is
    complete.

    Raises:
        OSError, ValueError: a file that is missing, damaged or not what it should be.
        MemoryError, RuntimeError: a volume too large to be encoded at once.
    """
    if encodes_labels(vae):
        labels = load_mask_labels(case.label)
        volume = on_grid = resize_volume(labels, wanted_size(labels.shape, args), order=0)
    else:
        volume = to_intensities(to_ras(load_volume(case.image)), modality_code(case.modality))
        volume = resize_volume(volume, wanted_size(volume.shape, args))
        if case.label is not None:
            labels = load_label_map(case.label)
            on_grid = resample_like(labels, volume, order=0, fill=0)
    if case.label is not None and not np.asarray(on_grid.dataobj).any():
        raise ValueError(f"'{case.label}' has no label where the image is; check that it is this image's label map.")
    latent = encode_volume(vae, volume)
    if args.posterior == "mean":
        latent = draw_latent(latent)
    elif args.posterior == "sample":
        latent = draw_latent(latent, case_generator(args.seed, 0, 0, f"posterior of {name}"))
    if case.label is not None:
        lost = write_labels(label_path(args.output_dir, name), labels, on_grid)
        if lost:
            lost_names = ", ".join(label_name(index, vocabulary) for index in sorted(lost))
            report(name, f"too small for {volume.shape} voxels and not in the label map any more: {lost_names}")
    save_latent(latent_path(args.output_dir, name), latent, volume, description)


def encoded_case(case: Case, name: str, output_dir: Path, ratio: int) -> Case:
    """The entry of a case once it is encoded, with the grid of the resized volume as its latent tells it."""
    latent = nib.load(latent_path(output_dir, name))
    return replace(
        case,
        image=latent_path(output_dir, name),
        label=None if case.label is None else label_path(output_dir, name),
        dim=tuple(n * ratio for n in latent.shape[:3]),
        spacing=tuple(round(mm / ratio, 6) for mm in spacing_of(latent)),
    )


def encode(args: argparse.Namespace) -> tuple[int, list[str]]:
    """
    Encode every case that is not there yet, and list those that are.

    Why a case fails is said on stderr at once.

    Returns:
        in the main process, how many cases there are, and the names of those that failed.

    Raises:
        OSError: a data list or a VAE that is not there.
        ValueError: a broken data list, a damaged VAE, sizes it cannot encode, or a folder with others' files or other
            settings.
    """
    data_list, root = read_cases(args)
    names = name_cases(data_list.cases, root, args.output_dir)
    vae = load_vae(args)
    if encodes_labels(vae):
        data_list = replace(data_list, cases=cases_of_labels(data_list.cases, args))
    ratio = vae.spatial_compression_ratio
    check_size(args, ratio)
    TILINGS[args.tiling](vae, *filter(None, [args.memory]))
    settings = settings_of(args, vae)
    if not args.overwrite:
        check_output(args.output_dir, names, settings)

    state = PartialState(cpu=runs_on_cpu(), timeout=TIMEOUT)
    if state.is_main_process:
        with write_atomically(args.output_dir / "encode.json") as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
    vae.to(state.device)
    vocabulary = new_vocabulary(data_list.label_names)

    descriptions = [describe(settings, None if encodes_labels(vae) else case.modality) for case in data_list.cases]
    jobs = list(zip(data_list.cases, names, descriptions))
    own_jobs = jobs[state.process_index :: state.num_processes]
    own_failed = []
    for case, name, description in tqdm(own_jobs, desc="Encode", disable=not state.is_main_process):
        if is_encoded(case, name, args.output_dir, description) and not args.overwrite:
            continue
        try:
            encode_case(case, name, vae, args, vocabulary, description)
        except (OSError, ValueError, MemoryError) as error:
            own_failed.append(name)
            report(name, f"{error}")
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            own_failed.append(name)
            report(name, f"out of memory ({error})")
    all_failed = set(gather_object(own_failed))

    failed = []
    if state.is_main_process:
        failed = [name for name in names if name in all_failed]
        cases = [encoded_case(case, name, args.output_dir, ratio) for case, name, _ in jobs if name not in all_failed]
        if cases:
            channels = vae.config.latent_channels
            latents = replace(data_list, cases=cases, latent_channels=channels, spatial_compression_ratio=ratio)
            write_data_list(args.output_dir / "latents.json", latents)
            print(f"wrote {args.output_dir / 'latents.json'}: {len(cases)} latents")
    state.destroy_process_group()
    return len(names), failed


def report(name: str, reason: str) -> None:
    """Say in one line what is wrong with a case, above the progress bar."""
    tqdm.write(f"{name}: {' '.join(reason.split())}", file=sys.stderr)
