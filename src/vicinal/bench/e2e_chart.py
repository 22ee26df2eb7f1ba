"""Where the time of a step goes, as a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vicinal._benchmark_chart import SERIES
from vicinal._figure import legend, save, title
from vicinal._tuples import times
from vicinal.bench.e2e_result import EndToEnd, Pass
from vicinal.bench.parts import PARTS


def draw(results: list[EndToEnd], path: Path | str) -> Path:
    """Write the chart: a bar per way, cut into parts.

    Raises:
        InvalidProblem: if the path is none of a picture.
        Unsupported: without matplotlib.
    """
    return save(path, lambda figure: _draw(figure, results))


def _name(result: EndToEnd, way: Pass) -> str:
    """`dense`, `windows 18x24x24 s16x8x8`: one model may have been timed with several."""
    if way is result.dense or way.name != "windows":
        return way.name
    return f"windows {result.window.replace('kernel size ', '').replace(', stride ', ' s')}"


def _draw(figure: Any, results: list[EndToEnd]) -> None:
    figure.set_size_inches(9, 1.4 + 0.9 * len(results))
    axes = figure.subplots()
    labels: list[str] = []
    places: list[float] = []
    for index, result in enumerate(results):
        for below, way in enumerate((result.dense, result.sparse)):
            y, left = 2.5 * index + below, 0.0
            places.append(y)
            labels.append(f"{result.model} {times(result.grid)}, {_name(result, way)}")
            for part, color in zip(PARTS, SERIES, strict=False):
                width = way.parts.get(part, 0.0)
                axes.barh(y, width, left=left, color=color)
                left += width
            if way.seconds is not None and not way.parts:
                axes.barh(y, way.seconds, color="#7F7F7F", alpha=0.5)  # its parts could not be told apart
                left = way.seconds
            note = " out of memory" if way.seconds is None else f" {way.seconds:.3g} s"
            if way is result.sparse and result.speedup is not None:
                note += f", {result.speedup:.2f}x"
                note += "" if result.predicted is None else f" ({result.predicted:.2f}x predicted)"
            axes.text(left, y, note, va="center", fontsize=8)
    axes.set_yticks(places, labels)
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step")
    axes.margins(x=0.25)
    title(figure, "Where the time of a step goes", f"random weights, {results[0].where['device']}")
    legend(figure, dict(zip(PARTS, SERIES, strict=False)))
