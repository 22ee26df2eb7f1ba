"""Which tiles to use: predicted times, best first."""

from __future__ import annotations

from functools import cache, lru_cache
from itertools import product
from math import prod

from vicinal._tuples import ceil_div
from vicinal.backends.blocked.chunks import SCORES
from vicinal.plan import AxisPlan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

# Measured on two cores of an AMD EPYC (AVX-512), in float32; all in the time of one multiply-add of a large product.
SCORE = 30  # the passes over one score: mask, maximum, exponential, sum
COPIED = 60  # gathering one element
ROW = 6_500_000  # the calls that one row of tiles takes
THIN = 8  # a product with this many rows runs at half its rate

MOST_SCORES = 2**22
"""Scores of one tile, at most: wider windows are met in several runs."""


def default_tilings(problem: Problem) -> tuple[Tiling, ...]:
    """Tilings by predicted time, best first: one KV tile holds all that a query tile needs."""
    units = max(problem.batch, 1) * problem.heads_kv
    return _ranked(problem.axes, units, problem.heads // problem.heads_kv, problem.head_dim + problem.head_dim_v)


@lru_cache(maxsize=1024)
def _ranked(axes: tuple[Axis, ...], units: int, groups: int, width: int) -> tuple[Tiling, ...]:
    tiles = product(*(_lengths(axis) for axis in axes))
    best = sorted(tiles, key=lambda tile: _cost(axes, tile, units, groups, width))[:8]
    return tuple(_covering(axes, tile, groups) for tile in best)


def _lengths(axis: Axis) -> list[int]:
    """Powers of two and multiples of the stride that fit the axis."""
    most = ceil_div(axis.length, axis.dilation)
    lengths = {2**i for i in range(11)} | {axis.stride * 2**i for i in range(11)}
    return sorted(n for n in lengths if n <= most) or [most]


@cache
def _visits(axis: Axis, q_tile: int) -> tuple[int, int, int]:
    """Along one axis: keys that all query tiles visit, the most that one visits, and query tiles."""
    lengths = [span.stop - span.start for span in AxisPlan(axis, q_tile, 1).spans]
    return sum(lengths), max(lengths), len(lengths)


def _cost(axes: tuple[Axis, ...], tile: tuple[int, ...], units: int, groups: int, width: int) -> float:
    """Predicted time of a forward pass, in multiply-adds."""
    along = [_visits(axis, q_tile) for axis, q_tile in zip(axes, tile, strict=True)]
    rows = prod(tile) * groups
    scores = units * rows * prod(visited for visited, _, _ in along)
    gathered = units * axes[0].length * prod(visited for visited, _, _ in along[1:])
    calls = along[0][2] * max(scores / along[0][2] / SCORES, 1)
    return scores * (width * (1 + THIN / rows) + SCORE) + gathered * width * COPIED + calls * ROW


def _covering(axes: tuple[Axis, ...], tile: tuple[int, ...], groups: int) -> Tiling:
    """These query tiles, with KV tiles as long as the longest span, or as may be on the first axis."""
    first, *others = (_visits(axis, q_tile)[1] for axis, q_tile in zip(axes, tile, strict=True))
    run = max(MOST_SCORES // (groups * prod(tile) * prod(others)), 1)
    return Tiling(tile, (min(first, run), *others))
