"""The Hopper backend on a card: equal to the definition, whatever the problem and wherever its tensors lie.

`VICINAL_FUZZ=200 pytest tests/hopper/test_on_card.py` runs that many random problems; few by default. For thousands,
`fuzz.py` compiles in several processes.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from problems import Case, check, dense_mask, draw, empty

from vicinal.backends import hopper
from vicinal.backends.base import Inputs
from vicinal.backends.hopper import launch
from vicinal.backends.hopper.cost import ranked_tilings
from vicinal.backends.hopper.variant import Variant
from vicinal.plan import AxisPlan, Plan, make_plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU (sm_90)",
    ),
]

PROBLEM = Problem.grid((5, 14, 22), (3, 5, 7), heads=2, head_dim=64)


def plan_of(problem: Problem) -> Plan:
    return make_plan(problem, ranked_tilings(problem)[0])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def inputs_for(problem: Problem) -> Inputs:
    shape = problem.batch, *problem.shape, problem.heads, problem.head_dim
    return Inputs(noise(*shape), noise(*shape), noise(*shape))


@pytest.mark.parametrize("seed", range(int(os.environ.get("VICINAL_FUZZ", "40"))))
def test_random_problem(seed: int) -> None:
    check(draw(seed), hopper.backend)


@pytest.mark.parametrize("seed", range(int(os.environ.get("VICINAL_FUZZ", "40")) // 2))
def test_random_problem_with_several_heads_to_a_block(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small problems would not share blocks by themselves."""

    def together(problem: Problem, variant: Variant, blocks: int, visited: int) -> int:
        divisors = [n for n in range(1, problem.heads + 1) if problem.heads % n == 0]
        return divisors[seed % len(divisors)] if variant.shares_heads else variant.abreast

    monkeypatch.setattr(launch, "heads_per_block", together)
    hopper.forget()
    check(draw(10_000 + seed), hopper.backend)
    hopper.forget()


