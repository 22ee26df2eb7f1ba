"""Which tiles to use: predicted times, best first."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import product
from math import prod

from vicinal._tuples import ceil_div
from vicinal.backends.blocked.chunks import SCORES
from vicinal.plan import AxisPlan
from vicinal.problem import Axis
from vicinal.tiling import Tiling


@lru_cache(maxsize=1024)
def default_tilings(axes: tuple[Axis, ...], groups: int) -> tuple[Tiling, ...]:
    """Tilings by predicted time, best first: one KV tile holds all that a query tile needs."""
    candidates = [Tiling(tile, tile) for tile in product(*(tile_lengths(axis) for axis in axes))]
    ranked = sorted(candidates, key=cost_of(axes, groups))
    return tuple(covering(tiling, axes) for tiling in ranked[:8])


def tile_lengths(axis: Axis) -> list[int]:
    """Powers of two and multiples of the stride that fit the axis."""
    most = ceil_div(axis.length, axis.dilation)
    lengths = {2**i for i in range(11)} | {axis.stride * 2**i for i in range(11)}
    return sorted(n for n in lengths if n <= most) or [most]


def cost_of(axes: tuple[Axis, ...], groups: int) -> Callable[[Tiling], float]:
    """Predicted time per query of a tiling, in units of one multiply-add's."""

    @cache
    def keys(axis: Axis, q_tile: int) -> tuple[int, int]:
        """Keys visited by all query tiles of the axis, and number of tiles."""
        spans = AxisPlan(axis, q_tile, 1).spans
        return sum(span.stop - span.start for span in spans), len(spans)

    def cost(tiling: Tiling) -> float:
        along = [keys(axis, q_tile) for axis, q_tile in zip(axes, tiling.q_tile, strict=True)]
        visited, tiles = prod(n for n, _ in along), prod(n for _, n in along)
        rows = prod(tiling.q_tile) * groups
        # A product with few rows runs at about rows / (rows + 8) of the peak rate; every visited score
        # costs about as much as 40 multiply-adds in passes over it; gathering a key 1/4 of a row.
        padded = prod(tiling.q_tile) * groups * visited * ((rows + 8) / rows + 0.3)
        gathered = visited / max(along[0][0] / axes[0].length, 1) * 8
        overhead = 40_000 * max(tiles * rows / max(SCORES / max(visited / tiles, 1), rows), 1) / 64
        return padded + gathered + overhead

    return cost


def covering(tiling: Tiling, axes: tuple[Axis, ...]) -> Tiling:
    """The same query tiles, with KV tiles as long as the longest span."""
    longest = tuple(
        max(span.stop - span.start for span in AxisPlan(axis, q_tile, 1).spans)
        for axis, q_tile in zip(axes, tiling.q_tile, strict=True)
    )
    return Tiling(tiling.q_tile, longest)
