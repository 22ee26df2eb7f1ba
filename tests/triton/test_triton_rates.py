"""The cost model of the portable kernels against what single passes took on one H100."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from statistics import median

import pytest

from vicinal.backends.triton.cost import Cut, cuts
from vicinal.backends.triton.rates import SHAPES
from vicinal.hardware import Hardware
from vicinal.problem import Problem
from vicinal.tuned import fingerprint

FILE = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "portable-passes.csv"
H100 = Hardware.named("h100-sxm")
PATTERN = re.compile(
    r"(?P<shape>\S+) window (?P<kernel_size>\S+) stride (?P<stride>\S+) dilation (?P<dilation>\S+) causal \S+ "
    r"batch (?P<batch>\d+) heads (?P<heads>\d+)/\d+ dims (?P<head_dim>\d+)/\d+ (?P<dtype>\w+)"
)


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def problem_of(words: str) -> Problem:
    found = PATTERN.fullmatch(words)
    assert found is not None
    fields = found.groupdict()
    windows = {name: numbers(fields.pop(name)) for name in ("shape", "kernel_size", "stride", "dilation")}
    others = {name: int(fields.pop(name)) for name in ("batch", "heads", "head_dim")}
    problem = Problem.grid(windows.pop("shape"), **windows, **others, dtype=fields["dtype"])
    assert fingerprint(problem) == words
    return problem


def measured() -> list[tuple[Cut, float]]:
    """What was timed of the shapes that the model states, and how long it took."""
    found: list[tuple[Cut, float]] = []
    with FILE.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            sides = numbers(row["rows"]), numbers(row["columns"])
            way = *map(int, (row["warps"], row["stages"], row["registers"])), row["lifts"] == "True"
            known = cuts(row["pass"], problem_of(row["problem"]), H100, most=10**6)
            alike = (cut for cut in known if (cut.rows, cut.columns) == sides and way_of(cut) == way)
            found += [(cut, float(row["milliseconds"])) for cut in alike]
    return found


def way_of(cut: Cut) -> tuple[object, ...]:
    return cut.shape.warps, cut.shape.stages, cut.shape.registers, cut.shape.lifts


def test_predictions_are_what_was_measured() -> None:
    errors = [abs(cut.time / 1e3 / taken - 1) for cut, taken in measured()]
    assert len(errors) > 70
    assert median(errors) < 0.02 and max(errors) < 0.2


@pytest.mark.parametrize("kind", SHAPES, ids=str)
def test_every_kind_has_shapes(kind: tuple[str, int, int]) -> None:
    assert len(set(SHAPES[kind])) == len(SHAPES[kind]) > 0
