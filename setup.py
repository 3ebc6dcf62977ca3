from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "maisi_diffusers" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
TRAIN = ["peft>=0.21", "tensorboard>=2.20"]
TEST = [
    "pytest>=9.0",
    "pytest-xdist>=3.8",
    "pytest-timeout>=2.4",
    "monai>=1.6.1",
    "einops>=0.8.2",
    *TRAIN,
]

setup(
    name="maisi-diffusers",
    version=VERSION,
    description="MAISI, synthetic 3D medical images with paired label maps, as a diffusers package",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["maisi_diffusers", "maisi_diffusers.*"]),
    package_data={"maisi_diffusers": ["pretrained/**"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13",
        "diffusers>=0.42",
        "accelerate>=1.15",
        "transformers>=5.23",
        "huggingface_hub>=2.4",
        "safetensors>=0.8",
        "numpy>=2.4",
        "scipy>=1.17",
        "nibabel>=5.4",
        "matplotlib>=3.11",
        "connected-components-3d>=4.1",
        "pyyaml>=6.0",
        "tqdm>=4.70",
        "psutil>=7.2",
        "typer>=0.29",
        "rich>=15.0",
    ],
    extras_require={"train": TRAIN, "test": TEST, "dev": [*TEST, "ruff>=0.17"]},
    entry_points={"console_scripts": ["maisi-ct = maisi_diffusers.cli.app:app"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
