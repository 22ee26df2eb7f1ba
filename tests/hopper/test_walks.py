"""What the kernels visit and hide, on any machine: each pair inside a window once, and no other.

The kernels' own source of spans and masks is run by NumPy, as in `test_masks`, for whole problems and for the queries
that see a key, too.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels' source needs triton, which is not installed")

from on_cpu import array, be_block, device

from vicinal.backends.hopper.cost import ranked_tilings
from vicinal.backends.hopper.cost_backward import HEAD_DIMS, ranked_cuts
from vicinal.backends.hopper.launch import axis_args, tiles_of
from vicinal.backends.hopper.variant import AxisArgs, Variant, three_axes, variant_of
from vicinal.plan import make_plan
from vicinal.problem import Axis, Problem

DEVICE = device()


def draw(rng: random.Random) -> Problem:
    rank = rng.choice((1, 2, 2, 3))
    longest = {1: 300, 2: 24, 3: 11}[rank]
    axes: list[Axis] = []
    for _ in range(rank):
        length = rng.randint(1, longest)
        dilation = rng.choice((1, 1, rng.randint(1, length)))
        kernel = rng.choice((rng.randint(1, length // dilation), length // dilation))
        stride = rng.choice((1, rng.randint(1, kernel)))
        axes.append(Axis(length, kernel, stride, dilation, rng.random() < 0.25))
    return Problem(tuple(axes), head_dim=rng.choice(HEAD_DIMS), heads=2)


def variants(problem: Problem, kernel: str, rng: random.Random) -> Iterator[Variant]:
    """The best cut of a pass, and one that nobody would choose."""
    if kernel == "forward":
        tilings = ranked_tilings(problem, 10_000)
        for tiling in (tilings[0], rng.choice(tilings)):
            yield variant_of(make_plan(problem, tiling))
    else:
        cuts = ranked_cuts(kernel, problem, 10_000)
        for cut in (cuts[0], rng.choice(cuts)):
            yield cut.variant


def number_of(x: Any) -> int:
    return int(np.asarray(x).item())


def tokens(axes: tuple[Axis, ...], spans: Any, members: tuple[Any, ...]) -> tuple[np.ndarray[Any, Any], Any]:
    """Numbers of the tokens at these members of a tile's groups, and whether there are such tokens."""
    number, exists = 0, True
    for axis, span, member in zip(axes, spans, members, strict=True):
        number = number * axis.length + span.group + member * axis.dilation
        exists = exists & (member < span.members)
    return np.asarray(number), np.asarray(exists)


def walked(problem: Problem, variant: Variant, slab: int) -> np.ndarray[Any, Any]:
    """How often each pair of a row and a column is seen, `[tokens, tokens]`."""
    axes = three_axes(problem.axes)
    tiles, blocks = tiles_of(axes, variant)
    args = [AxisArgs(*map(array, axis_args(axis, count))) for axis, count in zip(axes, tiles, strict=True)]
    count = np.zeros((problem.tokens, problem.tokens), np.int32)
    for block in range(blocks):
        be_block(block, 0, 0)
        tile = DEVICE.tile_of(args, slab, 1, variant)
        spans = [type(span)(*map(number_of, span)) for span in tile[2:]]
        for number in range(variant.consumers):
            places = DEVICE.row_places(array(np.arange(64)), variant, number)
            row, row_exists = tokens(
                axes, spans, [s.first + p for s, p in zip(spans, map(np.ravel, places), strict=True)]
            )
            mask = DEVICE.mask_of(tile, args, None, variant, number)
            edge = DEVICE.edge_of(tile, args, variant, number) if variant.skips else None
            for box in product(*(range(span.visited) for span in spans)):
                if variant.skips and not DEVICE.sees_box(*map(array, box), edge, variant, number):
                    continue
                places = np.unravel_index(np.arange(prod(variant.kv_box)), variant.kv_box)
                members = [s.origin + b * n + p for s, b, n, p in zip(spans, box, variant.kv_box, places, strict=True)]
                column, column_exists = tokens(axes, spans, members)
                seen = seen_by(mask, args, variant, box)[:, : len(column)] & row_exists[:, None]
                assert not (seen & ~column_exists).any(), "a column that does not exist is seen"
                r, c = np.nonzero(seen)
                np.add.at(count, (row[r], column[c]), 1)
    return count


def seen_by(mask: Any, args: Any, variant: Variant, box: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Which columns of a box each row of a warpgroup sees, `[64, columns]`."""
    box = tuple(map(array, box))
    if variant.mask == "coded":
        codes = DEVICE.penalties(mask, *box, None, variant)
        places = DEVICE.place_code(variant, 4).memory
        hidden = np.asarray(codes, np.float64) @ np.asarray(places, np.float64).T
        assert ((hidden == 0) | (hidden <= -(2.0**100))).all(), "what is added to a score is neither 0 nor huge"
        return np.broadcast_to(hidden == 0, (64, variant.keys))
    scores = array(np.zeros((64, variant.keys)))
    if variant.mask == "select":
        scores = DEVICE.select(scores, mask, *box, None, variant)
    return np.asarray(scores) == 0


KERNELS = ("forward", "queries", "keys")


def check(problem: Problem, variant: Variant, slab: int) -> None:
    pairs = np.ones((1, 1), np.int32)
    for axis in problem.axes:
        seen = np.zeros((axis.length, axis.length), np.int32)
        for query in range(axis.length):
            seen[query, axis.window(query)] = 1
        pairs = np.kron(pairs, seen)
    wrong = np.argwhere(walked(problem, variant, slab) != (pairs.T if variant.is_inverse else pairs))
    assert not len(wrong), f"{len(wrong)} pairs are wrong, the first at {wrong[0]}: {problem!r}, {variant}"


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_pair_is_seen_once(kernel: str, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(12):
        problem = draw(rng)
        for variant in variants(problem, kernel, rng):
            check(problem, variant, rng.choice((1, 2, 50)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("window", [63, 64, 65, 127, 128, 129, 193])
@pytest.mark.parametrize("is_causal", [False, True])
def test_boxes_that_windows_just_fill(kernel: str, window: int, is_causal: bool) -> None:
    """A box passes without a mask if every row sees all of it, and not if one column is missing."""
    problem = Problem.grid((420,), window, is_causal=is_causal, heads=1, head_dim=128)
    for variant in dict.fromkeys(variants(problem, kernel, random.Random(window))):
        check(problem, variant, 1)
