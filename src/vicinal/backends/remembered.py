"""What is prepared for a problem once, and found again by how its tensors lie: later calls only fill in addresses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from torch import Tensor

from vicinal.backends.devices import on_device

Strides = tuple[tuple[int, ...], ...]

S = TypeVar("S")
P = TypeVar("P")

MOST = 1024
"""What is remembered; then all is forgotten, for such a program repeats little."""

ALIGNMENT = 16
"""Bytes that kernels load at a time: what addresses and strides must be multiples of."""


class Remembered(Generic[S, P]):
    """What `build(subject, strides, device, *also)` made; `None` means that a tensor must be copied first.

    By the identity of the subject, since to hash a plan takes as long as all the rest. An entry keeps its subject,
    whose identity stays taken; it keeps no tensor.

    Args:
        build: prepares a subject, from which shapes and dtypes follow, for tensors that lie so on that device.
        readable: a tensor as it is, or a copy of it if kernels cannot read it where it lies.
    """

    def __init__(self, build: Callable[..., P | None], readable: Callable[[Tensor], Tensor]) -> None:
        self._build, self._readable = build, readable
        self._known: dict[tuple[Any, ...], tuple[S, P | None]] = {}

    def forget(self) -> None:
        self._known.clear()

    def find(self, subject: S, tensors: list[Tensor], device: int, *also: Hashable) -> P:
        """For these tensors. Those that cannot be read in place are replaced, in the list, by copies.

        Args:
            subject: a plan, or a problem.
            tensors: that it is about, always in the same order.
            device: its number, -1 for processors.
            also: whatever else the result depends on.
        """
        strides = tuple([tensor.stride() for tensor in tensors])
        kind = id(subject), device, strides, also
        entry = self._known.get(kind)
        if entry is None:
            entry = subject, on_device(self._build, device, subject, strides, device, *also)
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[kind] = entry
        found = entry[1]
        addresses = 0  # or-ed: some is unaligned if these bits are
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if found is not None and not addresses % ALIGNMENT:
            return found
        tensors[:] = map(self._readable, tensors)
        return self.find(subject, tensors, device, *also)
