"""The mask database and the anatomy sizes of a model: files of its repository, but no components of the pipeline."""

import copy
import json
import os
from pathlib import Path
from typing import Self

import torch
from diffusers import DiffusionPipeline

from ..anatomy import MaisiMaskDatabase, check_sizes, read_size_conditions
from ..anatomy.mask_database import CANDIDATES
from ..files import remove, write_atomically
from ..loaders import Repository

FOLDER = "mask_database"
SIZE_CONDITIONS = "anatomy_size_conditions.json"
UNREAD = object()


class AnatomyFiles:
    """
    The mask database and the anatomy sizes of a repository, read, and from the Hub downloaded, at first use.

    Args:
        repository: where they are; `None` where there are none.
        candidates: path in it of the list of label maps.
        masks: path of their folder or, with ".zip" added, of their archive.
        size_conditions: path of the anatomy sizes.
    """

    def __init__(
        self,
        repository: Repository | None = None,
        candidates: str = f"{FOLDER}/{CANDIDATES}",
        masks: str = f"{FOLDER}/masks",
        size_conditions: str = f"{FOLDER}/{SIZE_CONDITIONS}",
    ):
        self.repository = repository
        self.candidates, self.masks, self.size_conditions_path = candidates, masks, size_conditions
        self._mask_database = self._size_conditions = UNREAD

    @property
    def mask_database(self) -> MaisiMaskDatabase | None:
        if self._mask_database is UNREAD:
            path = self._find(self.candidates)
            self._mask_database = None if path is None else MaisiMaskDatabase(path, self._fetch_masks)
        return self._mask_database

    @mask_database.setter
    def mask_database(self, database: MaisiMaskDatabase | None) -> None:
        if database is not None and not isinstance(database, MaisiMaskDatabase):
            raise ValueError(
                f"mask_database={database!r} is not allowed: give MaisiMaskDatabase(path of the list), or None"
            )
        self._mask_database = database

    @property
    def size_conditions(self) -> list[list[float]] | None:
        if self._size_conditions is UNREAD:
            path = self._find(self.size_conditions_path)
            self._size_conditions = None if path is None else read_size_conditions(path)
        return self._size_conditions

    @size_conditions.setter
    def size_conditions(self, conditions: list[list[float]] | None) -> None:
        if conditions is not None and (not isinstance(conditions, list) or not conditions):
            raise ValueError(
                f"anatomy_size_conditions={conditions!r} is not allowed: give a list with the 10 sizes of every case, "
                "or None"
            )
        self._size_conditions = None if conditions is None else [check_sizes(sizes) for sizes in conditions]

    def save(self, directory: str | os.PathLike) -> None:
        """Copy what there is into the folder of a repository, in the place of what that has: all of it or nothing."""
        database, conditions = self.mask_database, self.size_conditions
        target = Path(directory) / FOLDER
        if database is None and conditions is None:
            if any((target / name).is_file() for name in (CANDIDATES, SIZE_CONDITIONS)):
                remove(target)  # another model's, which would be taken for this one's
            return
        with write_atomically(target) as folder:
            folder.mkdir()
            if database is not None:
                database.save(folder)
            if conditions is not None:
                (folder / SIZE_CONDITIONS).write_text(json.dumps([{"organ_size": sizes} for sizes in conditions]))

    def _find(self, path: str) -> Path | None:
        if self.repository is None:
            return None
        # With a file that every pipeline has, because huggingface_hub warns where nothing matches.
        found = self.repository.fetch(path, "model_index.json") / path
        return found if found.is_file() else None

    def _fetch_masks(self, pattern: str) -> Path:
        folder = self.repository.fetch(f"{self.masks}/{pattern}", f"{self.masks}.zip")
        return folder / self.masks if (folder / self.masks).is_dir() else folder / f"{self.masks}.zip"


class AnatomyFilesMixin:
    """
    Gives a pipeline `mask_database` and `anatomy_size_conditions`, which travel with it: `from_pretrained` finds them
    in the folder `mask_database` of its repository, `save_pretrained` copies them there.
    """

    _anatomy_files: AnatomyFiles | None = None

    @property
    def anatomy_files(self) -> AnatomyFiles:
        """Where mask database and anatomy sizes are read from."""
        if self._anatomy_files is None:
            self._anatomy_files = AnatomyFiles(repository_of(self))
        return self._anatomy_files

    @property
    def mask_database(self) -> MaisiMaskDatabase | None:
        """The label maps to look one up in, or `None`; can be set."""
        return self.anatomy_files.mask_database

    @mask_database.setter
    def mask_database(self, database: MaisiMaskDatabase | None) -> None:
        self.anatomy_files.mask_database = database

    @property
    def anatomy_size_conditions(self) -> list[list[float]] | None:
        """Anatomy sizes of real cases, by which given ones are completed, or `None`; can be set."""
        return self.anatomy_files.size_conditions

    @anatomy_size_conditions.setter
    def anatomy_size_conditions(self, conditions: list[list[float]] | None) -> None:
        self.anatomy_files.size_conditions = conditions

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> Self:
        """As [`DiffusionPipeline.from_pretrained`]."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        # Revision and cache are those of the networks, but what follows leaves no trace there.
        hub_kwargs = {name: kwargs[name] for name in ("token", "local_files_only") if name in kwargs}
        pipe._anatomy_files = AnatomyFiles(repository_of(pipe, **hub_kwargs))
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs) -> Self:
        """As [`DiffusionPipeline.from_pipe`], but the networks keep the dtypes they have where none is given; the
        two pipelines share them."""
        networks = [network for network in pipeline.components.values() if isinstance(network, torch.nn.Module)]
        dtypes = {weight: weight.dtype for network in networks for weight in network.parameters()}
        pipe = super().from_pipe(pipeline, **kwargs)
        if not kwargs.keys() & {"dtype", "torch_dtype"}:
            for weight, dtype in dtypes.items():
                weight.data = weight.data.to(dtype)  # from float32, which loses nothing
        if isinstance(pipeline, AnatomyFilesMixin):
            pipe._anatomy_files = copy.copy(pipeline.anatomy_files)
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """
        As [`DiffusionPipeline.save_pretrained`], with mask database and anatomy sizes; where these are on the Hub,
        they are downloaded.

        Raises:
            FileNotFoundError: if they cannot be read from here.
        """
        try:
            self.anatomy_files.save(save_directory)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; to save without mask database and anatomy sizes, set pipe.mask_database = None and "
                "pipe.anatomy_size_conditions = None"
            ) from error
        super().save_pretrained(save_directory, *args, **kwargs)


def repository_of(pipeline: DiffusionPipeline, **hub_kwargs) -> Repository | None:
    """Where a pipeline was loaded from, at the commit and in the cache that its networks are from."""
    source = pipeline.config.get("_name_or_path")
    if source is None:
        return None
    own_cache = f"models--{str(source).replace('/', '--')}"
    for component in pipeline.components.values():
        # A network knows its folder: <cache>/models--<owner>--<name>/snapshots/<commit>/<component>.
        snapshot = Path(getattr(component, "config", {}).get("_name_or_path", "")).parent
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name == own_cache:
            return Repository(source, revision=snapshot.name, cache_dir=snapshot.parents[2], **hub_kwargs)
    return Repository(source, **hub_kwargs)
