"""The figure of the recorded training runs: `training.py FOLDER FIGURE.png`, from the runs' CSV files."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from vicinal._figure import save
from vicinal.train.curves import COLOURS

PANELS = (
    ("digits", "accuracy", "MNIST: test error, %", lambda value: 100 * (1 - value)),
    ("brain", "dice_grey", "grey matter: Dice on held-out slabs", float),
    ("brain", "dice_white", "white matter: Dice on held-out slabs", float),
    ("video", "psnr", "video: PSNR of held-out frames, dB", float),
)
MODELS = ("dinat", "convolutions", "dense")


def history(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def main(folder: str, figure: str) -> None:
    def draw(canvas: Any) -> None:
        canvas.set_size_inches(13, 3.1)
        for axes, (task, column, title, value) in zip(canvas.subplots(1, len(PANELS)), PANELS, strict=True):
            for model, colour in zip(MODELS, COLOURS, strict=False):
                path = Path(folder) / f"{task}-{model}.csv"
                if path.is_file():
                    rows = history(path)
                    axes.plot(
                        [row["epoch"] for row in rows], [value(row[column]) for row in rows], color=colour, label=model
                    )
            axes.set(title=title, xlabel="epoch")
            if task == "digits":
                axes.set_yscale("log")
            axes.legend()

    print("wrote", save(figure, draw))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="of the runs' CSV files")
    parser.add_argument("figure", help="PNG or SVG to write")
    asked = parser.parse_args()
    if not Path(asked.folder).is_dir():
        parser.error(f"there is no folder {asked.folder!r}")
    main(asked.folder, asked.figure)
