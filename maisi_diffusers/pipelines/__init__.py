"""The pipelines, made known to diffusers."""

import diffusers
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from .pipeline_maisi_ct import MaisiCTPipeline
from .pipeline_maisi_mask import MaisiMaskPipeline
from .pipeline_output import MaisiCTPipelineOutput, MaisiMaskPipelineOutput

__all__ = ["MaisiCTPipeline", "MaisiCTPipelineOutput", "MaisiMaskPipeline", "MaisiMaskPipelineOutput"]

# diffusers loads components from libraries that it knows, records other classes under the path of their file, and
# refuses those on the Hub. As a known library, `model_index.json` says ["maisi_diffusers", "AutoencoderKLMaisi"],
# whatever file the class is in.
LOADABLE_CLASSES["maisi_diffusers"] = {
    name: ["save_pretrained", "from_pretrained"]
    for name in ("AutoencoderKLMaisi", "MaisiUNet3DConditionModel", "MaisiControlNetModel", "MaisiRFlowScheduler")
}
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["maisi_diffusers"])

# `DiffusionPipeline.from_pretrained` looks for a pipeline's class in diffusers.
diffusers.MaisiCTPipeline = MaisiCTPipeline
diffusers.MaisiMaskPipeline = MaisiMaskPipeline
