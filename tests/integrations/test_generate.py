"""`vicinal generate` on a tiny pipeline on disk: both runs are the pipeline's own, and the numbers theirs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from vicinal import InvalidProblem, Unsupported
from vicinal.bench.generate import Generated, generate, load_pipeline
from vicinal.cli import app

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")
pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-models.txt")

from vicinal.integrations.diffusers import sparsify
from vicinal.integrations.diffusers.zoo import specimen

CPU = torch.device("cpu")
SIZES = {"num_frames": 9, "height": 96, "width": 160}
SIZE = "9x96x160"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LTX-Video's pipeline with few and random weights, a vocabulary of three words included."""
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = Tokenizer(WordLevel({"<pad>": 0, "<unk>": 1, "lighthouse": 2}, unk_token="<unk>"))
    four: dict[str, Any] = {
        "block_out_channels": (8, 8, 8, 8),
        "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    }
    pipe = LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLLTXVideo(latent_channels=8, **four),
        text_encoder=T5EncoderModel(T5Config(vocab_size=3, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>"),
        transformer=specimen("ltx-video").build(tiny=True),
    )
    where = tmp_path_factory.mktemp("weights")
    pipe.save_pretrained(where)
    return where


@pytest.fixture
def pipe(folder: Path) -> Any:
    found = load_pipeline(folder, CPU, torch.float32)
    found.set_progress_bar_config(disable=True)
    return found


def vicinal(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def frames_of(pipe: Any, steps: int) -> Any:
    generator = torch.Generator().manual_seed(5)
    return pipe("lighthouse", generator=generator, num_inference_steps=steps, output_type="np", **SIZES).frames[0]


def test_both_runs_are_the_pipelines_own_from_one_seed(pipe):
    window = {"kernel_size": (2, 2, 3), "dense_steps": 1}
    found = generate(pipe, window, prompt="lighthouse", seed=5, steps=3, sizes=SIZES)
    np.testing.assert_array_equal(found.dense, frames_of(pipe, 3))
    with sparsify(pipe.transformer, **window):
        np.testing.assert_array_equal(found.sparse, frames_of(pipe, 3))
    assert not np.array_equal(found.dense, found.sparse)
    assert (found.steps, found.dense.shape) == (3, (9, 96, 160, 3))
    assert math.isfinite(found.psnr) and found.ssim < 1


def test_a_window_over_the_whole_grid_changes_next_to_nothing(pipe):
    found = generate(pipe, {"kernel_size": -1}, prompt="lighthouse", steps=2, sizes=SIZES)
    assert found.psnr > 80 and found.ssim > 0.9999


def test_psnr_is_that_of_the_formula_and_the_sheet_shows_dense_above_sparse():
    numbers = np.random.default_rng(1)
    dense = numbers.random((5, 12, 20, 3), dtype=np.float32)
    sparse = np.clip(dense + 0.1 * numbers.standard_normal(dense.shape), 0, 1).astype(np.float32)
    found = Generated("x", 0, 4, dense, sparse, 6.0, 2.0)
    assert found.psnr == pytest.approx(-10 * np.log10(np.square(dense - sparse, dtype=np.float64).mean()), rel=1e-4)
    assert found.speedup == 3.0
    sheet = found.sheet()
    assert sheet.shape == (24, 60, 3)
    np.testing.assert_array_equal(sheet[:12, 20:40], (dense[2] * 255).round().astype(np.uint8))
    np.testing.assert_array_equal(sheet[12:, 40:], (sparse[4] * 255).round().astype(np.uint8))
    assert Generated("x", 0, 4, dense, dense, 1.0, 1.0).psnr == math.inf


def test_the_command_prints_and_writes_what_it_found(folder, tmp_path):
    out = tmp_path / "pair.png"
    words = ("generate", folder, "--prompt", "lighthouse", "-k", "2x2x3", "--steps", 2, "--size", SIZE)
    result = vicinal(*words, "--device", "cpu", "--out", out)
    assert result.exit_code == 0, result.output
    assert "'lighthouse', 160x96, 9 frames, 2 steps, seed 0" in result.stdout
    assert "PSNR" in result.stdout and "SSIM" in result.stdout
    assert Image.open(out).size == (3 * 160, 2 * 96)
    again = json.loads(vicinal(*words, "--device", "cpu", "--json").stdout)
    assert again["shape"] == [9, 96, 160, 3] and again["psnr"] > 0


def test_what_cannot_be_run_is_said_before_anything_is(folder, pipe, tmp_path, monkeypatch):
    with pytest.raises(InvalidProblem, match=r"weights must be a folder with a pipeline's model_index.json, got"):
        load_pipeline(tmp_path, CPU, torch.float32)
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline", "vae": ["diffusers", "Nothing"]}')
    with pytest.raises(InvalidProblem, match="cannot be loaded"):
        load_pipeline(tmp_path, CPU, torch.float32)
    with pytest.raises(InvalidProblem, match="kernel_size"):
        generate(pipe, {"kernel_size": (2, 99, 3)}, prompt="x", steps=2, sizes=SIZES)
    with pytest.raises(InvalidProblem, match=r"LTXPipeline refuses its arguments: .*divisible by 32"):
        generate(pipe, {"kernel_size": 2}, prompt="x", steps=2, sizes={**SIZES, "height": 95})
    assert type(pipe.transformer.transformer_blocks[0].attn1.processor).__name__ == "LTXVideoAttnProcessor"
    bare = vicinal("generate", folder, "--prompt", "x")
    assert bare.exit_code == 2 and "pass --kernel-size or --preset" in bare.stderr
    size = vicinal("generate", folder, "--prompt", "x", "-k", 2, "--size", "8x8x8x8")
    assert size.exit_code == 2 and "FRAMESxROWSxCOLUMNS, 1 or more each, got 8x8x8x8" in size.stderr
    monkeypatch.setattr("vicinal.bench.generate.find_spec", lambda name: None)
    with pytest.raises(Unsupported, match="need scikit-image"):
        generate(pipe, {"kernel_size": 2}, prompt="x", steps=2, sizes=SIZES)


def test_steps_are_those_of_both_models():
    found = specimen("wan-14b")

    class TwoModels:
        """As Wan 2.2 has them: one for much noise, one for little."""

        transformer, transformer_2 = (found.build(tiny=True) for _ in range(2))

        def __call__(self, prompt: str, num_inference_steps: int, generator: torch.Generator, output_type: str) -> Any:
            for step in range(num_inference_steps):
                model = self.transformer if step < 2 else self.transformer_2
                arguments = found.arguments(model, tiny=True)
                with torch.no_grad():
                    model(**{**arguments, "timestep": torch.full_like(arguments["timestep"], 999.0 - step)})
            return SimpleNamespace(images=torch.rand(1, 16, 24, 3, generator=generator).numpy())

    assert generate(TwoModels(), {"kernel_size": 2}, prompt="x", steps=5).steps == 5
