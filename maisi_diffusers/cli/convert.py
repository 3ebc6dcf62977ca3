r"""
Convert a published MAISI checkpoint into a diffusers repository of safetensors and JSON.

Example:

```bash
maisi-ct convert nvidia/NV-Generate-CT maisi-rflow-ct --version rflow-ct
maisi-ct convert path/to/checkpoint maisi-ddpm-ct --version ddpm-ct --dtype float16 \
    --variant fp16
```
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import create_repo, upload_folder

from ..files import publish
from ..loaders import VERSIONS
from ..pipelines import MaisiCTPipeline
from .devices import DTYPES
from .scripts import ScriptParser, run


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, or a list of arguments instead."""
    parser = ScriptParser(
        prog="maisi-ct convert",
        description="Convert a published MAISI checkpoint into a diffusers repository of safetensors and JSON.",
    )
    parser.add_argument("source", help="folder in the published layout, or Hub id such as nvidia/NV-Generate-CT")
    parser.add_argument("output", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--version", required=True, help=f"published model: {', '.join(VERSIONS)}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--variant", help="name of the weights' variant, e.g. fp16 for *.fp16.safetensors")
    parser.add_argument("--max_shard_size", default="5GB", help="split weights into files of this size at most")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument(
        "--no_strict", action="store_true", help="drop unexpected keys with a warning instead of refusing them"
    )
    parser.add_argument(
        "--no_mask_database", action="store_true", help="leave out the label maps to look one up in, which are many"
    )
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the result to this Hub repository as well")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> dict:
    """
    Read, write into a temporary folder beside the output, rename: the output is there as a whole or not at all.

    Returns:
        what there is to tell of it to a program.

    Raises:
        OSError: a source that is not there, an output that cannot be written, a Hub that cannot be reached.
        ValueError: an output that has files; whatever [`MaisiCTPipeline.from_maisi_checkpoint`] refuses.
    """
    output = args.output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{args.output} exists and is not an empty folder: remove it or choose another output")
    pipe = MaisiCTPipeline.from_maisi_checkpoint(
        args.source,
        version=args.version,
        torch_dtype=DTYPES[args.dtype],
        strict=not args.no_strict,
        revision=args.revision,
    )
    if args.no_mask_database:
        pipe.mask_database = None

    parent = next(folder for folder in output.parents if folder.exists())
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{output.name}-") as temporary:
        # A folder in it, since the temporary one is readable by its owner alone.
        repository = Path(temporary) / output.name
        pipe.save_pretrained(repository, variant=args.variant, max_shard_size=args.max_shard_size)
        output.parent.mkdir(parents=True, exist_ok=True)
        publish(repository, output)

    components = {}
    for name, component in pipe.components.items():
        if component is None:
            continue
        line = f"{name}: {type(component).__name__}"
        components[name] = {"class": type(component).__name__}
        if isinstance(component, ModelMixin):
            components[name]["parameters"] = count = component.num_parameters()
            line += f", {count:,} parameters"
        print(line)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    print(f"wrote {args.output}: {len(components)} components in {args.dtype}, {size / 1e6:,.1f} MB")
    told = {"output": str(args.output), "components": components, "dtype": args.dtype, "bytes": size}

    if args.push_to_hub:
        try:
            repo_id = create_repo(args.push_to_hub, exist_ok=True).repo_id
            commit = upload_folder(repo_id=repo_id, folder_path=output, commit_message=f"Add MAISI {args.version}")
        except Exception as error:  # of the network, the Hub or the login: none touches what was written
            raise OSError(f"{args.output} is complete, but not uploaded to {args.push_to_hub}: {error}") from error
        print(f"uploaded to {commit.commit_url}")
        told["uploaded_to"] = str(commit.commit_url)
    return told


def main(argv: list[str] | None = None) -> None:
    """Convert, or say in one line on stderr why not and exit with code 1."""
    args = parse_args(argv)
    run(partial(convert, args), args.as_json)
