"""Run by `test_interpreter.py` in a process of its own, in which Triton interprets kernels: every law, and the device's
arithmetic of windows against the plan's.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from vicinal import neighborhood_attention
from vicinal._tuples import ceil_div
from vicinal.backends import present
from vicinal.backends import triton as portable
from vicinal.backends.triton import bias, launch
from vicinal.backends.triton import compile as compiling
from vicinal.backends.triton.cost import choice_of, cut_as, cuts, stays_inside, variant_of
from vicinal.backends.triton.rates import MOST_HELD
from vicinal.backends.triton.tile import (
    boxes_of,
    is_full,
    mask_of,
    next_box,
    span_of,
    tile_of,
    viewers_start,
    viewers_stop,
    window_start,
    window_stop,
    windows_of,
)
from vicinal.backends.triton.variant import AxisArgs, Variant
from vicinal.plan import AxisPlan
from vicinal.problem import Axis, Problem
from vicinal.testing import LAWS, Law
from vicinal.testing.cases import random_axes
from vicinal.testing.fuzzing import Drawn, check_drawn
from vicinal.testing.layouts import LAYOUTS
from vicinal.testing.trial import Trial

CPU = torch.device("cpu")
RIDERS: tuple[dict[str, Any], ...] = (
    {"batch": 2, "heads": 1, "heads_kv": 1, "head_dim": 16, "head_dim_v": 16, "scale": 0.25, "dtype": "float32"},
    {"batch": 1, "heads": 2, "heads_kv": 1, "head_dim": 8, "head_dim_v": 24, "scale": -0.3, "dtype": "float16"},
    {
        "batch": 1,
        "heads": 1,
        "heads_kv": 1,
        "head_dim": 40,
        "head_dim_v": 16,
        "scale": 0.0,
        "dtype": "float32",
        "position_bias": True,
    },
)
LONG = {"memory_around_is_not_read", "two_runs_are_bitwise_equal"}
SPECIAL = {"whole_window_is_dense_attention", "strided_window_is_blocked_attention", "merged_halves_are_the_whole"}
PROBLEMS = (
    Problem.grid((91,), 9, stride=5, dilation=4, is_causal=True),
    Problem.grid((11, 17), (4, 7), stride=(3, 1), additional=9),
    Problem.grid((3, 7, 10), (3, 4, 5), stride=(1, 4, 2), dilation=(1, 1, 2), is_causal=(False, True, False)),
)


def problems_of(law: Law) -> list[Problem]:
    """Two problems, or one where the law takes long: its own if it needs special ones. Heads are few and narrow."""
    number = zlib.crc32(law.name.encode())
    if law.name in LONG:
        return [replace(PROBLEMS[0], **RIDERS[0])]
    chosen = law.problems[1:3] if law.name in SPECIAL else [PROBLEMS[(number + i) % 3] for i in range(2)]
    return [replace(problem, **RIDERS[(number + i) % 3]) for i, problem in enumerate(chosen)]


@pytest.mark.parametrize("law", LAWS, ids=[law.name for law in LAWS])
def test_law_holds(law: Law) -> None:
    hardware = present(CPU)
    for seed, problem in enumerate(problems_of(law)):
        assert portable.backend.why_not(problem, hardware) == ()
        law.check(Trial(portable.backend, problem, CPU, hardware, seed))


HELD = (
    Problem.grid((13, 9), (5, 4), batch=3, heads=2, head_dim=16, head_dim_v=8),
    Problem.grid((14, 17), (7, 5), stride=(2, 1), dilation=(1, 2), heads=2, head_dim=8, is_causal=(True, False)),
    Problem.grid((3, 4, 5), (2, 3, 3), batch=2, heads=1, head_dim=24, scale=-0.3),
    Problem.grid((70,), 33, batch=2, heads=2, heads_kv=1, head_dim=16, scale=0.0),
    Problem.grid((11, 7), (5, 3), dilation=(2, 1), batch=3, heads=2, head_dim=16, is_causal=(False, True)),
    Problem.grid((9, 5), (4, 5), dilation=(2, 1), batch=3, heads=2, heads_kv=1, head_dim=8),
    Problem.grid((12, 5), (6, 4), dilation=(2, 1), stride=(1, 3), batch=5, heads=2, head_dim=16, scale=-0.2),
)


@pytest.mark.parametrize("problem", HELD, ids=str)
def test_passes_that_hold_a_position_bias_are_right(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a window is a whole dilation group, and every head has keys of its own, one kernel gives all gradients."""
    ran: list[str] = []
    interpret = compiling.interpret
    spy = lambda variant, *rest: (ran.append(variant.kernel), interpret(variant, *rest))  # noqa: E731
    monkeypatch.setattr(compiling, "interpret", spy)
    problem, hardware = replace(problem, dtype="float16", position_bias=True), present(CPU)
    passes = ("forward", "queries", *(("keys",) if problem.heads == problem.heads_kv else ()))
    known = {name: [cut for cut in cuts(name, problem, hardware, most=9999) if cut.held] for name in passes}
    held = [max(known[name], key=lambda cut: (cut.sums, prod(cut.held))) for name in passes]
    is_whole = problem.dilation == (2, 1)
    assert problem.rank == 1 or is_whole or all(prod(cut.held) == MOST_HELD for cut in held)
    assert any(cut.sums for cut in held) == is_whole
    assert all(cut_as(name, problem, hardware, choice_of(cut)) == cut for name, cut in zip(passes, held, strict=True))
    chosen = tuple((name, choice_of(cut)) for name, cut in zip(passes, held, strict=True))
    check_drawn(Drawn(3, problem, chosen, next(iter(LAYOUTS))), portable.backend, CPU, hardware)
    assert ran[1] == ("whole" if is_whole and problem.heads == problem.heads_kv else "queries_held")
    assert ("bias" in ran) != is_whole


