"""Plain calls take the short way, and nothing that watches calls is passed by."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from vicinal import InvalidProblem, Unsupported, _calls, attention_with_lse, neighborhood_attention, ops
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


def test_gradients_are_short_too_and_what_the_operator_gives(by_operator: list[str]):
    tensors = [t.requires_grad_() for t in inputs()]
    more = [torch.randn(2, 3, 2, 16, requires_grad=True) for _ in range(2)]
    table = torch.nn.Parameter(torch.randn(2, 5, 9))
    extra = dict(zip(("additional_keys", "additional_values", "position_bias"), (*more, table), strict=True))
    extra["additional_lengths"] = torch.tensor([2, 0])
    leaves = [*tensors, *more, table]

    def solved(which: int) -> tuple[torch.Tensor, ...]:
        """Gradients of the output alone, of the log-sum-exp alone, or of both."""
        found = attention_with_lse(*tensors, kernel_size=(3, 5), is_causal=(True, False), **extra)
        loss = sum(each.square().sum() for i, each in enumerate(found) if which in (i, 2))
        return *found, *torch.autograd.grad(loss, leaves)  # type: ignore[arg-type]

    for which in range(3):
        short = solved(which)
        assert not by_operator
        with FlopCounterMode(display=False):
            long = solved(which)
        assert by_operator
        by_operator.clear()
        for a, b in zip(short, long, strict=True):
            assert torch.equal(a, b)


def test_autocast_is_short_and_what_the_operator_gives(by_operator: list[str]):
    tensors, table = [t.requires_grad_() for t in inputs()], torch.randn(2, 5, 9, requires_grad=True)

    def solved() -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            out = neighborhood_attention(*tensors, kernel_size=(3, 5), position_bias=table)
            assert torch.is_autocast_enabled("cpu") and out.dtype == torch.bfloat16
            return out, *torch.autograd.grad(out.float().square().sum(), [*tensors, table])

    short = solved()
    assert not by_operator
    with FlopCounterMode(display=False):
        long = solved()
    assert by_operator
    for a, b in zip(short, long, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_autocast_goes_on_after_an_error():
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(InvalidProblem, match="kernel_size"):
            neighborhood_attention(*inputs(), kernel_size=99)
        assert torch.is_autocast_enabled("cpu")


def test_a_second_derivative_is_refused(by_operator: list[str]):
    q, k, v = (t.requires_grad_() for t in inputs())
    out = neighborhood_attention(q, k, v, 3)
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    assert not by_operator
    with pytest.raises(Unsupported, match="second derivative"):
        grad.sum().backward()


def watched() -> dict[str, Callable[[], Any]]:
    def in_a_batch() -> object:
        return torch.vmap(lambda q, k, v: neighborhood_attention(q, k, v, 3))(*(t[None] for t in inputs()))

    def profiled() -> object:
        with torch.profiler.profile() as found:
            out = neighborhood_attention(*inputs(), kernel_size=3)
        assert any(event.key == "vicinal::attention" for event in found.key_averages())
        return out

    def counted() -> object:
        q, k, v = inputs()
        with FlopCounterMode(display=False):
            return neighborhood_attention(q.requires_grad_(), k, v, kernel_size=3)

    return {f.__name__: f for f in (in_a_batch, profiled, counted)}


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
    monkeypatch.setattr(_calls, "MOST", 3)
    for length in range(5, 15):
        q = torch.randn(1, length, 1, 4)
        neighborhood_attention(q, q, q, 3)
        assert len(_calls._known) <= 3


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nothing_in_place_of_a_tensor_is_refused_in_words(name: str):
    tensors: dict[str, Any] = dict(zip(("query", "key", "value"), inputs(), strict=True))
    for _ in range(2):
        with pytest.raises(InvalidProblem, match=f"{name} must be a tensor, got NoneType"):
            neighborhood_attention(**{**tensors, name: None}, kernel_size=3)


def test_settings_that_cannot_be_spelled_in_short_are_spelled_out():
    """Such as a size: it is a tuple, but not only that."""
    tensors = inputs()
    expected = neighborhood_attention(*tensors, kernel_size=(3, 5))
    for _ in range(2):
        assert torch.equal(neighborhood_attention(*tensors, kernel_size=torch.Size((3, 5))), expected)
