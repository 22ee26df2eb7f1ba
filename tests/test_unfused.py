"""The two halves: scores by slot, sums by weights, and together attention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.library import opcheck

from vicinal import InvalidProblem, attention_with_lse, neighborhood_aggregate, neighborhood_scores, unfused
from vicinal.problem import Problem
from vicinal.testing import assert_as_good_as_eager
from vicinal.testing.cases import make_inputs
from vicinal.testing.strategies import problems, seeds
from vicinal.testing.truth import truth_and_eager
from vicinal.window import window

CPU = torch.device("cpu")


def settings(problem: Problem) -> dict[str, Any]:
    return {name: getattr(problem, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}


@given(problems(most_tokens=90, additional=False), seeds())
def test_softmax_of_scores_aggregated_is_attention(problem: Problem, seed: int):
    inputs = make_inputs(problem, CPU, seed)
    scores = neighborhood_scores(
        inputs.query, inputs.key, **settings(problem), scale=problem.scale, position_bias=inputs.position_bias
    )
    out = neighborhood_aggregate(scores.softmax(-1), inputs.value, **settings(problem))
    truth, eager = truth_and_eager(problem, inputs)
    flat = out.flatten(1, problem.rank), scores.logsumexp(-1).to(eager.lse.dtype).flatten(1, problem.rank)
    # Scores and weights are rounded to the dtype of the inputs on their way, as plain PyTorch's are.
    wide = torch.finfo(inputs.query.dtype).eps * scores.nan_to_num(neginf=0.0).abs().max()
    assert_as_good_as_eager(flat[0], eager.out, truth.out, slack=8, summed=inputs.value)
    assert (flat[1] - truth.lse).abs().max() <= 8 * wide + 8 * (eager.lse - truth.lse).abs().max() + 1e-6
    assert out.is_contiguous()
    assert out.dtype == inputs.query.dtype


@given(problems(most_tokens=60, additional=False, dtypes=("float64",)), seeds())
def test_gradients_are_those_of_attention(problem: Problem, seed: int):
    inputs = make_inputs(problem, CPU, seed)
    leaves = [t.requires_grad_() for t in (*inputs[:3], inputs.position_bias) if t is not None]
    table = leaves[3] if problem.position_bias else None

    def halves() -> Tensor:
        scores = neighborhood_scores(*leaves[:2], **settings(problem), scale=problem.scale, position_bias=table)
        return neighborhood_aggregate(scores.softmax(-1), leaves[2], **settings(problem))

    whole = attention_with_lse(
        *leaves[:3], **settings(problem), scale=problem.scale, position_bias=table, backend="reference"
    ).out
    numbers = torch.randn(whole.shape, dtype=whole.dtype)
    wanted = torch.autograd.grad(whole, leaves, numbers)
    for ours, theirs in zip(torch.autograd.grad(halves(), leaves, numbers), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_derivatives_of_any_order_are_those_of_finite_differences():
    query, key = (torch.randn(1, 3, 4, heads, 2, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    weights = torch.randn(1, 3, 4, 2, 6, dtype=torch.float64, requires_grad=True)
    geometry = {"kernel_size": (3, 2), "dilation": (1, 2), "is_causal": (True, False)}

    def scores(*leaves: Tensor) -> Tensor:
        return neighborhood_scores(*leaves, **geometry).clamp(min=-1e3)

    def sums(*leaves: Tensor) -> Tensor:
        return neighborhood_aggregate(*leaves, **geometry)

    for call, leaves in ((scores, (query, key)), (sums, (weights, key))):
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("is_causal", [False, True])
def test_slots_hold_the_keys_of_the_window_in_order_and_the_last_may_be_empty(is_causal: bool):
    lengths, sizes, strides, dilations = (11, 7), (4, 3), (3, 1), (2, 1)
    geometry = {"kernel_size": sizes, "stride": strides, "dilation": dilations, "is_causal": is_causal}
    tokens = torch.arange(77.0).view(1, 11, 7, 1, 1)
    scores = neighborhood_scores(torch.ones_like(tokens), tokens, **geometry, scale=1.0)
    for i in range(11):
        for j in range(7):
            rows, columns = (
                list(window(q, length, size, stride=stride, dilation=dilation, is_causal=is_causal))
                for q, length, size, stride, dilation in zip((i, j), lengths, sizes, strides, dilations, strict=True)
            )
            expected = [
                [rows[a] * 7.0 + columns[b] if a < len(rows) and b < len(columns) else -torch.inf for b in range(3)]
                for a in range(4)
            ]
            assert scores[0, i, j, 0].view(4, 3).tolist() == expected
    assert is_causal == bool(scores.isinf().any())


def test_what_empty_slots_hold_has_no_effect():
    value = torch.randn(2, 9, 1, 3)
    weights = torch.randn(2, 9, 2, 4)
    poisoned = weights.clone()
    poisoned[:, 0, :, 1:] = torch.nan  # the first query of a causal axis sees itself alone
    wanted = neighborhood_aggregate(weights, value, 4, is_causal=True)
    assert torch.equal(neighborhood_aggregate(poisoned, value, 4, is_causal=True), wanted)


def test_small_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch):
    query, key = torch.randn(2, 13, 10, 4, 8, dtype=torch.float64), torch.randn(2, 13, 10, 2, 8, dtype=torch.float64)
    geometry = {"kernel_size": (5, 3), "stride": (2, 1), "dilation": (1, 3), "is_causal": (False, True)}
    wanted = neighborhood_scores(query, key, **geometry)
    monkeypatch.setattr(unfused, "SCORES", 500)
    torch.testing.assert_close(neighborhood_scores(query, key, **geometry), wanted)


@pytest.mark.parametrize("name", ["scores", "aggregate", "spread"])
def test_opcheck(name: str):
    query, key = torch.randn(2, 5, 7, 4, 6, requires_grad=True), torch.randn(2, 5, 7, 2, 6, requires_grad=True)
    weights = torch.randn(2, 5, 7, 4, 6, requires_grad=True)
    geometry = [3, 2], [1, 2], [1, 3], [True, False]
    operator, arguments = {
        "scores": (unfused.scores_of, (query, key, *geometry)),
        "aggregate": (unfused.aggregate_of, (weights, key, *geometry)),
        "spread": (unfused.spread_of, (weights, query, 2, *geometry)),
    }[name]
    assert set(opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_compiled_halves_are_the_same():
    query, key = torch.randn(1, 5, 7, 4, 6, requires_grad=True), torch.randn(1, 5, 7, 2, 6)

    def call(query: Tensor, key: Tensor) -> Tensor:
        weights = neighborhood_scores(query, key, (3, 5), is_causal=(True, False)).softmax(-1)
        return neighborhood_aggregate(weights, key, (3, 5), is_causal=(True, False)).sin()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(query, key)
    torch.testing.assert_close(compiled, call(query, key))
    one, two = (torch.autograd.grad(out.sum(), query)[0] for out in (compiled, call(query, key)))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("call", "message"), [
    (lambda q, k: neighborhood_scores(q, k, 9), "kernel_size * dilation = 9 * 1 = 9 > axis length 5"),
    (lambda q, k: neighborhood_scores(q, k[..., :3], 3), "key must have query's head_dim 8"),
    (lambda q, k: neighborhood_scores(q, k, 3, position_bias=k), "position_bias must be [H, 2 * kernel_size - 1"),
    (lambda q, k: neighborhood_aggregate(q, k, 3), "weights must hold prod(kernel_size) = 9 numbers"),
    (lambda q, k: neighborhood_scores(q.numpy(), k.numpy(), 3), "query must be a tensor, got ndarray"),
    (lambda q, k: neighborhood_aggregate(None, k, 3), "weights must be a tensor, got NoneType"),
    (lambda q, k: neighborhood_aggregate(q[0, 0], k, 3), "weights must be [B, *S, H, prod(kernel_size)] with 1 to 3"),
    (lambda q, k: neighborhood_aggregate(q[..., :0], k[..., :2, :], 3), "weights must hold prod(kernel_size) = 9"),
    (lambda q, k: neighborhood_aggregate(q, k[:, :4], 3), "value must be [B, *S, Hkv, Dv] with weights' batch"),
    (lambda q, k: neighborhood_aggregate(q, k[..., :0], 3), "value must be [B, *S, Hkv, Dv] with weights' batch"),
    (lambda q, k: neighborhood_aggregate(q, k.half(), 3), "value and weights must share one dtype"),
    (lambda q, k: neighborhood_aggregate(torch.rand(2, 5, 7, 3, 9), k, 3), "query heads must be a multiple of"),
])  # fmt: skip
def test_bad_arguments_are_named(call: Any, message: str):
    with pytest.raises(InvalidProblem, match=re.escape(message)):
        call(torch.randn(2, 5, 7, 4, 8), torch.randn(2, 5, 7, 2, 8))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_halves_under_autocast_are_attention_under_autocast(is_compiled: bool):
    """Autocast softens in 32 bits, so that weights and values differ, as queries and keys of two layers may."""
    query, key, value = (torch.randn(1, 6, 9, 2, 8, requires_grad=True) for _ in range(3))
    bias = torch.randn(2, 5, 9, requires_grad=True)

    def attend() -> Tensor:
        weights = neighborhood_scores(query.bfloat16(), key, (3, 5), position_bias=bias).softmax(-1)
        return neighborhood_aggregate(weights, value.bfloat16(), (3, 5))

    with torch.autocast("cpu", torch.bfloat16):
        out = (torch.compile(attend, backend="aot_eager", fullgraph=True) if is_compiled else attend)()
        wanted = attention_with_lse(query, key, value, (3, 5), position_bias=bias).out
    assert out.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(out, wanted, atol=0.05, rtol=0.05)
    gradients = torch.autograd.grad(out.float().square().sum(), [query, key, value, bias])
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def _attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    window: dict[str, Any] = {"kernel_size": (3, 2), "stride": (2, 1), "is_causal": (True, False)}
    weights = neighborhood_scores(query, key, **window, position_bias=bias).softmax(-1)
    return neighborhood_aggregate(weights, value, **window)


def _given() -> list[Tensor]:
    shapes = (1, 4, 3, 2, 2), (1, 4, 3, 1, 2), (1, 4, 3, 1, 3), (2, 5, 3)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_forward_mode_has_tangents():
    assert torch.autograd.gradcheck(_attended, _given(), check_forward_ad=True, check_batched_grad=True)


def test_transforms_give_what_autograd_gives():
    given = _given()

    def loss(*tensors: Tensor) -> Tensor:
        return _attended(*tensors).sin().sum()

    wanted = torch.autograd.grad(loss(*given), given, create_graph=True)
    second = torch.autograd.grad(sum(gradient.sum() for gradient in wanted), given)
    every = tuple(range(4))
    given = [tensor.detach() for tensor in given]
    torch.testing.assert_close(torch.func.grad(loss, every)(*given), wanted)
    for hessian in (torch.func.hessian(loss, every), torch.func.jacrev(torch.func.jacrev(loss, every), every)):
        rows = zip(*hessian(*given), strict=True)  # of each input, a block for each gradient
        for found, expected in zip(rows, second, strict=True):
            summed = sum(block.flatten(0, block.ndim - expected.ndim - 1).sum(0) for block in found)
            torch.testing.assert_close(summed, expected)
    many = [torch.stack([tensor, -tensor, tensor.flip(1)]) for tensor in given]
    apart = [torch.func.grad(loss, every)(*each) for each in zip(*many, strict=True)]
    together = torch.vmap(torch.func.grad(loss, every))(*many)
    torch.testing.assert_close(together, tuple(torch.stack(each) for each in zip(*apart, strict=True)))
