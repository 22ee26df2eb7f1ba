"""How the passes of the backward are cut: the tiles with the least predicted time, as in `cost`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from vicinal._tuples import ceil_div
from vicinal.backends.hopper.cost import Rate, boxes
from vicinal.backends.hopper.launch import MULTIPROCESSORS
from vicinal.backends.hopper.variant import Variant, code_width, mask_for, variant_for
from vicinal.plan import AxisPlan
from vicinal.problem import Axis, Problem

RATES: dict[tuple[str, int, int, int], Rate] = {
    # (kernel, head_dim, warpgroups, columns of a box): starts and paces are fitted, in bf16, to `gradient-rates.csv`,
    # see `benchmarks/rates.py`; of ("keys", 128, 2, 64) and ("queries", 64, 2, 128) what masks cost, too.
    ("keys", 32, 1, 64): Rate(1.40, 0.324, 0.020, 0.15),
    ("keys", 64, 1, 32): Rate(1.30, 0.254, 0.020, 0.12),
    ("keys", 64, 1, 64): Rate(1.68, 0.481, 0.011, 0.25),
    ("keys", 64, 2, 64): Rate(4.02, 0.559, 0.000, 0.25),
    ("keys", 128, 1, 64): Rate(2.34, 0.813, 0.020, 0.60),
    ("keys", 128, 2, 64): Rate(5.74, 0.756, 0.050, 0.38),
    ("queries", 32, 1, 64): Rate(0.87, 0.228, 0.020, 0.15),
    ("queries", 64, 1, 64): Rate(1.19, 0.302, 0.008, 0.20),
    ("queries", 64, 2, 128): Rate(3.69, 0.618, 0.045, 0.08),
    ("queries", 128, 1, 64): Rate(2.05, 0.595, 0.003, 0.30),
    ("queries", 128, 2, 64): Rate(5.21, 0.509, 0.000, 0.31),
    ("queries", 128, 2, 128): Rate(4.89, 1.075, 0.019, 0.52),
}
"""Measured as in `cost.RATES`. One warpgroup means that blocks are small enough for two or more to share a
multiprocessor."""

HEAD_DIMS = tuple(sorted({head_dim for _, head_dim, _, _ in RATES}))


PASSING = 1.03
"""Factor of the pace where warpgroups pass by boxes that only the other one's rows see: they no longer go in step."""


class Cut(NamedTuple):
    """One way to cut a pass, and the milliseconds that it is predicted to take."""

    variant: Variant
    milliseconds: float


class Shape(NamedTuple):
    """A cut short of its `Variant`. `stack` counts three axes, `walked` pairs of rows and columns."""

    row_tile: tuple[int, ...]
    stack: int
    box: tuple[int, ...]
    mask: str
    skips: bool
    walked: int


@lru_cache(maxsize=65536)
def _counts(axis: Axis, rows: int, columns: int, is_inverse: bool) -> tuple[int, int, int, int]:
    plan = AxisPlan(axis, rows, columns, is_inverse=is_inverse)
    return plan.q_tiles, plan.visited, plan.full, plan.most_visited


