"""The demo's picture: what was there, what came, what we made of it, and where one pixel looked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vicinal._files import write_whole
from vicinal._tuples import times
from vicinal.cli._demo_result import Result
from vicinal.errors import Unsupported

if TYPE_CHECKING:
    from numpy.typing import NDArray

INK, SOFT, ACCENT = "#1b1f24", "#667079", "#D55E00"


@dataclass(frozen=True)
class Pictures:
    """What the figure shows: `[H, W]` or `[H, W, C]` in [0, 1]; `crop` is enlarged, `weights` belong to its middle."""

    clean: NDArray[np.float32]
    noisy: NDArray[np.float32]
    ours: NDArray[np.float32]
    theirs: NDArray[np.float32]
    crop: Any
    weights: NDArray[np.float32]


def draw(pictures: Pictures, result: Result, path: Path) -> Path:
    """Write the figure, whole or not at all."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError:
        raise Unsupported("figures need matplotlib; install it, for example as pip install 'vicinal[plots]'") from None
    theirs, ours = result.rows[0], result.rows[-2]
    removed = pictures.noisy - pictures.ours
    columns = (
        ("noisy", f"{result.noisy_psnr:.2f} dB", pictures.noisy),
        ("neighborhood attention", f"{ours.psnr:.2f} dB in {ours.seconds:.2f} s", pictures.ours),
        ("difference: what was taken away", "gray is nothing", 0.5 + removed / (8 * result.sigma)),
        ("scikit-image, exact", f"{theirs.psnr:.2f} dB in {theirs.seconds:.2f} s", pictures.theirs),
        ("original", "never seen by either", pictures.clean),
    )
    height, width = pictures.clean.shape[:2]
    side = 3.1
    with rc_context({"font.size": 10, "font.family": "sans-serif"}):
        layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.05, wspace=0.01, hspace=0.02)
        figure = Figure(figsize=(side * len(columns) + 0.4, side * height / width + side + 1.2), layout=layout)
        panels = figure.subplots(2, len(columns), height_ratios=[height / width, 1])
        for column, (name, note, picture) in enumerate(columns):
            _picture(panels[0, column], picture)
            panels[0, column].set_title(f"{name}\n", color=INK, fontsize=11, fontweight="bold")
            panels[0, column].text(
                0.5, 1.02, note, transform=panels[0, column].transAxes, ha="center", va="bottom", color=SOFT
            )
            _frame(panels[0, column], pictures.crop, "white" if column != 2 else INK)
            _picture(panels[1, column], picture[pictures.crop])
        _window(panels[1, 0], pictures)
        _attention(panels[1, 1], pictures)
        figure.suptitle(_headline(result), x=0.008, ha="left", fontsize=12, color=INK)
        figure.supxlabel(_footnote(result), x=0.008, ha="left", fontsize=9, color=SOFT)
        write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110, facecolor="white"))
    return path


def _picture(panel: Any, picture: NDArray[Any]) -> None:
    panel.imshow(np.clip(picture, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="none")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def _frame(panel: Any, crop: Any, colour: str) -> None:
    from matplotlib.patches import Rectangle

    rows, columns = crop
    size = columns.stop - columns.start, rows.stop - rows.start
    panel.add_patch(
        Rectangle((columns.start - 0.5, rows.start - 0.5), *size, fill=False, edgecolor=colour, linewidth=1.4)
    )


def _window(panel: Any, pictures: Pictures) -> None:
    """The search window around the crop's middle."""
    from matplotlib.patches import Rectangle

    rows, columns = pictures.crop
    y, x = (rows.stop - rows.start) // 2, (columns.stop - columns.start) // 2
    reach = pictures.weights.shape[0] // 2
    side = 2 * reach + 1
    panel.add_patch(
        Rectangle((x - reach - 0.5, y - reach - 0.5), side, side, fill=False, edgecolor=ACCENT, linewidth=1.8)
    )
    _label(panel, 0.03, f"one query's window: {side}x{side} keys")


def _attention(panel: Any, pictures: Pictures) -> None:
    """An inset with the weights that the query gives to the pixels of its window."""
    inset = panel.inset_axes((0.03, 0.03, 0.36, 0.36))
    inset.imshow(pictures.weights, cmap="magma", vmin=0, interpolation="none")
    inset.set_xticks([])
    inset.set_yticks([])
    for spine in inset.spines.values():
        spine.set_color(ACCENT)
        spine.set_linewidth(1.8)
    _label(panel, 0.41, "its attention weights")


def _label(panel: Any, height: float, text: str) -> None:
    """Words on the left of a panel, at a height from 0 to 1."""
    box = {"facecolor": ACCENT, "edgecolor": "none", "boxstyle": "round,pad=0.25"}
    panel.text(0.03, height, text, transform=panel.transAxes, color="white", fontsize=9, va="bottom", bbox=box)


def _headline(result: Result) -> str:
    theirs, ours = result.rows[0], result.rows[-2]
    return (
        f"Non-local means as neighborhood attention: {ours.psnr - theirs.psnr:+.2f} dB over scikit-image's exact "
        f"filter, {theirs.seconds / ours.seconds:.0f}x as fast, each at its best strength"
    )


def _footnote(result: Result) -> str:
    size = times(result.shape[:2])
    return (
        f"{result.picture} ({size}) with Gaussian noise of {result.sigma:g} of full range; the framed part is enlarged "
        f"below. Same patches and search windows, one pass, one thread. "
        f"Dense attention over all pixels would take about {result.dense_s:,.0f} s here (extrapolated from a crop)."
    )
