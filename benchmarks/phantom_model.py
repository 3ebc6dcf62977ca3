r"""
How good is the model inside the package, on phantoms that it has not seen?

    python -m benchmarks.phantom_model
    python -m benchmarks.phantom_model --model path/to/model --num_phantoms 4 --output figures.json

It prints three tables, in Markdown:

1. Fidelity. A CT is made of the label map of each unseen phantom. For every organ the median HU in it is compared with
   that of the phantom's own CT, which has as much contrast agent; bone and lungs are looked for by a threshold, and
   compared with their labels by Dice, as are those of the phantom's own CT, which tells how far the threshold can get.
   Labels that a threshold cannot tell from them are left out, and gas that has no label.
   The VAE's PSNR is that of the phantom's CT, encoded and decoded, for 0..1 of -1000..1000 HU, where images end.
2. Tissues. The shares of air, lung, fat, soft tissue and bone in images made without a label map, and in those of 1,
   against the range of those of phantoms, more of them: of the range of 32 more than a quarter of other phantoms are
   outside with one of the five.
3. Sizes. Label maps with a liver, and with a hepatic tumor, of sizes from 0 to 1, three of each size; the means of
   what is measured in them, and rank correlations with what was asked for: of these means, and of all label maps. A
   tumor is also measured as drawn: what the clean-up leaves of it, before it is brought to the size asked for.
"""

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm.auto import tqdm

from maisi_diffusers import PHANTOM_TINY, MaisiCTPipeline
from maisi_diffusers.anatomy import BODY, BONES, LABELS, LUNG_LOBES, TUMORS, size_of_volume
from maisi_diffusers.imaging import from_hu
from maisi_diffusers.phantom import SIZE_RANGES, Phantom, make_phantom
from maisi_diffusers.training.phantom_dataset import MODALITIES, PhantomDataset
from maisi_diffusers.workers import map_in_processes

