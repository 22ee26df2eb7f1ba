"""Rates of the hopper backend's cost models: what they are fitted to, and the fit.

`rates.py measure forward-rates.csv` times tiles of every kind on the last GPU, while several processes compile kernels
on the first one; `rates.py measure gradient-rates.csv --gradients` does so for single passes of the backward. `rates.py
fit TABLE ...` prints the starts and paces that come nearest to such tables: what a mask adds stays as it is, since few
tilings with costly masks are timed. See docs/decisions/013-rates-of-small-problems.md.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice
from math import prod
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vicinal import backends, tuning
from vicinal._tuples import times
from vicinal.backends import hopper
from vicinal.backends.base import Output
from vicinal.backends.hopper import backward, cost, cost_backward
from vicinal.bench import specs
from vicinal.bench.results import append_rows, today
from vicinal.bench.rows import columns_of, numbers, problem_of
from vicinal.errors import InvalidProblem
from vicinal.hardware import Hardware
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

WINDOWS: dict[str, dict[str, Any]] = {
    "dense": {"shape": (4096,), "kernel_size": -1, "batch": 2},
    "16384 w512": {"shape": (16384,), "kernel_size": 512},
    "blocks": {"shape": (64, 64), "kernel_size": 16, "stride": 16, "batch": 4},
    "64x64 w13": {"shape": (64, 64), "kernel_size": 13, "batch": 4},
    "56x48 w7": {"shape": (56, 48), "kernel_size": 7, "batch": 8},
    "56x56 w7 d4": {"shape": (56, 56), "kernel_size": 7, "dilation": 4, "batch": 4},
    "16x32x40 w8": {"shape": (16, 32, 40), "kernel_size": 8},
    "blocks in 3-D": {"shape": (16, 24, 32), "kernel_size": (4, 8, 8), "stride": (4, 8, 8), "batch": 2},
}
OF_CUT = {"forward": ("q_tile", "kv_tile"), **dict.fromkeys(("keys", "queries"), ("pass", "row_tile", "stack", "box"))}
OF_EACH = 3
"""Tilings that are timed of each kind, the best by the model."""

COLD = 0.012
"""Milliseconds that a kernel takes beside its work where keys and values must come from memory first."""

WEIGHTS = {1.04: 3.0, 1.2: 1.0, math.inf: 0.15}
"""What a timing counts if it is up to so many times the best one of its problem: others never run."""

Way = tuple[tuple[int, ...], int, tuple[int, ...]]
"""Tokens of a tile, the axis that warpgroups are stacked on, and tokens of a box."""

Kind = tuple[Any, ...]
"""A key of `cost.RATES` or `cost_backward.RATES`."""


def kind_of(what: str, problem: Problem, rows: tuple[int, ...], box: tuple[int, ...]) -> Kind:
    kind = problem.head_dim, prod(rows) // 64, prod(box)
    if what != "forward":
        return (what, *kind)
    return kind if prod(box) in (64, 128) else (*kind[:2], 64)  # odd boxes, of 54 to 63 keys


def ways(what: str, problem: Problem) -> Iterator[Way]:
    """The first tilings of each kind."""
    found: dict[Kind, list[Way]] = {}
    if what == "forward":
        for tiling in sorted(cost.candidates(problem), key=lambda tiling: cost._predict(problem, tiling)):
            kind = kind_of(what, problem, tiling.q_tile, tiling.kv_tile)
            found.setdefault(kind, []).append((tiling.q_tile, 0, tiling.kv_tile))
    else:
        for cut in cost_backward.ranked_cuts(what, problem, 10_000):
            way = cost_backward.arguments_of(cut.variant)
            found.setdefault(kind_of(what, problem, way[0], way[2]), []).append(way)
    for each in found.values():
        yield from islice(each, OF_EACH)


def only(what: str, cut: cost_backward.Cut) -> None:
    """From now on in this process the backward is that one pass, cut so."""
    calls = {"keys": KEYS, "queries": QUERIES}
    backward.sums_call = backward.keys_call = backward.queries_call = lambda *_: None
    setattr(backward, f"{what}_call", calls[what])
    backward.ranked_cuts = lambda *_: [cut]

    def start(
        self: Any, inputs: Any, grads: Any, pointers: Any, sums: Any, partials: Any, lengths: int, on: int
    ) -> None:
        query, grad_out, key, value = inputs
        if what == "keys":
            self._keys.start_on((query, grad_out, key, value, *grads[1:]), sums, on)
        else:
            self._queries.start_on((query, grad_out, key, value, grads[0]), (*sums, lengths), on)

    backward.Passes.start = start
    backward.forget()


KEYS, QUERIES = backward.keys_call, backward.queries_call


def call_of(what: str, problem: Problem, way: Way, device: torch.device, inputs: Any) -> Callable[[], object]:
    rows, _, box = way
    if what == "forward":
        return partial(hopper.backend.forward, make_plan(problem, Tiling(rows, box)), inputs)
    cuts = cost_backward.ranked_cuts(what, problem, 10_000)
    only(what, next(cut for cut in cuts if cost_backward.arguments_of(cut.variant) == way))
    lse = torch.zeros(inputs.query.shape[:-1], dtype=torch.float32, device=device)
    output: Output = Output(inputs.query.clone(), lse)
    grad_out: Tensor = torch.randn_like(inputs.query)
    return partial(backward.gradients, problem, inputs, output, grad_out, None)


def compile_way(what: str, problem: Problem, way: Way) -> None:
    torch.set_num_threads(1)
    device = torch.device("cuda:0")
    call_of(what, problem, way, device, tuning._numbers(problem, device))()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # many processes share the device


def measure(table: Path, problems: list[Problem], passes: tuple[str, ...], jobs: int, repeats: int) -> None:
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    torch.cuda.set_device(device)
    todo = [(what, problem, [*ways(what, problem)]) for problem in problems for what in passes]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        compiled = [pool.submit(compile_way, what, problem, way) for what, problem, found in todo for way in found]
        for each in compiled:
            each.result()
    for what, problem, found in todo:
        inputs = tuning._numbers(problem, device)
        taken: dict[Way, list[float]] = {way: [] for way in found}
        for _ in range(repeats):
            for way, milliseconds in taken.items():
                call = call_of(what, problem, way, device, inputs)
                call()
                milliseconds.append(tuning._clock(call, device))
        for (rows, stack, box), milliseconds in taken.items():
            cut = (rows, box) if what == "forward" else (what, rows, stack, box)
            words = [times(n) if isinstance(n, tuple) else n for n in cut]
            row = today(device) | columns_of(problem) | dict(zip(OF_CUT[what], words, strict=True))
            append_rows(table, (*row, "milliseconds"), [row | {"milliseconds": round(median(milliseconds), 5)}])


def predicted(what: str, problem: Problem, way: Way, rate: cost.Rate) -> float:
    rows, stack, box = way
    if what != "forward":
        return cost_backward.predict(what, problem, rate, rows, stack, box)[0] + COLD
    cost.RATES[kind_of(what, problem, rows, box)] = rate
    return cost._predict(problem, Tiling(rows, box)) + COLD - cost.LAUNCH


def fit(tables: list[Path]) -> None:
    import numpy as np
    from scipy.optimize import least_squares

    timed: dict[Kind, list[tuple[str, Problem, Way, float]]] = {}
    best: dict[tuple[str, Problem], float] = {}
    for table in tables:
        for row in csv.DictReader(table.read_text().splitlines()):
            what, problem, ms = row.get("pass", "forward"), problem_of(row), float(row["milliseconds"])
            names = ("q_tile", "kv_tile") if what == "forward" else ("row_tile", "box")
            rows, box = (numbers(row[name]) for name in names)
            timed.setdefault(kind_of(what, problem, rows, box), []).append(
                (what, problem, (rows, int(row.get("stack", 0)), box), ms)
            )
            best[what, problem] = min(ms, best.get((what, problem), math.inf))
    for kind, found in timed.items():
        began = (cost.RATES if len(kind) == 3 else cost_backward.RATES)[kind]

        shares = [ms / best[what, problem] for what, problem, _, ms in found]
        weights = np.array([next(weight for most, weight in WEIGHTS.items() if share <= most) for share in shares])

        def off(values: Any, found: Any = found) -> Any:
            rate = cost.Rate(*map(float, values))
            return np.array([math.log(predicted(what, problem, way, rate) / ms) for what, problem, way, ms in found])

        rate = least_squares(
            lambda values, off=off, weights=weights, began=began: weights * off([*values, *began[2:]]),
            began[:2], bounds=([0.05, 0.05], [20.0, 3.0]), loss="soft_l1", f_scale=0.05,
        ).x  # fmt: skip
        rate = [*rate, *began[2:]]
        spread = math.sqrt(float(np.mean(off(rate)[weights >= 1] ** 2)))
        print(kind, f"{len(found)} timings: Rate({rate[0]:.2f}, {', '.join(f'{n:.3f}' for n in rate[1:])}),", end=" ")
        print(f"{spread:.1%} off")


def is_ours(problem: Problem, hardware: Hardware, gradients: bool) -> bool:
    why_not = hopper.backend.why_not_gradients if gradients else hopper.backend.why_not
    return not why_not(problem, hardware)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure")
    measured.add_argument("table", type=Path)
    measured.add_argument("--gradients", action="store_true", help="of keys and queries, instead of the forward pass")
    measured.add_argument("--windows", nargs="+", default=list(WINDOWS), choices=list(WINDOWS))
    measured.add_argument("--suite", action="append", default=[], help="of `vicinal bench`, besides; may be repeated")
    measured.add_argument("--head-dims", nargs="+", type=int, default=[32, 64, 128, 256])
    measured.add_argument("--jobs", type=int, default=14, help="processes that compile")
    measured.add_argument("--repeats", type=int, default=7)
    fitted = commands.add_parser("fit")
    fitted.add_argument("tables", type=Path, nargs="+")
    asked = parser.parse_args()
    if asked.command == "fit":
        for table in asked.tables:
            if not table.is_file():
                parser.error(f"there is no table '{table}'")
        fit(asked.tables)
        return
    if not torch.cuda.is_available():
        parser.error("this needs an accelerator that PyTorch calls cuda")
    try:
        suites = [specs.suite(name) for name in asked.suite]
    except InvalidProblem as error:
        parser.error(str(error))
    passes = ("keys", "queries") if asked.gradients else ("forward",)
    problems = [
        Problem.grid(**WINDOWS[name], heads=8, head_dim=head_dim, dtype="bfloat16")
        for head_dim in asked.head_dims
        for name in asked.windows
    ]
    problems += [spec.problem for suite in suites for spec in suite]
    hardware = backends.present(torch.device("cuda"))
    problems = [problem for problem in dict.fromkeys(problems) if is_ours(problem, hardware, asked.gradients)]
    measure(asked.table, problems, passes, asked.jobs, asked.repeats)


if __name__ == "__main__":
    main()
