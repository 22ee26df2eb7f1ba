"""Where tensors lie: read in place if the tensor engine can, copied if not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.backends.devices import on_device
from vicinal.backends.hopper.launch import ALIGNMENT, is_mappable
from vicinal.problem import Problem

Strides = tuple[tuple[int, ...], ...]


class Placed(Protocol):
    """What is prepared for inputs of some strides.

    `rooms` are the bytes of the same allocation that each input needs before it, `needs_room` says whether any does,
    and `copy_room` is as many as a contiguous copy of any of them needs.
    """

    rooms: Sequence[int]
    needs_room: bool
    copy_room: int


S = TypeVar("S")
P = TypeVar("P", bound=Placed)

MOST = 1024
"""What is remembered; then all is forgotten, for such a program repeats little."""


class Remembered(Generic[S, P]):
    """What `build(subject, strides, device)` made; `None` means that a tensor must be copied first.

    By the identity of the subject, since to hash a plan takes as long as all the rest. An entry keeps its subject,
    whose identity stays taken.
    """

    def __init__(self, build: Callable[[S, Strides, int], P | None]) -> None:
        self._build = build
        self._known: dict[tuple[Any, ...], tuple[S, P | None]] = {}

    def forget(self) -> None:
        self._known.clear()

    def find(self, subject: S, tensors: list[Tensor], device: int) -> P:
        """For these tensors. Those that cannot be read in place are replaced, in the list, by copies."""
        kind = (id(subject), device, *[tensor.stride() for tensor in tensors])
        entry = self._known.get(kind)
        if entry is None:
            entry = subject, on_device(self._build, device, subject, kind[2:], device)
            if len(self._known) >= MOST:
                self._known.clear()
            self._known[kind] = entry
        found = entry[1]
        addresses = 0  # or-ed: some is unaligned if these bits are
        for tensor in tensors:
            addresses |= tensor.data_ptr()
        if found is None or addresses % ALIGNMENT:
            tensors[:] = [tensor if is_mappable(tensor) else copy(tensor) for tensor in tensors]
            return self.find(subject, tensors, device)
        if found.needs_room:
            lacks = [2 * tensor.storage_offset() < room for tensor, room in zip(tensors, found.rooms, strict=True)]
            if any(lacks):
                room = found.copy_room
                tensors[:] = [copy(t, room) if lack else t for t, lack in zip(tensors, lacks, strict=True)]
                return self.find(subject, tensors, device)
        return found


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device, room: int = 0) -> Tensor:
    """An empty tensor, `room` bytes into its allocation."""
    if room == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    start = room // dtype.itemsize
    return torch.empty(start + prod(shape), dtype=dtype, device=device)[start:].view(shape)


def copy(tensor: Tensor, room: int = 0) -> Tensor:
    """A contiguous copy, `room` bytes into its allocation."""
    return new(tensor.shape, tensor.dtype, tensor.device, room).copy_(tensor)


def additional(inputs: Inputs, problem: Problem) -> tuple[list[Tensor], Tensor | None]:
    """The additional keys and values, if there are any, with zeros beyond their lengths; and the lengths in 32 bits."""
    if not problem.additional:
        return [], None
    assert inputs.additional_keys is not None
    assert inputs.additional_values is not None
    more = [inputs.additional_keys, inputs.additional_values]
    if inputs.additional_lengths is None:
        return more, None
    lengths = inputs.additional_lengths.to(torch.int32)
    return [zero_from(tensor, lengths) for tensor in more], lengths


def zero_from(tensor: Tensor, lengths: Tensor) -> Tensor:
    """`tensor [B, M, ...]` with zeros from `lengths[b]` on, so that whatever pads it has no effect."""
    places = torch.arange(tensor.shape[1], device=tensor.device)
    is_padding = places >= lengths[:, None]
    return tensor.masked_fill(is_padding[:, :, None, None], 0)
