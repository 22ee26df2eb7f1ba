"""Under `torch.func`'s transforms: `vmap` as one call with more batch rows, and gradients by `grad`, `vjp`, `jacrev`.

The operators' own derivatives do not work there, since PyTorch makes them in the older of its two styles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import Function, forward_ad

from vicinal import ops
from vicinal.backends.base import no_second_derivative
from vicinal.errors import Unsupported

TENSORS = 7
"""Of the arguments of `ops.attention`, so many are tensors or `None`; the others are settings."""

GIVEN = 4
"""Tensors that `ops.attention_backward` has before those: gradients and outputs."""


def is_transformed() -> bool:
    """Whether a transform watches, so that tensors do not say whether they will be derived."""
    return not torch.compiler.is_compiling() and bool(peek_interpreter_stack())


def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`ops.attention`, differentiable under transforms too; the last argument says whether that may matter."""
    return _Attention.apply(*arguments) if arguments[-1] and is_transformed() else ops.attention(*arguments)


def refuse_tangents() -> NoReturn:
    """Stands where forward-mode derivatives would.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        "forward-mode derivatives (jvp) of neighborhood attention are not offered; use reverse mode, "
        "torch.autograd.grad or torch.func.vjp, or neighborhood_scores and neighborhood_aggregate, which have both"
    )


class _Attention(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return ops.attention(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:TENSORS], *output)
        ctx.settings = inputs[TENSORS:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        *inputs, out, lse = ctx.saved_tensors
        found = iter(_Gradients.apply(*grads, out, lse, *inputs, *ctx.settings))
        # Lengths, the sixth, have none.
        of_inputs = [None if tensor is None or i == 5 else next(found) for i, tensor in enumerate(inputs)]
        return (*of_inputs, *[None] * len(ctx.settings))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return refuse_tangents()


class _Gradients(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(ops.attention_backward(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return no_second_derivative(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return refuse_tangents()


def bilinear(operator: Callable[..., Tensor], derivative: Callable[..., Any], *arguments: Any) -> Tensor:
    """An operator of two tensors and settings, linear in each tensor, with every derivative, in forward mode too.

    Args:
        operator: has a reverse derivative of its own, which holds where nobody transforms.
        derivative: the same, of a context with `saved_tensors` and `settings`.
        arguments: of the operator.
    """
    if torch.compiler.is_compiling() or not (is_transformed() or forward_ad._current_level >= 0):
        return operator(*arguments)
    first, second, *settings = arguments
    return _Bilinear.apply(_Call(operator, derivative, settings), first, second)


@dataclass(frozen=True, eq=False)
class _Call:
    """All but the tensors, as one thing: transforms would take lists apart."""

    operator: Callable[..., Tensor]
    derivative: Callable[..., Any]
    settings: list[Any]


class _Bilinear(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: _Call, first: Tensor, second: Tensor) -> Tensor:
        return call.operator(first, second, *call.settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.call, *tensors = inputs
        ctx.settings = ctx.call.settings
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, *ctx.call.derivative(ctx, *grads)[:2]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (first, second), (_, of_first, of_second), call = ctx.saved_tensors, tangents, ctx.call
        pairs = [
            pair for pair in ((of_first, second), (first, of_second)) if pair[0] is not None and pair[1] is not None
        ]
        parts = [bilinear(call.operator, call.derivative, *pair, *call.settings) for pair in pairs]
        return sum(parts[1:], parts[0])


def _by_rows(call: Callable[..., Any], tensors: int, is_backward: bool) -> Callable[..., Any]:
    """The rule of `vmap` for an operator: batches of batches are batches, but for tables of position bias.

    Where tables differ from one to the next, or their gradients will, there is a call for each.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        size, settings = info.batch_size, arguments[tensors:]
        given = list(zip(arguments[:tensors], in_dims, strict=False))
        table, table_dim = given.pop()
        if table is not None and (is_backward or table_dim is not None):
            found = [
                call(*(t if dim is None else t.select(dim, i) for t, dim in (*given, (table, table_dim))), *settings)
                for i in range(size)
            ]
            apart = [torch.stack(each) for each in zip(*found, strict=True)]
        else:
            rows = [None if t is None else _rows(t, dim, size).flatten(0, 1) for t, dim in given]
            apart = [t.unflatten(0, (size, t.shape[0] // size)) for t in call(*rows, table, *settings)]
        return (apart, [0] * len(apart)) if is_backward else (tuple(apart), (0, 0))

    return rule


def by_rows(operator: Callable[..., Tensor]) -> Callable[..., Any]:
    """The rule of `vmap` for an operator of two tensors and settings: batches of batches are batches."""

    def rule(info: Any, in_dims: tuple[Any, ...], first: Tensor, second: Tensor, *settings: Any) -> tuple[Tensor, int]:
        size, given = info.batch_size, zip((first, second), in_dims, strict=False)
        found = operator(*(_rows(tensor, dim, size).flatten(0, 1) for tensor, dim in given), *settings)
        return found.unflatten(0, (size, found.shape[0] // size)), 0

    return rule


def _rows(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


torch.library.register_vmap("vicinal::attention", _by_rows(ops.attention, TENSORS, is_backward=False))
torch.library.register_vmap(
    "vicinal::attention_backward", _by_rows(ops.attention_backward, GIVEN + TENSORS, is_backward=True)
)
