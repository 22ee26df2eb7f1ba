"""Ways to lay tensors out in memory that is NaN wherever nobody should look."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vicinal.backends.base import Inputs


def with_nan_beyond_lengths(inputs: Inputs) -> Inputs:
    """Additional keys that do not count hold NaN in memory that nobody filled; so do their values."""
    keys, values, lengths = inputs.additional_keys, inputs.additional_values, inputs.additional_lengths
    if keys is None or values is None:
        return inputs
    if lengths is None:
        lengths = torch.arange(keys.shape[0], device=keys.device) % (keys.shape[1] + 1)
    beyond = (torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None])[:, :, None, None]
    filled = [tensor.masked_fill(beyond, torch.nan) for tensor in (keys, values)]
    return inputs._replace(additional_keys=filled[0], additional_values=filled[1], additional_lengths=lengths)


def _banded(tensor: Tensor) -> Tensor:
    band = 4096
    memory = torch.full((tensor.numel() + 2 * band,), torch.nan, dtype=tensor.dtype, device=tensor.device)
    inner = memory[band : band + tensor.numel()].view(tensor.shape)
    inner.copy_(tensor)
    return inner


def _embedded(tensor: Tensor) -> Tensor:
    """Part of a larger tensor on every axis; the last grows by 8 so that rows stay aligned to 16 bytes."""
    shape = [n + 2 for n in tensor.shape[:-1]] + [tensor.shape[-1] + 8]
    memory = torch.full(shape, torch.nan, dtype=tensor.dtype, device=tensor.device)
    inner = memory[(*(slice(1, 1 + n) for n in tensor.shape[:-1]), slice(0, tensor.shape[-1]))]
    inner.copy_(tensor)
    return inner


def _fused(tensor: Tensor) -> Tensor:
    """Every third head of a fused projection."""
    *rest, heads, width = tensor.shape
    memory = torch.full((*rest, heads, 3, width), torch.nan, dtype=tensor.dtype, device=tensor.device)
    memory[..., 1, :] = tensor
    return memory[..., 1, :]


def _heads_first(tensor: Tensor) -> Tensor:
    return tensor.movedim(-2, 1).contiguous().movedim(1, -2)


def _sparse_columns(tensor: Tensor) -> Tensor:
    memory = torch.full((*tensor.shape, 2), torch.nan, dtype=tensor.dtype, device=tensor.device)
    memory[..., 0] = tensor
    return memory[..., 0]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous tensors between guard bands": _banded,
    "slices of larger tensors": _embedded,
    "heads of a fused projection": _fused,
    "heads-first memory": _heads_first,
    "every other column": _sparse_columns,
}
"""Ways to lay a tensor out in memory that is NaN elsewhere."""
