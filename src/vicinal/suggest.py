"""Which window, stride and tiling to take, for a wanted sparsity or speed-up."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import inf, log, prod
from typing import NamedTuple, overload

from vicinal._tuples import canonical, ceil_div
from vicinal.errors import InvalidProblem
from vicinal.hardware import Hardware
from vicinal.plan import AxisPlan, make_plan
from vicinal.problem import FLOATS, Axis, Problem
from vicinal.simulate import Estimate, simulate
from vicinal.tiling import Tiling

_SHAPES = 10
"""Tile shapes that are tried per volume: the most compact ones, whose halo is smallest."""

_WINDOWS = 16
"""Window sizes that are tried per axis: multiples of the KV tile, thinned to about so many."""


@dataclass(frozen=True)
class Suggestions(Sequence[Estimate]):
    """Estimates, best first. Behaves like a tuple and prints itself as a table.

    Each is an `Estimate`: `.problem` has the window and stride, `.plan.tiling` the tiles.
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
            cells = [cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
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
    come first. Then counts, in steps of 5 %, how far a plan misses the wish times how far its worst
    query tile stays behind the bound; then how compact the window is in tokens (an axis that is
    wholly seen is left out); then a small stride, which is closest to a sliding window.

    Strides that bring no more speed-up than a smaller one are dropped, and each window and stride
    appears once, with its best tiling. Searched are windows of a multiple of the KV tile (about 16
    sizes per axis, short axes completely), and the most compact tiles of powers of two that fit into
    the device's shared memory twice over; so what is found is good, not proven best. Where nothing
    is near the wish, the nearest that there is comes back.

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
    wanted = _wanted(sparsity, speedup)
    if not isinstance(count, int) or count < 1:
        raise InvalidProblem(f"count must be an integer of at least 1, got {count!r}")
    fields = {"batch": batch, "heads": heads, "head_dim": head_dim, "dtype": dtype}
    Problem.grid(grid, 1, **fields)  # Refuses what no window could mend.
    hardware.peak(dtype)
    tried = tuple(_tilings(grid, hardware, head_dim, FLOATS[dtype]) if tilings is None else tilings)
    for tiling in tried:
        make_plan(Problem.grid(grid, 1, **fields), tiling)
    found = [
        simulate(make_plan(Problem.grid(grid, option.window, stride=option.stride, **fields), option.tiling), hardware)
        for option in _best(grid, tried, wanted, sparsity is None, count)
    ]
    wish = f"sparsity {sparsity:g}" if sparsity is not None else f"speed-up {speedup:g}x"
    return Suggestions(tuple(found), f"{'x'.join(map(str, grid))} grid on {hardware.name}, wanted {wish}")


def _wanted(sparsity: float | None, speedup: float | None) -> float:
    """The wish as a factor over dense attention."""
    if (sparsity is None) == (speedup is None):
        given = "neither" if sparsity is None else f"sparsity={sparsity} and speedup={speedup}"
        raise InvalidProblem(f"give either sparsity (such as 0.9) or speedup (such as 8.0), got {given}")
    if sparsity is not None:
        if not 0 <= sparsity < 1:
            raise InvalidProblem(
                f"sparsity must lie in [0, 1), as a share of pairs to leave out, got {sparsity}; "
                f"for a factor over dense attention use speedup="
            )
        return 1 / (1 - sparsity)
    assert speedup is not None
    if not 1 <= speedup < inf:
        raise InvalidProblem(
            f"speedup must be at least 1, as a factor over dense attention, got {speedup}; "
            f"for a share of pairs to leave out use sparsity="
        )
    return speedup


# ---- tiles ----------------------------------------------------------------------------------------------------


def _tilings(grid: tuple[int, ...], hardware: Hardware, head_dim: int, itemsize: int) -> Iterator[Tiling]:
    q_volume, kv_volume = _volumes(hardware, head_dim, itemsize)
    for q_tile, kv_tile in product(_shapes(grid, q_volume), _shapes(grid, kv_volume)):
        yield Tiling(q_tile, kv_tile)


def _volumes(hardware: Hardware, head_dim: int, itemsize: int) -> tuple[int, int]:
    """Tokens per query and KV tile: a query tile and two KV tiles in flight (keys and values) fit into shared memory."""
    for q_volume, kv_volume in ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (32, 16)):
        if (q_volume + 2 * 2 * kv_volume) * head_dim * itemsize <= hardware.smem_bytes:
            return q_volume, kv_volume
    return 16, 16


def _shapes(grid: tuple[int, ...], volume: int) -> list[tuple[int, ...]]:
    """Boxes of powers of two with that volume, or the largest that the grid holds; most compact first."""
    sides = [[2**power for power in range(length.bit_length() + 1) if 2**power < 2 * length] for length in grid]
    volume = min(volume, prod(axis[-1] for axis in sides))
    boxes = [box for box in product(*sides) if prod(box) == volume]
    return sorted(boxes, key=lambda box: (max(box) / min(box), box))[:_SHAPES]


# ---- one axis -------------------------------------------------------------------------------------------------


class _Choice(NamedTuple):
    """A window and a stride on one axis, under some tiling."""

    window: int
    stride: int
    speedup: float
    is_perfect: bool


@lru_cache(maxsize=4096)
def _choices(length: int, q_tile: int, kv_tile: int, kv_origin: str) -> tuple[_Choice, ...]:
    """All windows that are worth a try on an axis, each with the strides that pay."""
    return tuple(
        choice
        for window in _windows(length, kv_tile)
        for choice in _paying_strides(length, window, q_tile, kv_tile, kv_origin)
    )


def _windows(length: int, kv_tile: int) -> list[int]:
    if length <= _WINDOWS:
        return list(range(1, length + 1))
    step = kv_tile
    while length // step > _WINDOWS:
        step *= 2
    below = {2**power for power in range(step.bit_length()) if 2**power < step}
    return sorted({*range(step, length + 1, step), *below, length})


def _paying_strides(length: int, window: int, q_tile: int, kv_tile: int, kv_origin: str) -> Iterator[_Choice]:
    """Strides, ascending, each with fewer KV tiles in the worst query tile than any before it."""
    tiles, best = ceil_div(length, kv_tile), tiles_before = ceil_div(length, kv_tile) + 1, 0
    fewest = ceil_div(window, kv_tile)
    del tiles_before
    for stride in _strides(window, q_tile):
        plan = AxisPlan(Axis(length, window, stride), q_tile, kv_tile, kv_origin)
        if plan.most_visited < best:
            best = plan.most_visited
            perfect = plan.full == plan.visited and tiles * window >= best * length
            yield _Choice(window, stride, tiles / best, perfect)
        if best == fewest:
            return
