"""A tracker that needs nothing but a file: `log.jsonl`, one line of JSON a step."""

import json
from pathlib import Path

from accelerate.tracking import GeneralTracker, on_main_process

from ..files import write_atomically


class JSONLinesTracker(GeneralTracker):
    """
    Appends what is logged to `log.jsonl`. When a run is resumed, what was logged after its checkpoint is dropped.

    Args:
        output_dir: the run's folder.
        first_step: steps that the run has behind it.
    """

    name = "json_lines"
    requires_logging_directory = False

    @on_main_process
    def __init__(self, output_dir: str, first_step: int):
        super().__init__()
        self.path = Path(output_dir) / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= first_step]
        with write_atomically(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    @property
    def tracker(self) -> Path:
        """The file."""
        return self.path

    @on_main_process
    def log(self, values: dict, step: int | None = None, **kwargs) -> None:
        """Append the numbers of a step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_log(path: Path) -> list[dict]:
    """The lines of a log; none if there is no such file. A last line that a kill cut short is passed over."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
