"""The short way for plain eager calls: what was solved once is looked up, and the backend is called at once.

A custom operator and its checks cost about a tenth of a millisecond a call, more than a small kernel takes on a
GPU. Nobody needs them where nothing but the numbers is asked for: no gradient, no tracing, no mode, transform,
autocast or profiler. Everything else goes through `vicinal.ops`, and gets the same numbers.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad, profiler

from vicinal import backends, tuned, tuning
from vicinal.backends.base import Backend, Inputs, Output
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

MOST = 4096
"""Kinds of calls remembered; then all are forgotten, for such a program repeats few."""

_solved: dict[tuple[Any, ...], tuple[Backend, Plan]] = {}


def is_plain(*tensors: Any) -> bool:
    """Whether nothing but the numbers is asked for, of tensors that are nothing but tensors."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor or (tensor.requires_grad and torch.is_grad_enabled()):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or peek_interpreter_stack()  # vmap and its kin
        or torch._C._get_tracing_state()
        or forward_ad._current_level >= 0
        or profiler._is_profiler_enabled
        or torch.is_autocast_enabled(tensors[0].device.type)
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any], backend: str | None, tiling: Tiling | None
) -> Output:
    """The answer of the first backend that runs it, or of the one named.

    Args:
        query, key, value: tensors that are `is_plain`.
        settings: arguments of `Problem.of`, by name.
        backend, tiling: as in a call.

    Raises:
        InvalidProblem, Unsupported: as `vicinal.neighborhood_attention`.
    """
    kind = (  # spelled out, since a loop would take longer than the lookup
        query.shape, query.dtype, query.device, query.layout,
        key.shape, key.dtype, key.device, key.layout,
        value.shape, value.dtype, value.device, value.layout,
        id(backends.ALL), tuned.epoch,
        *[tuple(each) if type(each) is list else each for each in settings.values()],
        backend or os.environ.get(backends.VARIABLE),
        tiling,
    )  # fmt: skip
    try:
        found = _solved.get(kind)
    except TypeError:  # not hashable, so not a setting either, as the next line will say
        found = None
    if found is None:
        problem = Problem.of(query, key, value, **settings)
        found = tuning.settle(problem, query.device, backend, tiling)
        if len(_solved) >= MOST:
            _solved.clear()
        _solved[kind] = found
    chosen, plan = found
    return chosen.forward(plan, Inputs(query, key, value))
