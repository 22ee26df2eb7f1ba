"""What was measured of a whole model: printed, and as rows of a table that reads back."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicinal._tuples import times
from vicinal.bench.parts import GRID, PARTS
from vicinal.bench.results import append_rows
from vicinal.errors import InvalidProblem
from vicinal.simulate import end_to_end, readable_time


def _column(part: str) -> str:
    return part.replace(" ", "_") + "_s"


COLUMNS = (
    *("date", "device", "driver", "versions"),
    *("model", "grid", "text", "window", "dtype", "layers", "layers_in_all"),
    *("way", "seconds", "spread", *map(_column, PARTS), "peak_bytes"),
    *("speedup", "predicted_speedup", "simulated_attention_speedup"),
)
"""Of the table that `save` writes, a row per way."""


@dataclass(frozen=True)
class Pass:
    """One way to run the model.

    Args:
        name: of the way.
        seconds: median of a step; `None` if it ran out of memory.
        spread: the range of the times, as a share of the median.
        parts: seconds of each part of the pass that is the median; empty if they could not be told apart.
        peak_bytes: of memory, weights included; 0 where it is not counted.
    """

    name: str
    seconds: float | None
    spread: float
    parts: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True)
class EndToEnd:
    """What `measure` found. Prints itself.

    Args:
        model, grid, text, window, dtype, where: what ran.
        layers, layers_in_all: built, and of the published model; times are scaled by their ratio.
        dense, sparse: the two ways.
        attention: speed-up of attention that the simulator expects, over all layers; `None` for a decoder,
            whose model knows no dense attention.
        dense_steps, steps: of a whole run.
    """

    model: str
    grid: tuple[int, ...]
    text: int
    window: str
    dtype: str
    where: Mapping[str, str]
    layers: int
    layers_in_all: int
    dense: Pass
    sparse: Pass
    attention: float | None
    dense_steps: int
    steps: int

    @property
    def speedup(self) -> float | None:
        """Of one step."""
        if self.dense.seconds is None or self.sparse.seconds is None:
            return None
        return self.dense.seconds / self.sparse.seconds

    @property
    def share(self) -> float | None:
        """What part of the dense step attention over the grid takes."""
        if self.dense.seconds is None or not self.dense.parts:
            return None
        return self.dense.parts[GRID] / self.dense.seconds

    @property
    def predicted(self) -> float | None:
        """The same by Amdahl's law, from dense attention's measured share and the simulator's speed-up of it."""
        if self.attention is None or self.share is None:
            return None
        return end_to_end(self.share, self.attention)

    @property
    def of_a_run(self) -> float | None:
        """Speed-up of all steps, dense ones among them."""
        if self.speedup is None:
            return None
        return self.steps / (self.dense_steps + (self.steps - self.dense_steps) / self.speedup)

    def __str__(self) -> str:
        text = f" + {self.text} of text" if self.text else ""
        built = "" if self.layers == self.layers_in_all else f" (built {self.layers}; times are scaled up from them)"
        lines = [
            f"{self.model}, {times(self.grid)} tokens{text}, {self.layers_in_all} layers{built}, {self.dtype}, "
            f"{self.where['device']}",
            self.window,
            "  " + f"{'':<10}" + "".join(f"{name:>25}" for name in ("step", *PARTS, "peak memory")),
        ]
        lines += [_row(way) for way in (self.dense, self.sparse)]
        if self.speedup is not None:
            lines.append(f"  speed-up of a step: {self.speedup:.2f}x")
            if self.dense.parts and self.sparse.parts:
                gain = self.dense.parts[GRID] / max(self.sparse.parts[GRID], 1e-12)
                lines[-1] += f" (of attention over the grid: {gain:.2f}x)"
        if self.predicted is not None:
            lines.append(
                f"  predicted:          {self.predicted:.2f}x (the simulator's {self.attention:.2f}x for attention, "
                f"{self.share:.0%} of the dense step)"
            )
        if self.of_a_run is not None and self.dense_steps:
            lines.append(f"  {self.steps} steps, {self.dense_steps} of them dense: {self.of_a_run:.2f}x")
        lines.append("Weights are random: times do not depend on them, and nothing is said about quality.")
        return "\n".join(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One per way, for a CSV."""
        common = {
            **self.where,
            "model": self.model,
            "grid": times(self.grid),
            "text": self.text,
            "window": self.window,
            "dtype": self.dtype,
            "layers": self.layers,
            "layers_in_all": self.layers_in_all,
        }
        return [
            {
                **common,
                "way": way.name,
                "seconds": way.seconds,
                "spread": way.spread,
                **{_column(part): way.parts.get(part) for part in PARTS},
                "peak_bytes": way.peak_bytes,
                "speedup": None if way is self.dense else self.speedup,
                "predicted_speedup": None if way is self.dense else self.predicted,
                "simulated_attention_speedup": None if way is self.dense else self.attention,
            }
            for way in (self.dense, self.sparse)
        ]


def save(path: Path | str, results: list[EndToEnd]) -> None:
    """Append to a table, or begin one; whole or not at all."""
    append_rows(path, COLUMNS, (rounded(row) for result in results for row in result.rows()))


def rounded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with five digits of each number."""
    return {key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()}


def load(path: Path | str) -> list[EndToEnd]:
    """The results of a table that `save` wrote, without the steps of a run, which it does not hold.

    Raises:
        InvalidProblem: if it is no such table.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        results = [_result(dense, sparse) for dense, sparse in zip(rows[::2], rows[1::2], strict=True)]
    except KeyError as problem:
        raise InvalidProblem(f"{path} cannot be read as a table of whole models: it has no column {problem}") from None
    except (OSError, UnicodeDecodeError, csv.Error, ValueError, TypeError) as problem:
        raise InvalidProblem(f"{path} cannot be read as a table of whole models: {problem}") from None
    if not results:
        raise InvalidProblem(f"{path} cannot be read as a table of whole models: it has no rows")
    return results


def _result(dense: Mapping[str, str], sparse: Mapping[str, str]) -> EndToEnd:
    expected = sparse["simulated_attention_speedup"]
    return EndToEnd(
        model=dense["model"],
        grid=tuple(int(length) for length in dense["grid"].split("x")),
        text=int(dense["text"]),
        window=dense["window"],
        dtype=dense["dtype"],
        where={name: dense[name] for name in ("date", "device", "driver", "versions")},
        layers=int(dense["layers"]),
        layers_in_all=int(dense["layers_in_all"]),
        dense=_way(dense),
        sparse=_way(sparse),
        attention=float(expected) if expected else None,
        dense_steps=0,
        steps=1,
    )


def _way(row: Mapping[str, str]) -> Pass:
    parts = {part: row[_column(part)] for part in PARTS}
    return Pass(
        name=row["way"],
        seconds=float(row["seconds"]) if row["seconds"] else None,
        spread=float(row["spread"]),
        parts={part: float(seconds) for part, seconds in parts.items()} if all(parts.values()) else {},
        peak_bytes=int(row["peak_bytes"]),
    )


def _row(way: Pass) -> str:
    if way.seconds is None:
        return f"  {way.name:<10}{'out of memory':>25}"
    memory = f"{way.peak_bytes / 2**30:.1f} GiB" if way.peak_bytes else ""
    cells = [readable_time(way.seconds) + f" ± {way.spread / 2:.0%}"]
    cells += [
        f"{readable_time(way.parts[part])} ({way.parts[part] / way.seconds:.0%})" if way.parts else "" for part in PARTS
    ]
    return f"  {way.name:<10}" + "".join(f"{cell:>25}" for cell in (*cells, memory))
