"""How each pass is cut: the tiles with the least predicted time, from the plan's counts.

    time = max(sum over blocks of (start + boxes * pace + masked * mask) / multiprocessors, one block)

`boxes` and `masked` are pairs of tiles as the plan counts them. The rates are measured on one H100;
on other devices they rank tiles by the same proportions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple

from vicinal._tuples import ceil_div
from vicinal.backends.triton.variant import Variant, padded, three
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import AxisPlan, Plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling


class Shape(NamedTuple):
    """How many tokens the tiles of a kernel hold, how it runs, and what that costs.

    Args:
        rows, columns: tokens of a tile and of a box.
        warps, stages: warps of a block, and boxes in flight.
        start: microseconds of one multiprocessor per block, whatever it visits.
        pace: per pair of a tile and a box.
        mask: added to the pace by a mask.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    start: float
    pace: float
    mask: float


SHAPES: dict[tuple[str, int, int], tuple[Shape, ...]] = {
    # (kernel, bytes of an element, head dim up to). Timed on sustained clocks; the smallest of each kind is not timed
    # but scaled: it is for devices with little shared memory.
    ("forward", 2, 64): (
        Shape(64, 64, 4, 3, 1.9, 0.30, 0.16),
        Shape(128, 64, 4, 3, 3.3, 0.60, 0.31),
        Shape(64, 128, 4, 2, 2.2, 0.62, 0.33),
        Shape(64, 32, 4, 2, 1.5, 0.20, 0.08),
    ),
    ("forward", 2, 128): (
        Shape(64, 64, 4, 3, 1.0, 0.62, 0.20),
        Shape(128, 64, 8, 3, 1.5, 1.25, 0.36),
        Shape(128, 128, 8, 2, 2.0, 2.48, 0.60),
        Shape(64, 32, 4, 2, 1.0, 0.38, 0.10),
    ),
    ("forward", 2, 256): (Shape(128, 64, 8, 2, 4.0, 8.0, 0.4), Shape(64, 32, 4, 1, 4.0, 3.6, 0.2)),
    ("forward", 4, 64): (Shape(64, 64, 4, 2, 2.0, 3.8, 0.30), Shape(32, 32, 4, 2, 2.0, 1.5, 0.10)),
    ("forward", 4, 128): (Shape(64, 32, 4, 1, 4.0, 5.2, 0.20), Shape(32, 32, 4, 1, 4.0, 3.2, 0.10)),
    ("forward", 4, 256): (Shape(32, 16, 4, 1, 8.0, 5.0, 0.10),),
    ("queries", 2, 64): (Shape(64, 64, 4, 2, 2.0, 0.45, 0.15), Shape(64, 32, 4, 3, 2.0, 0.22, 0.08)),
    ("queries", 2, 128): (
        Shape(64, 64, 4, 2, 1.5, 0.80, 0.06),
        Shape(128, 64, 8, 2, 2.5, 1.58, 0.30),
        Shape(64, 32, 4, 1, 1.5, 0.55, 0.05),
    ),
    ("queries", 2, 256): (Shape(32, 32, 4, 1, 4.0, 3.6, 0.2),),
    ("queries", 4, 64): (Shape(64, 32, 4, 2, 3.0, 3.6, 0.20), Shape(32, 32, 4, 1, 3.0, 2.4, 0.10)),
    ("queries", 4, 128): (Shape(32, 32, 4, 1, 6.0, 5.0, 0.10), Shape(32, 16, 4, 1, 6.0, 2.8, 0.10)),
    ("queries", 4, 256): (Shape(16, 16, 4, 1, 8.0, 4.0, 0.10),),
    ("keys", 2, 64): (Shape(64, 64, 4, 2, 2.0, 0.70, 0.28), Shape(32, 64, 4, 2, 2.0, 0.70, 0.20)),
    ("keys", 2, 128): (Shape(64, 64, 4, 1, 2.0, 1.50, 0.65), Shape(32, 32, 4, 1, 2.0, 0.60, 0.15)),
    ("keys", 2, 256): (Shape(32, 16, 4, 1, 4.0, 1.5, 0.10),),
    ("keys", 4, 64): (Shape(32, 32, 4, 2, 3.0, 3.0, 0.10),),
    ("keys", 4, 128): (Shape(32, 16, 4, 1, 6.0, 3.0, 0.10),),
    ("keys", 4, 256): (Shape(16, 16, 4, 1, 8.0, 5.0, 0.10),),
}


def shapes(kernel: str, problem: Problem, room: int) -> tuple[Shape, ...]:
    """The shapes of a pass of `problem` that fit into `room` bytes of shared memory, or the smallest."""
    depth = max(padded(problem.head_dim), padded(problem.head_dim_v), 64)
    known = SHAPES[kernel, problem.itemsize, depth]
    return tuple(shape for shape in known if smem_bytes(kernel, problem, shape) <= room) or known[-1:]


def smem_bytes(kernel: str, problem: Problem, shape: Shape) -> int:
    """Shared memory that a kernel takes, at most: its own tokens, boxes in flight, and weights on their way.

    Full float32 on tensor cores splits a tile's own tokens in two.
    """
    token = (padded(problem.head_dim) + padded(problem.head_dim_v)) * problem.itemsize
    own = padded(problem.head_dim) * problem.itemsize if kernel == "forward" else token
    weights = 2 * shape.rows * shape.columns * problem.itemsize if kernel == "keys" else 0
    parts = 2 if problem.itemsize == 4 else 1
    return parts * shape.rows * own + shape.stages * shape.columns * token + weights + 2048