@pytest.mark.parametrize("position_bias", [False, True])
@pytest.mark.parametrize("head_dim", [136, 256])
def test_scores_in_halves_are_right(head_dim: int, position_bias: bool) -> None:
    problem = Problem.grid(
        (5, 7), (3, 4), heads=2, head_dim=head_dim, head_dim_v=16, scale=-0.1, additional=3, dtype="float32",
        position_bias=position_bias,
    )  # fmt: skip
    check_drawn(Drawn(1, problem, (), next(iter(LAYOUTS))), portable.backend, CPU, present(CPU))


BIASED = (
    (Problem.grid((19,), 5, stride=3, batch=5, heads=2, head_dim=8, is_causal=True), bias.MOST_SCRATCH),
    (Problem.grid((7, 10), (5, 3), dilation=(1, 2), batch=3, heads=2, heads_kv=1, head_dim=24, head_dim_v=8), 1),
    (Problem.grid((2, 5, 7), (2, 3, 4), stride=(1, 3, 2), heads=2, head_dim=16, is_causal=(False, True, False)), 1),
)


@pytest.mark.parametrize(("problem", "scratch"), BIASED, ids=str)
def test_bias_gradients_are_right_however_little_scratch_there_is(
    problem: Problem, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bias, "MOST_SCRATCH", scratch)
    monkeypatch.setattr(bias, "LEAST_CHUNK", 2)
    monkeypatch.setattr(bias, "RESIDENT", 64)  # as if there were many multiprocessors
    monkeypatch.setattr(bias, "bias_cut", bias.bias_cut.__wrapped__)
    problem = replace(problem, dtype="float32", position_bias=True)
    cut = bias.bias_cut(problem, present(CPU))
    assert (cut.heads, cut.chunks > 1) == ((1, False) if scratch == 1 else (problem.heads, True))
    check_drawn(Drawn(3, problem, (), next(iter(LAYOUTS))), portable.backend, CPU, present(CPU))


@triton.jit
def _windows(out, members, axis):
    member = tl.program_id(0)
    tl.store(out + 4 * member, window_start(member, members, axis))
    tl.store(out + 4 * member + 1, window_stop(member, members, axis))
    tl.store(out + 4 * member + 2, viewers_start(member, members, axis))
    tl.store(out + 4 * member + 3, viewers_stop(member, members, axis))


@triton.jit
def _spans(out, axis, V: tl.constexpr):  # noqa: N803
    span = span_of(tl.program_id(0), axis, V.rows[2], V.columns[2], V)
    row = out + tl.program_id(0) * 6
    tl.store(row, span.group)
    tl.store(row + 1, span.first)
    tl.store(row + 2, span.origin)
    tl.store(row + 3, span.reach)
    tl.store(row + 4, span.full_start)
    tl.store(row + 5, span.full_stop)


def axes(count: int) -> list[Axis]:
    rng = random.Random(0)
    drawn = [random_axes(rng, 1, 60) for _ in range(count)]
    return [Axis(*(values[0] for values in geometry.values())) for geometry in drawn]


def arguments(axis: Axis, rows: int) -> AxisArgs:
    tiles = ceil_div(ceil_div(axis.length, axis.dilation), rows)
    return AxisArgs(axis.length, axis.kernel_size, axis.stride, axis.dilation, int(axis.is_causal), tiles)


