"""Whole Hopper kernels against the definition, on any machine: their own source, run by NumPy.

`VICINAL_FUZZ=2000 pytest tests/hopper/test_on_cpu.py` runs that many random problems; few by default.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from math import prod

import numpy as np
import pytest

pytest.importorskip("triton", reason="the kernels' source needs triton, which is not installed")

from on_cpu import Map, Pointer, array, device, launch

from vicinal._tuples import ceil_div
from vicinal.backends.hopper.cost import RATES, kv_tiles, q_tiles
from vicinal.backends.hopper.launch import axis_args, geometry, heads_abreast, kernel_scale, layouts_of
from vicinal.backends.hopper.variant import AxisArgs, StepArgs, three_axes, variant_of
from vicinal.plan import make_plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

DEVICE = device()
KINDS = sorted({(consumers, keys) for _, consumers, keys in RATES})


def draw(seed: int, consumers: int, keys: int, times: int = 1) -> tuple[Problem, Tiling, np.ndarray | None]:
    """A small problem, a tiling that nobody would choose for it, and how many additional keys count."""
    rng = random.Random(seed)
    rank = rng.choice((1, 2, 3, 3, 3))
    shape = tuple(rng.randint(1, times * {1: 90, 2: 12, 3: 6}[rank]) for _ in range(rank))
    dilation = tuple(rng.choice((1, 1, rng.randint(1, n))) for n in shape)
    kernel = tuple(rng.randint(1, n // d) for n, d in zip(shape, dilation, strict=True))
    stride = tuple(rng.choice((1, rng.randint(1, k))) for k in kernel)
    heads_kv, batch = rng.randint(1, 2), rng.randint(1, 2)
    problem = Problem.grid(
        shape, kernel, stride=stride, dilation=dilation, is_causal=tuple(rng.random() < 0.3 for _ in shape),
        batch=batch, heads=heads_kv * rng.randint(1, 2), heads_kv=heads_kv, head_dim=32, dtype="bfloat16",
        additional=rng.choice((0, 0, rng.randint(1, 2 * keys))),
    )  # fmt: skip
    boxes = kv_tiles(consumers, keys, rank)
    odd = [box for box in boxes if prod(box) < keys]
    tiling = Tiling(rng.choice(q_tiles(consumers, rank)), rng.choice(odd if odd and rng.random() < 0.4 else boxes))
    lengths = None
    if problem.additional and rng.random() < 0.5:
        lengths = np.array([rng.randint(0, problem.additional) for _ in range(batch)], np.int32)
    return problem, tiling, lengths


def run(
    problem: Problem, tiling: Tiling, tensors: list[np.ndarray], lengths: np.ndarray | None, together: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `launch.Launch` does it, `together` heads to a block."""
    variant, axes = variant_of(make_plan(problem, tiling)), three_axes(problem.axes)
    tensors = [*tensors[:3], np.full(tensors[0].shape, np.nan, np.float32), *tensors[3:]]
    layouts = layouts_of(problem, [tuple(n // 4 for n in tensor.strides) for tensor in tensors])
    single = (Axis(1, 1), Axis(1, 1), Axis(max(problem.additional, 1), 1))
    boxes = [variant.box, variant.kv_box, variant.kv_box, variant.box, *[(1, 1, variant.keys)] * 2]
    places = [geometry(layout, single if i >= 4 else axes) for i, layout in enumerate(layouts)]
    variant = replace(variant, abreast=heads_abreast(problem, variant, places))
    together = together if variant.shares_heads else variant.abreast
    maps, steps = [], []
    for i, (tensor, place) in enumerate(zip(tensors, places, strict=True)):
        memory = np.concatenate([np.full(place.room // 2, np.nan, np.float32), tensor.ravel()])
        slots = 64 if i in (0, 3) else variant.keys
        maps.append(Map(memory, place, boxes[i], variant.columns, slots))
        steps.append(StepArgs(*map(array, place.steps)))
    counts = [ceil_div(ceil_div(a.length, a.dilation), q) for a, q in zip(axes, variant.q_tile, strict=True)]
    blocks = prod(count * axis.dilation for count, axis in zip(counts, axes, strict=True))
    lse = np.full(problem.batch * problem.tokens * problem.heads, np.nan)
    launch(
        DEVICE.forward_small if variant.consumers == 1 else DEVICE.forward,
        (blocks, ceil_div(problem.heads, together), problem.batch),
        *(maps + [maps[0]] * 2)[:6], Pointer(lse), Pointer(lengths),
        tuple(AxisArgs(*map(array, axis_args(axis, count))) for axis, count in zip(axes, counts, strict=True)),
        (steps + [steps[0]] * 2)[:6],
        array(problem.heads), array(problem.heads // problem.heads_kv), array(together), array(problem.additional),
        array(2), kernel_scale(problem.scale), variant,
    )  # fmt: skip
    out = maps[3].memory[maps[3].geometry.room // 2 :].reshape(tensors[3].shape)
    return out, lse.reshape(problem.batch, *problem.shape, problem.heads)


def expected(problem: Problem, tensors: list[np.ndarray], lengths: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Masked softmax over all pairs."""
    mask = np.ones((1, 1), bool)
    for axis in problem.axes:
        sees = np.zeros((axis.length, axis.length), bool)
        for query in range(axis.length):
            sees[query, list(axis.window(query))] = True
        mask = np.kron(mask, sees)
    repeats = problem.heads // problem.heads_kv
    flat = [t.astype(float).reshape(problem.batch, -1, *t.shape[-2:]).transpose(0, 2, 1, 3) for t in tensors]
    query, key, value = flat[0], *(t.repeat(repeats, 1) for t in flat[1:3])
    masks = np.broadcast_to(mask, (problem.batch, 1, *mask.shape))
    if problem.additional:
        key, value = (np.concatenate((a, b.repeat(repeats, 1)), 2) for a, b in zip((key, value), flat[3:], strict=True))
        valid = np.arange(problem.additional) < (problem.additional if lengths is None else lengths[:, None])
        valid = np.broadcast_to(valid, (problem.batch, problem.additional))[:, None, None]
        masks = np.concatenate((masks, np.broadcast_to(valid, (*masks.shape[:-1], problem.additional))), -1)
    scores = np.where(masks, query @ key.transpose(0, 1, 3, 2) * problem.scale, -np.inf)
    lse = np.log(np.exp(scores).sum(-1))
    out = np.exp(scores - lse[..., None]) @ value
    grid = problem.batch, problem.heads, *problem.shape
    return np.moveaxis(out.reshape(*grid, -1), 1, -2), np.moveaxis(lse.reshape(grid), 1, -1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("seed", range(int(os.environ.get("VICINAL_FUZZ", "30")) // len(KINDS)))
def test_a_kernel_computes_attention(kind: tuple[int, int], seed: int) -> None:
    check(*draw(10**6 * kind[0] + 10**4 * kind[1] + seed, *kind), seed)


@pytest.mark.parametrize("seed", range(int(os.environ.get("VICINAL_FUZZ", "30")) // 3))
def test_two_heads_that_share_boxes(seed: int) -> None:
    problem, tiling, _ = draw(10**7 + seed, 1, 64, times=2)
    heads = 2 * problem.heads_kv
    check(replace(problem, heads=heads, heads_kv=heads, additional=0), tiling, None, seed)


def check(problem: Problem, tiling: Tiling, lengths: np.ndarray | None, seed: int) -> None:
    noise = np.random.default_rng(seed)
    grid, more = (problem.batch, *problem.shape), (problem.batch, problem.additional)
    shapes = [(*grid, problem.heads, 32), *[(*grid, problem.heads_kv, 32)] * 2]
    shapes += [(*more, problem.heads_kv, 32)] * 2 if problem.additional else []
    tensors = [3 * noise.standard_normal(shape, np.float32) for shape in shapes]
    variant = variant_of(make_plan(problem, tiling))
    together = problem.heads if variant.shares_heads and seed % 2 else 1
    out, lse = run(problem, tiling, tensors, lengths, together)
    right_out, right_lse = expected(problem, tensors, lengths)
    np.testing.assert_allclose(out, right_out, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lse, right_lse, rtol=1e-5, atol=1e-5)