@pytest.mark.parametrize("seed", range(int(os.environ.get("VICINAL_FUZZ", "40")) // 4))
def test_random_problem_with_two_heads_of_32_to_a_box(seed: int) -> None:
    check(draw(20_000 + seed, pairs=True), hopper.backend)


AXES = [
    Axis(23, 5), Axis(23, 6, stride=4), Axis(23, 23), Axis(23, 5, dilation=4), Axis(24, 5, stride=5, dilation=4),
    Axis(23, 5, is_causal=True), Axis(23, 7, stride=3, dilation=3, is_causal=True), Axis(1, 1),
    Axis(23, 1, dilation=23), Axis(47, 7, stride=4, is_causal=True), Axis(53, 6, stride=5, dilation=2, is_causal=True),
]  # fmt: skip


@pytest.mark.parametrize("axis", AXES, ids=repr)
@pytest.mark.parametrize("cut", [(8, 4), (2, 8), (1, 1), (16, 16)], ids=str)
@pytest.mark.parametrize("is_inverse", [False, True], ids=["keys of queries", "queries of keys"])
def test_kernels_walk_the_plan(axis: Axis, cut: tuple[int, int], is_inverse: bool) -> None:
    """The spans and windows that the kernels compute are those of the plan and of the definition."""
    from geometry_probe import spans_on_device, windows_on_device

    plan = AxisPlan(axis, *cut, is_inverse=is_inverse)
    expected = [(s.group, s.first, s.start, s.visited) for s in plan.spans]
    members = [len(range(group, axis.length, axis.dilation)) for group in range(axis.dilation)]
    spans = spans_on_device(axis, *cut, is_inverse)
    walked = [s for s in spans if s[1] < members[s[0]]]  # short groups may have an empty tile
    assert walked == expected
    for group, count in enumerate(members):
        windows = windows_on_device(axis, count, is_inverse)
        for member, (start, stop) in enumerate(windows):
            token = group + member * axis.dilation
            seen = axis.viewers(token) if is_inverse else axis.window(token)
            assert [group + m * axis.dilation for m in range(start, stop)] == list(seen)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel_size", [(3, 5, 7), (5, 9, 13)])
def test_a_uniform_row_counts_its_window(head_dim: int, kernel_size: tuple[int, ...]) -> None:
    """With queries of zero, the log-sum-exp is the log of the number of keys seen: exactly one key more would show."""
    problem = Problem.grid((5, 14, 22), kernel_size, heads=2, head_dim=head_dim, is_causal=(False, True, False))
    inputs = inputs_for(problem)
    output = hopper.backend.forward(plan_of(problem), inputs._replace(query=torch.zeros_like(inputs.query)))
    seen = dense_mask(problem).sum(1).reshape(problem.shape)
    torch.testing.assert_close(output.lse[0, ..., 0].exp(), seen.float(), rtol=1e-5, atol=0)


def test_huge_keys_outside_the_window_leave_no_trace() -> None:
    problem = Problem.grid((9, 14, 22), (3, 5, 7), heads=1, head_dim=64, dtype="bfloat16")
    inputs = inputs_for(problem)
    before = hopper.backend.forward(plan_of(problem), inputs)
    query = (4, 6, 10)
    key = inputs.key.clone()
    outside = torch.ones(problem.shape, dtype=torch.bool, device="cuda")
    windows = [axis.window(place) for axis, place in zip(problem.axes, query, strict=True)]
    outside[tuple(slice(window.start, window.stop) for window in windows)] = False
    key[0, outside] = 1e15 * inputs.query[0][query].sign()
    after = hopper.backend.forward(plan_of(problem), inputs._replace(key=key))
    assert torch.equal(before.out[0][query], after.out[0][query])
    assert torch.equal(before.lse[0][query], after.lse[0][query])


def test_slices_of_a_fused_projection_are_read_in_place() -> None:
    problem = replace(PROBLEM, batch=4)
    shape = (problem.batch, *problem.shape, problem.heads, problem.head_dim)
    fused = noise(*shape[:-2], 3, *shape[-2:])
    inputs = Inputs(*fused.unbind(-3))
    hopper.backend.forward(plan_of(problem), inputs)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = hopper.backend.forward(plan_of(problem), inputs)
    grown = torch.cuda.max_memory_allocated() - before
    assert grown <= output.out.nbytes + output.lse.nbytes + 2 * 512  # the allocator's rounding
    same = hopper.backend.forward(plan_of(problem), Inputs(*(tensor.contiguous() for tensor in inputs[:3])))
    assert torch.equal(output.out, same.out) and torch.equal(output.lse, same.lse)


def test_what_cannot_be_read_in_place_is_copied() -> None:
    shape = (1, *PROBLEM.shape, PROBLEM.heads, PROBLEM.head_dim)
    odd = noise(1, *PROBLEM.shape, PROBLEM.heads, PROBLEM.head_dim + 4)[..., :-4]  # strides of 8 bytes
    unaligned = noise(odd.numel() + 1)[1:].view(shape)
    transposed = noise(*shape[:-2], PROBLEM.head_dim, PROBLEM.heads).mT
    strange = Inputs(odd, unaligned, transposed)
    plain = Inputs(*(tensor.clone(memory_format=torch.contiguous_format) for tensor in strange[:3]))
    output, same = (hopper.backend.forward(plan_of(PROBLEM), inputs) for inputs in (strange, plain))
    assert torch.equal(output.out, same.out) and torch.equal(output.lse, same.lse)


def test_ragged_dilation_at_the_start_of_an_allocation() -> None:
    """Maps of dilated axes begin before their tensor; where nothing lies before it, it must be moved."""
    problem = Problem.grid((20, 20), (3, 3), dilation=(3, 6), heads=2, head_dim=64)
    torch.cuda.empty_cache()
    for _ in range(3):
        check(Case(problem, ranked_tilings(problem)[0], "contiguous", False, 0), hopper.backend)
        large = empty((1, 2048, 2048, 2, 64), "contiguous", torch.bfloat16)  # an allocation of its own
        big = Problem.grid((2048, 2048), (3, 3), dilation=(3, 6), heads=2, head_dim=64)
        large.normal_()
        output = hopper.backend.forward(plan_of(big), Inputs(large, large, large))
        assert torch.isfinite(output.out[0, ::7, ::5]).all()


def test_replays_in_a_graph_and_repeats_bit_for_bit() -> None:
    inputs = inputs_for(PROBLEM)
    plan = plan_of(PROBLEM)
    hopper.backend.forward(plan, inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = hopper.backend.forward(plan, inputs)
    for _ in range(3):
        inputs.query.copy_(noise(*inputs.query.shape))
        captured.out.fill_(float("nan"))
        graph.replay()
        again = hopper.backend.forward(plan, inputs)
        assert torch.equal(captured.out, again.out) and torch.equal(captured.lse, again.lse)


def test_more_elements_than_32_bits_count() -> None:
    heads, length = 8, 2**21 + 64
    problem = Problem.grid((length,), (256,), stride=256, heads=heads, head_dim=128)
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * 2 * problem.tokens * heads * 128:
        pytest.skip("needs 22 GB of free memory on the card")
    inputs = inputs_for(problem)
    assert inputs.query.numel() > 2**31
    output = hopper.backend.forward(plan_of(problem), inputs)
    tail = slice(length - 256, length)  # the last window
    short = Problem.grid((256,), (256,), heads=heads, head_dim=128)
    ends = Inputs(*(tensor[:, tail].contiguous() for tensor in inputs[:3]))
    same = hopper.backend.forward(make_plan(short, Tiling((128,), (128,))), ends)
    last = slice(-64, None)
    torch.testing.assert_close(output.out[:, last], same.out[:, last], rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(output.lse[:, last], same.lse[:, last], rtol=1e-5, atol=1e-5)


def test_no_batch_rows_give_no_outputs() -> None:
    problem = replace(PROBLEM, batch=0)
    output = hopper.backend.forward(plan_of(problem), inputs_for(problem))
    assert output.out.shape == (0, *problem.shape, 2, 64) and output.lse.shape == (0, *problem.shape, 2)
