"""How each pass is cut: the tiles with the least predicted time, from the plan's counts.

    time = max(sum over blocks of (start + boxes * pace + masked * mask) / multiprocessors, one block)

`boxes` and `masked` are pairs of tiles as the plan counts them. The `rates` are those of one H100, solved for from
times of single passes (benchmarks/results/nvidia-h100-80gb-hbm3/portable-passes.csv); on other devices they rank tiles
by the same proportions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from math import prod
from typing import NamedTuple

from vicinal import tuned
from vicinal._tuples import ceil_div
from vicinal.backends.triton.rates import (
    HELD,
    HOPPER_SHAPES,
    MOST_CHUNK,
    RESIDENT,
    RESIDENT_SINGLE,
    SHAPES,
    Shape,
)
from vicinal.backends.triton.variant import FACTS, Variant, padded, three
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import AxisPlan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

NAME = "triton"

PASSES = ("forward", "queries", "keys")

OPEN = 5
"""Cuts that the model leaves open, so many: it orders those that are near each other no better than by chance."""

MOST_STAGES = 4


def shapes(kernel: str, problem: Problem, hardware: Hardware) -> tuple[Shape, ...]:
    """The shapes of a pass of `problem` that fit into shared memory, or the smallest."""
    kind = kernel, problem.itemsize, max(padded(problem.head_dim), padded(problem.head_dim_v), 64)
    known = SHAPES[kind]
    if can_hold(kernel, problem, hardware):
        known = (*HELD[kernel], *known)
    if hardware.arch == (9, 0):
        own = HOPPER_SHAPES.get(kind, ())
        own = tuple(shape for shape in own if is_plain(problem) or not (shape.registers or shape.lifts))
        instead = [shape[:4] for shape in own if shape.registers]
        known = (*own, *(shape for shape in known if shape[:4] not in instead))
        known = tuple(shape for shape in known if not is_miscompiled(kernel, problem, shape))
    room = room_of(hardware)
    return tuple(shape for shape in known if smem_bytes(kernel, problem, shape) <= room) or known[-1:]


def can_hold(kernel: str, problem: Problem, hardware: Hardware) -> bool:
    """Whether blocks of a pass can hold the bias of boxes, if there are few."""
    is_narrow = problem.itemsize == 2 and max(padded(problem.head_dim), padded(problem.head_dim_v)) <= 32
    is_plain = problem.position_bias and not problem.additional
    # Products of sm_100 to sm_110 end in a memory of their own: registers spill when a bias is held beside it.
    has_registers = hardware.arch[0] not in (10, 11)
    return is_plain and is_narrow and has_registers and (kernel != "keys" or problem.heads == problem.heads_kv)


def is_plain(problem: Problem) -> bool:
    """Whether blocks need few registers beside a tile and a box."""
    return not problem.additional and not problem.position_bias


COMPILER, SEEN = ("triton", "pytorch-triton", "triton-windows"), "3.6."
"""Packages that hold Triton, and the version whose machine code of blocks that lift has been looked at."""


@lru_cache(maxsize=1)
def is_compiler_known() -> bool:
    """Whether Triton is of that version, or not installed, so that nothing will be compiled."""
    for package in COMPILER:
        with suppress(PackageNotFoundError):
            return version(package).startswith(SEEN)
    return True


def is_miscompiled(kernel: str, problem: Problem, shape: Shape) -> bool:
    """Whether Triton 3.6's assembler gets a kernel wrong on Hopper, for all that is known.

    Without pipelining, where the values of a box lie in shared memory never changes, and ptxas 12.8.93 adds to it
    before it is known: with value dims up to 32, tensor cores read from anywhere. So they do where a position bias is
    summed in float32 from keys of 17 to 32 elements and values of up to 16. And where a block lifts its own tokens, and
    two products of the loop are one instruction (a box has as many tokens as a head has elements), it gives the one's
    registers to the other, too, and does not fill them again. Tests look for both in compiled kernels, and blocks lift
    only what was looked at.
    """
    if kernel == "bias":
        dims = padded(problem.head_dim), padded(problem.head_dim_v)
        return problem.itemsize == 4 and shape.rows == 64 and dims == (32, 16)
    if shape.lifts:
        return not (is_compiler_known() and problem.head_dim == problem.head_dim_v == 128 > shape.columns)
    return kernel == "forward" and problem.itemsize == 2 and shape.stages == 1


def smem_bytes(kernel: str, problem: Problem, shape: Shape) -> int:
    """Shared memory that a kernel takes, at most: its own tokens, boxes in flight, and weights on their way.

    Full float32 on tensor cores splits a tile's own tokens in two. A box that is not in flight lies there twice if two
    products want it. The position bias of a box changes places there, 32 bits for each score, or is in flight like its
    keys.
    """
    token = (padded(problem.head_dim) + padded(problem.head_dim_v)) * problem.itemsize
    own = padded(problem.head_dim) * problem.itemsize if kernel == "forward" or shape.lifts else token
    if shape.holds:
        return shape.stages * (shape.rows * 2 * own + shape.holds * shape.columns * (token + 4 * FACTS)) + 2048
    weights = 2 * shape.rows * shape.columns * problem.itemsize if kernel == "keys" else 0
    parts = 2 if problem.itemsize == 4 else 1
    bias = 4 * max(shape.stages - 1, 1) * shape.rows * shape.columns if problem.position_bias else 0
    twice = max(padded(problem.head_dim), padded(problem.head_dim_v)) * problem.itemsize
    again = (2048 if kernel == "forward" else shape.columns * twice) if shape.stages == 1 else 0
    return parts * shape.rows * own + shape.stages * shape.columns * token + again + weights + bias + 2048


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


@lru_cache(maxsize=65536)
def stays_inside(axis: Axis, rows: int, columns: int, is_inverse: bool) -> bool:
    """Whether no box along an axis ends beyond the grid, nor one of a tile without rows, see `tile.span_of`."""
    plan, groups = AxisPlan(axis, rows, columns, is_inverse=is_inverse), axis.subaxes()
    are_alike = len({ceil_div(group.length, rows) for group in groups}) == 1
    return are_alike and all(span.origin + span.visited * columns <= groups[span.group].length for span in plan.spans)


def is_inside(kernel: str, problem: Problem, cut: Cut) -> bool:
    """Whether all boxes of a pass that is cut so lie on the grid, so that none of their tokens is asked for."""
    sides = zip(problem.axes, cut.rows, cut.columns, strict=True)
    return all(stays_inside(axis, rows, columns, kernel == "keys") for axis, rows, columns in sides)


class Cut(NamedTuple):
    """One way to cut a pass, and the microseconds that it is predicted to take."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shape: Shape
    time: float
    masked: bool
    held: tuple[int, ...] = ()  # boxes along each axis whose bias a block holds, if it does
    chunk: int = 1  # batch rows of a block
    sums: bool = False  # see `Variant`


