"""Where tiles lie: rows of query tiles along axis 0, columns of them across the other axes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from vicinal.plan import AxisPlan, Span
from vicinal.problem import Axis

Slices = tuple[slice, ...]
Pattern = tuple[tuple[int, int], ...]
"""The run of keys that each query of a tile sees, counted from the tile's first key."""


@dataclass(frozen=True)
class Tile:
    """A query tile along one axis, the run of keys it visits, and which of them each query sees."""

    queries: slice
    keys: slice
    pattern: Pattern

    @staticmethod
    def of(axis: Axis, span: Span, box: int) -> Tile:
        """The tile of `span`, its run of keys lengthened to `box` so that tiles can be batched."""
        start = min(span.start, axis.length - box)
        windows = (axis.window(query) for query in range(span.first, span.last))
        pattern = tuple((window.start - start, window.stop - start) for window in windows)
        return Tile(slice(span.first, span.last), slice(start, start + box), pattern)


@dataclass(frozen=True)
class Column:
    """A query tile across the axes after the first."""

    tiles: tuple[Tile, ...]

    @property
    def queries(self) -> Slices:
        return tuple(tile.queries for tile in self.tiles)

    @property
    def keys(self) -> Slices:
        return tuple(tile.keys for tile in self.tiles)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(length(tile.queries) for tile in self.tiles)


@dataclass(frozen=True)
class Part:
    """All dilation groups that have the same lengths: grids of their own, cut in the same way."""

    lengths: tuple[int, ...]
    residues: tuple[range, ...]
    rows: tuple[Tile, ...]
    columns: tuple[Column, ...]


@lru_cache(maxsize=64)
def parts(axes: tuple[AxisPlan, ...]) -> tuple[Part, ...]:
    """The plan, by groups of equal lengths. Groups of one axis differ in length by one at most."""
    choices: list[list[range]] = []
    for along in axes:
        longer = along.axis.length % along.axis.dilation or along.axis.dilation
        choices.append([group for group in (range(longer), range(longer, along.axis.dilation)) if group])
    found: list[Part] = []
    for residues in product(*choices):
        lengths: list[int] = []
        tiles: list[list[Tile]] = []
        for i, (along, groups) in enumerate(zip(axes, residues, strict=True)):
            axis = along.axis.subaxes()[groups[0]]
            spans = [span for span in along.spans if span.group == groups[0]]
            # Rows are visited one at a time and may differ; columns are batched, so theirs are equally long.
            longest = max(span.stop - span.start for span in spans)
            tiles.append([Tile.of(axis, span, longest if i else span.stop - span.start) for span in spans])
            lengths.append(axis.length)
        columns = sorted((Column(tile) for tile in product(*tiles[1:])), key=lambda column: column.shape)
        found.append(Part(tuple(lengths), residues, tuple(tiles[0]), tuple(columns)))
    return tuple(found)


def length(piece: slice) -> int:
    return piece.stop - piece.start
