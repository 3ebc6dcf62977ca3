"""Sizes and spacings that suit a region, of the published CT models."""

Grid = tuple[tuple[int, int, int], tuple[float, float, float]]

RECOMMENDED_CT_GRIDS: dict[tuple[str, ...], Grid] = {
    ("head", "chest"): ((512, 512, 128), (0.645, 0.645, 2.219)),
    ("head", "chest", "abdomen"): ((512, 512, 384), (0.977, 0.977, 2.103)),
    ("head", "chest", "abdomen", "lower"): ((512, 512, 384), (1.367, 1.367, 4.603)),
    ("chest",): ((512, 512, 128), (0.684, 0.684, 2.422)),
    ("chest", "abdomen"): ((512, 512, 128), (0.781, 0.781, 2.981)),
    ("chest", "abdomen", "lower"): ((512, 512, 256), (0.793, 0.793, 1.826)),
    ("abdomen",): ((512, 512, 128), (0.723, 0.723, 1.182)),
    ("abdomen", "lower"): ((512, 512, 384), (0.808, 0.808, 0.729)),
    ("lower",): ((512, 512, 384), (0.839, 0.839, 0.728)),
}
"""Words of `body_region` -> size in voxels and spacing in mm: medians of the training data (published with MAISI)."""
