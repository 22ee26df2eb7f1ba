"""What `quality.py` found: its rows, read and written, and their figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor, nn

from vicinal._benchmark_chart import SERIES
from vicinal._figure import save, title
from vicinal._files import write_whole
from vicinal.integrations.diffusers import sparsify

SIDE, PATCH = 32, 2
GRID = (SIDE // PATCH, SIDE // PATCH)


@dataclass(frozen=True)
class Case:
    """One way to draw: a window, and what was done about it.

    Args:
        kernel_size, stride: per axis, in tokens; the grid's length and 1 for dense attention.
        dense_steps: first steps that stay dense.
        is_tuned: whether the model was fine-tuned with these windows.
    """

    kernel_size: int
    stride: int = 1
    dense_steps: int = 0
    is_tuned: bool = False

    @property
    def sparsity(self) -> float:
        """Share of the scores that a sparse step leaves out."""
        return 1 - self.kernel_size**2 / (GRID[0] * GRID[1])

    def on(self, model: nn.Module) -> Any:
        if self.kernel_size == GRID[0]:
            return nullcontext()
        return sparsify(model, self.kernel_size, stride=self.stride, dense_steps=self.dense_steps)


@dataclass(frozen=True)
class Row(Case):
    """A case and what was found. Distances are lower, accuracies and PSNR higher for better digits."""

    frechet: float = 0.0
    accuracy: float = 0.0
    psnr: float = float("nan")


def write_rows(path: Path, rows: list[Row], **common: Any) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*common, *(field.name for field in fields(Row))], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        values = {**common, **asdict(row)}
        writer.writerow({name: f"{value:.5g}" if isinstance(value, float) else value for name, value in values.items()})
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def read_rows(path: Path) -> tuple[list[Row], dict[str, str]]:
    """The rows, and what is common to all."""
    with path.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    kinds = {"int": int, "float": float, "bool": lambda text: text == "True"}
    own = {field.name: kinds[str(field.type)] for field in fields(Row)}
    return [Row(**{name: kind(line[name]) for name, kind in own.items()}) for line in found], found[0]


def write_sheet(path: Path, pictures: list[Tensor]) -> None:
    """One row of digits per case, in the order of the table."""
    sheet = torch.cat([torch.cat(list(row), dim=1) for row in pictures])
    Image.fromarray(((sheet + 1) * 127.5).byte().numpy()).save(path)


def draw(
    table: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="quality.csv; quality-digits.png lies beside it.")
    ],
    picture: Annotated[Path, typer.Argument(help="PNG or SVG to write.")],
) -> None:
    """The figure of a run that was made before."""
    rows, common = read_rows(table)
    sheet = Image.open(table.with_name("quality-digits.png"))
    save(picture, lambda figure: _draw(figure, rows, common, sheet))


WAYS = {
    "swapped in": lambda row: not row.is_tuned and not row.dense_steps and row.stride == 1,
    "first 6 of 20 steps dense": lambda row: bool(row.dense_steps),
    "fine-tuned for 150 steps": lambda row: row.is_tuned and row.stride == 1,
    "blocked, swapped in": lambda row: not row.is_tuned and row.stride == row.kernel_size,
    "blocked, fine-tuned": lambda row: row.is_tuned and row.stride == row.kernel_size,
}


def _draw(figure: Any, rows: list[Row], common: Mapping[str, str], sheet: Image.Image) -> None:
    figure.set_size_inches(12, 4.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    colors = (*SERIES[:3], SERIES[0], SERIES[2])
    for (name, belongs), color in zip(WAYS.items(), colors, strict=True):
        chosen = [row for row in rows if belongs(row) and row.sparsity]
        look = {"color": color, "marker": "o", "label": name}
        if name.startswith("blocked"):
            look |= {"marker": "s", "linestyle": "", "fillstyle": "none", "markersize": 8}
        for axes, value in ((left, "frechet"), (middle, "accuracy")):
            axes.plot([row.sparsity for row in chosen], [getattr(row, value) for row in chosen], **look)
    dense = rows[0]
    left.axhline(dense.frechet, color="black", linestyle="--", linewidth=1, label="dense")
    middle.axhline(dense.accuracy, color="black", linestyle="--", linewidth=1)
    floor = float(common["frechet_of_training_digits"])
    left.axhline(floor, color="grey", linestyle=":", linewidth=1, label="real training digits")
    left.set(yscale="log", title="Fréchet distance to real test digits (lower is better)")
    middle.set(ylim=(0, 1), title="read as the digit that was asked for")
    for axes in (left, middle):
        axes.set_xlabel("share of scores left out")
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        windows = sorted({(row.sparsity, row.kernel_size) for row in rows if row.sparsity})
        for sparsity, size in windows:
            if size != 3:
                axes.text(sparsity, 0.01, f"{size}", transform=axes.get_xaxis_transform(), ha="center", fontsize=7)
    middle.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _draw_digits(right, rows, sheet)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    title(
        figure,
        "Windows in a diffusion transformer of 16x16 tokens, trained dense on MNIST "
        f"for {common['steps']} steps; windows' sizes stand above the axes",
    )


def _draw_digits(axes: Any, rows: list[Row], sheet: Image.Image) -> None:
    shown = {
        "dense": Case(16),
        "8x8": Case(8),
        "8x8, 6 dense steps": Case(8, dense_steps=6),
        "8x8, fine-tuned": Case(8, is_tuned=True),
        "8x8 blocked": Case(8, 8),
        "4x4": Case(4),
        "4x4, 6 dense steps": Case(4, dense_steps=6),
        "4x4, fine-tuned": Case(4, is_tuned=True),
    }
    names = [field.name for field in fields(Case)]
    order = [tuple(getattr(row, name) for name in names) for row in rows]
    strips = []
    for case in shown.values():
        top = order.index(tuple(getattr(case, name) for name in names)) * SIDE
        strips.append(sheet.crop((0, top, sheet.width, top + SIDE)))
    image = Image.new("L", (sheet.width, SIDE * len(strips)))
    for index, strip in enumerate(strips):
        image.paste(strip, (0, SIDE * index))
    axes.imshow(image, cmap="gray_r")
    axes.set_yticks([SIDE * (index + 0.5) for index in range(len(strips))], list(shown))
    axes.set_xticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
