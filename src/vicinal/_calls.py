"""What eager calls and the operator share: who computes a call, looked up by what was passed, outside of autocast.

Every call of a model's step passes here at least twice, on its way forward and back. To choose a backend and a plan
takes a hundred microseconds, to look them up three.
"""

from __future__ import annotations

import marshal
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from vicinal import backends, tuned, tuning
from vicinal.backends.base import Backend, Inputs, Output
from vicinal.plan import Plan
from vicinal.tiling import Tiling

MOST = 4096
"""Kinds of calls remembered; then all are forgotten, for such a program repeats few."""

_known: dict[tuple[Any, ...], tuple[Backend, Plan]] = {}

T = TypeVar("T")


def settled(
    inputs: Inputs, settings: dict[str, Any], backend: str | None, tiling: Tiling | None, needs_grad: bool
) -> tuple[Backend, Plan]:
    """Who computes it, and how it is cut: `tuning.settle`, asked once for all tensors of the same kinds.

    Args:
        inputs: tensors.
        settings: arguments of `Problem.of`, by name, always in the same order.
        backend, tiling: as in a call.
        needs_grad: whether gradients will be asked for.

    Raises:
        InvalidProblem, Unsupported: as `vicinal.neighborhood_attention`.
    """
    query, key, value, *extra = inputs
    try:
        kind = (  # spelled out, since a loop would take longer than the lookup
            query.shape, query.dtype, query.device, query.layout,
            key.shape, key.dtype, key.device, key.layout,
            value.shape, value.dtype, value.device, value.layout,
            id(backends.ALL), tuned.epoch, needs_grad,
            _spelled(settings),
            backend or os.environ.get(backends.VARIABLE),
            tiling,
            *[tensor if tensor is None else (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
              for tensor in extra],
        )  # fmt: skip
        found = _known.get(kind)
    except (TypeError, RuntimeError):
        # Symbolic sizes, which have no hash. Or what is no setting, or nested tensors: the next line will say so.
        return tuning.settle(inputs.problem(settings), query.device, backend, tiling, needs_grad=needs_grad)
    if found is None:
        found = tuning.settle(inputs.problem(settings), query.device, backend, tiling, needs_grad=needs_grad)
        if len(_known) >= MOST:
            _known.clear()
        _known[kind] = found
    return found


def _spelled(settings: dict[str, Any]) -> bytes | str:
    """Settings as a key: spelled out, since 7, 7.0 and True are different settings that are equal as keys."""
    try:
        return marshal.dumps([*settings.values()], 2)  # without references, and three times as fast as `repr`
    except ValueError:
        return repr(settings)


def gradients(
    chosen: Backend,
    plan: Plan,
    inputs: Inputs,
    output: Output,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    packed: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The backward pass of a call: a gradient for each of its tensors but the lengths, which have none.

    Args:
        chosen, plan: as they were settled.
        inputs, output, grad_out, grad_lse: as in `Backend.backward`.
        packed: queries, keys and values if they came as one tensor, see `unpacked`: so do their gradients.
    """
    if packed is None:
        found = outside_autocast(grad_out, chosen.backward, plan, inputs, output, grad_out, grad_lse)
        return *found[:5], None, found.position_bias
    whole = torch.empty_like(packed, memory_format=torch.contiguous_format)
    into = whole.unbind(-3)
    found = outside_autocast(grad_out, chosen.backward, plan, inputs, output, grad_out, grad_lse, into)
    return whole, None, None, *found[3:5], None, found.position_bias


def outside_autocast(there: Tensor, run: Callable[..., T], *args: Any) -> T:
    """`run(*args)` with autocast off where a tensor lies: what a backend computes in is its own affair.

    Two calls where `torch.autocast(device, enabled=False)` would make thirty.
    """
    if not (torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device := there.device.type)):
        return run(*args)
    torch.set_autocast_enabled(device, False)
    try:
        return run(*args)
    finally:
        torch.set_autocast_enabled(device, True)
