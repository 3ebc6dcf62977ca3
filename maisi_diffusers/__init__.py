"""MAISI, synthetic 3D medical images with paired label maps, as a diffusers package."""

import importlib
import importlib.abc
import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"

PHANTOM_TINY = Path(__file__).parent / "pretrained" / "maisi-phantom-tiny"
"""The small model inside the package: `MaisiCTPipeline.from_pretrained(PHANTOM_TINY)`."""

# Where every public name lives; imported when first used, since diffusers takes seconds.
_HOMES = {
    "AutoencoderKLMaisi": "models",
    "MaisiUNet3DConditionModel": "models",
    "MaisiControlNetModel": "models",
    "MaisiRFlowScheduler": "schedulers",
    "MaisiCTPipeline": "pipelines",
    "MaisiCTPipelineOutput": "pipelines",
    "MaisiMaskPipeline": "pipelines",
    "MaisiMaskPipelineOutput": "pipelines",
    "MaisiMaskDatabase": "anatomy",
}
__all__ = [*_HOMES, "PHANTOM_TINY", "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# The module of `DiffusionPipeline`.
_DIFFUSION_PIPELINE = "diffusers.pipelines.pipeline_utils"


class _PipelinesAfterDiffusion(importlib.abc.MetaPathFinder):
    """Imports our pipelines right after `DiffusionPipeline`, so that its `from_pretrained` knows them."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _DIFFUSION_PIPELINE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        exec_module = spec.loader.exec_module

        def exec_and_register(module):
            exec_module(module)
            importlib.import_module(f"{__name__}.pipelines")

        spec.loader.exec_module = exec_and_register
        return spec


if _DIFFUSION_PIPELINE in sys.modules:
    importlib.import_module(f"{__name__}.pipelines")
else:
    sys.meta_path.insert(0, _PipelinesAfterDiffusion())
