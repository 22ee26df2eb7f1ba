"""Which window, stride and tiling to take, for a wanted sparsity or speed-up."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf, lcm, log, prod
from typing import Any, NamedTuple, overload

from vicinal._tuples import canonical, ceil_div, times
from vicinal.errors import InvalidProblem
from vicinal.hardware import Hardware
from vicinal.plan import AxisPlan, make_plan
from vicinal.problem import FLOATS, Axis, Problem
from vicinal.simulate import Estimate, readable_time, simulate
from vicinal.tiling import Tiling

_SHAPES = 10
"""Tile shapes that are tried per volume: the most compact ones, whose halo is smallest."""

_LADDER = {1: 1.02, 2: 1.08, 3: 1.2}
"""Ratio of neighboring window sizes that are tried on a long axis, by the grid's rank."""

_ALL = 16
"""Up to so many window sizes per axis, all of them are tried."""


@dataclass(frozen=True)
class Suggestions(Sequence[Estimate]):
    """Estimates, best first. Behaves like a tuple and prints itself as a table.

    Each is an `Estimate`: `.problem` has the window and stride, `.plan.tiling` the tiles.

    Args:
        estimates: what was found.
        wish: what was asked for, in words.

    Example:
        >>> best, *others = suggest((64, 96), Hardware.named("h100-sxm"), speedup=8, count=3)
        >>> len(others), best.is_perfect
        (2, True)
    """

    estimates: tuple[Estimate, ...]
    wish: str

    @overload
    def __getitem__(self, index: int) -> Estimate: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Estimate, ...]: ...
    def __getitem__(self, index: int | slice) -> Estimate | tuple[Estimate, ...]:
        return self.estimates[index]

    def __len__(self) -> int:
        return len(self.estimates)

    def __str__(self) -> str:
        header = ("window", "stride", "query tile", "KV tile", "sparsity", "speed-up", "bound", "time", "")
        rows = [header, *(_row(estimate) for estimate in self.estimates)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [self.wish]
        for row in rows:
            # Shapes read from the left, numbers from the right.
            cells = [
                cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append(("  " + "  ".join(cells)).rstrip())
        return "\n".join(lines)


def suggest(
    grid: Sequence[int],
    hardware: Hardware,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
    count: int = 10,
    tilings: Iterable[Tiling] | None = None,
    batch: int = 1,
    heads: int = 1,
    head_dim: int = 64,
    dtype: str = "bfloat16",
) -> Suggestions:
    """Windows, strides and tilings near a wish, best first. Give either `sparsity` or `speedup`.

    Perfectly block-sparse plans (no masks, and the worst query tile reaches the FLOP-wise bound)
    come first. Then counts the product of three factors, to one percent: how far a plan misses the
    wish; pairs that it performs for each useful one, if all its query tiles were as its worst; and the
    fifth root of the window's elongation (its longest side over its shortest; a side that fills its
    axis is excused for being short), because the nearest keys matter most. Then small strides, which
    are closest to a sliding window.

    Of one window, a stride is listed only if it wastes less than every smaller stride (by the number
    of queries that share a window), each with its best tiling. Searched are windows of a multiple of
    the KV tile (a geometric ladder of them on long axes, all sizes on short ones) and the most compact
    tiles of powers of two that fit into the device's shared memory. What is found is good, not proven
    best; where nothing is near the wish, the nearest comes back.

    Args:
        grid: tokens per axis, 1 to 3 axes.
        hardware: sets the tile volume and the time.
        sparsity: share of (query, key) pairs to leave out, in `[0, 1)`; 0.9 keeps a tenth.
        speedup: worst-tile speed-up over dense attention (see `simulate`), at least 1.
        count: the most suggestions to return.
        tilings: try these instead, for example those that a backend offers.
        batch, heads, head_dim, dtype: of the problem; they set tile volume and time, not the ranking.

    Raises:
        InvalidProblem: naming the argument, what was expected and what came.

    Example:
        >>> found = suggest((30, 48, 80), Hardware.named("h100-sxm"), sparsity=0.9, heads=24, head_dim=128)
        >>> found[0].is_perfect
        True
    """
    grid = canonical(tuple(grid), len(tuple(grid)), "grid")
    # No window leaves out more than all keys but one.
    wanted = min(_wanted(sparsity, speedup), float(prod(grid)))
    if count < 1:
        raise InvalidProblem(f"count must be at least 1, got {count}")
    fields = {"batch": batch, "heads": heads, "head_dim": head_dim, "dtype": dtype}
    Problem.grid(grid, 1, **fields)  # Refuses what no window could mend.
    hardware.peak(dtype)
    tried = tuple(_tilings(grid, hardware, head_dim, FLOATS[dtype]) if tilings is None else tilings)
    if not tried:
        raise InvalidProblem("tilings must hold at least one tiling, got none; leave it out to try the usual ones")
    for tiling in tried:
        make_plan(Problem.grid(grid, 1, **fields), tiling)
    found = [
        simulate(make_plan(Problem.grid(grid, option.window, stride=option.stride, **fields), option.tiling), hardware)
        for option in _best(_Wish(grid, wanted, sparsity is None), tried, count)
    ]
    wish = f"sparsity {sparsity:g}" if sparsity is not None else f"speed-up {speedup:g}x"
    return Suggestions(tuple(found), f"{'x'.join(map(str, grid))} grid on {hardware.name}, wanted {wish}")


def _wanted(sparsity: float | None, speedup: float | None) -> float:
    """The wish as a factor over dense attention."""
    if sparsity is None and speedup is not None:
        if not 1 <= speedup < inf:
            raise InvalidProblem(
                f"speedup must be at least 1, as a factor over dense attention, got {speedup}; "
                f"for a share of pairs to leave out use sparsity="
            )
        return speedup
    if sparsity is not None and speedup is None:
        if not 0 <= sparsity < 1:
            raise InvalidProblem(
                f"sparsity must lie in [0, 1), as a share of pairs to leave out, got {sparsity}; "
                f"for a factor over dense attention use speedup="
            )
        return 1 / (1 - sparsity)
    given = "neither" if sparsity is None else "both"
    raise InvalidProblem(f"give either sparsity (such as 0.9) or speedup (such as 8.0), got {given}")


def _tilings(grid: tuple[int, ...], hardware: Hardware, head_dim: int, itemsize: int) -> Iterator[Tiling]:
    q_volume, kv_volume = _volumes(hardware, head_dim, itemsize)
    for q_tile, kv_tile in product(_shapes(grid, q_volume), _shapes(grid, kv_volume)):
        yield Tiling(q_tile, kv_tile)


def _volumes(hardware: Hardware, head_dim: int, itemsize: int) -> tuple[int, int]:
    """Tokens per query tile and KV tile: one of queries and two of keys and values fit into shared memory."""
    for q_volume, kv_volume in ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 16)):
        if (q_volume + 2 * 2 * kv_volume) * head_dim * itemsize <= hardware.smem_bytes:
            return q_volume, kv_volume
    return 16, 16


