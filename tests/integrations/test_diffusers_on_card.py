"""diffusers on an accelerator: blocks compiled with windows, and LTX-2.5's own NATTEN processor on our kernel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vicinal.integrations.natten_kernel import write_natten_kernel

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")

from vicinal.integrations.diffusers import sparsify
from vicinal.integrations.diffusers.zoo import specimen

pytestmark = pytest.mark.gpu

DEVICE = "cuda"


# The first product in float32 that a process compiles is told that TF32 would be faster.
@pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize("name", ["flux", "wan-14b"])
def test_compiled_blocks_with_windows_give_what_they_give_uncompiled(name: str):
    found = specimen(name)
    model: Any = found.build(tiny=True, device=DEVICE)
    arguments = found.arguments(model, tiny=True)

    def output() -> torch.Tensor:
        with torch.no_grad():
            return model(**arguments, return_dict=False)[0]

    dense = output()
    with sparsify(model, **found.tiny_window):
        eager = output()
        model.compile_repeated_blocks(fullgraph=True)
        compiled = output()
    difference, felt = ((other - eager).norm() / eager.norm() for other in (compiled, dense))
    assert difference < felt / 100


UNMODIFIED = """
import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as decoder
from vicinal.integrations.diffusers import LTX2DecoderProcessor
from vicinal.integrations.diffusers.zoo import specimen

found = specimen("ltx2-decoder")
torch.manual_seed(0)
model = found.build(device="cuda", dtype=torch.bfloat16)
latent = found.arguments(model, (3, 7, 9))["z"]
videos = []
for processor in (decoder.LTX2VideoVaeNeighborhoodNattenProcessor(), LTX2DecoderProcessor()):
    model.set_attn_processor(processor)
    with torch.no_grad():
        videos.append(model.decode(latent, generator=torch.Generator("cuda").manual_seed(0)).sample.double())
theirs, ours = videos
print(float((theirs - ours).norm() / ours.norm()))
"""


def test_the_unmodified_processor_runs_our_kernel(tmp_path: Path):
    pytest.importorskip("kernels", reason="kernels is not installed: pip install -r requirements-models.txt")
    variable, path = write_natten_kernel(tmp_path / "natten").split("=", 1)
    environment = {**os.environ, variable: path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", UNMODIFIED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    # The same kernel runs; queries were rounded to 16 bits before and after they were scaled.
    assert float(done.stdout) < 0.02