def run(kernel: Any, grid: int, *args: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(compiling.KERNELS, "probe", kernel)
        compiling.interpret(replace(PROBE, kernel="probe"), (grid, 1, 1), list(args))


PROBE = Variant("forward", "float32", 16, 16, 1, (1, 1, 8), (1, 1, 4))


@pytest.mark.parametrize("axis", axes(12), ids=str)
def test_windows_are_the_definition(axis: Axis) -> None:
    axis = axis.subaxes()[0]
    out = torch.zeros(axis.length, 4, dtype=torch.int32)
    run(_windows, axis.length, out, axis.length, arguments(axis, 1))
    for member, row in enumerate(out.tolist()):
        window, viewers = axis.window(member), axis.viewers(member)
        assert row == [window.start, window.stop, viewers.start, viewers.stop]


@pytest.mark.parametrize("kernel", ["forward", "keys"])
@pytest.mark.parametrize("axis", axes(8), ids=str)
def test_spans_are_the_plans(axis: Axis, kernel: str) -> None:
    variant = replace(PROBE, kernel=kernel)
    plan = AxisPlan(axis, 8, 4, is_inverse=kernel == "keys")
    args = arguments(axis, 8)
    out = torch.zeros(args.tiles * axis.dilation, 6, dtype=torch.int32)
    run(_spans, len(out), out, args, variant)
    rows = {(group, first): rest for group, first, *rest in out.tolist()}
    for span in plan.spans:
        origin, reach, full_start, full_stop = rows[span.group, span.first]
        assert (origin, reach) == (span.origin, 4 * span.visited)
        assert (full_start, full_stop) == (span.full_start - span.origin, span.full_stop - span.origin)


@pytest.mark.parametrize("kernel", ["forward", "keys"])
def test_boxes_that_are_not_looked_at_lie_on_the_grid(kernel: str) -> None:
    found: list[tuple[bool, bool]] = []
    for axis in (*axes(30), Axis(48, 16), Axis(48, 16, stride=8), Axis(48, 16, dilation=3), Axis(9, 4, dilation=2)):
        args, groups = arguments(axis, 4), axis.subaxes()
        out = torch.zeros(args.tiles * axis.dilation, 6, dtype=torch.int32)
        run(_spans, len(out), out, args, replace(PROBE, kernel=kernel, rows=(1, 1, 4)))
        lie = all(origin + reach <= groups[group].length for group, _, origin, reach, *_ in out.tolist())
        found.append((stays_inside(axis, 4, 4, is_inverse=kernel == "keys"), lie))
    # What is not known to lie there is looked at: that costs time alone.
    assert (True, False) not in found and {(True, True), (False, False)} <= set(found)


@pytest.mark.parametrize("problem", HELD[:3], ids=str)
def test_passes_that_lift_their_own_tokens_are_right(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    def lifting(kernel: str, *args: Any) -> Variant:
        lifted.append(kernel)
        return replace(variant_of(kernel, *args), lifts=True)

    lifted: list[str] = []
    portable.forget()
    monkeypatch.setattr(launch, "variant_of", lifting)
    problem = replace(problem, dtype="float16", position_bias=False)
    check_drawn(Drawn(5, problem, (), next(iter(LAYOUTS))), portable.backend, CPU, present(CPU))
    portable.forget()
    assert {"queries", "keys"} <= set(lifted)


@triton.jit
def _boxes(out, axes, most, V: tl.constexpr):  # noqa: N803
    tile = tile_of(axes, 1, V)
    windows = windows_of(tile, axes, V)
    row = out + tl.program_id(0) * most * 2
    t = 0
    h = 0
    w = 0
    for number in tl.range(0, boxes_of(tile, V)):
        tl.store(row + 2 * number, is_full(t, h, w, tile, V).to(tl.int32))
        tl.store(row + 2 * number + 1, tl.sum(tl.sum(mask_of(windows, t, h, w, V).to(tl.int32), 1), 0))
        t, h, w = next_box(t, h, w, tile, V)


def test_a_bias_may_be_of_32_bits_beside_16() -> None:
    query, key, value = (torch.randn(2, 6, 9, 2, 16).half().requires_grad_() for _ in range(3))
    table = torch.randn(2, 5, 9).half()
    found: list[tuple[torch.Tensor, ...]] = []
    for each in (table.requires_grad_(), table.detach().float().requires_grad_()):
        out = neighborhood_attention(query, key, value, (3, 5), position_bias=each, backend="triton")
        found.append((out, *torch.autograd.grad(out.float().square().sum(), (query, key, value, each))))
    assert found[1][-1].dtype == torch.float32
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("kernel", ["forward", "keys"])
@pytest.mark.parametrize("seed", range(2))
def test_boxes_are_full_where_every_row_sees_every_column(seed: int, kernel: str) -> None:
    rng = random.Random(seed)
    shape = rng.sample(range(5, 8), 3)
    problem = Problem.grid(
        shape,
        tuple(rng.randint(4, length) for length in shape),
        stride=tuple(rng.choice((1, 4)) for _ in shape),
        is_causal=tuple(rng.random() < 0.3 for _ in shape),
    )
    variant = replace(PROBE, kernel=kernel, rank=3, rows=(2, 2, 4), columns=(1, 2, 2))
    plans = [
        AxisPlan(axis, rows, columns, is_inverse=kernel == "keys")
        for axis, rows, columns in zip(problem.axes, variant.rows, variant.columns, strict=True)
    ]
    tiles, most = prod(plan.q_tiles for plan in plans), prod(plan.most_visited for plan in plans)
    out = torch.full((tiles, most, 2), -1, dtype=torch.int32)
    args = tuple(arguments(axis, rows) for axis, rows in zip(problem.axes, variant.rows, strict=True))
    run(_boxes, tiles, out, args, most, variant)
    visited = out[out[..., 0] >= 0]
    assert len(visited) == prod(plan.visited for plan in plans)
    assert visited[:, 0].sum() == prod(plan.full for plan in plans) > 0
    assert torch.equal(visited[:, 0] == 1, visited[:, 1] == variant.row_count * variant.column_count)
