"""What a tiling costs on one H100, predicted from the plan; tilings are chosen by it.

    time = launch + (busy ** p + memory ** p) ** (1 / p)
    busy = max(sum over blocks of (start + tiles * pace) / multiprocessors, one block)

`tiles` are pairs of 64 queries and a KV box, as the plan counts them; `start` and `pace` are
measured; `memory` is what its bytes take. The model knows no problem by name: a window, a stride or a
dilation enters only through the tiles that it makes the plan visit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from vicinal._tuples import ceil_div
from vicinal.backends.hopper.launch import MULTIPROCESSORS, heads_abreast, heads_per_block
from vicinal.backends.hopper.variant import Variant, code_width, is_odd_box, variant_for, variant_of
from vicinal.plan import AxisPlan, Plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

BYTES_PER_S = 3.0e12
"""Of a large copy on an H100 80GB."""

LAUNCH = 0.008
"""Milliseconds around a kernel as events measure it, whatever it does: the median that five short ones took longer."""

HIDING = 2.4
"""The `p` above: 1 if computing and memory traffic added up, infinite if the longer one hid the other."""

READ_AGAIN = 0.4
"""Share of the keys and values that memory is asked for twice, if neighbors share them and a box is as deep along the
first axis as all that a tile sees.

Blocks sweep that axis and so do boxes, so that a tile needs what it shares with the tile before it first, and what it
shares with the one after it last, at the same time as that one. Unless one box holds all of it. The profiler saw it:
LTX stage 4 reads 9.0 GB by boxes of 4x2x8, one layer, and 8.0 GB by boxes of 2x4x8, two layers of the same keys.
"""

L2_BYTES = 50 * 10**6
"""What the cache holds. If a tile sees more keys and values than that, each wave of blocks reads them once as long as
blocks keep in step, and more often if boxes are deeper than one token along the first axis: of dense attention on
30x48x80 the profiler saw 14 GB by boxes of 1x16x8, where waves alone say 10, and 55 and 114 GB by boxes two deep. That
costs power, and so clock, rather than time. Here it only breaks ties.
"""


class Rate(NamedTuple):
    """Microseconds of one multiprocessor.

    Args:
        start: per block, whatever it visits; heads that take turns in a block share it.
        pace: per pair of 64 queries and a KV box, without a mask.
        coded: added to the pace by a mask on the tensor core.
        select: added to it on a tile that is masked by selects.
    """

    start: float
    pace: float
    coded: float
    select: float


RATES: dict[tuple[int, int, int], Rate] = {
    # (head_dim, warpgroups, keys of a box): starts and paces are fitted, in bf16, to `forward-rates.csv`, see
    # `benchmarks/rates.py`; the first one's pace and the start of 128 by 2 by 128 moved by what the fit leaves open.
    (32, 1, 64): Rate(0.08, 0.250, 0.024, 0.10),
    (32, 1, 128): Rate(0.21, 0.449, 0.048, 0.20),
    (32, 3, 128): Rate(2.73, 0.446, 0.055, 0.20),
    (64, 1, 64): Rate(0.38, 0.282, 0.030, 0.10),
    (64, 1, 128): Rate(0.33, 0.605, 0.043, 0.20),
    (64, 3, 128): Rate(2.99, 0.531, 0.055, 0.20),
    (128, 1, 64): Rate(0.82, 0.503, 0.043, 0.30),
    (128, 2, 64): Rate(3.83, 0.445, 0.020, 0.20),
    (128, 2, 128): Rate(2.30, 0.822, 0.000, 0.25),
    (256, 1, 64): Rate(1.70, 1.212, 0.030, 0.30),
    (256, 2, 64): Rate(4.76, 0.642, 0.030, 0.30),
}

REDUCED_CODE = 0.025
"""Added to a coded mask by the reduced code's arithmetic."""

WIDE_CODE = 0.045
"""Added to a coded mask whose code takes two matrix instructions."""


def predicted_ms(plan: Plan) -> float:
    """Milliseconds that `plan` takes on one H100.

    Example:
        >>> from vicinal.plan import make_plan
        >>> from vicinal.problem import Problem
        >>> problem = Problem.grid((30, 48, 80), (18, 24, 24), heads=24, head_dim=128)
        >>> round(predicted_ms(make_plan(problem, Tiling((2, 8, 8), (2, 8, 8)))))
        36
    """
    first = plan.axes[0]
    return _milliseconds(
        plan.problem, variant_of(plan), plan.q_tiles, plan.visited, plan.masked, plan.most_visited,
        first.visited, first.most_visited,
    )  # fmt: skip