def _shapes(grid: tuple[int, ...], volume: int) -> list[tuple[int, ...]]:
    """Boxes of powers of two with that volume, or the largest that the grid holds; most compact first."""
    sides = [[2**power for power in range(length.bit_length() + 1) if 2**power < 2 * length] for length in grid]
    # A grid of few tiles has nothing to leave out, so small grids get small tiles; 16 is a matrix instruction's side.
    while volume > 16 and 8 * volume > prod(grid):
        volume //= 2
    volume = min(volume, prod(axis[-1] for axis in sides))
    boxes = [box for box in product(*sides) if prod(box) == volume]
    return sorted(boxes, key=lambda box: (max(box) / min(box), box))[:_SHAPES]


class _Choice(NamedTuple):
    """A window and a stride on one axis, under some tiling, measured by its worst query tile."""

    stride: int
    speedup: float
    waste: float
    is_perfect: bool


def _windows(length: int, kv_tile: int, rank: int) -> list[int]:
    if length <= _ALL:
        return list(range(1, length + 1))
    below = {2**power for power in range(kv_tile.bit_length()) if 2**power < kv_tile}
    most = length // kv_tile
    sizes = set(range(1, most + 1))
    if most > _ALL:
        steps = int(log(most) / log(_LADDER[rank])) + 1
        sizes = {round(_LADDER[rank] ** step) for step in range(steps)} | {most}
    return sorted({*below, *(size * kv_tile for size in sizes), length})


