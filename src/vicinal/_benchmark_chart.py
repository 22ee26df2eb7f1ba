"""A benchmark's table as a chart."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from vicinal._figure import lanes, legend, title
from vicinal.errors import InvalidProblem

SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
SPREAD = 0.6
"""Of a case's height, what its dots share."""

MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")

KNOWN = ("hopper", "triton", "dense", "flex-tiled", "flex", "fused", "blocked", "natten")
"""Who looks alike in every chart: a colour and a marker each. Others take what is left."""


def looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of everybody in a chart."""
    left = [i for i in range(len(SERIES)) if KNOWN[i] not in names]
    places = {name: KNOWN.index(name) for name in names if name in KNOWN}
    for i, name in enumerate(name for name in names if name not in KNOWN):
        places[name] = left[i % len(left)] if left else i % len(SERIES)
    return {name: (SERIES[places[name]], MARKERS[places[name]]) for name in names}


def read(table: Path) -> list[dict[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidProblem(f"table {table} cannot be read as CSV: {error}") from None
    needed = ("case", "backend", "pass", "milliseconds")
    missing = [name for name in needed if not rows or name not in rows[0]]
    if missing:
        raise InvalidProblem(f"table {table} must have rows with the columns {', '.join(needed)}; missing: {missing}")
    # Of repeated measurements the last counts.
    latest = {(row.get("device"), row["case"], row["backend"], row["pass"]): row for row in rows}
    if not any(_positive(row["milliseconds"]) for row in latest.values()):
        raise InvalidProblem(f"table {table} must hold at least one time, got {len(rows)} rows without milliseconds")
    return list(latest.values())


def _positive(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 < number < math.inf else None


def _plain(value: float, _: int) -> str:
    return f"{value:g}"


def draw_times(figure: Any, rows: list[dict[str, str]]) -> None:
    devices, passes, backends = (
        list(dict.fromkeys(row.get(k) or "" for row in rows)) for k in ("device", "pass", "backend")
    )
    look = looks(backends)
    labels = [row["case"] if len(devices) == 1 else f"{row['case']} ({row.get('device')})" for row in rows]
    cases = list(dict.fromkeys(labels))
    row, names = 0.42 if len(cases) <= 10 else 0.27, 0.065 * max(map(len, cases))
    figure.set_size_inches(1.0 + names + 3.6 * len(passes), 1.6 + row * len(cases))
    panels = figure.subplots(1, len(passes), squeeze=False, sharex=True, sharey=True)[0]
    lost: list[str] = []
    for row, label in zip(rows, labels, strict=True):
        place = backends.index(row["backend"])
        # One below the other: equal times would hide each other.
        y = cases.index(label) + SPREAD * ((place + 0.5) / len(backends) - 0.5)
        panel, (color, marker) = panels[passes.index(row["pass"])], look[row["backend"]]
        time, predicted = _positive(row["milliseconds"]), _positive(row.get("predicted_milliseconds"))
        if time is None:
            lost.append(f"{row['backend']} on {label}, {row['pass']}")
            continue
        panel.plot(time, y, marker, color=color, markersize=7, markeredgecolor="white", zorder=3)
        if predicted is not None:
            panel.plot(predicted, y, "|", color=color, markersize=13, markeredgewidth=1.6, zorder=2)
    for panel, name in zip(panels, passes, strict=True):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(_plain)
        panel.xaxis.set_minor_formatter("")
        panel.set_title(name)
        panel.set_xlabel("milliseconds")
        lanes(panel, cases)
    title(
        figure, ", ".join(devices) if any(devices) else "benchmark", *(f"no time: {'; '.join(lost)}" for _ in lost[:1])
    )
    entries = dict(look)
    if any(_positive(row.get("predicted_milliseconds")) for row in rows):
        entries["predicted"] = ("#555555", "|")
    legend(figure, entries)