@lru_cache(maxsize=4096)
def cuts(kernel: str, problem: Problem, hardware: Hardware, most: int = 16) -> tuple[Cut, ...]:
    """Ways to cut a pass of `problem`, the one with the least predicted time first.

    A pass for queries that leaves sums for the position bias, too, or all gradients, saves more than its own time.

    Args:
        kernel: `"forward"`, `"queries"` or `"keys"`.
        problem: what is asked.
        hardware: where; its multiprocessors and shared memory count.
    """
    found = sorted(_cuts(kernel, problem, hardware), key=lambda cut: (not cut.sums, round(cut.time, 3), cut.rows[::-1]))
    return tuple(found[:most])


def _cuts(kernel: str, problem: Problem, hardware: Hardware) -> Iterator[Cut]:
    for shape in shapes(kernel, problem, hardware):
        for rows, columns in product(boxes(shape.rows, problem.rank), boxes(shape.columns, problem.rank)):
            cut = _cut(kernel, problem, max(hardware.units, 1), shape, rows, columns)
            if cut is not None:
                yield cut


def _cut(
    kernel: str, problem: Problem, units: int, shape: Shape, rows: tuple[int, ...], columns: tuple[int, ...]
) -> Cut | None:
    """`None` if blocks would hold more than they can, or so little that another shape is for them."""
    is_inverse = kernel == "keys"
    heads = problem.heads_kv if is_inverse else problem.heads
    repeats = problem.heads // problem.heads_kv if is_inverse else 1
    additional = 0 if is_inverse else ceil_div(problem.additional, shape.columns)
    counts = [_counts(axis, r, c, is_inverse) for axis, r, c in zip(problem.axes, rows, columns, strict=True)]
    tiles, visited, full, longest = (prod(column) for column in zip(*counts, strict=True))
    if shape.holds:
        held = tuple(count[3] for count in counts)
        # Where a tile and a box are a whole dilation group, all pairs of them lie as far ahead.
        is_whole = all(count[0] == axis.dilation for count, axis in zip(counts, problem.axes, strict=True))
        sums = kernel == "queries" and is_whole and prod(held) == 1
        if kernel == "forward" and shape.holds > prod(held) == 1:
            return None  # one box has a shape of its own
        resident = RESIDENT_SINGLE if shape.holds == 1 else RESIDENT
        return _held_cut(problem, units, Cut(rows, columns, shape, 0.0, True, held, sums=sums), tiles * heads, resident)
    pace = shape.pace + shape.mask * (visited - full) / visited
    one = shape.start + (longest * repeats + additional) * pace
    everything = tiles * shape.start + (visited * repeats + tiles * additional) * pace
    time = max(max(problem.batch, 1) * heads * everything / units, one)
    return Cut(rows, columns, shape, time, visited > full)


