"""A checkpoint streams into its model: what is held at once is the model and no more than one file besides."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity import monai_reference
from tests.parity.monai_reference import Size, build_networks, network_config, save_checkpoint

from .checkpoints import FILES

ROOT = Path(__file__).parents[2]
# Some 600 MB in float32, next to which what Python itself takes on the way is nothing.
WIDE = Size([128, 352], [1, 1], [False, True], [0, 32], [96, 128, 192], [1, 1, 1], (8, 8, 8))

# Of this process alone: what getrusage calls its peak is at least that of the process that started it.
MEASURE = """
import json, sys
import torch
from maisi_diffusers import MaisiCTPipeline

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

torch.ones(1000).sum()
before = memory("VmRSS")
pipe = MaisiCTPipeline.from_maisi_checkpoint(sys.argv[1], "rflow-ct", torch_dtype=getattr(torch, sys.argv[2]))
peak = memory("VmHWM") - before
models = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
size = sum(parameter.nbytes for model in models for parameter in model.parameters())
print(json.dumps({"peak": peak, "models": size, "count": len(models)}))
"""


@pytest.fixture(scope="module")
def wide_checkpoint(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        patch.setattr(monai_reference, "randomize", lambda network, seed: network)
        networks = build_networks("rflow-ct", WIDE)
    for network in networks.values():
        network.load_state_dict(
            {key: torch.rand(weight.shape) for key, weight in network.state_dict().items()}, assign=True
        )
    folder = tmp_path_factory.mktemp("wide")
    yield save_checkpoint(folder / "checkpoint", "rflow-ct", networks, network_config("rflow-ct", WIDE))
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory in use from /proc")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_peak_memory(wide_checkpoint, dtype):
    files = [(wide_checkpoint / file).stat().st_size for file in FILES.values()]
    assert sum(files) > 4e8 and max(files) < 0.45 * sum(files)
    command = [sys.executable, "-c", MEASURE, wide_checkpoint, dtype]
    measured = json.loads(subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout)
    assert measured["count"] == len(FILES)
    assert measured["models"] == pytest.approx(sum(files) / (1 if dtype == "float32" else 2), rel=0.02)
    # In float32 the file's tensors become the model's; in float16 a file is there as well while it is read.
    held = measured["models"] + (0 if dtype == "float32" else max(files))
    assert measured["peak"] <= 1.15 * held, measured
    print(f"{dtype}: peak {measured['peak'] / 1e6:.0f} MB, models {measured['models'] / 1e6:.0f} MB")
