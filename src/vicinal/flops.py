"""Formulas for PyTorch's FLOP counter: what the windows ask for, whoever computes them."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from vicinal.problem import recorded_axes

Shape = Sequence[int]


def ensure_registered() -> None:
    """Register the formulas once somebody has imported the counter.

    Not at import: `torch.utils.flop_counter` brings triton with it, which `import vicinal` must not.
    """
    if "torch.utils.flop_counter" in sys.modules:
        _register()


@lru_cache(maxsize=1)
def _register() -> None:
    counters: Any = sys.modules["torch.utils.flop_counter"]
    formulas = {torch.ops.vicinal.attention: _forward, torch.ops.vicinal.attention_backward: _backward}
    for operator, formula in formulas.items():
        counters.register_flop_formula(operator)(formula)
    # A counter copies the registry when it is made: one that is already counting must hear of us as well.
    for mode in _get_current_dispatch_mode_stack():
        counter: Any = getattr(mode, "counter", None)
        if hasattr(counter, "flop_registry"):
            counter.flop_registry.update({operator: counters.flop_registry[operator] for operator in formulas})


def _forward(query: Shape, key: Shape | None, value: Shape | None, extra: Shape | None, *rest: Any, **_: Any) -> int:
    """Two products, over the pairs inside windows only. Adding a bias is no product and counts nothing."""
    _values, _lengths, _bias, *settings = rest
    query, value = _unpacked(query, value)
    return 2 * _pairs(query, extra, settings) * (query[-1] + value[-1])


def _backward(*args: Any, **_: Any) -> int:
    """Five products: the scores again, and four gradients."""
    query, _key, value, extra, _values, _lengths, _bias, *settings = args[4:]
    query, value = _unpacked(query, value)
    return 2 * _pairs(query, extra, settings) * (3 * query[-1] + 2 * value[-1])


def _unpacked(query: Shape, value: Shape | None) -> tuple[Shape, Shape]:
    """Of a query that may hold keys and values too, as `vicinal.backends.base.unpacked` takes it."""
    if value is not None:
        return query, value
    *outer, _three, heads, width = query
    return (*outer, heads, width), (*outer, heads, width)


def _pairs(query: Shape, extra: Shape | None, settings: Sequence[Any]) -> int:
    """(query, key) pairs of all batch rows and heads."""
    batch, *shape, heads, _ = query
    axes = recorded_axes(shape, *settings[:4])
    inside = math.prod(axis.pairs for axis in axes)
    return batch * heads * (inside + (math.prod(shape) * extra[1] if extra else 0))
