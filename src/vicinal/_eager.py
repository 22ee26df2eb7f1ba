"""The short way for eager calls: what was solved once is looked up, and the backend is called at once.

A custom operator and its checks cost about a tenth of a millisecond a call, and several times that with its gradient:
more than small kernels take on a GPU. Nobody needs them where nobody watches: no tracing, no mode, transform or
profiler. Everything else goes through `vicinal.ops`, and gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler

from vicinal._calls import gradients, outside_autocast, settled
from vicinal.backends.base import Backend, Inputs, Output, no_second_derivative, unpacked
from vicinal.plan import Plan
from vicinal.tiling import Tiling


def is_plain(tensors: Iterable[object]) -> bool:
    """Whether nobody watches, and these are tensors, and nothing but tensors."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or peek_interpreter_stack()  # vmap and its kin
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
    )


def attention(tensors: Sequence[Any], settings: dict[str, Any], backend: str | None, tiling: Tiling | None) -> Output:
    """The answer of the first backend that runs it, or of the one named; differentiable if an input is.

    Args:
        tensors: those of a call, `is_plain`, as `unpacked` takes them.
        settings: arguments of `Problem.of`, by name.
        backend, tiling: as in a call.

    Raises:
        InvalidProblem, Unsupported: as `vicinal.neighborhood_attention`.
    """
    needs_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    inputs = unpacked(*tensors)
    chosen, plan = settled(inputs, settings, backend, tiling, needs_grad)
    if needs_grad:
        return outside_autocast(inputs.query, _differentiable, chosen, plan, inputs, tensors)
    return outside_autocast(inputs.query, chosen.forward, plan, inputs)


def _differentiable(chosen: Backend, plan: Plan, inputs: Inputs, tensors: Sequence[Any]) -> Output:
    return Output(*_Attention.apply(chosen, plan, inputs, *tensors))


class _Attention(torch.autograd.Function):
    """A backend's two passes. Autograd sees nothing of what is inside."""

    @staticmethod
    def forward(ctx: Any, chosen: Backend, plan: Plan, inputs: Inputs, *tensors: Any) -> tuple[Tensor, Tensor]:
        output = chosen.forward(plan, inputs)
        ctx.save_for_backward(*tensors, *output)
        ctx.solved = chosen, plan
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        # With create_graph=True the gradients get a derivative of their own, to refuse it in words.
        derive = _Gradients.apply if torch.is_grad_enabled() else _gradients
        return None, None, None, *derive(*ctx.solved, *grads, *ctx.saved_tensors)


class _Gradients(torch.autograd.Function):
    """The backward pass as something that might be derived."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Any, ...]:
        return _gradients(*given)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return no_second_derivative(ctx, *grads)


def _gradients(
    chosen: Backend, plan: Plan, grad_out: Tensor | None, grad_lse: Tensor | None, *saved: Any
) -> tuple[Tensor | None, ...]:
    """One for each tensor of the call; lengths have none."""
    *tensors, out, lse = saved
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    packed = tensors[0] if tensors[1] is None else None
    return gradients(chosen, plan, unpacked(*tensors), Output(out, lse), grad_out, grad_lse, packed)