def _held_cut(problem: Problem, units: int, cut: Cut, tiles: int, resident: int) -> Cut | None:
    """Batch rows are divided among blocks so that the last ones to run leave few multiprocessors idle."""
    number = prod(cut.held)
    if number > cut.shape.holds:
        return None
    row = cut.shape.start + number * cut.shape.pace

    def time(chunk: int) -> float:
        turns = ceil_div(tiles * ceil_div(problem.batch, chunk), units * resident)
        return max(turns, 1) * resident * (cut.shape.mask + chunk * row)

    chunk = min(range(1, min(max(problem.batch, 1), MOST_CHUNK) + 1), key=time)
    return cut._replace(time=time(chunk), chunk=chunk)


def room_of(hardware: Hardware) -> int:
    """Bytes of shared memory that a block can use; where nothing is known of a GPU, what the smallest has."""
    if hardware.kind != "cuda":
        return 2**30  # Triton's interpreter
    return hardware.smem_bytes or 64 * 2**10


def best_cut(kernel: str, problem: Problem, hardware: Hardware) -> Cut:
    """The cut of a pass that was measured to be fastest, if that is remembered, else the one with the least predicted
    time."""
    return _best_cut(kernel, problem, hardware, tuned.epoch)


@lru_cache(maxsize=4096)
def _best_cut(kernel: str, problem: Problem, hardware: Hardware, epoch: int) -> Cut:
    remembered = tuned.pick(NAME, kernel, problem, hardware)
    cut = None if remembered is None else cut_as(kernel, problem, hardware, remembered)
    return cut or cuts(kernel, problem, hardware)[0]


def cut_as(kernel: str, problem: Problem, hardware: Hardware, choice: tuned.Choice) -> Cut | None:
    """The cut that a choice stands for, or `None` if the pass cannot be cut so; of several the best by the model."""
    sides = (*choice.rows, *choice.columns)
    if len(choice.rows) != problem.rank or any(n & (n - 1) for n in sides):
        return None
    room, found = room_of(hardware), list[Cut]()
    for shape in shapes(kernel, problem, hardware):
        way = shape._replace(warps=choice.warps or shape.warps, stages=choice.stages or shape.stages)
        is_one = (way.rows, way.columns, way.warps) == (prod(choice.rows), prod(choice.columns), shape.warps)
        has_stages = way.stages == shape.stages or 2 <= way.stages <= MOST_STAGES
        if is_one and has_stages and smem_bytes(kernel, problem, way) <= room:
            cut = _cut(kernel, problem, max(hardware.units, 1), way, choice.rows, choice.columns)
            found += [] if cut is None else [cut]
    return min(found, key=lambda cut: (not cut.held, cut.time), default=None)


