"""How the gradient of a position bias is cut; its kernels are in `backward_bias`.

Scratch memory depends on the window alone, not on the grid or the batch: a box of pairs for each way ahead of
a tile that some window reaches, about `rows` times the table.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from vicinal._tuples import ceil_div
from vicinal.backends.triton.cost import Cut, boxes, is_miscompiled, room_of
from vicinal.backends.triton.launch import axis_args
from vicinal.backends.triton.rates import Shape
from vicinal.backends.triton.variant import SlotArgs, padded, three, three_axes
from vicinal.hardware import Hardware
from vicinal.plan import AxisPlan
from vicinal.problem import Axis, Problem

SHAPES = {2: ((64, 64, 8), (64, 32, 8), (32, 32, 4), (32, 16, 4), (16, 16, 4)), 4: ((32, 16, 4), (16, 16, 4))}
"""By the bytes of an element: queries of a tile, keys of a box, and warps, the most first. Larger ones would spill."""

HOPPER_SHAPES = {4: ((64, 32, 8),)}
"""Where products read float32 from shared memory, these do not."""

RESIDENT = 2
"""Blocks that run on one multiprocessor at a time."""

START = 10
"""What a block does once, in pairs of a tile and a box that it could sum meanwhile."""

MOST_TURNS = 4
"""Blocks that a multiprocessor should run one after another, at most, for each that it runs at a time."""

REGISTERS = 128
"""Of a thread at most where eight warps sum a box of 16-bit pairs on Hopper, so that two blocks share a multiprocessor:
a quarter faster, though what is needed once is spilled."""

LEAST_CHUNK = 8
"""Pairs of a tile and a box that a block sums at least, where there are so many: starting it costs as much."""

MOST_SCRATCH = 2**24
"""Sums on their way, in numbers: no more chunks are made than fit, and heads that do not fit take turns."""


class SlotCut(NamedTuple):
    """How the gradient is cut.

    Args:
        cut: tiles of queries and boxes of keys.
        slots: of each axis.
        met: pairs of a tile and a box that are summed, in all heads and batch rows.
        heads: that share scratch memory; others take their turn.
        chunk, chunks: tiles that a block walks, counted once for every batch row, and how many such chunks there are.
    """

    cut: Cut
    slots: tuple[SlotArgs, ...]
    met: int
    heads: int
    chunk: int
    chunks: int

    @property
    def boxes(self) -> int:
        """Slots of a head."""
        return prod(slots.count for slots in self.slots)

    @property
    def scratch(self) -> int:
        """Numbers that are kept between the two kernels."""
        return self.chunks * self.heads * self.boxes * self.cut.shape.rows * self.cut.shape.columns


@lru_cache(maxsize=65536)
def slots_of(axis: Axis, rows: int, columns: int) -> tuple[SlotArgs, int]:
    """The slots of an axis that is cut into tiles of `rows`, and how many of them all tiles together meet.

    Slots may begin anywhere, as long as they are `columns` apart: there, where fewest are met.

    Example:
        >>> slots_of(Axis(56, 7), 8, 8)  # seven tiles, which see from 3 keys before their first query on
        (SlotArgs(first=-3, count=2), 14)
    """
    spans = AxisPlan(axis, rows, columns).spans
    reaches = Counter((span.start - span.first, span.stop - span.first) for span in spans)
    low, high = min(start for start, _ in reaches), max(stop for _, stop in reaches)

    def met(first: int) -> int:
        return sum(
            n * ((stop - 1 - first) // columns - (start - first) // columns + 1) for (start, stop), n in reaches.items()
        )

    first = min(range(low, low - columns, -1), key=lambda first: (met(first), ceil_div(high - first, columns)))
    return SlotArgs(first, ceil_div(high - first, columns)), met(first)


@lru_cache(maxsize=1024)
def bias_cut(problem: Problem, hardware: Hardware) -> SlotCut:
    """The cut that meets fewest boxes, of the largest that fit into shared memory."""
    shape = shape_of(problem, hardware)
    sides = product(boxes(shape.rows, problem.rank), boxes(shape.columns, problem.rank))
    ways = [(rows, columns, _slots(problem, rows, columns)) for rows, columns in sides]
    rows, columns, axes = min(ways, key=lambda way: (prod(met for _, met in way[2]), _count(way[2])))
    slots = (*[SlotArgs(0, 1)] * (3 - problem.rank), *(slots for slots, _ in axes))
    met = prod(met for _, met in axes) * problem.batch * problem.heads
    numbers = _count(axes) * shape.rows * shape.columns
    heads = min(max(MOST_SCRATCH // numbers, 1), problem.heads)
    tiles = (
        prod(axis.tiles * axis.dilation for axis in axis_args(three_axes(problem.axes), three(rows))) * problem.batch
    )
    lines, pairs = heads * _count(axes), met * heads // problem.heads
    most = min(ceil_div(tiles, LEAST_CHUNK), max(MOST_SCRATCH // (heads * numbers), 1))
    chunk = chunk_of(tiles, lines, pairs, RESIDENT * max(hardware.units, 1), most)
    return SlotCut(Cut(rows, columns, shape, 0.0, True), slots, met, heads, chunk, ceil_div(tiles, chunk))


def chunk_of(tiles: int, lines: int, pairs: int, at_a_time: int, most: int) -> int:
    """How many of `tiles` a block walks, so that all blocks are soon done.

    Args:
        tiles: of a line.
        lines: of blocks, each for one slot of one head.
        pairs: of a tile and a box that are summed; no line has more than there are tiles.
        at_a_time: blocks that run.
        most: chunks of a line.

    Example:
        >>> chunk_of(512, 24, 10240, 264, most=64)  # 24 lines of 11 chunks: 264 blocks
        47
    """

    def time(chunks: int) -> float:
        chunk = ceil_div(tiles, chunks)
        blocks = lines * ceil_div(tiles, chunk)
        if blocks <= at_a_time:
            return START + chunk
        return (pairs + blocks * START) / at_a_time + (START + chunk) / 2  # half a block is waited for at the end

    largest = max(min(most, ceil_div(MOST_TURNS * at_a_time, lines)), 1)
    return ceil_div(tiles, min(range(1, largest + 1), key=time))


def summed_cut(problem: Problem, queries: Cut) -> SlotCut | None:
    """How those sums lie that the pass for queries leaves, if it is cut so that it can, and they are not too many."""
    chunks = prod(axis.dilation for axis in problem.axes) * ceil_div(problem.batch, queries.chunk)
    cut = SlotCut(queries, (SlotArgs(0, 1),) * 3, 0, problem.heads, queries.chunk, chunks)
    return cut if queries.sums and cut.scratch <= MOST_SCRATCH else None


def _slots(problem: Problem, rows: tuple[int, ...], columns: tuple[int, ...]) -> list[tuple[SlotArgs, int]]:
    return [slots_of(*each) for each in zip(problem.axes, rows, columns, strict=True)]


def _count(axes: list[tuple[SlotArgs, int]]) -> int:
    return prod(slots.count for slots, _ in axes)


def shape_of(problem: Problem, hardware: Hardware) -> Shape:
    """The largest of which two steps fit into shared memory, or one step of the smallest."""
    token = (padded(problem.head_dim) + padded(problem.head_dim_v)) * problem.itemsize
    room = room_of(hardware) - 2048
    is_hopper = hardware.arch == (9, 0)
    larger = HOPPER_SHAPES.get(problem.itemsize, ()) if is_hopper else ()
    for rows, columns, warps in larger + SHAPES[problem.itemsize]:
        step = (rows + columns) * token
        if 2 * step <= room:  # a third only where two blocks still fit
            is_capped = is_hopper and (rows, columns, problem.itemsize) == (64, 64, 2)
            stages, registers = 3 if 6 * step <= room else 2, REGISTERS if is_capped else 0
            shape = Shape(rows, columns, warps, stages, 0.0, 0.0, 0.0, registers=registers)
            if not (is_hopper and is_miscompiled("bias", problem, shape)):
                return shape
    rows, columns, warps = SHAPES[problem.itemsize][-1]
    return Shape(rows, columns, warps, 1, 0.0, 0.0, 0.0)
