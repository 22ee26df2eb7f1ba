"""LTX-2.5's decoder: through our processor, and through its own NATTEN processor with our kernel folder."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from vicinal import InvalidProblem, Problem
from vicinal.integrations.natten_kernel import write_natten_kernel
from vicinal.testing import truth
from vicinal.testing.tolerance import assert_as_good_as_eager

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")

from diffusers.models.autoencoders import ltx2_diffusion_decoder as decoder

from vicinal.integrations.diffusers import LTX2DecoderProcessor
from vicinal.integrations.diffusers.decoder import is_bare
from vicinal.integrations.diffusers.zoo import specimen


class Masked:
    """Dense attention under the oracle's mask."""

    def __call__(self, attn, hidden_states, block_mask=None):
        grid = tuple(hidden_states.shape[1:4])
        query, key, value = (tensor.flatten(1, 3).transpose(1, 2) for tensor in attn.project_qkv(hidden_states))
        mask = truth.mask(Problem.grid(grid, attn.kernel_size))
        out = nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=1.0)
        return attn.to_out[0](out.transpose(1, 2).flatten(2).unflatten(1, grid))


def decoded(dtype: torch.dtype, processor: object, weights: nn.Module | None = None) -> tuple[nn.Module, torch.Tensor]:
    found = specimen("ltx2-decoder")
    model = found.build(tiny=True, dtype=dtype)
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    model.set_attn_processor(processor)
    arguments = found.arguments(weights or model, tiny=True)
    latent = arguments["z"].to(dtype)
    # Noise would be drawn in the model's dtype: let it be zero, and the same in all.
    with torch.no_grad():
        context = model.decoder.forward_stage_4(model.decoder.forward_stages_1_to_3(latent))
        shape = (1, 3, context.shape[1], *(n * model.decoder.patch_size for n in context.shape[2:4]))
        noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
        return model, model.decoder.denoise(context, noise, 2)


def test_our_processor_equals_dense_attention_under_the_same_mask():
    exact, true = decoded(torch.float64, Masked())
    _, eager = decoded(torch.float32, Masked(), exact)
    _, ours = decoded(torch.float32, LTX2DecoderProcessor(), exact)
    assert_as_good_as_eager(ours, eager, true, slack=4.0)


INTERPRETED = """
import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as decoder
from vicinal.integrations.diffusers.decoder import turns_of
from vicinal.integrations.diffusers.rotation import norm_and_rotate_

torch.manual_seed(0)
for shape, dtype in (((2, 3, 5, 4, 3, 64), torch.float32), ((1, 4, 2, 7, 5, 8), torch.float32),
                     ((1, 2, 3, 5, 4, 32), torch.float16)):
    norm, rope = torch.nn.RMSNorm(shape[-1], eps=1e-3), decoder.LTX2VideoVaeRotaryPosEmbed3D(shape[-1], base=100.0)
    with torch.no_grad():
        norm.weight.normal_()
        norm.to(dtype)
        x = torch.randn(shape, dtype=dtype)
        wanted = rope(norm(x))
        split = rope.rope_dim_split
        turns = turns_of(shape[1:4], split, rope.base, x.device)
        found = norm_and_rotate_(x, norm.weight, norm.eps, turns, tuple(channels // 2 for channels in split))
    assert found is x
    torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
print("equal")
"""


