"""The figure of vision.py's table: `vision_rows.py TABLE.csv FIGURE.png`, images a second of everybody in each mode."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from vicinal._benchmark_chart import MARKERS, SERIES
from vicinal._figure import lanes, legend, save, title

MODES = {"eager": "eager", "graph": "CUDA graph", "compiled": "compiled", "compiled-graph": "compiled, CUDA graph"}
NAMES = {
    "dinat": "DiNAT",
    "dinat-unbiased": "DiNAT, no position bias",
    "dinat-flex": "DiNAT by FlexAttention",
    "swin": "Swin",
    "convnext": "ConvNeXt",
}


def main(table: str, figure: str) -> None:
    with Path(table).open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    devices = list(dict.fromkeys(row["device"] for row in rows))
    looks = dict(zip(MODES, zip(SERIES, MARKERS, strict=True), strict=False))

    def draw(canvas: Any) -> None:
        columns = min(len(cases), 3)
        lines = -(-len(cases) // columns)
        canvas.set_size_inches(1.4 + 3.4 * columns, 1.0 + 1.7 * lines)
        panels = canvas.subplots(lines, columns, squeeze=False).flatten()
        for panel in panels[len(cases) :]:
            panel.remove()
        for case, panel in zip(cases, panels, strict=False):
            here = [row for row in rows if row["case"] == case]
            names = [name for name in NAMES if any(row["contender"] == name for row in here)]
            for row in here:
                color, marker = looks[row["mode"]]
                place = names.index(row["contender"]) + 0.15 * (list(MODES).index(row["mode"]) - 1.5)
                panel.plot(
                    float(row["images_per_s"]), place, marker, color=color, markersize=7, markeredgecolor="white"
                )
            size, pixels, what = case.split()
            panel.set(title=f"{what}, {size}, {pixels} pixels", xlim=(0, None), xlabel="images/s")
            lanes(panel, [NAMES[name] for name in names])
        title(canvas, ", ".join(devices))
        used = {row["mode"] for row in rows}
        legend(canvas, {MODES[mode]: look for mode, look in looks.items() if mode in used})

    print("wrote", save(figure, draw))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="the CSV that vision.py wrote")
    parser.add_argument("figure", help="PNG or SVG to write")
    asked = parser.parse_args()
    if not Path(asked.table).is_file():
        parser.error(f"there is no table {asked.table!r}")
    main(asked.table, asked.figure)