FIRST_SEED = 100_000  # far from those that were trained on
SIZE, SPACING = (128, 128, 128), 3.0
MUSCLES = tuple(range(LABELS["left gluteus maximus"], LABELS["right iliopsoas"] + 1))
# Labels, and how far their median HU may be off.
ORGANS = {
    "liver": ((LABELS["liver"],), 25),
    "spleen": ((LABELS["spleen"],), 25),
    "kidneys": ((LABELS["left kidney"], LABELS["right kidney"]), 25),
    "heart": ((LABELS["heart"],), 25),
    "muscles": (MUSCLES, 25),
    "lungs": (LUNG_LOBES, 50),
    "bones": (BONES, 100),
    "tumors": (tuple(TUMORS), 25),
}
MIN_VOXELS = 50
# Where a threshold of bone cannot tell: what takes up contrast agent or has it in it, and calcified cartilage.
BRIGHT = [
    *("aorta", "inferior vena cava", "superior vena cava", "portal vein and splenic vein", "hepatic vessel", "heart"),
    *("left atrial appendage", "brachiocephalic trunk", "pulmonary vein", "thyroid gland"),
    *("left brachiocephalic vein", "right brachiocephalic vein", "left common carotid artery"),
    *("right common carotid artery", "left subclavian artery", "right subclavian artery"),
    *("left iliac artery", "right iliac artery", "left iliac vena", "right iliac vena"),
    *("liver", "spleen", "pancreas", "left kidney", "right kidney", "left adrenal gland", "right adrenal gland"),
    *("stomach", "duodenum", "small bowel", "colon", "bladder", "prostate"),
    *("lung tumor", "pancreatic tumor", "hepatic tumor", "colon cancer primaries", "bone lesion", "costal cartilages"),
]
# And where gas is, as dark as lung.
GASSY = ["trachea", "airway", "esophagus", "stomach", "duodenum", "small bowel", "colon", "colon cancer primaries"]
BONE_HU, LUNG_HU = 150, -500  # of bone the best on phantoms' own CTs, of 90 to 170 HU
# Lowest and highest HU of each.
TISSUES = {
    "air": (-2000, -950),
    "lung": (-950, -600),
    "fat": (-150, -50),
    "soft tissue": (-10, 130),
    "bone": (150, 3000),
}
ASKED_SIZES = np.linspace(0, 1, 9)
MAPS_OF_A_SIZE = 3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PHANTOM_TINY)
    parser.add_argument("--num_phantoms", type=int, default=32)
    parser.add_argument("--num_compared", type=int, default=256, help="phantoms that tell the range of tissues")
    parser.add_argument("--num_image_only", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file for every figure")
    return parser.parse_args()


def generator(seed: int) -> torch.Generator:
    """The random numbers of one image."""
    return torch.Generator().manual_seed(seed)


def psnr(pipe: MaisiCTPipeline, image: np.ndarray) -> float:
    """dB of a CT (X, Y, Z) in HU that is encoded and decoded."""
    intensities = from_hu(torch.from_numpy(image)[None, None], 1).to(pipe.device)
    with torch.no_grad():
        decoded = pipe.vae.decode(pipe.vae.encode(intensities).latent_dist.mode()).sample.clamp(0, 1)
    return -10 * float((decoded - intensities).square().mean().log10())


def dice(found: np.ndarray, labels: np.ndarray, wanted: tuple[int, ...], untold: list[str]) -> float | None:
    """Dice of a mask and the wanted labels, without voxels outside of the body and those of untold labels."""
    known = (labels > 0) & ~np.isin(labels, [LABELS[name] for name in untold])
    found, true = found & known, np.isin(labels, wanted)
    if true.sum() < MIN_VOXELS:
        return None
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def measure(image: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """Median HU of the organs, Dice of bone and lungs by threshold, shares of the tissues."""
    figures = {}
    for name, (indices, _) in ORGANS.items():
        inside = np.isin(labels, indices)
        figures[name] = float(np.median(image[inside])) if inside.sum() >= MIN_VOXELS else None
    figures["bone Dice"] = dice(image > BONE_HU, labels, BONES, BRIGHT)
    figures["lung Dice"] = dice(image < LUNG_HU, labels, LUNG_LOBES, GASSY)
    return figures | tissue_shares(image)


def tissue_shares(image: np.ndarray) -> dict[str, float]:
    """Percent of the voxels that each tissue has by its HU."""
    return {name: 100 * float(((image >= low) & (image < high)).mean()) for name, (low, high) in TISSUES.items()}


def draw_phantom(seed: int) -> tuple[Phantom, np.ndarray]:
    """An unseen phantom, and its CT without a table, which is no part of the label map, and so of no image of one."""
    dataset = PhantomDataset(Path(), SIZE, SPACING, other_spacings=0, body_region=None, tumors=0.5, num_folds=1)
    phantom = make_phantom(**dataset.draw(seed))
    labels = np.asarray(phantom.labels.dataobj)
    return phantom, np.where(labels > 0, np.asarray(phantom.image.dataobj, dtype=np.float32), -1000)


def tissue_shares_of_phantom(seed: int) -> dict[str, float]:
    return tissue_shares(draw_phantom(seed)[1])


def compare_with_phantoms(pipe: MaisiCTPipeline, num_phantoms: int) -> list[dict]:
    """A CT for the label map of every unseen phantom: what is measured in both."""
    cases = []
    for seed in tqdm(range(FIRST_SEED, FIRST_SEED + num_phantoms), desc="Label maps of unseen phantoms"):
        phantom, own = draw_phantom(seed)
        labels = np.asarray(phantom.labels.dataobj)
        # Gas that no label is for, as in the nose, is no more to be found by a threshold of lung than other gas.
        labels = np.where((own < LUNG_HU) & (labels == BODY), LABELS["airway"], labels)
        modality = MODALITIES[phantom.subject.phase]
        made = pipe(
            mask=phantom.labels, modality=modality, generator=generator(seed), output_type="np", quality_retries=0
        ).images[0]
        psnr_of_vae = psnr(pipe, np.asarray(phantom.image.dataobj, dtype=np.float32))
        case = {"seed": seed, "modality": modality, "psnr": psnr_of_vae}
        cases.append(case | {"phantom": measure(own, labels), "made": measure(made, labels)})
    return cases


def mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def print_fidelity(cases: list[dict]) -> None:
    """The first table."""
    modalities = tuple(dict.fromkeys(MODALITIES.values()))
    print(f"\n| organ | allowed | {' | '.join(f'{one}: off, mean (worst)' for one in modalities)} | within |")
    print("|---|---|" + "---|" * len(modalities) + "---|")
    for name, (_, allowed) in ORGANS.items():
        there = [case for case in cases if case["phantom"][name] is not None]
        off = {one: [] for one in modalities}
        for case in there:
            off[case["modality"]].append(abs(case["made"][name] - case["phantom"][name]))
        columns = [f"{mean(values):.0f} ({max(values, default=np.nan):.0f}) HU" for values in off.values()]
        within = sum(value <= allowed for values in off.values() for value in values)
        print(f"| {name} | {allowed} HU | {' | '.join(columns)} | {within} of {len(there)} |")
    print("\n| | asked | made, mean (worst) | the phantom's own CT |")
    print("|---|---|---|---|")
    for name, asked in (("bone Dice", 0.85), ("lung Dice", 0.95)):
        there = [case for case in cases if case["phantom"][name] is not None]
        own, made = ([case[which][name] for case in there] for which in ("phantom", "made"))
        print(f"| {name} | {asked} | {mean(made):.3f} ({min(made, default=np.nan):.3f}) | {mean(own):.3f} |")
    values = [case["psnr"] for case in cases]
    print(f"| PSNR of the VAE | 30 dB | {mean(values):.1f} ({min(values):.1f}) dB | |")


def print_tissues(cases: list[dict], unconditioned: list[dict], others: list[dict]) -> None:
    """The second table: an image passes with all of its shares within the range of the phantoms'."""
    print(f"\n| percent of voxels | {len(cases) + len(others)} phantoms | made from label maps | made without |")
    print("|---|---|---|---|")
    own, made = ([case[which] for case in cases] for which in ("phantom", "made"))
    groups = (own + others, made, unconditioned)
    for tissue in TISSUES:
        ranges = [[figures[tissue] for figures in group] for group in groups]
        print(f"| {tissue} | " + " | ".join(f"{min(values):.1f} to {max(values):.1f}" for values in ranges) + " |")
    limits = {tissue: [figures[tissue] for figures in groups[0]] for tissue in TISSUES}
    passed = [
        sum(all(min(limits[t]) <= figures[t] <= max(limits[t]) for t in TISSUES) for figures in group)
        for group in groups
    ]
    # The first group is what the range is of.
    counts = ["", *(f"{n} of {len(group)}" for n, group in zip(passed[1:], groups[1:]))]
    print("| all within the range of phantoms | " + " | ".join(counts) + " |")


def print_sizes(pipe: MaisiCTPipeline) -> dict[str, list]:
    """The third table, and its figures."""
    asked = " | ".join(f"{size:.2f}" for size in ASKED_SIZES)
    print(f"\n| size asked for | {asked} | rank correlation of means | of all |")
    print("|---" * (len(ASKED_SIZES) + 3) + "|")
    sizes = {}
    for name in ("liver", "hepatic tumor"):
        reached, drawn = measure_sizes(pipe, name)
        sizes[name] = reached
        if name == "hepatic tumor":
            sizes["hepatic tumor, as drawn"] = drawn
    for name, measured in sizes.items():
        means = measured.mean(1)
        of_means = spearmanr(ASKED_SIZES, means).statistic
        of_all = spearmanr(ASKED_SIZES.repeat(MAPS_OF_A_SIZE), measured.ravel()).statistic
        print(f"| {name} | " + " | ".join(f"{size:.2f}" for size in means) + f" | {of_means:.2f} | {of_all:.2f} |")
    return {name: measured.tolist() for name, measured in sizes.items()}


def measure_sizes(pipe: MaisiCTPipeline, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Sizes in label maps (asked sizes, maps of each), 0 where there is none of it; and before a tumor was fitted."""
    reached, drawn = np.zeros((2, len(ASKED_SIZES), MAPS_OF_A_SIZE))
    for seed, (i, j) in enumerate(tqdm(list(np.ndindex(reached.shape)), desc=f"Label maps with {name}")):
        sizes = [(name, float(ASKED_SIZES[i]))]
        _, (report,) = pipe.generate_masks(sizes, None, 1, generator(seed), SIZE, (SPACING,) * 3)
        anatomy = report["anatomy"][name]
        reached[i, j], drawn[i, j] = (
            size_of_volume(ml, SIZE_RANGES[name]) for ml in (anatomy["ml"], anatomy.get("drawn_ml", anatomy["ml"]))
        )
    return reached, drawn


def main() -> None:
    args = parse_args()
    pipe = MaisiCTPipeline.from_pretrained(args.model).to(args.device)
    pipe.set_progress_bar_config(disable=True)

    cases = compare_with_phantoms(pipe, args.num_phantoms)
    print_fidelity(cases)

    unconditioned = []
    for seed in tqdm(range(args.num_image_only), desc="Without label maps"):
        image = pipe(image_only=True, generator=generator(seed), output_type="np").images[0]
        unconditioned.append(tissue_shares(image))
    seeds = range(FIRST_SEED + args.num_phantoms, FIRST_SEED + args.num_phantoms + args.num_compared)
    shares = map_in_processes(tissue_shares_of_phantom, seeds, os.cpu_count())
    others = list(tqdm(shares, total=len(seeds), desc="Phantoms"))
    print_tissues(cases, unconditioned, others)
    sizes = print_sizes(pipe)
    if args.output is not None:
        figures = {"cases": cases, "image_only": unconditioned, "other_phantoms": others, "sizes": sizes}
        args.output.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
