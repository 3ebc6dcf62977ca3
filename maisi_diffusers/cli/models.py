"""The model that a command works with: the embedded one, a folder, or a Hub repository."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import PHANTOM_TINY

if TYPE_CHECKING:
    import torch

    from ..pipelines import MaisiCTPipeline

INDEX = "model_index.json"


@dataclass(frozen=True)
class Model:
    """
    Where a model is.

    Args:
        name: short, for the names of files.
        source: as the user gave it; the embedded model's is its name.
        revision: the commit of a Hub repository.
        folder: that has its `model_index.json`; of a Hub repository, the cached one.
        variant: of its weights; the one without a name if not given.
    """

    name: str
    source: str
    revision: str | None
    folder: Path
    variant: str | None = None

    @property
    def description(self) -> dict[str, str | None]:
        """What the record of an image says of it."""
        told = {"name": self.name, "source": self.source, "revision": self.revision}
        return told if self.variant is None else told | {"variant": self.variant}


def find_model(source: str | None, revision: str | None = None, variant: str | None = None) -> Model:
    """
    Look for a model, of which no more than `model_index.json` is downloaded.

    Args:
        source: a folder or a Hub id; the embedded model if not given.
        revision: branch, tag or commit of a Hub repository.
        variant: of its weights.

    Raises:
        FileNotFoundError: if it is neither, or the embedded model is not in this installation.
        ValueError: if it is no diffusers repository, or none that has revisions.
    """
    is_folder = source is None or Path(source).is_dir()
    if is_folder and revision is not None:
        raise ValueError(f"--revision {revision} is for a model on the Hub: leave it out, or name one")
    if source is None:
        if not (PHANTOM_TINY / INDEX).is_file():
            raise FileNotFoundError(
                f"the embedded model is not in this installation ({PHANTOM_TINY}): install the package again, or name "
                "a folder or a Hub id with --model"
            )
        return Model(PHANTOM_TINY.name, PHANTOM_TINY.name, None, PHANTOM_TINY, variant)

    from ..loaders import Repository

    folder = Repository(source, revision).fetch(INDEX)
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{source} has no {INDEX}, so it is no diffusers repository; a published checkpoint becomes one by "
            "maisi-ct convert"
        )
    name = Path(source).resolve().name
    # The cache has a folder a commit, named by it.
    return Model(name, source, None if is_folder else folder.name, folder, variant)


def load_pipeline(model: Model, dtype: "torch.dtype") -> "MaisiCTPipeline":
    """
    The pipeline of a model, on the CPU.

    Raises:
        ValueError: if its files are missing, damaged or not of this pipeline.
        MemoryError, RuntimeError: if it does not fit in memory.
    """
    from ..memory import is_out_of_memory
    from ..pipelines import MaisiCTPipeline

    source = model.folder if model.revision is None else model.source
    try:
        return MaisiCTPipeline.from_pretrained(source, revision=model.revision, variant=model.variant, dtype=dtype)
    except Exception as error:  # whatever diffusers, safetensors and json say of damaged files
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
            raise
        line = " ".join(str(error).split())
        raise ValueError(f"the model {model.source} cannot be loaded: {type(error).__name__}: {line}") from error
