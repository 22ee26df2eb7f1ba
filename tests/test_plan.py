"""Every pair of tiles is empty, full or masked exactly as the dense mask says, and counted so."""

from __future__ import annotations

import math
import re
import time
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vicinal.errors import InvalidProblem
from vicinal.plan import AxisPlan, Span, make_plan
from vicinal.problem import Axis, Problem
from vicinal.testing.strategies import axes, near_multiples, problems, tilings
from vicinal.testing.truth import axis_mask, mask
from vicinal.tiling import Tiling

origins = st.sampled_from(("free", "grid"))


def block(dense: Tensor, plan: AxisPlan, span: Span, tile: int) -> tuple[Tensor, bool]:
    """What the dense mask of a dilation group says about one pair of tiles, and whether all its keys exist."""
    start = span.origin + tile * plan.kv_tile
    stop = start + plan.kv_tile
    inside = dense[span.first : span.last, max(start, 0) : max(stop, 0)]
    return inside, start >= 0 and stop <= dense.shape[1]


def group_mask(axis: Axis, group: int) -> Tensor:
    """The dense mask among the members of one dilation group."""
    mates = torch.arange(group, axis.length, axis.dilation)
    return axis_mask(axis, mates)[:, mates]


@given(axes(most=50), near_multiples(20), near_multiples(20), origins)
def test_a_tile_pair_is_empty_full_or_masked_as_the_dense_mask_says(axis: Axis, q_tile: int, kv_tile: int, origin: str):
    plan = AxisPlan(axis, q_tile, kv_tile, origin)
    visited = full = 0
    queries: dict[int, list[int]] = {}
    for span in plan.spans:
        dense = group_mask(axis, span.group)
        queries.setdefault(span.group, []).extend(range(span.first, span.last))
        seen = 0
        # Tiles before and behind the span as well: what it leaves out must be empty.
        for tile in range(-(span.origin // kv_tile) - 2, dense.shape[1] // kv_tile + 3):
            pairs, exists = block(dense, plan, span, tile)
            named = 0 <= tile < span.visited
            assert bool(pairs.any()) == named, (span, tile)
            assert (exists and bool(pairs.all())) == (tile in span.full_tiles), (span, tile)
            seen += int(pairs.sum())
            visited += named
            full += tile in span.full_tiles
        assert seen == dense[span.first : span.last].sum(), "the span's tiles miss keys"
    assert queries == {g: list(range(len(range(g, axis.length, axis.dilation)))) for g in range(axis.dilation)}
    assert (plan.visited, plan.full) == (visited, full)
    assert plan.most_visited == max(span.visited for span in plan.spans)


@given(axes(most=50), near_multiples(20), near_multiples(20), origins)
def test_an_inverse_span_says_which_queries_see_some_and_which_see_all_of_its_keys(
    axis: Axis, rows: int, columns: int, origin: str
):
    plan = AxisPlan(axis, rows, columns, origin, is_inverse=True)
    full = 0
    for span in plan.spans:
        dense = group_mask(axis, span.group).T[span.first : span.last]
        some, every = dense.any(0).nonzero()[:, 0].tolist(), dense.all(0).nonzero()[:, 0].tolist()
        assert list(range(span.start, span.stop)) == some
        assert list(range(span.full_start, span.full_stop)) == every
        assert span.visited == -(-(span.stop - span.origin) // columns)
        full += len(span.full_tiles)
    assert plan.full == full
    assert sum(span.last - span.first for span in plan.spans) == axis.length


@given(axes(most=50), near_multiples(20), near_multiples(20), origins)
def test_a_span_says_what_some_and_what_all_of_its_queries_see(axis: Axis, q_tile: int, kv_tile: int, origin: str):
    for span in AxisPlan(axis, q_tile, kv_tile, origin).spans:
        dense = group_mask(axis, span.group)[span.first : span.last]
        some, every = dense.any(0).nonzero()[:, 0].tolist(), dense.all(0).nonzero()[:, 0].tolist()
        assert list(range(span.start, span.stop)) == some
        assert list(range(span.full_start, span.full_stop)) == every
        assert span.origin <= span.start
        if origin == "grid":
            assert span.origin % kv_tile == 0


@given(axes(most=50), near_multiples(20), near_multiples(20))
def test_free_origins_never_visit_more_than_the_grid(axis: Axis, q_tile: int, kv_tile: int):
    free, grid = (AxisPlan(axis, q_tile, kv_tile, origin) for origin in ("free", "grid"))
    assert all(a.visited <= b.visited for a, b in zip(free.spans, grid.spans, strict=True))


@given(problems(most_tokens=90, additional=False), st.data())
def test_the_product_plan_counts_what_the_dense_mask_of_the_grid_holds(problem: Problem, data: st.DataObject):
    plan = make_plan(problem, data.draw(tilings(problem.shape, smallest=2)))
    dense = mask(problem)
    order = [torch.arange(g, a.length, a.dilation) for a in problem.axes for g in range(a.dilation)]
    assert sum(len(members) for members in order) == sum(problem.shape)
    visited = full = 0
    for spans in product(*(axis.spans for axis in plan.axes)):
        groups = [torch.arange(s.group, a.length, a.dilation) for s, a in zip(spans, problem.axes, strict=True)]
        rows = flat(problem, [g[s.first : s.last] for g, s in zip(groups, spans, strict=True)])
        for tiles in product(*(range(s.visited) for s in spans)):
            starts = [s.origin + t * a.kv_tile for s, t, a in zip(spans, tiles, plan.axes, strict=True)]
            keys = [g[at : at + a.kv_tile] for g, at, a in zip(groups, starts, plan.axes, strict=True)]
            pairs = dense[rows][:, flat(problem, keys)]
            assert pairs.any()
            whole = all(len(k) == a.kv_tile for k, a in zip(keys, plan.axes, strict=True))
            is_full = all(t in s.full_tiles for s, t in zip(spans, tiles, strict=True))
            assert is_full == (whole and bool(pairs.all()))
            visited, full = visited + 1, full + is_full
    assert (plan.visited, plan.full, plan.masked) == (visited, full, visited - full)
    assert problem.pairs == dense.sum()
    assert plan.q_tiles == math.prod(axis.q_tiles for axis in plan.axes)
    assert plan.is_block_sparse == (visited * plan.tile_pairs == problem.pairs)


def flat(problem: Problem, places: list[Tensor]) -> Tensor:
    """Flat token numbers of a box, given its places on each axis."""
    tokens = torch.zeros(1, dtype=torch.long)
    for axis, place in zip(problem.axes, places, strict=True):
        tokens = (tokens[:, None] * axis.length + place[None, :]).flatten()
    return tokens


def test_a_video_of_sixteen_million_tokens_is_planned_in_milliseconds():
    problem = Problem.grid((121, 272, 480), kernel_size=11, heads=4)
    best = math.inf
    for warp in range(5):  # another tiling each time, so that no cache answers
        began = time.perf_counter()
        plan = make_plan(problem, Tiling((2, 8, 8 + warp), (2, 8, 8)))
        assert 0 < plan.visited * plan.tile_pairs < problem.tokens**2 / 1000
        best = min(best, time.perf_counter() - began)
    assert best < 0.02, f"{best * 1e3:.1f} ms"


def test_equal_plans_are_built_once():
    problem, tiling = Problem.grid((30, 48), kernel_size=(7, 9)), Tiling((8, 8), (8, 16))
    assert make_plan(problem, tiling).axes is make_plan(Problem.grid((30, 48), kernel_size=(7, 9)), tiling).axes
    assert make_plan(problem, tiling) == make_plan(problem, tiling)


def test_a_plan_prints_its_counts_and_its_picture():
    problem = Problem.grid((48, 40), kernel_size=24, stride=(8, 1))
    assert str(make_plan(problem, Tiling((8, 8), (8, 8), kv_origin="grid"))).splitlines() == [
        "48x40 grid, window 24x24, stride 8x1; query tiles 8x8, KV tiles 8x8, grid origin",
        "30 query tiles x 30 KV tiles: 342 pairs visited (38.0%), 198 full, 144 masked",
        "axis 48   axis 40",
        "███···    ███··",
        "███···    ░██░·",
        "·███··    ░░█░░",
        "··███·    ·░██░",
        "···███    ··███",
        "···███",
    ]


@given(problems(), st.data())
def test_any_plan_can_be_printed(problem: Problem, data: st.DataObject):
    plan = make_plan(problem, data.draw(tilings(problem.shape)))
    first, second, *_ = str(plan).splitlines()
    assert str(problem) in first
    assert f"{plan.visited:,} pairs visited" in second


def test_a_tiling_of_another_rank_is_refused():
    wanted = "tiling must have one number per axis: the grid (8, 9) has 2, q_tile (4,) has 1"
    with pytest.raises(InvalidProblem, match=re.escape(wanted)):
        make_plan(Problem.grid((8, 9), kernel_size=3), Tiling((4,), (4,)))