def test_the_kernel_norms_and_rotates_as_the_model_does():
    pytest.importorskip("triton", reason="interpreting kernels needs triton, which is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["equal"], done.stderr[-2000:]


def test_norms_that_bring_their_weights_are_called():
    here, norm = torch.device("cpu"), nn.RMSNorm(8, eps=1e-6)
    assert is_bare(norm, here)
    assert not is_bare(norm, torch.device("cuda:0")) and not is_bare(norm.to("meta"), here)
    assert not is_bare(nn.LayerNorm(8), here) and not is_bare(nn.RMSNorm(8), here)
    hooked = nn.RMSNorm(8, eps=1e-6)
    handle = hooked.register_forward_pre_hook(lambda *_: None)
    assert not is_bare(hooked, here)
    handle.remove()
    assert is_bare(hooked, here)
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(hooked, execution_device=here)
    assert not is_bare(hooked, here)


@pytest.mark.parametrize("arch", [80, 90, 120, "gfx942"])
def test_the_kernel_compiles_everywhere(arch):
    triton = pytest.importorskip("triton", reason="compiling kernels needs triton, which is not installed")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vicinal.integrations.diffusers.rotation import norm_and_rotate

    kinds = dict.fromkeys(norm_and_rotate.arg_names, "i32") | {
        "x": "*bf16",
        "weight": "*bf16",
        "turns": "*fp32",
        "eps": "fp32",
    }
    fixed = {"D": 64, "T_PAIRS": 8, "H_PAIRS": 12, "W_PAIRS": 12, "ROWS": 32}
    kinds |= dict.fromkeys(fixed, "constexpr")
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    kernel = triton.compile(ASTSource(norm_and_rotate, kinds, fixed), target=target)
    assert kernel.asm["hsaco" if isinstance(arch, str) else "cubin"]


def test_our_processor_has_the_models_gradients():
    found = specimen("ltx2-decoder")
    model = found.build(tiny=True, dtype=torch.float64)
    attention = next(m for m in model.modules() if isinstance(m, decoder.LTX2VideoVaeNeighborhoodAttention))
    x = torch.randn(1, 5, 6, 7, attention.heads * attention.head_dim, dtype=torch.float64, requires_grad=True)
    gradients = []
    for processor in (Masked(), LTX2DecoderProcessor()):
        attention.set_processor(processor)
        gradients.append(torch.autograd.grad(attention(x).square().sum(), [x, *attention.parameters()]))
        with torch.no_grad():
            torch.testing.assert_close(attention(x), Masked()(attention, x), rtol=1e-6, atol=1e-6)
    for ours, own in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, own)


def test_our_processor_can_be_put_there_and_taken_away():
    found = specimen("ltx2-decoder")
    model = found.build(tiny=True)
    model.set_attn_processor(LTX2DecoderProcessor("blocked"))
    latent = found.arguments(model, tiny=True)["z"]
    with torch.no_grad():
        video = model.decode(latent, generator=torch.Generator().manual_seed(0)).sample
    assert video.isfinite().all()
    model.set_attn_processor(decoder.LTX2VideoVaeNeighborhoodAttnProcessor())
    assert not any(isinstance(p, LTX2DecoderProcessor) for p in model.attn_processors.values())


UNMODIFIED = """
import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as decoder
from vicinal.integrations.diffusers import LTX2DecoderProcessor
from vicinal.integrations.diffusers.decoder import is_bare
from vicinal.integrations.diffusers.zoo import specimen

found = specimen("ltx2-decoder")
torch.manual_seed(0)
model = found.build(tiny=True)
latent = found.arguments(model, tiny=True)["z"]
videos = []
for processor in (decoder.LTX2VideoVaeNeighborhoodNattenProcessor(), LTX2DecoderProcessor()):
    model.set_attn_processor(processor)
    with torch.no_grad():
        videos.append(model.decode(latent, generator=torch.Generator().manual_seed(0)).sample)
assert type(model.attn_processors.popitem()[1]) is LTX2DecoderProcessor
print(torch.allclose(*videos, rtol=1e-4, atol=1e-4), videos[0].isfinite().all().item())
"""


def test_the_unmodified_processor_runs_our_kernel(tmp_path):
    pytest.importorskip("kernels", reason="kernels is not installed: pip install -r requirements-models.txt")
    variable, path = write_natten_kernel(tmp_path / "natten").split("=", 1)
    # A process of its own: the library reads the variable once.
    environment = {**os.environ, variable: path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", UNMODIFIED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["True", "True"]


def test_the_folder_is_written_again_but_nothing_else_is_overwritten(tmp_path):
    first = write_natten_kernel(tmp_path / "here")
    assert write_natten_kernel(tmp_path / "here") == first
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    with pytest.raises(InvalidProblem, match=r"DIR must be a new or empty folder, got .*other, which holds something"):
        write_natten_kernel(tmp_path / "other")
    assert [entry.name for entry in (tmp_path / "other").iterdir()] == ["precious.txt"]
    with pytest.raises(InvalidProblem, match="DIR must hold no colon"):
        write_natten_kernel(tmp_path / "a:b")


def test_the_example_decodes(monkeypatch, capsys):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "ltx2_decoder.py"))
    monkeypatch.setattr(sys, "argv", ["ltx2_decoder.py"])
    example["main"]()
    assert "(1, 8, 2, 3, 4) -> (1, 3, 9, 96, 128) in" in capsys.readouterr().out
