"""Who a phantom is of: everything that is drawn from its seed before anything is drawn on a grid."""

import zlib
from dataclasses import dataclass, field
from typing import Self

import numpy as np

PHASES = ("none", "arterial", "venous")
SEXES = ("female", "male")
ARMS = ("up", "down")
SIZED = (
    "aorta",
    "bladder",
    "colon",
    "gallbladder",
    "heart",
    "left kidney",
    "liver",
    "pancreas",
    "prostate",
    "right kidney",
    "spleen",
    "stomach",
)
"""Organs whose size can be given."""


@dataclass(frozen=True)
class Subject:
    """
    A body. Lengths are relative to a standard one of 175 cm.

    Args:
        seed: of all that is not said here: positions, shapes and sizes of organs, textures, noise.
        sex: `"female"` or `"male"`: pelvis, breasts, prostate.
        scale: factors along X, Y, Z.
        fat: mm of fat under the skin of the flank.
        visceral_fat: share of the usual space between bowels.
        warp: standard deviation in mm of the smooth deformation of the whole body.
        breath: mm that the diaphragm is higher than usual.
        arms: `"up"` or `"down"`.
        phase: contrast: `"none"`, `"arterial"` or `"venous"`.
        sizes: factor on the volume of organs, by a name in [`SIZED`]; drawn where not given. Organs that are tubes
            (aorta, colon, pancreas, stomach) keep their course and follow by a power of 2/3; liver and spleen end
            where their cavity does.

    Raises:
        ValueError: for an unknown sex, phase or position of the arms; for a size of what has none, or none above 0.
    """

    seed: int
    sex: str = "male"
    scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    fat: float = 18.0
    visceral_fat: float = 1.0
    warp: float = 4.0
    breath: float = 0.0
    arms: str = "up"
    phase: str = "none"
    sizes: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        for name, allowed in (("sex", SEXES), ("arms", ARMS), ("phase", PHASES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown: use {', '.join(allowed[:-1])} or {allowed[-1]}")
        for name, factor in self.sizes.items():
            if name not in SIZED or not 0 < factor < np.inf:
                raise ValueError(
                    f"sizes={{{name!r}: {factor}}} is not allowed: give a factor above 0 for any of {', '.join(SIZED)}"
                )

    @classmethod
    def draw(cls, seed: int, **given) -> Self:
        """A random subject; what is given is not drawn."""
        rng = np.random.default_rng([seed, zlib.crc32(b"subject")])
        sex = SEXES[rng.integers(2)]
        sex = given.get("sex", sex)  # which height and fat go by
        height = rng.normal(1.0 if sex == "male" else 0.93, 0.035)
        girth = height * float(np.clip(rng.normal(1.0, 0.055), 0.88, 1.13))
        drawn = {
            "sex": sex,
            "scale": (girth, girth * rng.normal(1.0, 0.03), height),
            "fat": float(np.clip(rng.gamma(4.0, 5.0), 5.0, 42.0)) * (1.15 if sex == "female" else 1.0),
            "visceral_fat": float(rng.uniform(0.6, 1.4)),
            "breath": float(rng.normal(0.0, 7.0)),
            "arms": ARMS[int(rng.random() < 0.15)],
            "phase": ("none", "venous")[rng.integers(2)],
        }
        return cls(seed=seed, **(drawn | given))

    def rng(self, name: str) -> np.random.Generator:
        """Random numbers for one purpose, independent of what else is drawn and of the grid."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode())])

    def size(self, name: str, spread: float = 0.12) -> float:
        """Factor on an organ's lengths, from its volume in `sizes` or drawn with this relative spread."""
        if name in self.sizes:
            return self.sizes[name] ** (1 / 3)
        return float(np.exp(np.clip(self.rng(f"size of {name}").normal(0.0, spread), -2 * spread, 2 * spread)))

    def shift(self, name: str, spread: float = 4.0) -> np.ndarray:
        """How far an organ is from its usual place, (3,) in mm."""
        return np.clip(self.rng(f"place of {name}").normal(0.0, spread, 3), -2 * spread, 2 * spread)

    def tilt(self, name: str, spread: float = 6.0) -> np.ndarray:
        """How far an organ is turned about X, Y, Z from its usual position, (3,) in degrees."""
        return self.rng(f"tilt of {name}").normal(0.0, spread, 3)