@lru_cache(maxsize=65536)
def _paying_strides(length: int, window: int, q_tile: int, kv_tile: int, kv_origin: str) -> tuple[_Choice, ...]:
    """Strides, ascending, each with fewer KV tiles in its worst query tile than any before it."""
    tiles, fewest, least = ceil_div(length, kv_tile), length + 1, ceil_div(window, kv_tile)
    choices: list[_Choice] = []
    for stride in _strides(window, q_tile):
        shorter, narrower = _sample(length, window, lcm(stride, q_tile, kv_tile))
        plan = AxisPlan(Axis(shorter, narrower, stride), q_tile, kv_tile, kv_origin)
        most_visited = plan.most_visited + (window - narrower) // kv_tile
        if most_visited < fewest:
            fewest = most_visited
            waste = ceil_div(length, q_tile) * q_tile * fewest * kv_tile / (length * window)
            is_perfect = plan.full == plan.visited and tiles * window >= fewest * length
            choices.append(_Choice(stride, tiles / fewest, waste, is_perfect))
        if fewest == least:
            break
    return tuple(choices)


def _sample(length: int, window: int, period: int) -> tuple[int, int]:
    """A shorter axis and a smaller window with the same query tiles: both borders, and a period or more between them.

    Away from the borders windows repeat with the period of strides and tiles; shortening by whole periods keeps the
    far border where it is in relation to them. A window without an even number of periods reaches as much less far on
    either side of its query: every query tile loses the same number of whole KV tiles, none of which needs a mask.
    """
    inside = max(window // period // 2 - 1, 0) * 2 * period
    between = max((length - window) // period - 4, 0) * period
    return length - inside - between, window - inside


def _strides(window: int, q_tile: int) -> list[int]:
    if window <= 2 * _ALL:
        return list(range(1, window + 1))
    powers = (2**power for power in range(window.bit_length()))
    return sorted({*powers, *range(q_tile, min(window, _ALL * q_tile) + 1, q_tile), window})


class _Option(NamedTuple):
    """One candidate; the smaller its rank, the better."""

    rank: tuple[bool, int, int, float, int, tuple[tuple[int, ...], ...]]
    waste: float
    window: tuple[int, ...]
    stride: tuple[int, ...]
    tiling: Tiling


@dataclass(frozen=True, slots=True)
class _Wish:
    grid: tuple[int, ...]
    factor: float
    is_speedup: bool

    def option(self, tiling: Tiling, window: tuple[int, ...], axes: Sequence[_Choice]) -> _Option:
        bound = prod(self.grid) / prod(window)
        # Dense attention may pad its tiles even more; nobody wishes for that part of a speed-up.
        reached = min(prod(choice.speedup for choice in axes), bound) if self.is_speedup else bound
        waste = prod(choice.waste for choice in axes)
        sides = [size for size, length in zip(window, self.grid, strict=True) if size < length]
        elongation = max(window) / min(sides) if sides else 1.0
        cost = max(reached / self.factor, self.factor / reached) * waste * max(elongation, 1.0) ** 0.2
        stride = tuple(choice.stride for choice in axes)
        is_perfect = all(choice.is_perfect for choice in axes)
        # Among equals compact tiles; the shapes at the end only make the order definite.
        bulk = max(tiling.q_tile) + max(tiling.kv_tile)
        shapes = (window, tiling.q_tile, tiling.kv_tile)
        rank = (not is_perfect, round(100 * log(cost)), prod(stride), round(cost, 9), bulk, shapes)
        return _Option(rank, waste, window, stride, tiling)

    def windows(self, kv_tile: tuple[int, ...], within: float) -> list[tuple[int, ...]]:
        """Windows whose FLOP-wise bound is within a factor of the wish."""
        axes = [_windows(length, tile, len(self.grid)) for length, tile in zip(self.grid, kv_tile, strict=True)]
        pairs = prod(self.grid) / self.factor
        low, high = pairs / within, pairs * within
        return [window for window in product(*axes) if low <= prod(window) <= high]

    def choices(self, tiling: Tiling, window: tuple[int, ...]) -> Iterator[tuple[_Choice, ...]]:
        for length, size, q_tile, kv_tile in zip(self.grid, window, tiling.q_tile, tiling.kv_tile, strict=True):
            yield _paying_strides(length, size, q_tile, kv_tile, tiling.kv_origin)


def _best(wish: _Wish, tilings: tuple[Tiling, ...], count: int) -> list[_Option]:
    # The fastest stride of every window first; only the best windows are then tried with smaller strides.
    within, pool = 1.5, list[_Option]()
    while not pool:
        near = {kv_tile: wish.windows(kv_tile, within) for kv_tile in {tiling.kv_tile for tiling in tilings}}
        fastest = (
            wish.option(tiling, window, [strides[-1] for strides in wish.choices(tiling, window)])
            for tiling in tilings
            for window in near[tiling.kv_tile]
        )
        pool = heapq.nsmallest(16 * count, fastest, key=lambda option: option.rank)
        within *= 1.5
    for window, tiling in {(option.window, option.tiling) for option in pool}:
        pool += [wish.option(tiling, window, axes) for axes in product(*wish.choices(tiling, window))]
    kept: dict[tuple[int, ...], list[_Option]] = {}
    # Ascending strides, so that whatever makes a larger one superfluous is met before it.
    for option in sorted(pool, key=lambda option: (prod(option.stride), round(option.waste, 9), option.rank)):
        smaller = kept.setdefault(option.window, [])
        if all(option.waste < other.waste * (1 - 1e-12) for other in smaller):
            smaller.append(option)
    return heapq.nsmallest(count, (option for group in kept.values() for option in group), key=lambda o: o.rank)


def _row(estimate: Estimate) -> tuple[str, ...]:
    problem, tiling = estimate.problem, estimate.plan.tiling
    shapes = (problem.kernel_size, problem.stride, tiling.q_tile, tiling.kv_tile)
    return (
        *(times(shape) for shape in shapes),
        f"{estimate.sparsity:.1%}",
        # Dense attention may pad its tiles even more than this plan; that part of a speed-up is nothing to show.
        f"{min(estimate.speedup.worst_tile, estimate.speedup.flop_wise):.2f}x",
        f"{estimate.speedup.flop_wise:.2f}x",
        readable_time(estimate.time_s),
        "block-sparse" if estimate.is_perfect else "",
    )


def sweep(
    grid: Sequence[int],
    hardware: Hardware,
    tiling: Tiling,
    *,
    kernel_sizes: Iterable[int | Sequence[int]] | None = None,
    strides: Iterable[int | Sequence[int]] | None = None,
    **fields: Any,
) -> tuple[Estimate, ...]:
    """Estimates of every window with every stride that fits into it, under one tiling: the table behind a heat map.

    Args:
        grid: tokens per axis.
        hardware, tiling: of all estimates.
        kernel_sizes: windows; by default one to seven eighths of the grid, rounded up to KV tiles,
            as far as that is not the whole grid.
        strides: by default 1, then the query tile's side on one axis after the other, the last axis first,
            then twice the query tile.
        fields: other fields of `Problem.grid`, such as `heads`.

    Raises:
        InvalidProblem: naming the argument, what was expected and what came.

    Example:
        >>> found = sweep((64, 96), Hardware.named("h100-sxm"), Tiling((8, 16), (8, 16)), kernel_sizes=[16, 32])
        >>> [f"{estimate.speedup.worst_tile:.0f}x" for estimate in found]
        ['8x', '16x', '24x', '3x', '5x', '6x', '6x']
    """
    grid, rank = tuple(grid), len(tuple(grid))
    if len(tiling.q_tile) != rank:
        raise InvalidProblem(f"tiling must have one number per axis of the grid {grid}, got {tiling}")
    if kernel_sizes is None:
        eighths = [
            tuple(
                min(ceil_div(length * part, 8 * tile) * tile, length)
                for length, tile in zip(grid, tiling.kv_tile, strict=True)
            )
            for part in range(1, 8)
        ]
        kernel_sizes = dict.fromkeys(window for window in eighths if window != grid)
    if strides is None:
        ladder = [(1,) * (rank - i) + tiling.q_tile[rank - i :] for i in range(rank + 1)]
        strides = dict.fromkeys([*ladder, tuple(2 * side for side in tiling.q_tile)])
    windows = [canonical(size, rank, "kernel_sizes") for size in kernel_sizes]
    steps = [canonical(step, rank, "strides") for step in strides]
    return tuple(
        simulate(make_plan(Problem.grid(tuple(grid), window, stride=step, **fields), tiling), hardware)
        for window, step in product(windows, steps)
        if all(1 <= a <= b for a, b in zip(step, window, strict=True))
    )
