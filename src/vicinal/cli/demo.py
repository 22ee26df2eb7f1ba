"""The demo: a real photograph, known noise, and everything that can be said about removing it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from vicinal.cli import _demo_figure
from vicinal.cli._demo_result import COMPONENTS, CROP, DENSE_CROP, PATCH, REACH, Result, Row
from vicinal.cli._options import tiling_of
from vicinal.denoise import STRENGTH, Features, denoise, estimate_sigma
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.hardware import Hardware
from vicinal.images import check_output
from vicinal.plan import make_plan
from vicinal.plots import draw_plan
from vicinal.problem import Problem
from vicinal.simulate import simulate
from vicinal.tiling import Tiling

if TYPE_CHECKING:
    from numpy.typing import NDArray

PICTURES = {
    "astronaut": (40, 150),
    "chelsea": (70, 130),
    "coffee": (90, 210),
    "camera": (60, 150),
}
"""Pictures inside scikit-image's wheel, and the corner of the crop on which strengths are chosen."""

PREDICT_FOR, PREDICT_TILING = "h100-sxm", Tiling((8, 16), (8, 16))
"""A device that need not be here, and tiles of 128 queries and 128 keys, as its kernels like them."""

Update = Callable[..., None]


class Setting(NamedTuple):
    """Filter strength, in sigmas, and the noise that a method is told; `None` where it has to find out."""

    strength: float | None
    sigma: float | None


Method = Callable[[Any, Setting], Any]


def run(picture: str, sigma: float, seed: int, out: Path, update: Update) -> Result:
    """Do all of it on one thread. `update` is called with steps done, steps in all, and what comes next."""
    threads = torch.get_num_threads()
    # scikit-image's filter has one thread; who compares times gives everyone the same.
    torch.set_num_threads(1)
    try:
        return _run(picture, sigma, seed, out, update)
    finally:
        torch.set_num_threads(threads)


def _run(picture: str, sigma: float, seed: int, out: Path, update: Update) -> Result:
    if not 0 < sigma <= 1e6:
        raise InvalidProblem(f"sigma must be above 0 and at most 1e6, as a fraction of full range, got {sigma}")
    if seed < 0:
        raise InvalidProblem(f"seed must not be negative, got {seed}")
    if out.suffix.lower() != ".png":
        raise InvalidProblem(f"out must end in .png, got {str(out)!r}")
    check_output(out)
    clean = _load(picture)
    axis = -1 if clean.ndim == 3 else None
    noise = np.random.default_rng(seed).standard_normal(clean.shape)
    noisy = (clean + sigma * noise).astype(np.float32)
    result = Result(picture, clean.shape, sigma, estimate_sigma(noisy, channel_axis=axis), psnr(noisy, clean))
    top, left = PICTURES[picture]
    crop = np.s_[top : top + CROP, left : left + CROP]
    methods = _methods(sigma, axis)
    pictures: dict[str, NDArray[np.float32]] = {}
    for step, (name, method, settings) in enumerate(methods):
        update(step, len(methods) + 3, f"looking for the best strength: {name}")
        best = max(settings, key=lambda setting: psnr(method(noisy[crop], setting), clean[crop]))
        update(step + 0.5, len(methods) + 3, f"denoising: {name}")
        pictures[name], seconds = _timed(lambda: method(noisy, best))  # noqa: B023, called before they change
        result.rows.append(Row(name, best.strength, best.sigma, psnr(pictures[name], clean), seconds))
    update(len(methods), len(methods) + 3, "timing dense attention on a crop")
    result.dense_crop_s, result.crop_s = _against_dense(noisy[:DENSE_CROP, :DENSE_CROP], sigma)
    update(len(methods) + 1, len(methods) + 3, "predicting")
    problem = _problem(clean.shape)
    result.estimate = simulate(make_plan(problem, PREDICT_TILING), Hardware.named(PREDICT_FOR))
    update(len(methods) + 2, len(methods) + 3, "drawing")
    theirs, ours = result.rows[0], result.rows[-2]
    figure = _demo_figure.Pictures(
        clean, noisy, pictures[ours.method], pictures[theirs.method], crop, _weights(noisy, sigma, ours, crop)
    )
    # The plan that ran here, which is not the one that the other device would like.
    plan_file = draw_plan(
        make_plan(problem, tiling_of(problem, None, None, "free", None)), out.with_name(f"{out.stem}-plan{out.suffix}")
    )
    result.files = (_demo_figure.draw(figure, result, out), plan_file)
    return result


def psnr(picture: NDArray[Any], clean: NDArray[Any]) -> float:
    """Peak signal-to-noise ratio in dB, of a picture whose full range is 1."""
    return -10 * math.log10(float(np.square(picture.astype(np.float64) - clean).mean()))


