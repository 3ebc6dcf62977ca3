"""The four files of an image: what they are called, whether they are there, and how they come to be."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outputs:
    """
    Where an image goes. The record is written last: where it is, the image is complete.

    Args:
        folder: of all images of a run.
        name: that the files' names begin with.
        seed: of the image.
    """

    folder: Path
    name: str
    seed: int

    @property
    def ct(self) -> Path:
        """The image, int16 HU."""
        return self.folder / f"{self.name}_ct.nii.gz"

    @property
    def labels(self) -> Path:
        """Its label map, uint8; not there without one."""
        return self.folder / f"{self.name}_labels.nii.gz"

    @property
    def picture(self) -> Path:
        """Three planes of it."""
        return self.folder / f"{self.name}.png"

    @property
    def record(self) -> Path:
        """How it was made and what is in it."""
        return self.folder / f"{self.name}.json"

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them, the record last."""
        return self.ct, self.labels, self.picture, self.record

    def is_made_from(self, model: dict, request: dict) -> bool:
        """
        Whether the image is there with all its files, made from what is asked for.

        Raises:
            ValueError: if it is there, but made from something else, or its record is none.
        """
        if not self.record.exists():
            return False
        try:
            record = json.loads(self.record.read_text())
            made_from = {"model": record["model"], "seed": record["seed"], **record["request"]}
            files = [self.folder / name for name in record["files"].values() if name is not None]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.record} is no record of an image: --force, or choose another --name") from error
        asked = json.loads(json.dumps({"model": model, "seed": self.seed, **request}))  # JSON knows no tuples
        for key in sorted(made_from.keys() | asked.keys()):
            if made_from.get(key) != asked.get(key):
                raise ValueError(
                    f"{self.record} was made with {key}={made_from.get(key)!r}, not {asked.get(key)!r}: --force it, "
                    "or choose another --name or --output"
                )
        return all(file.exists() for file in files)


def name_outputs(folder: Path, name: str | None, model_name: str, seed: int, num: int) -> list[Outputs]:
    """The outputs of a run: image i has seed + i, so that each can be made again alone."""
    seeds = range(seed, seed + num)
    if name is None:
        return [Outputs(folder, f"{model_name}_seed{one}", one) for one in seeds]
    return [Outputs(folder, name if num == 1 else f"{name}_{i:03d}", one) for i, one in enumerate(seeds)]


def refuse_existing(outputs: list[Outputs]) -> None:
    """Raise a `FileExistsError` that names the first file that is there."""
    for file in (file for one in outputs for file in one.files):
        if file.exists():
            raise FileExistsError(f"{file} is there already: --force, or choose another --name, --seed or --output")


def refuse_others(outputs: list[Outputs]) -> None:
    """
    Raise a `FileExistsError` that names the first file that is there and was not made by this command.

    A run that was killed may have left files without a record: of a volume the header tells, and the picture, which
    has none, gets its name after the CT.
    """
    from ..imaging.nifti import DESCRIPTION, is_up_to_date

    for one in outputs:
        ours = {file for file in (one.ct, one.labels) if is_up_to_date(file, DESCRIPTION, [])}
        if one.ct in ours or one.record.exists():
            ours |= {one.picture, one.record}
        for file in one.files:
            if file.exists() and file not in ours:
                raise FileExistsError(
                    f"{file} is there and was not made by this command: --force, or choose another --name, --seed or "
                    "--output"
                )


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """
    A temporary folder beside the outputs, to write them in before they get their names; it tells at once whether
    `folder` can be written. A new folder that nothing came into goes again.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".maisi-ct-") as temporary:
            yield Path(temporary)
    finally:
        if is_new:
            with suppress(OSError):
                folder.rmdir()


def publish_outputs(staged: Path, outputs: Outputs) -> None:
    """Move the files of an image from the temporary folder to their names, all of them or none."""
    from ..files import flush, publish

    for file in staged.iterdir():  # takes time, in which what is there had better stay
        flush(file)
    outputs.record.unlink(missing_ok=True)  # what is there is not complete any more
    try:
        for file in outputs.files:
            if (staged / file.name).exists():
                publish(staged / file.name, file)
            else:
                file.unlink(missing_ok=True)  # of an image with labels that one without replaces
    except BaseException:
        if not outputs.record.exists():
            for file in outputs.files:
                file.unlink(missing_ok=True)
        raise
