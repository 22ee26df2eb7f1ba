"""The hardware behind a PyTorch device."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vicinal.hardware import KNOWN, Hardware


@lru_cache(maxsize=32)
def present(device: torch.device) -> Hardware:
    """The hardware behind a PyTorch device: a known record where the name is known, else what can be read off."""
    if device.type != "cuda":
        return Hardware(device.type, device.type, (0, 0), os.cpu_count() or 1, 0, 0, 0, 0.0, (), "not a known device")
    properties = torch.cuda.get_device_properties(device)
    arch = (0, 0) if torch.version.hip else (properties.major, properties.minor)
    for record in KNOWN.values():
        # Names such as "NVIDIA H100 80GB HBM3"; memory tells variants of one chip apart.
        chip = record.name.split("-")[0].upper()
        if (
            record.arch == arch
            and chip in properties.name.upper().replace(" ", "")
            and record.units == (properties.multi_processor_count)
        ):
            return record
    return Hardware(
        name=properties.name,
        kind="cuda",
        arch=arch,
        units=properties.multi_processor_count,
        smem_bytes=getattr(properties, "shared_memory_per_block_optin", 0),
        l2_bytes=getattr(properties, "L2_cache_size", 0),
        memory_bytes=properties.total_memory,
        bandwidth_bytes_per_s=0.0,
        flops_per_s=(),
        source="read off the device",
    )


def empty_as(tensor: Tensor) -> Tensor:
    """An empty tensor of the same shape, dtype and device, contiguous; in half the time of `torch.empty` told so."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def on_device(run: Callable[..., Any], device: int, *args: Any) -> Any:
    """`run(*args)` with `device` current. Entering a device costs as much as a launch, so it is avoided.

    Args:
        run: what to do there.
        device: its number, -1 for processors.
        args: of `run`.
    """
    if device < 0 or torch._C._cuda_getDevice() == device:
        return run(*args)
    with torch.cuda.device(device):
        return run(*args)


def add_at(total: Tensor, index: Tensor, numbers: Tensor) -> None:
    """`total[..., index[i]] += numbers[..., i]` for all i, the same bits every time on any device.

    A GPU's `scatter_add_` adds in the order in which its threads arrive, its `index_put_` sorts; on a CPU it is
    `scatter_add_` that keeps an order.
    """
    rows, places = total.view(-1, total.shape[-1]), numbers.reshape(-1, numbers.shape[-1])
    if total.device.type == "cpu":
        rows.scatter_add_(1, index.expand(len(rows), -1), places)
    else:
        row = torch.arange(len(rows), device=total.device)[:, None]
        rows.index_put_((row, index[None]), places, accumulate=True)
