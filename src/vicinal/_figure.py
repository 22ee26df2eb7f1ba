"""The frame of every figure, and its file, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vicinal._files import write_whole
from vicinal.errors import InvalidProblem, Unsupported

FRAME = "#D55E00"

STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#7F7F7F",
    "legend.frameon": False,
    "svg.hashsalt": "vicinal",
}


def title(figure: Any, *lines: str) -> None:
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left")


def legend(figure: Any, entries: Mapping[str, Any]) -> None:
    """Below the panels: a patch per colour, a marker per (colour, marker), an empty frame per None."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for look in entries.values():
        if look is None:
            handles.append(Patch(fill=False, edgecolor=FRAME, linewidth=2))
        elif isinstance(look, str):
            handles.append(Patch(color=look))
        else:
            handles.append(
                Line2D([], [], color=look[0], marker=look[1], linestyle="", markersize=8, markeredgewidth=1.6)
            )
    figure.legend(handles, list(entries), loc="outside lower center", ncols=min(len(entries), 6))


def lanes(panel: Any, names: Sequence[str]) -> None:
    """One row for each name, the first on top, with a faint line for its marks to lie about."""
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.grid(axis="x", which="major", color="#DDDDDD", linewidth=0.8)
    panel.hlines(range(len(names)), 0, 1, transform=panel.get_yaxis_transform(), color="#EEEEEE", zorder=0)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)


def check(path: str | Path) -> Path:
    """Refuse a path to which no figure can be written, before anything expensive is computed.

    Raises:
        InvalidProblem: if it has another suffix than .png or .svg, is a folder, or its folder is missing.
        Unsupported: without matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".svg"):
        raise InvalidProblem(f"path must end in .png or .svg, got {path}")
    if path.is_dir():
        raise InvalidProblem(f"path must be a file, got the folder {path}")
    if not path.parent.is_dir():
        raise InvalidProblem(f"path must lie in a folder that exists, got {path}")
    try:
        __import__("matplotlib")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise Unsupported("figures need matplotlib; install it, for example as pip install 'vicinal[plots]'") from None
    return path


def save(path: str | Path, draw: Callable[[Any], None]) -> Path:
    """Draw and write, whole or not at all."""
    path = check(path)
    import matplotlib
    from matplotlib.figure import Figure

    kind = path.suffix.lower().removeprefix(".")
    # matplotlib's types have gaps.
    context: Any = getattr(matplotlib, "rc_context")  # noqa: B009
    with context(STYLE):
        # A Figure of its own, not pyplot's: no window, no display and no state shared with the caller.
        figure: Any = Figure(layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08)
        draw(figure)
        # Without a date, equal figures are equal files.
        date = {"Date": None} if kind == "svg" else None
        write_whole(path, lambda file: figure.savefig(file, format=kind, dpi=160, metadata=date))
    return path
