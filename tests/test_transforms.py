"""`torch.func`: gradients and batches by transforms are what loops and autograd give; the rest is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from vicinal import attention_with_lse, neighborhood_attention, neighborhood_attention_packed, ops
from vicinal.errors import Unsupported
from vicinal.nn import NeighborhoodAttention2D

SAMPLES = 3


def make(*batch: int) -> dict[str, Tensor]:
    """Everything that has a gradient, in float64, and each of another shape."""
    shapes = {
        "query": (*batch, 2, 5, 7, 4, 3),
        "key": (*batch, 2, 5, 7, 2, 3),
        "value": (*batch, 2, 5, 7, 2, 6),
        "additional_keys": (*batch, 2, 4, 2, 3),
        "additional_values": (*batch, 2, 4, 2, 6),
        "position_bias": (*batch, 4, 5, 9),
    }
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def loss(tensors: dict[str, Tensor], lengths: Tensor | None = None) -> Tensor:
    window: dict[str, Any] = {"kernel_size": (3, 5), "stride": (2, 1), "is_causal": (True, False)}
    out, lse = attention_with_lse(**tensors, **window, additional_lengths=lengths)
    return out.sin().sum() + lse.cos().sum()


def by_autograd(tensors: dict[str, Tensor], lengths: Tensor | None = None) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    return dict(zip(leaves, torch.autograd.grad(loss(leaves, lengths), [*leaves.values()]), strict=True))


@pytest.mark.parametrize("lengths", [None, torch.tensor([1, 3])], ids=["all", "lengths"])
def test_grad_is_autograds(lengths: Tensor | None):
    tensors = make()
    torch.testing.assert_close(grad(loss)(tensors, lengths), by_autograd(tensors, lengths))


@pytest.mark.parametrize("shared", [(), ("position_bias",), ("key", "additional_values", "position_bias")])
def test_gradients_of_each_sample_are_a_loops(shared: tuple[str, ...]):
    """Also where samples share tensors, whose gradients differ from sample to sample all the same."""
    tensors = {name: tensor[0] if name in shared else tensor for name, tensor in make(SAMPLES).items()}
    dims = {name: None if name in shared else 0 for name in tensors}
    lengths = torch.tensor([[0, 4], [1, 2], [4, 3]])
    found = vmap(grad(loss), in_dims=(dims, 0))(tensors, lengths)
    for i in range(SAMPLES):
        sample = {name: tensor if name in shared else tensor[i] for name, tensor in tensors.items()}
        wanted = by_autograd(sample, lengths[i])
        torch.testing.assert_close({name: gradient[i] for name, gradient in found.items()}, wanted)


@pytest.mark.parametrize("dim", [0, 2, -1])
@pytest.mark.parametrize("shared", [(), ("position_bias",)])
@pytest.mark.parametrize("is_watched", [False, True], ids=["no_grad", "grad"])
def test_vmap_is_a_loop(dim: int, shared: tuple[str, ...], is_watched: bool):
    tensors = make(SAMPLES)
    samples = [{n: t[0] if n in shared else t[i] for n, t in tensors.items()} for i in range(SAMPLES)]
    dims = {name: None if name in shared else dim for name in tensors}
    moved = {name: t[0] if name in shared else t.movedim(0, dim) for name, t in tensors.items()}
    with torch.set_grad_enabled(is_watched):
        found = vmap(loss, in_dims=(dims,))(moved)
    torch.testing.assert_close(found, torch.stack([loss(sample) for sample in samples]))


@pytest.mark.parametrize(("shared", "calls"), [((), SAMPLES), (("position_bias",), 1)])
def test_vmap_is_one_call_where_tables_do_not_differ(
    shared: tuple[str, ...], calls: int, monkeypatch: pytest.MonkeyPatch
):
    solved: list[int] = []
    solve = ops.solve
    monkeypatch.setattr(ops, "solve", lambda inputs, *more: solved.append(len(inputs.query)) or solve(inputs, *more))
    tensors = {name: tensor[0] if name in shared else tensor for name, tensor in make(SAMPLES).items()}
    vmap(loss, in_dims=({name: None if name in shared else 0 for name in tensors},))(tensors)
    assert solved == [2 * SAMPLES // calls] * calls


def test_what_vmap_gives_has_a_gradient():
    tensors = make(SAMPLES)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    found = torch.autograd.grad(vmap(loss)(leaves).sum(), [*leaves.values()])
    for i in range(SAMPLES):
        wanted = by_autograd({name: tensor[i] for name, tensor in tensors.items()})
        torch.testing.assert_close([gradient[i] for gradient in found], [*wanted.values()])


def test_vjp_and_jacrev():
    query = torch.randn(1, 4, 2, 2, dtype=torch.float64)

    def call(query: Tensor) -> Tensor:
        return neighborhood_attention(query, query, query, 3)

    leaf = query.clone().requires_grad_()
    weights = torch.randn_like(query)
    (wanted,) = torch.autograd.grad((call(leaf) * weights).sum(), leaf)
    torch.testing.assert_close(vjp(call, query)[1](weights)[0], wanted)
    torch.testing.assert_close((jacrev(call)(query) * weights[(...,) + (None,) * 4]).sum((0, 1, 2, 3)), wanted)


def test_packed_tensors_have_packed_gradients():
    packed = torch.randn(SAMPLES, 2, 5, 7, 3, 4, 3, dtype=torch.float64)
    found = vmap(grad(lambda qkv: neighborhood_attention_packed(qkv, 3).sin().sum()))(packed)
    leaf = packed.clone().requires_grad_()
    apart = (neighborhood_attention(*qkv.unbind(-3), 3).sin().sum() for qkv in leaf)
    torch.testing.assert_close(found, torch.autograd.grad(sum(apart), leaf)[0])


def test_gradients_of_each_sample_of_a_layer():
    layer = NeighborhoodAttention2D(8, 2, 3, position_bias=True, rotary=True, qk_norm=True).double()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    x = torch.randn(SAMPLES, 5, 6, 8, dtype=torch.float64)

    def of_one(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x[None],)).sin().sum()

    found = vmap(grad(of_one), in_dims=(None, 0))(parameters, x)
    for i in range(SAMPLES):
        layer.zero_grad()
        layer(x[i : i + 1]).sin().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(found[name][i], parameter.grad)


@pytest.mark.parametrize(
    ("derive", "message"),
    [
        (lambda f, x: grad(lambda y: grad(f)(y).sum())(x), "second derivative"),
        (lambda f, x: jacrev(jacrev(f))(x), "second derivative"),
        (lambda f, x: jvp(f, (x,), (x,)), "forward-mode derivatives"),
        (lambda f, x: hessian(f)(x), "forward-mode derivatives"),
    ],
    ids=["grad of grad", "jacrev of jacrev", "jvp", "hessian"],
)
def test_what_is_not_offered_is_refused(derive: Callable[..., Any], message: str):
    query = torch.randn(1, 4, 2, 2, dtype=torch.float64)
    with pytest.raises(Unsupported, match=message):
        derive(lambda x: neighborhood_attention(x, x, x, 3).sin().sum(), query)
