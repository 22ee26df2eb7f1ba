"""The portable backend's cost model beside what an H100 took: its choice is about the best of those that were timed."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

from vicinal.backends.triton.cost import choice_of, cuts
from vicinal.bench.rows import numbers, problem_of
from vicinal.hardware import Hardware
from vicinal.problem import Problem
from vicinal.tuned import Choice, fingerprint

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3" / "portable-choices.csv"
H100 = Hardware.named("h100-sxm")


def timed() -> dict[tuple[str, Problem], dict[Choice, float]]:
    """Milliseconds by pass and problem; of passes that one kernel does together, those of all gradients."""
    found: dict[tuple[str, Problem], dict[Choice, float]] = defaultdict(dict)
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            problem = problem_of(row)
            choice = Choice(numbers(row["rows"]), numbers(row["columns"]), int(row["warps"]), int(row["stages"]))
            found[row["pass"], problem][choice] = float(row["milliseconds"])
    return found


def test_the_first_choice_is_about_the_fastest() -> None:
    over = dict[tuple[str, str], float]()
    for (what, problem), times in timed().items():
        first = choice_of(cuts(what, problem, H100)[0])
        over[what, fingerprint(problem)] = times[first] / min(times.values()) - 1
    assert len(over) == 78
    assert mean(over.values()) < 0.02
    late = {name: share for name, share in over.items() if share > 0.06}
    assert len(late) <= 1, late  # a forward pass of 20 us
