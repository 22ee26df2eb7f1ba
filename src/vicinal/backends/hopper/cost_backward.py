"""How the passes of the backward are cut: the tiles with the least predicted time, as in `cost`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from vicinal._tuples import ceil_div
from vicinal.backends.hopper.cost import MULTIPROCESSORS, Rate, boxes, q_tiles
from vicinal.backends.hopper.variant import Variant, code_width, mask_for, variant_for
from vicinal.plan import AxisPlan
from vicinal.problem import Axis, Problem

RATES: dict[tuple[str, int, int, int], Rate] = {
    # (kernel, head_dim, warpgroups, columns of a box): fitted to 62 timings, bf16, sustained clocks.
    ("keys", 32, 1, 64): Rate(1.0, 0.25, 0.02, 0.15),
    ("keys", 64, 1, 32): Rate(1.6, 0.272, 0.0, 0.12),
    ("keys", 64, 1, 64): Rate(1.6, 0.489, 0.042, 0.25),
    ("keys", 64, 2, 64): Rate(4.5, 0.555, 0.0, 0.25),
    ("keys", 128, 1, 64): Rate(1.0, 0.89, 0.02, 0.60),
    ("keys", 128, 2, 64): Rate(2.2, 0.821, 0.0, 0.46),
    ("queries", 32, 1, 64): Rate(1.0, 0.19, 0.02, 0.15),
    ("queries", 64, 1, 64): Rate(1.1, 0.335, 0.008, 0.20),
    ("queries", 64, 2, 128): Rate(3.8, 0.66, 0.009, 0.30),
    ("queries", 128, 1, 64): Rate(1.0, 0.63, 0.003, 0.30),
    ("queries", 128, 2, 64): Rate(0.5, 0.565, 0.0, 0.31),
    ("queries", 128, 2, 128): Rate(0.5, 1.112, 0.019, 0.52),
}
"""Measured as in `cost.RATES`. One warpgroup means that blocks are small enough for two or more to share a
multiprocessor."""

HEAD_DIMS = tuple(sorted({head_dim for _, head_dim, _, _ in RATES}))


class Cut(NamedTuple):
    """One way to cut a pass, and the milliseconds that it is predicted to take."""

    variant: Variant
    milliseconds: float


@lru_cache(maxsize=65536)
def _counts(axis: Axis, rows: int, columns: int, is_inverse: bool) -> tuple[int, int, int, int]:
    plan = AxisPlan(axis, rows, columns, is_inverse=is_inverse)
    return plan.q_tiles, plan.visited, plan.full, plan.most_visited


def _cuts(kernel: str, problem: Problem) -> Iterator[Cut]:
    is_inverse = kernel == "keys"
    heads = problem.heads_kv if is_inverse else problem.heads
    repeats = problem.heads // heads
    for (name, head_dim, consumers, columns), rate in RATES.items():
        if (name, head_dim) != (kernel, problem.head_dim):
            continue
        additional = 0 if is_inverse else ceil_div(problem.additional, columns)
        for row_tile, box in product(q_tiles(consumers, problem.rank), boxes(columns, problem.rank)):
            width, is_reduced = code_width(box)
            if problem.rank > 1 and width > 32:
                continue
            counts = [_counts(axis, r, c, is_inverse) for axis, r, c in zip(problem.axes, row_tile, box, strict=True)]
            tiles, visited, full, longest = (prod(column) for column in zip(*counts, strict=True))
            mask = "none" if visited == full else mask_for(box)
            pace = rate.pace
            if mask == "coded":
                pace += rate.coded * (1 + is_reduced + 2 * (width > 16))
            elif mask == "select":
                pace += rate.select * (visited - full) / visited
            one = rate.start + consumers * (longest * repeats + additional) * pace
            everything = tiles * rate.start + consumers * (visited * repeats + tiles * additional) * pace
            time = max(problem.batch * heads * everything / MULTIPROCESSORS, one) / 1e3
            yield Cut(variant_for(problem, row_tile, box, mask, kernel), time)


@lru_cache(maxsize=1024)
def ranked_cuts(kernel: str, problem: Problem, most: int = 16) -> tuple[Cut, ...]:
    """The `most` most promising cuts of the pass `"keys"` or `"queries"`, the least predicted time first."""

    def order(cut: Cut) -> tuple[float, bool, tuple[int, ...]]:
        variant = cut.variant
        return round(cut.milliseconds, 5), variant.kv_box != variant.q_tile, variant.q_tile[::-1]

    return tuple(sorted(_cuts(kernel, problem), key=order)[:most])


def additional_variant(problem: Problem) -> Variant:
    """What is compiled for the gradients of additional keys: boxes that cover the grid with the least padding."""

    def padded(box: tuple[int, ...]) -> tuple[int, int]:
        return prod(ceil_div(axis.length, n) * n for axis, n in zip(problem.axes, box, strict=True)), -box[-1]

    return variant_for(problem, (128,), min(boxes(64, problem.rank), key=padded), "none", "additional")
