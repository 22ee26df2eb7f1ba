"""Where the time of a model's forward pass goes: attention over its grid, other attention, products, the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal._clock import mark

GRID, OTHER, PRODUCTS, REST = "attention over the grid", "other attention", "matrix products", "the rest"
PARTS = (GRID, OTHER, PRODUCTS, REST)

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "linear")


class Stopwatch(TorchDispatchMode):
    """Times every attention and matrix product that PyTorch runs in its `with`, and the whole.

    On accelerators by events in the stream, so that the host may run ahead as it does without a watch.

    Args:
        tokens: of the grid; attention with at least as many keys counts as attention over the grid.
        device: where the work is done.
        in_parts: whether to tell parts apart; FlexAttention runs under no such watch.
    """

    def __init__(self, tokens: int, device: torch.device, *, in_parts: bool = True) -> None:
        super().__init__()
        self._in_parts = in_parts
        self._tokens = tokens
        self._device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    def __enter__(self) -> Self:
        _wait(self._device)
        self._begin = self._now()
        if self._in_parts:
            super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._in_parts:
            super().__exit__(kind, error, trace)
        self._end = self._now()
        if error is None:
            _wait(self._device)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        part = self._part(func, args)
        if part is None:
            return func(*args, **(kwargs or {}))
        begin = self._now()
        out = func(*args, **(kwargs or {}))
        self._marks.setdefault(part, []).append((begin, self._now()))
        return out

    @property
    def seconds(self) -> float:
        """Of the whole."""
        return self._between(self._begin, self._end)

    @property
    def parts(self) -> Mapping[str, float]:
        """Seconds of each part; empty if they were not told apart."""
        if not self._in_parts:
            return {}
        found = {part: sum(self._between(*marks) for marks in self._marks.get(part, ())) for part in PARTS[:-1]}
        return {**found, REST: max(self.seconds - sum(found.values()), 0.0)}

    def _part(self, func: Any, args: tuple[Any, ...]) -> str | None:
        name = str(func.name()).split(".")[0]
        if name == "vicinal::attention":
            return GRID
        if "scaled_dot_product" in name:
            return GRID if args[1].shape[-2] >= self._tokens else OTHER
        return PRODUCTS if name.removeprefix("aten::") in _PRODUCTS else None

    def _now(self) -> Any:
        return mark(self._device) if self._device.type == "cuda" else time.perf_counter()

    @staticmethod
    def _between(begin: Any, end: Any) -> float:
        return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