@lru_cache(maxsize=1024)
def open_cuts(kernel: str, problem: Problem, hardware: Hardware) -> tuple[Cut, ...]:
    """What is left open: the cuts with the least predicted times, each with as many boxes in flight, fewer and more."""
    room = room_of(hardware)
    found: dict[tuned.Choice, Cut] = {}
    for cut in cuts(kernel, problem, hardware)[:OPEN]:
        stages = cut.shape.stages
        # Not down to one, see `is_miscompiled`.
        numbers = (stages, *(n for n in (stages - 1, stages + 1) if 2 <= n <= MOST_STAGES))
        ways = [cut.shape._replace(stages=n) for n in numbers]
        fitting = [way for way in ways if smem_bytes(kernel, problem, way) <= room]
        for way in fitting or ways[:1]:
            found.setdefault(choice_of(cut._replace(shape=way)), cut._replace(shape=way))
    return tuple(found.values())


def choice_of(cut: Cut) -> tuned.Choice:
    """What can be remembered of a cut."""
    return tuned.Choice(cut.rows, cut.columns, cut.shape.warps, cut.shape.stages)


def ranked_tilings(problem: Problem, hardware: Hardware) -> tuple[Tiling, ...]:
    """Tilings of the forward pass, the one with the least predicted time first."""
    found = cuts("forward", problem, hardware)
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


def forward_cut(problem: Problem, tiling: Tiling, hardware: Hardware) -> Cut:
    """How the forward kernel runs `problem` under `tiling`.

    Raises:
        Unsupported: if it cannot be cut so.
    """
    return _forward_cut(problem, tiling, hardware, tuned.epoch)


@lru_cache(maxsize=4096)
def _forward_cut(problem: Problem, tiling: Tiling, hardware: Hardware, epoch: int) -> Cut:
    known = shapes("forward", problem, hardware)
    reasons = why_not_tiling(tiling, known)
    if reasons:
        raise Unsupported(f"triton cannot use this tiling ({tiling}): {'; '.join(reasons)}")
    best = best_cut("forward", problem, hardware)
    if (best.rows, best.columns) == (tiling.q_tile, tiling.kv_tile):
        return best
    volume = prod(tiling.q_tile), prod(tiling.kv_tile)
    fitting = [shape for shape in known if (shape.rows, shape.columns) == volume]
    units = max(hardware.units, 1)
    found = (_cut("forward", problem, units, shape, tiling.q_tile, tiling.kv_tile) for shape in fitting)
    return next(cut for cut in found if cut is not None)


def variant_of(kernel: str, problem: Problem, cut: Cut, precision: str, is_wide: bool) -> Variant:
    """What is compiled for a pass of `problem` that is cut that way."""
    return Variant(
        f"{kernel}_held" if cut.held and kernel in HELD else kernel,
        problem.dtype,
        problem.head_dim,
        problem.head_dim_v,
        problem.rank,
        three(cut.rows),
        three(cut.columns),
        masked=cut.masked,
        has_additional=problem.additional > 0 and kernel in ("forward", "queries"),
        has_bias=problem.position_bias,
        is_signed=problem.scale <= 0 and (kernel == "forward" or problem.position_bias),
        precision=precision,
        is_wide=is_wide,
        is_inside=kernel in PASSES and cut.masked and not cut.held and is_inside(kernel, problem, cut),
        lifts=cut.shape.lifts and kernel in PASSES,
        warps=cut.shape.warps,
        stages=cut.shape.stages,
        registers=cut.shape.registers,
        sums=cut.sums and kernel == "queries",
        held=three(cut.held) if cut.held and kernel in (*HELD, "whole") else (0, 0, 0),
    )
