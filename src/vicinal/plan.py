"""How the work is cut, exactly: which keys each query tile visits, and which of them need a mask.

A neighborhood is a product over axes, so a plan is a product of axis plans: a pair of tiles is
empty if it is empty on some axis, and needs no mask if it needs none on every axis. Nothing here
ever enumerates the product, so a plan of millions of tokens takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

from vicinal._tuples import ceil_div
from vicinal.errors import InvalidProblem
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling


@dataclass(frozen=True, slots=True)
class Span:
    """The keys of one query tile along one axis, and the KV tiles that cover them.

    All positions count members of the dilation group `group`: member `m` is token
    `group + m * dilation`. Ranges are half-open.

    Args:
        group: dilation group that the tile belongs to.
        first, last: its queries `[first, last)`.
        start, stop: keys that some query of the tile sees.
        full_start, full_stop: keys that every query of the tile sees; empty if they cross.
        origin: where the first KV tile begins.
        visited: KV tiles from `origin` on that hold a key of `[start, stop)`.
        full_tiles: those of them (as a range of their numbers) that need no mask: all their keys
            exist and are seen by every query.
    """

    group: int
    first: int
    last: int
    start: int
    stop: int
    full_start: int
    full_stop: int
    origin: int
    visited: int
    full_tiles: range

    @property
    def full(self) -> int:
        """KV tiles that need no mask."""
        return len(self.full_tiles)


@dataclass(frozen=True)
class AxisPlan:
    """One axis, cut into query tiles, each with its span of KV tiles.

    If `is_inverse`, queries and keys have changed places in all that is said here: the axis is cut into
    tiles of keys, of `q_tile` tokens, each with the span of the queries that see it. That is what the
    gradients of keys and values walk.
    """

    axis: Axis
    q_tile: int
    kv_tile: int
    kv_origin: str = "free"
    is_inverse: bool = False

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """One span per query tile, dilation groups one after another."""
        return tuple(span for group, axis in enumerate(self.axis.subaxes()) for span in self._spans(group, axis))

    def _spans(self, group: int, axis: Axis) -> Iterable[Span]:
        sees = axis.viewers if self.is_inverse else axis.window
        for first in range(0, axis.length, self.q_tile):
            last = min(first + self.q_tile, axis.length)
            # Both ends of a window move monotonically with the query, so the first and the last
            # query of a tile bound its union and its intersection, and neither has holes.
            early, late = sees(first), sees(last - 1)
            origin = early.start if self.kv_origin == "free" else early.start // self.kv_tile * self.kv_tile
            full_start = ceil_div(late.start - origin, self.kv_tile)
            full_stop = max((early.stop - origin) // self.kv_tile, full_start)
            yield Span(
                group=group,
                first=first,
                last=last,
                start=early.start,
                stop=late.stop,
                full_start=late.start,
                full_stop=early.stop,
                origin=origin,
                visited=ceil_div(late.stop - origin, self.kv_tile),
                full_tiles=range(full_start, full_stop),
            )

    @property
    def q_tiles(self) -> int:
        return len(self.spans)

    @property
    def kv_tiles(self) -> int:
        """KV tiles that cover the axis, dilation groups counted apart: what dense attention would visit."""
        return sum(ceil_div(axis.length, self.kv_tile) for axis in self.axis.subaxes())

    @cached_property
    def visited(self) -> int:
        return sum(span.visited for span in self.spans)

    @cached_property
    def full(self) -> int:
        return sum(span.full for span in self.spans)

    @cached_property
    def most_visited(self) -> int:
        """KV tiles of the query tile that has most of them."""
        return max(span.visited for span in self.spans)


@dataclass(frozen=True)
class Plan:
    """A problem's windows cut into tiles: a product of axis plans.

    Counts are per batch row and head, and leave additional keys out. Make one with `make_plan`.

    Args:
        problem, tiling: what is cut, and how.
        axes: one plan per axis.

    Example:
        >>> plan = make_plan(Problem.grid((48, 40), kernel_size=24, stride=8), Tiling((8, 8), (8, 8)))
        >>> plan.q_tiles, plan.visited, plan.masked, plan.is_block_sparse
        (30, 270, 0, True)
    """

    problem: Problem
    tiling: Tiling
    axes: tuple[AxisPlan, ...]

    @property
    def q_tiles(self) -> int:
        """Query tiles of the grid."""
        return prod(axis.q_tiles for axis in self.axes)

    @property
    def kv_tiles(self) -> int:
        """KV tiles of the grid."""
        return prod(axis.kv_tiles for axis in self.axes)

    @property
    def visited(self) -> int:
        """Pairs of tiles that hold at least one (query, key) pair inside a window on every axis."""
        return prod(axis.visited for axis in self.axes)

    @property
    def full(self) -> int:
        """Visited pairs of tiles that need no mask."""
        return prod(axis.full for axis in self.axes)

    @property
    def masked(self) -> int:
        """Visited pairs of tiles that need a mask."""
        return self.visited - self.full

    @property
    def most_visited(self) -> int:
        """KV tiles of the query tile that has most of them."""
        return prod(axis.most_visited for axis in self.axes)

    @property
    def is_block_sparse(self) -> bool:
        """Whether the work is exactly the windows: no masks, no padding."""
        return self.masked == 0 and self.visited * self.tile_pairs == self.problem.pairs

    @property
    def tile_pairs(self) -> int:
        """(query, key) pairs in one pair of tiles."""
        return prod(self.tiling.q_tile) * prod(self.tiling.kv_tile)

    def __str__(self) -> str:
        share = self.visited / (self.q_tiles * self.kv_tiles)
        lines = [
            f"{self.problem}; {self.tiling}",
            f"{self.q_tiles:,} query tiles x {self.kv_tiles:,} KV tiles: {self.visited:,} pairs visited ({share:.1%}), "
            f"{self.full:,} full, {self.masked:,} masked",
        ]
        pictures = [picture(axis) for axis in self.axes]
        height = max(len(rows) for rows in pictures)
        for rows in pictures:
            rows += [""] * (height - len(rows))
        widths = [max(len(row) for row in rows) for rows in pictures]
        lines += [
            "   ".join(row.ljust(width) for row, width in zip(rows, widths, strict=True)).rstrip()
            for rows in zip(*pictures, strict=True)
        ]
        return "\n".join(lines)


def picture(axis: AxisPlan, most: int = 16) -> list[str]:
    """Rows of text: one query tile a row, one KV tile's width of keys a column; full, masked, empty = █ ░ ·

    With free origins tiles straddle columns; a column shows what most of its keys are.
    """
    title = f"axis {axis.axis.length}"
    if axis.axis.dilation > 1:
        title += f", one of {axis.axis.dilation} groups"
    length = axis.axis.subaxes()[0].length
    spans = [span for span in axis.spans if span.group == 0]
    columns = ceil_div(length, axis.kv_tile)
    rows = [title]
    for span in spans[:most]:
        row = ""
        for column in range(columns):
            middle = min(column * axis.kv_tile + axis.kv_tile // 2, length - 1)
            tile, inside = divmod(middle - span.origin, axis.kv_tile)
            row += "·" if inside < 0 or not 0 <= tile < span.visited else "█" if tile in span.full_tiles else "░"
        rows.append(row if columns <= 4 * most else row[: 4 * most] + "…")
    if len(spans) > most:
        rows.append(f"… {len(spans) - most} more")
    return rows


def make_plan(problem: Problem, tiling: Tiling) -> Plan:
    """Cut a problem. Cached; builds one span per query tile and axis, never per pair.

    Args:
        problem: what is asked.
        tiling: tile shapes, one number per axis of the problem.

    Raises:
        InvalidProblem: if the tiling is of another rank.

    Example:
        >>> problem = Problem.grid((48, 40), kernel_size=24, stride=(8, 1))
        >>> print(make_plan(problem, Tiling((8, 8), (8, 8), kv_origin="grid")))
        48x40 grid, window 24x24, stride 8x1; query tiles 8x8, KV tiles 8x8, grid origin
        30 query tiles x 30 KV tiles: 342 pairs visited (38.0%), 198 full, 144 masked
        axis 48   axis 40
        ███···    ███··
        ███···    ░██░·
        ·███··    ░░█░░
        ··███·    ·░██░
        ···███    ··███
        ···███
    """
    if not isinstance(tiling, Tiling):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidProblem(f"tiling must be a Tiling, got {tiling!r}")
    if len(tiling.q_tile) != problem.rank:
        raise InvalidProblem(
            f"tiling must have one number per axis: the grid {problem.shape} has {problem.rank}, "
            f"q_tile {tiling.q_tile} has {len(tiling.q_tile)}"
        )
    return Plan(problem, tiling, _axis_plans(problem.axes, tiling))


@lru_cache(maxsize=1024)
def _axis_plans(axes: tuple[Axis, ...], tiling: Tiling) -> tuple[AxisPlan, ...]:
    return tuple(
        AxisPlan(axis, q_tile, kv_tile, tiling.kv_origin)
        for axis, q_tile, kv_tile in zip(axes, tiling.q_tile, tiling.kv_tile, strict=True)
    )
