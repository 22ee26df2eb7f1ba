"""The forward's cost model beside what an H100 took."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from statistics import median

from vicinal.backends.hopper.cost import LAUNCH, predicted_ms, ranked_tilings
from vicinal.backends.hopper.cost_backward import arguments_of, ranked_cuts
from vicinal.bench.results import load
from vicinal.bench.rows import numbers, problem_of
from vicinal.bench.specs import suite
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"
PROBLEMS = {spec.name: spec.problem for spec in suite("h100-forward")}


def predicted(problem: Problem, tiling: Tiling) -> float:
    return predicted_ms(make_plan(problem, tiling))


def measured() -> dict[str, float]:
    """Milliseconds of the cases of the newest run that has all of them."""
    runs = sorted(path for path in RESULTS.glob("*.csv") if re.fullmatch(r"\d{4}-\d\d-\d\d", path.stem))
    rows = [row for path in runs for row in load(path) if row.backend == "hopper" and row.pass_ == "forward"]
    return {row.case: row.milliseconds for row in rows if row.milliseconds is not None}


def timed_tilings() -> dict[str, dict[Tiling, Mapping[str, str]]]:
    """By case, the tilings that the last run which took it timed, each with its row of the table.

    In a round every tiling is timed once, in random order; `share_of_round` is the median, over rounds, of a time over
    the mean of its round. Where the card's power limit changes the clock from round to round, that compares better.
    """
    runs: dict[str, dict[int, dict[Tiling, Mapping[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    with (RESULTS / "forward-tiles.csv").open() as table:
        for row in csv.DictReader(table):
            q_tile, kv_tile = (tuple(map(int, row[name].split("x"))) for name in ("q_tile", "kv_tile"))
            runs[row["case"]][int(row["run"])][Tiling(q_tile, kv_tile)] = row
    return {case: by_run[max(by_run)] for case, by_run in runs.items()}


def test_predicted_times_are_those_measured() -> None:
    times = measured()
    firsts = {name: predicted(problem, ranked_tilings(problem)[0]) for name, problem in PROBLEMS.items()}
    assert firsts.keys() <= times.keys()
    off = {case: abs(ms / times[case] - 1) for case, ms in firsts.items()}
    assert median(off.values()) < 0.08, off
    assert sum(share < 0.15 for share in off.values()) >= 24, off


def test_predicted_times_of_all_tilings_are_those_measured() -> None:
    timed = timed_tilings()
    assert timed.keys() == PROBLEMS.keys()
    off = [
        abs(predicted(PROBLEMS[case], tiling) / float(row["milliseconds"]) - 1)
        for case, rows in timed.items()
        for tiling, row in rows.items()
    ]
    assert median(off) < 0.06


UNSTEADY = {"dense 30x48x80"}
"""One tiling of it took times 7% apart within ten seconds: a long kernel at the card's power limit."""


def test_the_first_tiling_is_about_the_fastest() -> None:
    over = {}
    for case, rows in timed_tilings().items():
        times = {tiling: float(row["share_of_round"] or row["milliseconds"]) for tiling, row in rows.items()}
        over[case] = times[ranked_tilings(PROBLEMS[case])[0]] / min(times.values()) - 1
    late = {case: share for case, share in over.items() if share > (0.07 if case in UNSTEADY else 0.05)}
    assert not late, late


COLD = 0.012
"""Milliseconds that a kernel takes beside its work where keys and values must come from memory first."""


def rows_of(table: str) -> list[Mapping[str, str]]:
    with (RESULTS / table).open() as file:
        return list(csv.DictReader(file))


def test_rates_are_those_of_their_table() -> None:
    """Of all tilings that take up to a fifth longer than the best one; others never run."""
    rows = rows_of("forward-rates.csv")
    best: dict[Problem, float] = defaultdict(lambda: float("inf"))
    found = [(problem_of(row), Tiling(*map(numbers, (row["q_tile"], row["kv_tile"])))) for row in rows]
    for (problem, _), row in zip(found, rows, strict=True):
        best[problem] = min(best[problem], float(row["milliseconds"]))
    off, late = defaultdict[object, list[float]](list), dict[str, float]()
    for (problem, tiling), row in zip(found, rows, strict=True):
        ms = float(row["milliseconds"])
        if ms < 1.2 * best[problem]:
            kind = problem.head_dim, prod(tiling.q_tile), prod(tiling.kv_tile)
            off[kind].append(abs((predicted(problem, tiling) + COLD - LAUNCH) / ms - 1))
        if tiling == ranked_tilings(problem)[0]:
            late[f"{problem}, heads of {problem.head_dim}"] = ms / best[problem] - 1
    assert len(best) == 59 and len(late) > 0.8 * len(best)
    assert {kind: median(shares) for kind, shares in off.items() if median(shares) > 0.05} == {}
    assert sum(share > 0.1 for shares in off.values() for share in shares) < 0.1 * sum(map(len, off.values()))
    assert sum(share > 0.05 for share in late.values()) <= 1, late  # heads of 256 with a window of 7x7: 12%


def test_rates_of_gradients_are_those_of_their_table() -> None:
    best: dict[tuple[Problem, str], float] = defaultdict(lambda: float("inf"))
    off, late = defaultdict[object, list[float]](list), dict[str, float]()
    rows = rows_of("gradient-rates.csv")
    for row in rows:
        key = problem_of(row), row["pass"]
        best[key] = min(best[key], float(row["milliseconds"]))
    for row in rows:
        problem, ms = problem_of(row), float(row["milliseconds"])
        ranked = ranked_cuts(row["pass"], problem, 10_000)
        cut = numbers(row["row_tile"]), int(row["stack"]), numbers(row["box"])
        alike = [each for each in ranked if arguments_of(each.variant) == cut]
        kind = row["pass"], problem.head_dim, alike[0].variant.consumers, prod(alike[0].variant.kv_box)
        off[kind].append(abs((alike[0].milliseconds + COLD) / ms - 1))
        if alike[0] == ranked[0]:
            late[f"{problem}, heads of {problem.head_dim}, {row['pass']}"] = ms / best[problem, row["pass"]] - 1
    assert len(late) > 0.7 * len(best)
    assert {kind: median(shares) for kind, shares in off.items() if median(shares) > 0.05} == {}
    assert sum(share > 0.1 for shares in off.values() for share in shares) < 0.15 * sum(map(len, off.values()))
    assert not {name: share for name, share in late.items() if share > 0.05}
