"""What is in weight files, from their headers alone."""

import json
import re
from pathlib import Path

from .models import Model

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_FILE = re.compile(r"(?P<component>\w+)/diffusion_pytorch_model(\.(?P<variant>\w+))?(-\d+-of-\d+)?\.safetensors")


def weight_dtypes(model: Model) -> dict[str, str]:
    """
    Component -> the dtype of its weights, of variants the one without a name.

    Headers of a Hub repository's files are read there, unless the files were downloaded before.
    """
    if model.revision is None:
        files = [path.relative_to(model.folder).as_posix() for path in model.folder.glob("*/*.safetensors")]
    else:
        from huggingface_hub import HfApi

        files = HfApi().list_repo_files(model.source, revision=model.revision)
    found: dict[str, str] = {}
    # Without a variant last, and one shard of several, for they do not differ.
    for match in sorted(
        filter(None, map(_FILE.fullmatch, files)), key=lambda match: match["variant"] or "", reverse=True
    ):
        found[match["component"]] = match[0]
    return {component: _dtype(model, file) for component, file in sorted(found.items())}


def _dtype(model: Model, file: str) -> str:
    path = model.folder / file
    if path.is_file():
        dtypes = {tensor["dtype"] for name, tensor in read_header(path).items() if name != "__metadata__"}
    else:
        from huggingface_hub import HfApi

        header = HfApi().parse_safetensors_file_metadata(model.source, file, revision=model.revision)
        dtypes = {tensor.dtype for tensor in header.tensors.values()}
    return ", ".join(sorted(DTYPES.get(dtype, dtype) for dtype in dtypes))


def read_header(path: Path) -> dict[str, dict]:
    """Name -> dtype, shape and place of every tensor of a .safetensors file."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length))
