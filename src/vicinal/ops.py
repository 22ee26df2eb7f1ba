"""The operator as PyTorch sees it: custom ops with fakes, derivatives, autocast and FLOP formulas.

Schemas carry tensors and numbers only. Every entry rebuilds `Problem` and `Plan` from them through
the same caches, so that compiled, exported and eager calls share one plan and one set of checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vicinal._calls import gradients, outside_autocast, settled
from vicinal._eager import is_plain
from vicinal.backends.base import Backend, Inputs, Output, no_second_derivative, unpacked
from vicinal.errors import InvalidProblem
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

try:  # PyTorch's own affair, which may go one day
    from torch._library.autograd import Info, make_autograd_impl
except ImportError:
    Info = make_autograd_impl = None


def encode(tiling: Tiling | None) -> list[int]:
    """A tiling as integers, for a schema: query tile, KV tile, 1 if origins are free. Empty for `None`."""
    if tiling is not None and not isinstance(tiling, Tiling):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidProblem(f"tiling must be a Tiling, got {tiling!r}")
    return [] if tiling is None else [*tiling.q_tile, *tiling.kv_tile, tiling.kv_origin == "free"]


def decode(numbers: Sequence[int]) -> Tiling | None:
    """Undo `encode`."""
    if not numbers:
        return None
    *tiles, free = numbers
    rank = len(tiles) // 2
    return Tiling(tuple(tiles[:rank]), tuple(tiles[rank:]), "free" if free else "grid")


def solve(
    inputs: Inputs,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
    backend: str,
    tiling: Sequence[int],
    needs_grad: bool,
) -> tuple[Backend, Plan]:
    """Who computes it, and how it is cut."""
    settings = {
        "kernel_size": list(kernel_size),
        "stride": list(stride),
        "dilation": list(dilation),
        "is_causal": list(map(bool, is_causal)),  # integers, since `torch.jit.trace` knows no lists of bools
        "scale": scale,
    }
    return settled(inputs, settings, backend or None, decode(tiling), needs_grad)


_MOST = 4096
_problems: dict[tuple[Any, ...], Problem] = {}


def problem_of(inputs: Inputs, settings: dict[str, Any]) -> Problem:
    """`Problem.of`, which looks at tensors of the same kinds once.

    Args:
        inputs: tensors, or whatever else was passed for them.
        settings: arguments of `Problem.of`, by name.

    Raises:
        InvalidProblem: as `Problem.of`.
    """
    # Text, since 7, 7.0 and True are different settings that are equal as keys.
    kind: list[Any] = [repr(settings)]
    for tensor in inputs:
        if type(tensor) in (Tensor, torch.nn.Parameter):
            assert tensor is not None
            kind += [tensor.shape, tensor.dtype, tensor.device, tensor.layout]
        elif tensor is None:
            kind.append(None)
        else:  # who knows what that is
            return inputs.problem(settings)
    try:
        known = _problems.get(key := tuple(kind))
    except TypeError:  # symbolic sizes
        return inputs.problem(settings)
    if known is None:
        known = inputs.problem(settings)
        if len(_problems) >= _MOST:
            _problems.clear()
        _problems[key] = known
    return known


def _attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
    position_bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
    backend: str,
    tiling: Sequence[int],
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """`out [B, *S, H, Dv]` and `lse [B, *S, H]`; see `vicinal.neighborhood_attention`.

    Without key and value, the query is all three, `[B, *S, 3, H, D]`; see `vicinal.neighborhood_attention_packed`.
    """
    inputs = unpacked(query, key, value, additional_keys, additional_values, additional_lengths, position_bias)
    chosen, plan = solve(inputs, kernel_size, stride, dilation, is_causal, scale, backend, tiling, needs_grad)
    out, lse = outside_autocast(query, chosen.forward, plan, inputs)
    return out, lse


def _attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
    position_bias: Tensor | None,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
    scale: float,
    backend: str,
    tiling: Sequence[int],
    needs_grad: bool,
) -> list[Tensor]:
    """Gradients of those that there are of query, key, value, additional keys and values, and bias."""
    inputs = unpacked(query, key, value, additional_keys, additional_values, additional_lengths, position_bias)
    chosen, plan = solve(inputs, kernel_size, stride, dilation, is_causal, scale, backend, tiling, needs_grad)
    packed = query if key is None else None
    found = gradients(chosen, plan, inputs, Output(out, lse), grad_out, grad_lse, packed)
    return [gradient for gradient in found if gradient is not None]


def _fake_attention(query: Tensor, key: Tensor | None, value: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    shape = (*query.shape[:-1], value.shape[-1]) if value is not None else (*query.shape[:-3], *query.shape[-2:])
    return query.new_empty(shape), query.new_empty(shape[:-1], dtype=lse_dtype)


def _fake_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
    position_bias: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    tensors = (query, key, value, additional_keys, additional_values, position_bias)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors if t is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.settings = inputs[7:]
    ctx.set_materialize_grads(False)  # hardly anybody asks for the log-sum-exp's, and zeros cost a kernel


def _derivative(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    # Programs that were recorded where nobody wanted gradients may be derived where somebody does.
    *settings, _ = ctx.settings
    gradients = iter(attention_backward(grad_out, grad_lse, out, lse, *inputs, *settings, True))
    # Lengths, the sixth, have none.
    of_inputs = [None if tensor is None or i == 5 else next(gradients) for i, tensor in enumerate(inputs)]
    return (*of_inputs, *[None] * len(ctx.settings))


_library = torch.library.Library("vicinal", "DEF")


def _operator(
    compute: Callable[..., Any], fake: Callable[..., Any], derivative: Callable[..., Any], save: Any = None
) -> Callable[..., Any]:
    """What `torch.library.custom_op` makes of `compute`, but for what that does in each call.

    It redispatches calls that need no derivative, looks for aliases, and guards functions against being traced that
    never are: as much host time as all else that a compiled call does. Where PyTorch's `make_autograd_impl` has gone,
    calls that need no derivative are redispatched.
    """
    name = compute.__name__.removeprefix("_")
    schema = torch.library.infer_schema(compute, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vicinal::{name}", fake, lib=_library)
    operator = getattr(torch.ops.vicinal, name).default
    if Info is None or make_autograd_impl is None:
        torch.library.register_autograd(f"vicinal::{name}", derivative, setup_context=save, lib=_library)
        return operator
    derived = make_autograd_impl(operator, Info(derivative, save))

    def dispatched(keys: Any, *args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        return derived(keys, *args) if needs_grad or not is_plain(tensors) else compute(*args)

    _library.impl(name, dispatched, "Autograd", with_keyset=True)
    return operator


attention_backward = _operator(_attention_backward, _fake_attention_backward, no_second_derivative)
attention = _operator(_attention, _fake_attention, _derivative, _save)
