"""Queries, keys and values in one tensor: the numbers of three, and a gradient that nobody puts together."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from vicinal import InvalidProblem, Unsupported, backends, neighborhood_attention, neighborhood_attention_packed, ops
from vicinal.nn import NeighborhoodAttention
from vicinal.problem import Problem

GRID = (2, 7, 12)
WINDOW: dict[str, Any] = {"kernel_size": (3, 5), "stride": (1, 2), "dilation": (2, 1), "is_causal": (False, True)}
RIDERS = ("nothing", "bias", "additional")


def riders(which: str) -> dict[str, Any]:
    if which == "bias":
        return {"position_bias": torch.randn(2, 5, 9, requires_grad=True)}
    if which == "additional":
        more = {f"additional_{name}": torch.randn(2, 3, 2, 16, requires_grad=True) for name in ("keys", "values")}
        return more | {"additional_lengths": torch.tensor([2, 0])}
    return {}


def lying(how: str) -> Tensor:
    """`[B, *S, 3, H, D]` as one projection makes it, or otherwise."""
    if how == "heads first":
        return torch.randn(*GRID, 2, 3, 16).transpose(-2, -3).requires_grad_()
    return torch.randn(*GRID, 3, 2, 16, requires_grad=True)


@pytest.fixture(autouse=True)
def forget_what_was_compiled() -> None:
    torch._dynamo.reset()


def solved(call: Callable[[], Tensor], leaves: list[Tensor], times: int = 1) -> list[Tensor]:
    """The output and gradients, taken so many times from one graph."""
    torch.manual_seed(1)
    out = call()
    grad = torch.randn(out.shape).to(out.dtype)
    for left in reversed(range(times)):
        gradients = torch.autograd.grad(out, leaves, grad, retain_graph=left > 0)
    return [out, *gradients]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("which", RIDERS)
@pytest.mark.parametrize("how", ["projected", "heads first"])
def test_the_bits_are_those_of_three_tensors(backend: str, which: str, how: str):
    qkv, extra = lying(how), riders(which)
    leaves = [qkv, *[tensor for tensor in extra.values() if tensor.requires_grad]]
    more = {**WINDOW, **extra, "scale": 0.3, "backend": backend}

    def packed() -> Tensor:
        return neighborhood_attention_packed(qkv, **more)

    def apart() -> Tensor:
        return neighborhood_attention(*qkv.unbind(-3), **more)

    wanted = solved(apart, leaves)
    eager = solved(packed, leaves, times=2)
    assert_same_bits(eager, wanted)
    assert eager[1].is_contiguous()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert_same_bits(solved(compiled, leaves), wanted)
    assert_same_bits(solved(lambda: checkpoint(packed, use_reentrant=False), leaves), wanted)
    with FlopCounterMode(display=False) as one:
        assert_same_bits(solved(packed, leaves), wanted)
    with FlopCounterMode(display=False) as three:
        solved(apart, leaves)
    assert one.get_total_flops() == three.get_total_flops() > 0


@pytest.mark.parametrize("is_compiled", [False, True])
def test_under_autocast(is_compiled: bool):
    qkv, table = torch.randn(*GRID, 3, 2, 16, requires_grad=True), torch.randn(2, 5, 9, requires_grad=True)

    def packed() -> Tensor:
        return neighborhood_attention_packed(qkv, (3, 5), position_bias=table)

    def apart() -> Tensor:
        return neighborhood_attention(*qkv.unbind(-3), (3, 5), position_bias=table)

    with torch.autocast("cpu", torch.bfloat16):
        wanted = solved(apart, [qkv, table])
        call = torch.compile(packed, fullgraph=True, backend="aot_eager") if is_compiled else packed
        found = solved(call, [qkv, table])
    assert found[0].dtype == torch.bfloat16
    assert_same_bits(found, wanted)


def test_without_gradients():
    qkv = lying("projected")
    wanted = neighborhood_attention(*qkv.unbind(-3), 3)
    with torch.no_grad():
        assert torch.equal(neighborhood_attention_packed(qkv, 3, backend="blocked"), wanted)
        fused = neighborhood_attention_packed(qkv, 3)
        assert torch.equal(fused, neighborhood_attention(*qkv.unbind(-3), 3))
    empty = torch.zeros(0, 7, 12, 3, 2, 16, requires_grad=True)
    neighborhood_attention_packed(empty, 3).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == empty.shape


@pytest.mark.parametrize("which", RIDERS)
def test_opcheck(which: str):
    extra = riders(which)
    names = ("additional_keys", "additional_values", "additional_lengths", "position_bias")
    tensors = [lying("projected"), None, None, *[extra.get(name) for name in names]]
    checks = opcheck(ops.attention, [*tensors, [3, 5], [1, 2], [2, 1], [False, True], 0.3, "", [], True])
    assert set(checks.values()) == {"SUCCESS"}


def test_no_gradient_is_put_together_in_compiled_code():
    """Not so with three slices: that is what it is for."""
    seen: list[set[str]] = []

    def backward(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=backward)
    project = torch.nn.Linear(32, 96)

    def packed(x: Tensor) -> Tensor:
        return neighborhood_attention_packed(project(x).unflatten(-1, (3, 2, 16)), 3)

    def apart(x: Tensor) -> Tensor:
        return neighborhood_attention(*project(x).unflatten(-1, (3, 2, 16)).unbind(-3), 3)

    for call in (packed, apart):
        torch.compile(call, fullgraph=True, backend=backend)(torch.randn(*GRID, 32)).sum().backward()
    joining = {"aten.stack.default", "aten.cat.default", "aten.select_backward.default"}
    assert not joining & seen[0]
    assert joining & seen[1]
    assert "vicinal.attention_backward.default" in seen[0]


def test_in_a_batch_of_a_transform():
    qkv = torch.randn(4, *GRID, 3, 2, 16, dtype=torch.float64)
    found = torch.vmap(lambda each: neighborhood_attention_packed(each, 3))(qkv)
    torch.testing.assert_close(found[2], neighborhood_attention_packed(qkv[2], 3))

    def loss(each: torch.Tensor) -> torch.Tensor:
        return neighborhood_attention_packed(each, 3).sin().sum()

    of_each = torch.vmap(torch.func.grad(loss))(qkv)
    whole = qkv.clone().requires_grad_()
    sum(loss(each) for each in whole).backward()
    torch.testing.assert_close(of_each, whole.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("dilation", [(2, 3), (1, 5)], ids=["divides", "divides not"])
@pytest.mark.parametrize(("backend", "is_biased"), [("hopper", False), ("triton", False), ("triton", True)])
def test_on_a_card_compiled_and_in_a_graph(backend: str, dilation: tuple[int, int], is_biased: bool):
    problem = Problem.grid((14, 24), (3, 4), dilation=dilation, heads=2, head_dim=32, position_bias=is_biased)
    if reasons := backends.named(backend).why_not(problem, backends.present(torch.device("cuda", 0))):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")
    made: dict[str, Any] = {"device": "cuda", "requires_grad": True}
    qkv = torch.randn(2, 14, 24, 3, 2, 32, dtype=torch.bfloat16, **made)
    more: dict[str, Any] = {"kernel_size": (3, 4), "dilation": dilation, "backend": backend}
    if is_biased:
        more["position_bias"] = torch.randn(2, 5, 7, **made)
    leaves, grad = [qkv, *([more["position_bias"]] if is_biased else [])], torch.randn(2, 14, 24, 2, 32).to(qkv)

    def packed() -> Tensor:
        return neighborhood_attention_packed(qkv, **more)

    def derived(call: Callable[[], Tensor]) -> list[Tensor]:
        out = call()
        return [out, *torch.autograd.grad(out, leaves, grad)]

    side = torch.cuda.Stream()  # on which leaves are used first, as captures want it
    with torch.cuda.stream(side):
        wanted = derived(lambda: neighborhood_attention(*qkv.unbind(-3), **more))
        assert_same_bits(derived(packed), wanted)
        assert_same_bits(derived(torch.compile(packed, fullgraph=True)), wanted)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = derived(packed)
        for tensor in captured:
            tensor.detach().fill_(torch.nan)
        graph.replay()
        assert_same_bits(captured, wanted)


SHAPES = [(2, 7, 3, 16), (7, 12, 4, 2, 16), (2, 7, 12, 5, 3, 2, 3, 16), (2, 7, 12, 6, 16)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_not_packed_is_refused_in_words(shape: tuple[int, ...]):
    message = f"qkv must be [B, *S, 3, H, D] with 1 to 3 spatial axes, queries, keys and values of as many heads and one width, got shape {shape}; where they differ, pass them apart to neighborhood_attention"  # fmt: skip  # noqa: E501
    with pytest.raises(InvalidProblem, match=re.escape(message)):
        neighborhood_attention_packed(torch.zeros(shape), 3)
    with pytest.raises(InvalidProblem, match=re.escape(message)), FlopCounterMode(display=False):
        neighborhood_attention_packed(torch.zeros(shape), 3)
    compiled = torch.compile(lambda qkv: neighborhood_attention_packed(qkv, 3), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="qkv must be"):
        compiled(torch.zeros(shape))


def test_other_bad_input_is_refused_in_words():
    with pytest.raises(InvalidProblem, match="qkv must be a tensor, got NoneType"):
        neighborhood_attention_packed(None, 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidProblem, match="qkv must be a tensor, got ndarray"):
        neighborhood_attention_packed(torch.zeros(*GRID, 3, 2, 16).numpy(), 3)  # type: ignore[arg-type]
    with pytest.raises(InvalidProblem, match="qkv is a nested tensor"):
        neighborhood_attention_packed(torch.nested.nested_tensor([torch.zeros(7, 3, 2, 16)], layout=torch.jagged), 3)
    with pytest.raises(InvalidProblem, match=r"qkv must have one of the dtypes .* got int64"):
        neighborhood_attention_packed(torch.zeros(*GRID, 3, 2, 16, dtype=torch.int64), 3)
    with pytest.raises(InvalidProblem, match="kernel_size"):
        neighborhood_attention_packed(torch.zeros(*GRID, 3, 2, 16), 99)
    with pytest.raises(InvalidProblem, match="position_bias"):
        neighborhood_attention_packed(torch.zeros(*GRID, 3, 2, 16), 3, position_bias=torch.zeros(3, 5, 5))
    qkv = torch.zeros(*GRID, 3, 2, 16)
    call = torch.compile(lambda: neighborhood_attention(qkv, None, None, 3), backend="eager")  # type: ignore[arg-type]
    with pytest.raises(Exception, match="key must be a tensor, got NoneType"):
        call()


def test_derivatives_that_are_not_offered_are_refused_in_words():
    qkv = lying("projected")
    for watch in (lambda: FlopCounterMode(display=False), lambda: torch.autograd.set_grad_enabled(True)):
        with watch():
            out = neighborhood_attention_packed(qkv, 3)
            (grad,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        with pytest.raises(Unsupported, match="second derivative"):
            grad.sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(qkv.detach(), torch.ones_like(qkv))
        with pytest.raises(Exception, match="forward-mode derivatives"):
            neighborhood_attention_packed(dual, 3)


@pytest.mark.parametrize(("more", "is_packed"), [({}, True), ({"num_heads_kv": 2}, False), ({"qk_norm": True}, False)])
def test_a_layer_packs_where_nothing_stands_between(more: dict[str, Any], is_packed: bool, monkeypatch: Any):
    calls: list[str] = []

    def spy(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **rest: calls.append(name) or function(*args, **rest)

    for name, function in (("packed", neighborhood_attention_packed), ("apart", neighborhood_attention)):
        full = function.__name__
        monkeypatch.setattr(f"vicinal.nn.attention.{full}", spy(name, function))
    layer = NeighborhoodAttention(32, num_heads=4, kernel_size=(3, 5), position_bias=True, **more)
    x = torch.randn(2, 6, 9, 32)
    out = layer(x)
    assert calls == ["packed" if is_packed else "apart"]
    if is_packed:
        q, k, v = layer.qkv(x).unflatten(-1, (3, 4, 8)).unbind(-3)
        wanted = neighborhood_attention(q, k, v, (3, 5), position_bias=layer.rpb).flatten(-2)
        assert torch.equal(out, layer.proj(wanted))
