"""What is in weight files, from their headers alone."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import HfApi

from .models import Model

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_FILE = re.compile(r"(?P<component>\w+)/diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors")


def weight_dtypes(model: Model) -> dict[str, str]:
    """
    Component -> the dtype of its weights, of variants the one without a name.

    Where the files of a Hub repository were not downloaded, their headers are read there. Components that nothing can
    be learned of are left out.
    """
    files = [path.relative_to(model.folder).as_posix() for path in model.folder.glob("*/*.safetensors")]
    if files or model.revision is None:
        return {
            component: dtypes_text(tensor["dtype"] for name, tensor in header.items() if name != "__metadata__")
            for component, file in choose_files(files).items()
            for header in [read_header(model.folder / file)]
        }
    try:
        hub = HfApi()
        headers = {
            component: hub.parse_safetensors_file_metadata(model.source, file, revision=model.revision)
            for component, file in choose_files(hub.list_repo_files(model.source, revision=model.revision)).items()
        }
    except Exception:  # of the network or the Hub
        return {}
    return {
        component: dtypes_text(tensor.dtype for tensor in header.tensors.values())
        for component, header in headers.items()
    }


def choose_files(files: list[str]) -> dict[str, str]:
    """Component -> one of its files: of the variant without a name if there is one, and of shards any."""
    found: dict[str, str] = {}
    matches = filter(None, map(_FILE.fullmatch, files))
    for match in sorted(matches, key=lambda match: match["variant"] or "", reverse=True):
        found[match["component"]] = match[0]
    return found


def dtypes_text(dtypes: Iterable[str]) -> str:
    """The names that torch has for what the files say."""
    return ", ".join(sorted({DTYPES.get(dtype, dtype) for dtype in dtypes}))


def read_header(path: Path) -> dict[str, dict]:
    """Name -> dtype, shape and place of every tensor of a .safetensors file; raises a `ValueError` if it is none."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"{path} is no safetensors file, or cut short: download it again (a clone: git lfs pull)")
        return json.loads(stream.read(length))