@lru_cache(maxsize=65536)
def _counts(axis: Axis, rows: int, columns: int, is_inverse: bool) -> tuple[int, int, int, int]:
    plan = AxisPlan(axis, rows, columns, is_inverse=is_inverse)
    return plan.q_tiles, plan.visited, plan.full, plan.most_visited


def boxes(volume: int, rank: int, largest: int = 64) -> list[tuple[int, ...]]:
    """Boxes of `volume` tokens whose sides are powers of two, none longer than `largest` if there are several."""
    if rank == 1:
        return [(volume,)]
    sides = [1 << i for i in range(largest.bit_length())]
    return [box for box in product(sides, repeat=rank) if prod(box) == volume]


class Cut(NamedTuple):
    """One way to cut a pass, and the microseconds that it is predicted to take."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shape: Shape
    time: float
    masked: bool


@lru_cache(maxsize=4096)
def cuts(kernel: str, problem: Problem, units: int, room: int, most: int = 16) -> tuple[Cut, ...]:
    """Ways to cut a pass of `problem`, the one with the least predicted time first.

    Args:
        kernel: `"forward"`, `"queries"` or `"keys"`.
        problem: what is asked.
        units: multiprocessors.
        room: bytes of shared memory that a block can use.
    """
    found = sorted(_cuts(kernel, problem, units, room), key=lambda cut: (round(cut.time, 3), cut.rows[::-1]))
    return tuple(found[:most])


def _cuts(kernel: str, problem: Problem, units: int, room: int) -> Iterator[Cut]:
    is_inverse = kernel == "keys"
    heads = problem.heads_kv if is_inverse else problem.heads
    repeats = problem.heads // problem.heads_kv if is_inverse else 1
    for shape in shapes(kernel, problem, room):
        additional = 0 if is_inverse else ceil_div(problem.additional, shape.columns)
        for rows, columns in product(boxes(shape.rows, problem.rank), boxes(shape.columns, problem.rank)):
            counts = [_counts(axis, r, c, is_inverse) for axis, r, c in zip(problem.axes, rows, columns, strict=True)]
            tiles, visited, full, longest = (prod(column) for column in zip(*counts, strict=True))
            pace = shape.pace + shape.mask * (visited - full) / visited
            one = shape.start + (longest * repeats + additional) * pace
            everything = tiles * shape.start + (visited * repeats + tiles * additional) * pace
            time = max(max(problem.batch, 1) * heads * everything / units, one)
            yield Cut(rows, columns, shape, time, visited > full)


def room_of(hardware: Hardware) -> int:
    """Bytes of shared memory that a block can use; where nothing is known of a GPU, what the smallest has."""
    if hardware.kind != "cuda":
        return 2**30  # Triton's interpreter
    return hardware.smem_bytes or 64 * 2**10


def best_cut(kernel: str, problem: Problem, hardware: Hardware) -> Cut:
    """The cut of a pass with the least predicted time."""
    return cuts(kernel, problem, max(hardware.units, 1), room_of(hardware))[0]


def ranked_tilings(problem: Problem, hardware: Hardware) -> tuple[Tiling, ...]:
    """Tilings of the forward pass, the one with the least predicted time first."""
    found = cuts("forward", problem, max(hardware.units, 1), room_of(hardware))
    return tuple(dict.fromkeys(Tiling(cut.rows, cut.columns) for cut in found))


def why_not_tiling(tiling: Tiling, known: tuple[Shape, ...]) -> tuple[str, ...]:
    """Every reason why the forward kernel cannot be cut that way."""
    sides = (*tiling.q_tile, *tiling.kv_tile)
    volumes = [(shape.rows, shape.columns) for shape in known]
    volume = prod(tiling.q_tile), prod(tiling.kv_tile)
    facts = (
        (tiling.kv_origin == "free", 'kv_origin must be "free"'),
        (all(n & (n - 1) == 0 for n in sides), "the sides of tiles must be powers of two"),
        (volume in volumes, f"tiles must hold as many queries and keys as one of {volumes}, got {volume}"),
    )
    return tuple(reason for holds, reason in facts if not holds)


def shape_of(plan: Plan, hardware: Hardware) -> Shape:
    """How the forward kernel runs `plan`.

    Raises:
        Unsupported: if its tiling is not one that the kernel can be cut into.
    """
    problem, tiling = plan.problem, plan.tiling
    known = shapes("forward", problem, room_of(hardware))
    reasons = why_not_tiling(tiling, known)
    if reasons:
        raise Unsupported(f"triton cannot use this tiling ({tiling}): {'; '.join(reasons)}")
    volume = prod(tiling.q_tile), prod(tiling.kv_tile)
    return next(shape for shape in known if (shape.rows, shape.columns) == volume)


def variant_of(kernel: str, problem: Problem, cut: Cut, precision: str, is_wide: bool) -> Variant:
    """What is compiled for a pass of `problem` that is cut that way."""
    return Variant(
        kernel,
        problem.dtype,
        problem.head_dim,
        problem.head_dim_v,
        problem.rank,
        three(cut.rows),
        three(cut.columns),
        masked=cut.masked,
        has_additional=problem.additional > 0 and kernel in ("forward", "queries"),
        has_bias=problem.position_bias,
        precision=precision,
        is_wide=is_wide,
        warps=cut.shape.warps,
        stages=cut.shape.stages,
    )
