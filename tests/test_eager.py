"""Plain calls take the short way, and nothing that watches calls is passed by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vicinal import InvalidProblem, _eager, attention_with_lse, neighborhood_attention, ops
from vicinal.tiling import Tiling


@pytest.fixture
def by_operator(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What went through the operator, call by call."""
    calls: list[str] = []
    operator = ops.attention

    def attention(*args: Any) -> Any:
        calls.append("operator")
        return operator(*args)

    monkeypatch.setattr(ops, "attention", attention)
    return calls


def inputs() -> list[torch.Tensor]:
    return [torch.randn(2, 7, 12, 2, 16) for _ in range(3)]


def test_a_plain_call_is_short_and_gives_what_the_operator_gives(by_operator: list[str]):
    tensors = inputs()
    for _ in range(2):  # solved, then looked up
        short = attention_with_lse(*tensors, kernel_size=(3, 5), dilation=(2, 1))
    assert not by_operator
    with FlopCounterMode(display=False) as counter:
        long = attention_with_lse(*tensors, kernel_size=(3, 5), dilation=(2, 1))
    assert by_operator
    assert counter.get_total_flops() > 0
    for a, b in zip(short, long, strict=True):
        assert torch.equal(a, b)


def watched() -> dict[str, Callable[[], Any]]:
    def with_gradient() -> object:
        q, k, v = inputs()
        return neighborhood_attention(q.requires_grad_(), k, v, 3)

    def in_a_batch() -> object:
        return torch.vmap(lambda q, k, v: neighborhood_attention(q, k, v, 3))(*(t[None] for t in inputs()))

    def autocast() -> object:
        with torch.autocast("cpu", torch.bfloat16):
            out = neighborhood_attention(*inputs(), kernel_size=3)
        assert out.dtype == torch.bfloat16
        return out

    def profiled() -> object:
        with torch.profiler.profile() as found:
            out = neighborhood_attention(*inputs(), kernel_size=3)
        assert any(event.key == "vicinal::attention" for event in found.key_averages())
        return out

    def parameters() -> object:
        return neighborhood_attention(*(torch.nn.Parameter(t) for t in inputs()), kernel_size=3)

    def biased() -> object:
        return neighborhood_attention(*inputs(), kernel_size=3, position_bias=torch.zeros(2, 5, 5))

    return {f.__name__: f for f in (with_gradient, in_a_batch, autocast, profiled, parameters, biased)}


@pytest.mark.parametrize("name", watched())
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_whoever_watches_sees_the_operator(by_operator: list[str], name: str):
    watched()[name]()
    assert by_operator


def test_tangents_are_refused_rather_than_lost():
    q, k, v = inputs()
    with forward_ad.dual_level(), pytest.raises(Exception, match="forward-mode derivatives"):
        neighborhood_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v, 3)


def test_what_a_call_remembers_is_told_apart():
    """By all that Problem is made of: nothing solved for one call answers another."""
    q, k, v = inputs()
    calls: list[dict[str, Any]] = [
        {"kernel_size": 3},
        {"kernel_size": (3, 5)},
        {"kernel_size": [3, 5]},
        {"kernel_size": (3, 5), "stride": (1, 2)},
        {"kernel_size": (3, 5), "dilation": (2, 1)},
        {"kernel_size": (3, 5), "is_causal": (True, False)},
        {"kernel_size": (3, 5), "scale": 0.5},
        {"kernel_size": (3, 5), "backend": "reference"},
        {"kernel_size": (3, 5), "tiling": Tiling((2, 3), (4, 5))},
    ]
    for _ in range(2):
        for tensors in ((q, k, v), (q.double(), k.double(), v.double()), (q[:1], k[:1], v[:1])):
            for call in calls:
                want = neighborhood_attention(*tensors, **{**call, "backend": "reference", "tiling": None})
                torch.testing.assert_close(neighborhood_attention(*tensors, **call), want)


@pytest.mark.parametrize("grad", [True, False])
def test_bad_input_is_refused_each_time(grad: bool):
    q, k, v = inputs()
    with nullcontext() if grad else torch.no_grad():
        for _ in range(2):
            with pytest.raises(InvalidProblem, match="kernel_size"):
                neighborhood_attention(q, k, v, 99)
            with pytest.raises(InvalidProblem, match="kernel_size"):
                neighborhood_attention(q, k, v, {3: 5})  # type: ignore[arg-type]
            with pytest.raises(InvalidProblem, match="value"):
                neighborhood_attention(q, k, v[:1], 3)
            with pytest.raises(InvalidProblem, match="key"):
                neighborhood_attention(q, k.double(), v, 3)


def test_memory_of_calls_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_eager, "MOST", 3)
    for length in range(5, 15):
        q = torch.randn(1, length, 1, 4)
        neighborhood_attention(q, q, q, 3)
        assert len(_eager._solved) <= 3
