"""Progress on stderr: the stage, how far it is, and the time left."""

import sys
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Stages:
    """
    A line for the stage of an image, and above it one for the images if there are several. As a context manager it is
    there until the block ends.

    Args:
        num: images to make.
        quiet: say nothing. Where stderr is no terminal there are no lines, but still warnings.
    """

    def __init__(self, num: int, quiet: bool):
        console = Console(stderr=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),  # to be above the lines; a pipe is to get what is printed
            disable=quiet or not console.is_terminal,
        )
        self._num, self._quiet = num, quiet
        self._images = self._progress.add_task("images", total=num, count=f"0/{num}", visible=num > 1)
        self._stage = self._progress.add_task("", total=None, count="")
        self.stage = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def begin(self, stage: str, total: int | None = None) -> None:
        """A stage begins, of so many steps if that is known."""
        self.stage = stage
        # A new line: rich's `reset` leaves the total as it is where none is known.
        self._progress.remove_task(self._stage)
        self._stage = self._progress.add_task(stage, total=total, count="" if total is None else f"0/{total}")

    def step(self, completed: int, total: int) -> None:
        """So many steps of the stage are done."""
        self._progress.update(self._stage, completed=completed, total=total, count=f"{completed}/{total}")

    def finish_image(self, completed: int) -> None:
        """So many images are done."""
        self._progress.update(self._images, completed=completed, count=f"{completed}/{self._num}")

    def warn(self, message: str) -> None:
        """Say in a line above the stage what may be wrong."""
        if not self._quiet:
            print(f"warning: {message}", file=sys.stderr)