def _load(name: str) -> NDArray[np.float32]:
    if name not in PICTURES:
        raise InvalidProblem(f"picture must be one of {', '.join(PICTURES)}, got {name!r}")
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise Unsupported(
            "the demo needs the package scikit-image; install it with: pip install scikit-image"
        ) from None
    return (getattr(data, name)() / 255).astype(np.float32)


def _methods(sigma: float, axis: int | None) -> list[tuple[str, Method, list[Setting]]]:
    """Name, function of picture and setting, and the settings to try."""
    from skimage.restoration import denoise_nl_means

    def theirs(picture: Any, setting: Setting) -> Any:
        h = (setting.strength or 0.0) * sigma
        found = denoise_nl_means(
            picture, PATCH, REACH, h=h, sigma=setting.sigma or 0.0, fast_mode=False, channel_axis=axis
        )
        return found.reshape(picture.shape)

    def ours(components: int | None) -> Method:
        def method(picture: Any, setting: Setting) -> Any:
            h = None if setting.strength is None else setting.strength * sigma
            search: dict[str, Any] = {"patch_size": PATCH, "patch_distance": REACH, "components": components}
            return denoise(picture, sigma=setting.sigma, h=h, channel_axis=axis, **search)

        return method

    # Eight strengths each, around where each method is at its best.
    low, middle, high = ([start + step / 10 for step in range(8)] for start in (0.5, 0.8, 1.2))
    return [
        ("scikit-image, exact", theirs, [Setting(x, sigma) for x in low] + [Setting(x, 0.0) for x in middle]),
        ("vicinal, whole patches", ours(None), [Setting(x, sigma) for x in low]),
        (f"vicinal, {COMPONENTS} principal components", ours(COMPONENTS), [Setting(x, sigma) for x in high]),
        ("vicinal, told nothing", ours(COMPONENTS), [Setting(None, None)]),
    ]


def _problem(shape: tuple[int, ...]) -> Problem:
    """The attention problem of the last method."""
    channels = shape[2] if len(shape) == 3 else 1
    return Problem.grid(
        shape[:2], 2 * REACH + 1, head_dim=COMPONENTS + 1, head_dim_v=channels, dtype="float32", scale=1.0
    )


def _against_dense(crop: NDArray[np.float32], sigma: float) -> tuple[float, float]:
    """Seconds of dense and of neighborhood attention over a crop: same features, attention alone."""
    from torch.nn.functional import pad, scaled_dot_product_attention

    from vicinal.functional import neighborhood_attention

    pixels = torch.from_numpy(crop).reshape(*crop.shape[:2], -1)
    features = Features.of(pixels.movedim(-1, 0).contiguous(), (PATCH, PATCH), COMPONENTS, sigma)
    query = (pad(features.rows(0, crop.shape[0]), (0, 1)) / (STRENGTH * sigma)).contiguous()[None, :, :, None]
    value = pixels[None, :, :, None]  # [1, H, W, 1, C]
    # Its fast kernel wants values as long as queries; zeros beside the pixels cost it less than the slow one.
    wide = pad(value, (0, query.shape[-1] - value.shape[-1]))
    q, v = (tensor.flatten(1, 2).transpose(1, 2).contiguous() for tensor in (query, wide))  # [1, 1, tokens, D]

    _, near = _timed(lambda: neighborhood_attention(query, query, value, kernel_size=2 * REACH + 1, scale=1.0))
    _, far = _timed(lambda: scaled_dot_product_attention(q, q, v, scale=1.0))
    return far, near


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What the call gives, and the seconds of its fastest run: of five, or as many as fit into three seconds.

    The fastest, because whatever else runs on a machine can only add time, and to threads it adds the most.
    """
    seconds: list[float] = []
    while True:
        begin = time.perf_counter()
        found = call()
        seconds.append(time.perf_counter() - begin)
        if len(seconds) == 5 or sum(seconds) > 3:
            return found, min(seconds)


def _weights(noisy: NDArray[np.float32], sigma: float, row: Row, crop: Any) -> NDArray[np.float32]:
    """Attention weights of the pixel in the middle of the crop, over its search window; 1 at most."""
    pixels = torch.from_numpy(noisy).reshape(*noisy.shape[:2], -1).movedim(-1, 0).contiguous()
    features = Features.of(pixels, (PATCH, PATCH), COMPONENTS, sigma)
    y, x = ((part.start + part.stop) // 2 for part in crop)
    rows = features.rows(y - REACH, y + REACH + 1)[:, x - REACH : x + REACH + 1]
    distance = (rows - rows[REACH, REACH]).square().sum(dim=-1) / ((row.strength or STRENGTH) * sigma) ** 2
    weights = torch.exp(-distance)
    weights[REACH, REACH] = math.exp(-2 / (row.strength or STRENGTH) ** 2)
    return weights.numpy()
