"""Where tensors lie: read in place if the tensor engine can, copied if not."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from math import prod
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.backends.devices import empty_as
from vicinal.backends.hopper.launch import is_mappable
from vicinal.backends.remembered import Remembered
from vicinal.problem import Problem


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


class Launches(Remembered[S, P]):
    """Launches, found by what they are for. Tensors that lie where a map may not begin are copied, too."""

    def __init__(self, build: Callable[..., P | None]) -> None:
        super().__init__(build, lambda tensor: tensor if is_mappable(tensor) else copy(tensor))

    def find(self, subject: S, tensors: list[Tensor], device: int, *also: Hashable) -> P:
        """As `Remembered.find`."""
        found = super().find(subject, tensors, device, *also)
        if not found.needs_room:
            return found
        lacks = [2 * tensor.storage_offset() < room for tensor, room in zip(tensors, found.rooms, strict=True)]
        if not any(lacks):
            return found
        room = found.copy_room
        tensors[:] = [copy(t, room) if lack else t for t, lack in zip(tensors, lacks, strict=True)]
        return self.find(subject, tensors, device, *also)


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device, room: int = 0) -> Tensor:
    """An empty tensor, `room` bytes into its allocation."""
    if room == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    start = room // dtype.itemsize
    return torch.empty(start + prod(shape), dtype=dtype, device=device)[start:].view(shape)


def new_as(tensor: Tensor, room: int = 0) -> Tensor:
    """The same of the shape, dtype and device of another."""
    return new(tensor.shape, tensor.dtype, tensor.device, room) if room else empty_as(tensor)


def copy(tensor: Tensor, room: int = 0) -> Tensor:
    """A contiguous copy, `room` bytes into its allocation."""
    return new_as(tensor, room).copy_(tensor)


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