@lru_cache(maxsize=65536)
def seen(axis: Axis, rows: int, columns: int, is_inverse: bool) -> int:
    """Boxes along an axis that the halves of tiles of rows see, of those that their tile visits, added up.

    Example:
        >>> seen(Axis(256, 1), 128, 32, False)  # each half sees two of four
        8
    """
    boxes = 0
    for axis_of_group in axis.subaxes():
        sees = axis_of_group.viewers if is_inverse else axis_of_group.window
        last = axis_of_group.length - 1
        for first in range(0, axis_of_group.length, rows):
            origin = sees(first).start
            for start in range(first, min(first + rows, last + 1), rows // 2):
                stop = sees(min(start + rows // 2 - 1, last)).stop
                boxes += max(ceil_div(stop - origin, columns) - (sees(start).start - origin) // columns, 0)
    return boxes


def _shapes(kernel: str, problem: Problem) -> Iterator[tuple[float, Shape]]:
    """Every way to cut a pass, and the milliseconds that it is predicted to take."""
    for (name, head_dim, consumers, columns), rate in RATES.items():
        if (name, head_dim) != (kernel, problem.head_dim):
            continue
        for (row_tile, stack), box in product(_row_tiles(consumers, problem.rank), boxes(columns, problem.rank)):
            if problem.rank == 1 or code_width(box)[0] <= 32:
                yield predict(kernel, problem, rate, row_tile, stack, box)


def predict(
    kernel: str, problem: Problem, rate: Rate, row_tile: tuple[int, ...], stack: int, box: tuple[int, ...]
) -> tuple[float, Shape]:
    """The milliseconds that a pass takes which is cut so, and the cut's shape. `stack` counts the problem's axes."""
    is_inverse, missing = kernel == "keys", 3 - problem.rank
    heads = problem.heads_kv if is_inverse else problem.heads
    repeats = problem.heads // heads
    consumers, columns = prod(row_tile) // 64, prod(box)
    additional = 0 if is_inverse else ceil_div(problem.additional, columns)
    cuts = list(zip(problem.axes, row_tile, box, strict=True))
    counts = [_counts(*cut, is_inverse) for cut in cuts]
    tiles, visited, full, longest = (prod(column) for column in zip(*counts, strict=True))
    mask = "none" if visited == full else mask_for(box)
    pace = rate.pace
    if mask == "coded":
        width, is_reduced = code_width(box)
        pace += rate.coded * (1 + is_reduced + 2 * (width > 16))
    elif mask == "select":
        pace += rate.select * (visited - full) / visited
    share = 1.0
    if consumers == 2 and mask != "none":
        share = PASSING * seen(*cuts[stack], is_inverse) / (2 * counts[stack][1])
    one = rate.start + consumers * (longest * min(share, 1) * repeats + additional) * pace
    everything = tiles * rate.start
    everything += consumers * (visited * min(share, 1) * repeats + tiles * additional) * pace
    time = max(problem.batch * heads * everything / MULTIPROCESSORS, one) / 1e3
    return time, Shape(row_tile, stack + missing, box, mask, share < 1, visited * prod(row_tile) * columns)


def _row_tiles(consumers: int, rank: int) -> Iterator[tuple[tuple[int, ...], int]]:
    """Tiles of that many boxes of 64 rows, and the axis that these are stacked on."""
    for box in boxes(64, rank):
        for stack in range(rank if consumers > 1 else 1):
            yield tuple(n * consumers if i == stack else n for i, n in enumerate(box)), stack


@lru_cache(maxsize=1024)
def ranked_cuts(kernel: str, problem: Problem, most: int = 16) -> tuple[Cut, ...]:
    """The `most` most promising cuts of the pass `"keys"` or `"queries"`, the least predicted time first."""

    def order(found: tuple[float, Shape]) -> tuple[float, bool, int, bool, tuple[int, ...]]:
        time, shape = found
        return round(time, 5), shape.skips, shape.walked, shape.box != shape.row_tile, shape.row_tile[::-1]

    best = sorted(_shapes(kernel, problem), key=order)[:most]
    return tuple(
        Cut(variant_for(problem, cut.row_tile, cut.box, cut.mask, kernel, stack=cut.stack, skips=cut.skips), time)
        for time, cut in best
    )


def arguments_of(variant: Variant) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """The tile, the axis that it is stacked on, and the box of a cut's variant, as `predict` takes them."""
    first, is_stacked = 3 - variant.rank, variant.consumers > 1
    rows = [n * (variant.consumers if i == variant.stack else 1) for i, n in enumerate(variant.box)]
    return tuple(rows[first:]), variant.stack - first if is_stacked else 0, variant.kv_box[first:]


def additional_variant(problem: Problem) -> Variant:
    """What is compiled for the gradients of additional keys: boxes that cover the grid with the least padding."""

    def padded(box: tuple[int, ...]) -> tuple[int, int]:
        return prod(ceil_div(axis.length, n) * n for axis, n in zip(problem.axes, box, strict=True)), -box[-1]

    return variant_for(problem, (128,), min(boxes(64, problem.rank), key=padded), "none", "additional")
