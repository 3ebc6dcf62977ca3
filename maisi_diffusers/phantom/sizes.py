"""What volumes the sizes 0 and 1 of organs and tumors are in phantoms."""

import numpy as np

from ..anatomy import CONTROLLABLE_ANATOMY

# In ml: for organs about what one phantom in twenty is below and above, for tumors spheres of 10 and 60 mm.
SIZE_RANGES: dict[str, tuple[float, float]] = {
    "gallbladder": (5.0, 60.0),
    "liver": (1000.0, 2300.0),
    "stomach": (190.0, 650.0),
    "pancreas": (26.0, 96.0),
    "colon": (320.0, 830.0),
    **dict.fromkeys(CONTROLLABLE_ANATOMY[5:], (np.pi / 6, np.pi / 6 * 216)),
}
"""Ranges of [`~maisi_diffusers.anatomy.anatomy_sizes`]."""
