"""Masks and spans of the Hopper kernels against the definition, on any machine: their own source, run by NumPy."""

from __future__ import annotations

import random
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels' source needs triton, which is not installed")

from on_cpu import Array, array, device

from vicinal._tuples import ceil_div
from vicinal.backends.hopper.cost import RATES, kv_tiles, q_tiles
from vicinal.backends.hopper.launch import axis_args
from vicinal.backends.hopper.variant import AxisArgs, Variant, three, three_axes, variant_of, why_not_tiling
from vicinal.plan import AxisPlan, make_plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

DEVICE = device()
KINDS = sorted({(consumers, keys) for _, consumers, keys in RATES})
BOXES = [(rank, *kind, box) for rank in (1, 2, 3) for kind in KINDS for box in kv_tiles(*kind, rank)]
BOXES += [(2, 1, 64, (1, 64)), (2, 2, 128, (64, 2)), (3, 1, 64, (1, 64, 1)), (3, 2, 128, (2, 1, 64))]  # never chosen


def draw(seed: int, rank: int, q_tile: tuple[int, ...], kv_tile: tuple[int, ...]) -> tuple[Problem, Tiling]:
    rng = random.Random(seed)
    shape = tuple(rng.randint(1, 3 * q + 5) for q in q_tile)
    dilation = tuple(rng.choice((1, 1, rng.randint(1, n))) for n in shape)
    kernel = tuple(rng.randint(1, n // d) for n, d in zip(shape, dilation, strict=True))
    stride = tuple(rng.choice((1, rng.randint(1, k))) for k in kernel)
    causal = tuple(rng.random() < 0.3 for _ in shape)
    problem = Problem.grid(
        shape, kernel, stride=stride, dilation=dilation, is_causal=causal, heads=1, head_dim=64, dtype="bfloat16"
    )
    return problem, Tiling(q_tile, kv_tile)


def spans(problem: Problem, variant: Variant, place: tuple[int, ...]) -> tuple[Any, list[Any]]:
    """What a kernel finds of the query tile with these numbers on each axis; and what it is told of the axes."""
    axes = three_axes(problem.axes)
    args = []
    for axis, q in zip(axes, variant.q_tile, strict=True):
        groups = -(-axis.length // axis.dilation)
        args.append(AxisArgs(*map(array, axis_args(axis, -(-groups // q)))))
    found = [DEVICE.span_on(i, array(n), args, variant) for i, n in enumerate(place)]
    return DEVICE.Tile(array(0), array(0), *found), args


def seen(problem: Problem, variant: Variant, tile: Any, box: tuple[int, ...], consumer: int) -> np.ndarray:
    """`[64, slots]`: whether a query sees a key, by the definition; all false for queries that do not exist."""
    rows = np.stack([np.asarray(n).ravel() for n in DEVICE.row_places(np.arange(64), variant, consumer)])
    keys = np.arange(variant.keys)
    _, h, w = variant.kv_box
    places = np.stack([keys // (h * w), keys // w % h, keys % w])
    sees = np.broadcast_to(keys < prod(variant.kv_box), (64, variant.keys)).copy()
    for i, (axis, span) in enumerate(zip(three_axes(problem.axes), tile[2:], strict=True)):
        group, first, origin = (int(np.asarray(n).item()) for n in (span.group, span.first, span.origin))
        member = origin + box[i] * variant.kv_box[i] + places[i]
        for row in range(64):
            query = group + (first + rows[i][row]) * axis.dilation
            window = axis.window(query) if query < axis.length else range(0)
            sees[row] &= np.isin(group + member * axis.dilation, list(window))
    return sees


def exists(problem: Problem, variant: Variant, tile: Any, consumer: int) -> np.ndarray:
    rows = [np.asarray(n).ravel() for n in DEVICE.row_places(np.arange(64), variant, consumer)]
    spans = zip(tile[2:], rows, strict=True)
    return np.all([np.asarray(s.first).item() + r < np.asarray(s.members).item() for s, r in spans], axis=0)


def scores_after(variant: Variant, tile: Any, args: list[Any], box: tuple[int, ...], consumer: int) -> np.ndarray:
    """What a mask makes of scores of 0."""
    t, h, w = (array(n) for n in box)
    found = DEVICE.mask_of(tile, args, None, variant, consumer)
    if variant.mask == "coded":
        code = DEVICE.place_code(variant, 4).memory
        return np.asarray(DEVICE.penalties(found, t, h, w, None, variant)) @ np.asarray(code).T
    zeros = np.zeros((64, variant.keys), np.float32).view(Array)
    return np.asarray(DEVICE.select(zeros, found, t, h, w, None, variant))


@pytest.mark.parametrize(("rank", "consumers", "keys", "kv_tile"), BOXES, ids=str)
def test_masks_hide_what_is_outside_the_window(rank: int, consumers: int, keys: int, kv_tile: tuple[int, ...]) -> None:
    rng = random.Random(repr((rank, consumers, keys, kv_tile)))
    for trial in range(3):
        q_tile = rng.choice(q_tiles(consumers, rank))
        assert not why_not_tiling(Tiling(q_tile, kv_tile), 64)
        problem, tiling = draw(rng.randrange(10**6), rank, q_tile, kv_tile)
        variant = variant_of(make_plan(problem, tiling))
        if variant.mask == "none":
            continue
        plans = [AxisPlan(*cut) for cut in zip(problem.axes, q_tile, kv_tile, strict=True)]
        span = three(tuple(rng.randrange(len(plan.spans)) for plan in plans)) if trial else (0, 0, 0)
        span = tuple(0 if i < 3 - rank else n for i, n in enumerate(span))
        tile, args = spans(problem, variant, span)
        visited = [int(np.asarray(s.visited).item()) for s in tile[2:]]
        boxes = list(product(*map(range, visited)))
        consumer = rng.randrange(consumers)
        real = exists(problem, variant, tile, consumer)
        for box in {boxes[0], boxes[-1], rng.choice(boxes)}:
            after = scores_after(variant, tile, args, box, consumer)
            expected = seen(problem, variant, tile, box, consumer)
            assert (after[real][expected[real]] == 0).all()
            assert (after[real][~expected[real]] <= -(2.0**99)).all()


AXES = [
    Axis(23, 5), Axis(23, 6, stride=4), Axis(23, 23), Axis(23, 5, dilation=4), Axis(24, 5, stride=5, dilation=4),
    Axis(23, 5, is_causal=True), Axis(23, 7, stride=3, dilation=3, is_causal=True), Axis(1, 1),
    Axis(23, 1, dilation=23), Axis(37, 11, stride=3, dilation=2),
]  # fmt: skip


@pytest.mark.parametrize("axis", AXES, ids=repr)
@pytest.mark.parametrize("cut", [(8, 4), (2, 8), (1, 1), (16, 16), (4, 7), (8, 3)], ids=str)
def test_spans_are_the_plans(axis: Axis, cut: tuple[int, int]) -> None:
    q, k = cut
    tiles = ceil_div(ceil_div(axis.length, axis.dilation), q)
    args = AxisArgs(*map(array, axis_args(axis, tiles)))
    found = DEVICE.span_of(array(np.arange(tiles * axis.dilation)[None]), args, q, k)
    columns = np.broadcast_arrays(found.group, found.first, found.origin, found.visited, found.members)
    walked = np.stack([np.asarray(column).ravel() for column in columns], 1).tolist()
    expected = [[s.group, s.first, s.start, s.visited] for s in AxisPlan(axis, q, k).spans]
    assert [row[:4] for row in walked if row[1] < row[4]] == expected  # short groups may have an empty tile
