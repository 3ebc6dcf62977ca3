"""What a decoder leaves in a label map that is no anatomy: pieces of a few voxels."""

import cc3d
import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

LEAST = 10  # voxels of a piece that is no crumb


def remove_crumbs(labels: np.ndarray) -> tuple[np.ndarray, int]:
    """
    Have pieces of a label map that are smaller than ten voxels take the label of the nearest voxel of a larger one.
    Where two labels meet a decoder is in doubt, and now and then a third wins. The published system leaves these.

    Args:
        labels: uint8 (X, Y, Z) in MAISI's vocabulary; stays as it is. Background is a label like others.

    Returns:
        the label map without them, and how many voxels they were.

    Example:

    ```py
    >>> import numpy as np
    >>> from maisi_diffusers.anatomy import remove_crumbs

    >>> labels = np.full((16, 16, 16), 1, dtype=np.uint8)
    >>> labels[8, 8, 6:9] = 3
    >>> without, voxels = remove_crumbs(labels)
    >>> np.unique(without).tolist(), voxels
    ([1], 3)
    ```
    """
    # Background is no piece to this library, so it gets an index that no label has.
    pieces, count = cc3d.connected_components(np.where(labels, labels, 255), connectivity=26, return_N=True)
    is_crumb = (np.bincount(pieces.ravel(order="K"), minlength=count + 1) < LEAST)[pieces]
    without = labels.copy()
    around = (ndimage.maximum_filter(is_crumb.view(np.uint8), size=3) > 0) & ~is_crumb if is_crumb.any() else is_crumb
    if around.any():
        places = np.argwhere(around)
        _, nearest = KDTree(places).query(np.argwhere(is_crumb))
        without[is_crumb] = labels[tuple(places[nearest].T)]
    return without, int(np.count_nonzero(without != labels))
