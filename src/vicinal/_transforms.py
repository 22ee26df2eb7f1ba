"""Under `torch.func`'s transforms: `vmap` as one call with more batch rows, and gradients by `grad`, `vjp`, `jacrev`.

The operators' own derivatives do not work there, since PyTorch makes them in the older of its two styles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import Function

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
        "torch.autograd.grad or torch.func.vjp"
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


def _rows(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


torch.library.register_vmap("vicinal::attention", _by_rows(ops.attention, TENSORS, is_backward=False))
torch.library.register_vmap(
    "vicinal::attention_backward", _by_rows(ops.attention_backward, GIVEN + TENSORS, is_backward=True)
)
