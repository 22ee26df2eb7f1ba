"""Training runs as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vicinal._figure import save

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

COLUMNS = ("epoch", "rate", "loss", "seconds")
"""Of a history, next to what its task measures."""


def draw_curves(runs: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> Path:
    """Loss, and what was measured on what was held out, by epoch: one line per run.

    Args:
        runs: histories by name, all of one task; see `Run.fit`.
        path: ends in .png or .svg.
    """
    measured = [name for name in next(iter(runs.values()))[0] if name not in COLUMNS]

    def draw(figure: Any) -> None:
        figure.set_size_inches(3.6 * (1 + len(measured)), 3.0)
        panels = figure.subplots(1, 1 + len(measured), squeeze=False)[0]
        for panel, name in zip(panels, ["loss", *measured], strict=True):
            for (run, history), colour in zip(runs.items(), COLOURS, strict=False):
                panel.plot([row["epoch"] for row in history], [row[name] for row in history], color=colour, label=run)
            panel.set(
                title=name.replace("_", " ") + (" in training" if name == "loss" else ", held out"), xlabel="epoch"
            )
            if name == "loss":
                panel.set_yscale("log")
        panels[-1].legend()

    return save(path, draw)
