"""Fixtures that several test packages share."""

import os
from pathlib import Path

# Each of pytest-xdist's processes, and what it starts, is to keep to one core: their thread pools would spin against
# each other. Before anything imports torch.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

REAL_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: one that came last would keep one process busy, and the others waiting."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def real_file(name: str) -> Path:
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"needs the real {name} in {REAL_DATA}, which is not part of the repository")
    return path


@pytest.fixture(scope="session")
def torso_ct() -> Path:
    """A real abdomen-pelvis CT, 122 x 101 x 112 voxels of 3 mm, RAS+."""
    return real_file("torso_ct_3mm.nii.gz")


@pytest.fixture(scope="session")
def torso_labels() -> Path:
    """Its TotalSegmentator v2 `total` labels on the same grid."""
    return real_file("torso_totalseg_3mm.nii.gz")
