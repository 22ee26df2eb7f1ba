"""Neighborhood attention on Hopper GPUs (sm_90): TMA boxes with free origins, warpgroup matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.hopper.cost import predicted_ms, ranked_tilings
from vicinal.backends.hopper.launch import ALIGNMENT, Launch, can_map, is_mappable, layouts_of
from vicinal.backends.hopper.variant import variant_of
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

HEAD_DIMS = (32, 64, 128, 256)
LARGEST_GRID = 65535  # of heads, and of batch rows


class Hopper:
    """Forward in one kernel, straight from and to `[B, *S, H, D]`: no permutation, no padding, no index lists.

    Reads strided tensors where they lie if their last axis is contiguous and their address and
    other strides are multiples of 16 bytes, as the slices of a fused projection are; copies
    others first. It also copies what lies at the very start of an allocation if a dilation does not
    divide its axis, see `launch.geometry`.

    Keys and values near a window should be finite: masks are added to scores, so a NaN or an
    infinity in a key that shares a KV tile with a window reaches the queries of that tile, as one in a
    value does in any tiled implementation. Memory outside the tensors is never read.
    """

    name = "hopper"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Every reason, as a sentence part, why this backend will not run the problem there."""
        major, minor = hardware.arch
        facts = (
            (hardware.kind == "cuda" and major == 9, f"needs sm_90, this is {hardware.kind} sm_{major}{minor}"),
            (problem.dtype in ("float16", "bfloat16"), f"computes in 16 bits only, got {problem.dtype}"),
            (problem.head_dim in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}, got {problem.head_dim}"),
            (
                problem.head_dim_v == problem.head_dim,
                f"values must have the head_dim of the keys, got {problem.head_dim_v} and {problem.head_dim}",
            ),
            (not problem.position_bias, "adds no position bias yet"),
            (problem.heads <= LARGEST_GRID, f"takes at most {LARGEST_GRID} heads, got {problem.heads}"),
            (problem.tokens < 2**31, f"takes fewer than 2^31 tokens a batch row, got {problem.tokens}"),
            (problem.batch <= LARGEST_GRID, f"takes at most {LARGEST_GRID} batch rows, got {problem.batch}"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ("computes no gradients yet",)

    def tilings(self, problem: Problem, hardware: Hardware) -> Iterable[Tiling]:
        """Tilings worth trying, the one with the least predicted time first."""
        return ranked_tilings(problem)

    def predicted_ms(self, plan: Plan) -> float:
        """Milliseconds that `forward` takes on one H100, see `cost`."""
        return predicted_ms(plan)

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        """Attention under `plan`.

        Raises:
            Unsupported: if its tiling is not one that the kernels can be cut into.
        """
        problem, query = plan.problem, inputs.query
        if problem.batch == 0:
            shape, device = query.shape, query.device
            return Output(new(shape, query.dtype, device), new(shape[:-1], torch.float32, device))
        if problem.scale < 0:
            query = -query  # masks need a positive scale, see `launch.kernel_scale`
        tensors, lengths = [query, inputs.key, inputs.value], inputs.additional_lengths
        if problem.additional:
            assert inputs.additional_keys is not None and inputs.additional_values is not None
            more = [inputs.additional_keys, inputs.additional_values]
            if lengths is not None:
                lengths = lengths.to(torch.int32)
                more = [zero_from(tensor, lengths) for tensor in more]
            tensors += more
        device = query.get_device()
        launch = prepare(plan, tensors, device)
        out, lse = outputs_of(query, launch)
        tensors.insert(3, out)
        addresses = [tensor.data_ptr() for tensor in tensors]
        stream = torch._C._cuda_getCurrentRawStream(device)
        on_device(launch, device, addresses, lse.data_ptr(), 0 if lengths is None else lengths.data_ptr(), stream)
        return Output(out, lse)

    def backward(
        self, plan: Plan, inputs: Inputs, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        raise Unsupported("backend 'hopper' computes no gradients yet")


def prepare(plan: Plan, tensors: list[Tensor], device: int) -> Launch:
    """A launch for these inputs. Those that cannot be read in place are replaced, in the list, by copies."""
    kind = (id(plan), device, *[tensor.stride() for tensor in tensors])
    entry = known.get(kind)  # by identity, since to hash a plan takes as long as all the rest
    if entry is None:
        entry = plan, on_device(prepared, device, plan, kind[2:], device)
        if len(known) >= MOST:
            known.clear()
        known[kind] = entry
    launch = entry[1]
    if launch is None or any(tensor.data_ptr() % ALIGNMENT for tensor in tensors):
        tensors[:] = [tensor if is_mappable(tensor) else copy(tensor) for tensor in tensors]
        return prepare(plan, tensors, device)
    if launch.needs_room:
        rooms = launch.rooms[:3] + launch.rooms[4:]
        lacks = [2 * tensor.storage_offset() < room for tensor, room in zip(tensors, rooms, strict=True)]
        if any(lacks):
            room = launch.rooms[3]  # of the output, which is contiguous and has no fewer heads than a copy
            tensors[:] = [copy(tensor, room) if lack else tensor for tensor, lack in zip(tensors, lacks, strict=True)]
            return prepare(plan, tensors, device)
    return launch


MOST = 1024
"""Launches remembered; then all are forgotten, for such a program repeats few."""

known: dict[tuple[Any, ...], tuple[Plan, Launch | None]] = {}
"""Launches by the plan's identity, the device and the strides. Each keeps its plan, whose identity stays taken."""


def forget() -> None:
    """Forget all launches."""
    known.clear()
    prepared.cache_clear()


def outputs_of(query: Tensor, launch: Launch) -> Output:
    """Empty outputs. Of the ways to make a tensor these take least time."""
    if query.is_contiguous() and not launch.rooms[3]:
        out = torch.empty_like(query)
    else:
        out = new(query.shape, query.dtype, query.device, launch.rooms[3])
    return Output(out, torch.empty(launch.lse_shape, dtype=torch.float32, device=query.device))


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device, room: int = 0) -> Tensor:
    """An empty tensor, `room` bytes into its allocation."""
    if room == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    start = room // dtype.itemsize
    return torch.empty(start + prod(shape), dtype=dtype, device=device)[start:].view(shape)


def copy(tensor: Tensor, room: int = 0) -> Tensor:
    """A contiguous copy, `room` bytes into its allocation."""
    return new(tensor.shape, tensor.dtype, tensor.device, room).copy_(tensor)


@lru_cache(maxsize=MOST)
def prepared(plan: Plan, strides: tuple[tuple[int, ...], ...], device: int) -> Launch | None:
    """The launch of `plan` on tensors with these strides, built once; None if one of them must be copied first."""
    problem = plan.problem
    out = torch.empty((problem.batch, *problem.shape, problem.heads, problem.head_dim), device="meta")
    layouts = layouts_of(problem, (*strides[:3], out.stride(), *strides[3:]))
    return Launch(plan, variant_of(plan), layouts, device) if all(map(can_map, layouts)) else None


def on_device(run: Callable[..., Any], device: int, *args: Any) -> Any:
    """`run(*args)` with `device` current. Entering a device costs as much as a launch, so it is avoided."""
    if torch._C._cuda_getDevice() == device:
        return run(*args)
    with torch.cuda.device(device):
        return run(*args)


def zero_from(tensor: Tensor, lengths: Tensor) -> Tensor:
    """`tensor [B, M, ...]` with zeros from `lengths[b]` on, so that whatever pads it has no effect."""
    places = torch.arange(tensor.shape[1], device=tensor.device)
    is_padding = places >= lengths[:, None]
    return tensor.masked_fill(is_padding[:, :, None, None], 0)


backend = Hopper()