def _milliseconds(
    problem: Problem, variant: Variant, q_tiles: int, visited: int, masked: int, most_visited: int,
    visited_first: int, layers: int,
) -> float:  # fmt: skip
    rate = RATES[variant.head_dim, variant.consumers, variant.keys]
    variant = replace(variant, abreast=heads_abreast(problem, variant, ()))  # as if they lay next to each other
    start = rate.start / heads_per_block(problem, variant, q_tiles, visited)
    pace = variant.consumers * (rate.pace + _mask_pace(rate, variant, masked / visited))
    additional = ceil_div(problem.additional, variant.keys)
    one_block = start + (most_visited + additional) * pace
    all_blocks = q_tiles * start + (visited + q_tiles * additional) * pace
    busy = max(problem.batch * problem.heads * all_blocks / MULTIPROCESSORS, one_block) / 1e3
    row = problem.batch * problem.tokens * problem.head_dim * problem.itemsize
    reads = _reads(problem, variant, q_tiles, most_visited, visited_first, layers)
    memory = 2 * row * (problem.heads + problem.heads_kv * reads) / BYTES_PER_S * 1e3
    return LAUNCH + (busy**HIDING + memory**HIDING) ** (1 / HIDING)


def _reads(
    problem: Problem, variant: Variant, q_tiles: int, most_visited: int, visited_first: int, layers: int
) -> float:
    """How often memory is asked for keys and values, see `READ_AGAIN` and `L2_BYTES`.

    Along the first axis tiles visit `visited_first` boxes in all, and one of them at most `layers`.
    """
    depth = variant.kv_box[-variant.rank]
    seen = 2 * most_visited * prod(variant.kv_box) * problem.head_dim * problem.itemsize
    if seen > L2_BYTES:
        return max(q_tiles / MULTIPROCESSORS, 1) * (min(depth, 2) if variant.rank > 1 else 1)
    shared = visited_first * depth / problem.axes[0].length - 1
    return 1 + READ_AGAIN * min(max(shared, 0), 1) * (layers == 1)


def _mask_pace(rate: Rate, variant: Variant, masked: float) -> float:
    """What the mask adds to the pace, if that share of the boxes needs one."""
    kv_tile = variant.kv_box[-variant.rank :]
    width, is_reduced = code_width(kv_tile)
    if masked == 0 and not is_odd_box(kv_tile):
        return 0
    if width > 32:
        return rate.select * masked
    return rate.coded + REDUCED_CODE * is_reduced + WIDE_CODE * (width > 16)


def candidates(problem: Problem) -> Iterator[Tiling]:
    """Every tiling that the kernels can be cut into and that has a measured rate."""
    for consumers, keys in ((c, k) for d, c, k in RATES if d == problem.head_dim):
        for q_tile in q_tiles(consumers, problem.rank):
            for kv_tile in kv_tiles(consumers, keys, problem.rank):
                yield Tiling(q_tile, kv_tile)


def q_tiles(consumers: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Query tiles of that many boxes of 64, stacked along one axis."""
    tiles = (
        tuple(n * consumers if i == stack else n for i, n in enumerate(box))
        for stack in range(rank)
        for box in boxes(64, rank)
    )
    return tuple(dict.fromkeys(tiles))


@lru_cache(maxsize=64)
def kv_tiles(consumers: int, keys: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """KV boxes of that many slots; with several axes only those whose mask has a short code."""
    even = [box for box in boxes(keys, rank) if rank == 1 or code_width(box)[0] <= 32]
    if consumers > 1 or keys != 64 or rank < 3:
        return tuple(even)
    return tuple(even + [box for box in product(range(2, 11), repeat=rank) if is_odd_box(box)])


def boxes(volume: int, rank: int, largest: int = 64) -> list[tuple[int, ...]]:
    """Boxes of `volume` tokens whose sides are powers of two, none longer than `largest` if there are several."""
    if rank == 1:
        return [(volume,)]
    sides = [1 << i for i in range(largest.bit_length())]
    return [box for box in product(sides, repeat=rank) if prod(box) == volume]


@lru_cache(maxsize=65536)
def _counts(axis: Axis, q: int, k: int) -> tuple[int, int, int, int]:
    plan = AxisPlan(axis, q, k)
    return plan.q_tiles, plan.visited, plan.full, plan.most_visited


def _predict(problem: Problem, tiling: Tiling) -> float:
    # `predicted_ms(make_plan(problem, tiling))`, sharing the counts of an axis between tilings.
    counts = [_counts(*cut) for cut in zip(problem.axes, tiling.q_tile, tiling.kv_tile, strict=True)]
    q_tiles, visited, full, most_visited = (prod(column) for column in zip(*counts, strict=True))
    variant = variant_for(problem, tiling.q_tile, tiling.kv_tile, "coded")  # whatever the mask, it costs no registers
    _, visited_first, _, layers = counts[0]
    return _milliseconds(problem, variant, q_tiles, visited, visited - full, most_visited, visited_first, layers)


@lru_cache(maxsize=1024)
def ranked_tilings(problem: Problem, most: int = 16) -> tuple[Tiling, ...]:
    """The `most` most promising tilings, the one with the least predicted time first."""

    def order(tiling: Tiling) -> tuple[float, bool, tuple[int, ...]]:
        # Among equals, the tiles of one box shared by queries and keys, long on the first axes,
        # make neighboring blocks load the same lines: measured, up to 8% faster.
        return round(_predict(problem, tiling), 5), tiling.kv_tile != tiling.q_tile, tiling.q_tile[::-1]

    return tuple(sorted(candidates(problem), key=order)[:most])
