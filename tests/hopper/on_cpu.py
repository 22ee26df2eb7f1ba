"""The kernels' own arithmetic of tiles and masks, run by NumPy: what can be known of it without a GPU.

`device(module)` gives the functions of a module of kernels as plain Python functions on arrays: their source as it
stands, with `gl` replaced by the few functions that this arithmetic uses.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
from triton.runtime.jit import JITFunction

from vicinal.backends.hopper import mask, tile


class Array(np.ndarray):
    """An array with the one method of Triton's tensors that is needed."""

    def to(self, dtype: Any, bitcast: bool = False) -> Array:
        return self.view(dtype) if bitcast else self.astype(dtype).view(Array)


def array(x: Any) -> Array:
    """A number as `[1, 1]`, an array as it is; integers of 32 bits."""
    found = np.asarray(x)
    found = found.astype(np.int32) if found.dtype == np.int64 else found
    return np.atleast_2d(found).view(Array) if found.ndim < 1 else found.view(Array)


class Shared:
    """Shared memory: what was stored last."""

    value: Array

    def store(self, value: Array) -> None:
        self.value = value


def _nothing(*_: Any, **__: Any) -> None:
    """Layouts mean nothing here."""


LANGUAGE = types.SimpleNamespace(
    constexpr=lambda x: x,
    where=lambda c, a, b: array(np.where(c, a, b)),
    minimum=lambda a, b: array(np.minimum(a, b)),
    maximum=lambda a, b: array(np.maximum(a, b)),
    arange=lambda start, stop, layout=None: array(np.arange(start, stop, dtype=np.int32)),
    expand_dims=lambda x, axis: array(np.expand_dims(x, axis)),
    allocate_shared_memory=lambda *_: Shared(),
    SliceLayout=_nothing, BlockedLayout=_nothing, DotOperandLayout=_nothing, NVMMASharedLayout=_nothing,
    uint32=np.uint32, bfloat16=np.float32,
)  # fmt: skip


def device() -> types.SimpleNamespace:
    """The functions of `tile` and `mask`."""
    names: dict[str, Any] = {}
    for module in (tile, mask):
        names |= {key: value for key, value in vars(module).items() if not key.startswith("__")}
    names |= {"gl": LANGUAGE, "NEVER": float(mask.NEVER.value), "__builtins__": __builtins__}
    for name, value in list(names.items()):
        if isinstance(value, JITFunction):
            fn = value.fn
            names[name] = types.FunctionType(fn.__code__, names, name, fn.__defaults__)
    return types.SimpleNamespace(**names)
