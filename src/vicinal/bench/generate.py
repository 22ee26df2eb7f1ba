"""What a pipeline with real weights makes of a prompt, dense and with windows, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vicinal.errors import InvalidProblem, Unsupported
from vicinal.simulate import readable_time

Frames = NDArray[np.float32]
"""`[frames, height, width, 3]` in [0, 1]; pictures are one frame."""


@dataclass(frozen=True)
class Generated:
    """Two generations with one seed, and how far apart they are. Prints itself.

    Args:
        prompt, seed, steps: what was asked for.
        dense, sparse: what came.
        dense_seconds, sparse_seconds: for all of it, text encoders and decoder included.
    """

    prompt: str
    seed: int
    steps: int
    dense: Frames
    sparse: Frames
    dense_seconds: float
    sparse_seconds: float

    @property
    def psnr(self) -> float:
        """Peak signal-to-noise ratio of the sparse frames to the dense ones in decibels, over all of them."""
        from skimage.metrics import peak_signal_noise_ratio

        with np.errstate(divide="ignore"):  # equal frames are infinitely close
            return float(peak_signal_noise_ratio(self.dense, self.sparse, data_range=1.0))

    @property
    def ssim(self) -> float:
        """Structural similarity of the two, 1 for equal frames, on average over them."""
        from skimage.metrics import structural_similarity

        pairs = zip(self.dense, self.sparse, strict=True)
        return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in pairs]))

    @property
    def speedup(self) -> float:
        return self.dense_seconds / self.sparse_seconds

    def sheet(self) -> NDArray[np.uint8]:
        """First, middle and last frame: dense ones above sparse ones."""
        count = len(self.dense)
        chosen = sorted({0, count // 2, count - 1})
        rows = [np.concatenate([frames[i] for i in chosen], axis=1) for frames in (self.dense, self.sparse)]
        return (np.concatenate(rows) * 255).round().astype(np.uint8)

    def summary(self) -> dict[str, Any]:
        """Numbers only."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "shape": list(self.dense.shape),
            "dense_seconds": self.dense_seconds,
            "sparse_seconds": self.sparse_seconds,
            "speedup": self.speedup,
            "psnr": self.psnr,
            "ssim": self.ssim,
        }

    def __str__(self) -> str:
        count, height, width, _ = self.dense.shape
        what = f"{width}x{height}" + (f", {count} frames" if count > 1 else "")
        return (
            f"{self.prompt!r}, {what}, {self.steps} steps, seed {self.seed}\n"
            f"  dense {readable_time(self.dense_seconds)}, windows {readable_time(self.sparse_seconds)}: "
            f"{self.speedup:.2f}x for all of it\n"
            f"  windows against dense: PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.3f}"
        )


def load_pipeline(folder: Path | str, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline in a folder that `save_pretrained` wrote, on a device. Nothing is downloaded.

    Raises:
        InvalidProblem: if the folder holds none, or one without a transformer.
        Unsupported: without diffusers.
    """
    from vicinal.integrations.diffusers import require_diffusers

    require_diffusers()
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        raise InvalidProblem(f"weights must be a folder with a pipeline's model_index.json, got {str(folder)!r}")
    try:
        pipe: Any = DiffusionPipeline.from_pretrained(str(folder), dtype=dtype, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise InvalidProblem(f"weights in {str(folder)!r} cannot be loaded: {error}") from error
    if not transformers_of(pipe):
        raise InvalidProblem(f"weights must hold a diffusion transformer, {type(pipe).__name__} has none")
    return pipe.to(device)


def transformers_of(pipe: Any) -> list[torch.nn.Module]:
    """One, or two where high and low noise have models of their own."""
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in found if isinstance(model, torch.nn.Module)]


def generate(
    pipe: Any,
    window: Mapping[str, Any],
    *,
    prompt: str,
    seed: int = 0,
    steps: int | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Generated:
    """Run a pipeline twice from one seed, dense and with windows.

    Args:
        pipe: of a family that `sparsify` knows.
        window: arguments of `sparsify`.
        prompt: what to show.
        seed: of the noise, which is drawn on the CPU: every device starts from the same.
        steps: denoising steps; by default the pipeline's.
        sizes: `height`, `width`, `num_frames` and the like, arguments of the pipeline.

    Raises:
        InvalidProblem: if the windows do not fit, or the pipeline refuses its arguments.
        Unsupported: if the pipeline's transformer is unknown, or scikit-image, which compares frames, is missing.
    """
    from vicinal.integrations.diffusers import sparsify

    if find_spec("skimage") is None:
        raise Unsupported("PSNR and SSIM need scikit-image; install it, for example as pip install 'vicinal[demo]'")
    models = transformers_of(pipe)
    for model in models:
        sparsify(model, **window).remove()  # whatever is wrong with it is said before anything runs
    count = {} if steps is None else {"num_inference_steps": steps}
    arguments = {"prompt": prompt, **(sizes or {}), **count}
    # First two steps that do not count: kernels are compiled in them.
    _run(pipe, {**arguments, "num_inference_steps": 2}, seed)
    dense, dense_seconds = _run(pipe, arguments, seed)
    with _windows(models, {**window, "dense_steps": 0}):
        _run(pipe, {**arguments, "num_inference_steps": 2}, seed)
    with _windows(models, window) as handles:
        sparse, sparse_seconds = _run(pipe, arguments, seed)
        done = sum(1 + handle.step for handle in handles)  # of two models each takes its share of the steps
    return Generated(prompt, seed, done, dense, sparse, dense_seconds, sparse_seconds)


@contextmanager
def _windows(models: list[torch.nn.Module], window: Mapping[str, Any]) -> Generator[list[Any]]:
    from vicinal.integrations.diffusers import sparsify

    with ExitStack() as stack:
        yield [stack.enter_context(sparsify(model, **window)) for model in models]


def _run(pipe: Any, arguments: Mapping[str, Any], seed: int) -> tuple[Frames, float]:
    generator = torch.Generator("cpu").manual_seed(seed)
    begin = time.perf_counter()
    try:
        output = pipe(**arguments, generator=generator, output_type="np")
    except (InvalidProblem, Unsupported):
        raise
    except (TypeError, ValueError) as error:
        raise InvalidProblem(f"{type(pipe).__name__} refuses its arguments: {error}") from error
    seconds = time.perf_counter() - begin
    frames = output.frames[0] if hasattr(output, "frames") else output.images
    return np.asarray(frames, dtype=np.float32), seconds
