"""Neighborhood attention on Hopper GPUs (sm_90): TMA boxes with free origins, warpgroup matrix products."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.devices import on_device
from vicinal.backends.hopper import backward
from vicinal.backends.hopper.cost import predicted_ms, ranked_tilings
from vicinal.backends.hopper.launch import Launch, can_map, layouts_of
from vicinal.backends.hopper.memory import Launches, additional, new, new_as
from vicinal.backends.hopper.variant import variant_of
from vicinal.backends.remembered import Strides
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

HEAD_DIMS = (32, 64, 128, 256)
LARGEST_GRID = 65535  # of heads, and of batch rows


class Hopper:
    """Forward in one kernel, straight from and to `[B, *S, H, D]`: no permutation, no padding, no index lists.

    Gradients in three: sums of each query, those of keys and values, those of queries; a fourth for those of additional
    keys. Nothing is added to memory, so the same inputs give the same bits. They take two float32 numbers per
    query and head beside the gradients themselves.

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
        here = f"{hardware.kind} sm_{major}{minor}" if hardware.kind == "cuda" else hardware.kind
        facts = (
            (hardware.kind == "cuda" and major == 9, f"needs sm_90, this is {here}"),
            (problem.dtype in ("float16", "bfloat16"), f"computes in 16 bits only, got {problem.dtype}"),
            (problem.head_dim in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}, got {problem.head_dim}"),
            (
                problem.head_dim_v == problem.head_dim,
                f"values must have the head_dim of the keys, got {problem.head_dim_v} and {problem.head_dim}",
            ),
            (not problem.position_bias, "adds no position bias"),
            (problem.heads <= LARGEST_GRID, f"takes at most {LARGEST_GRID} heads, got {problem.heads}"),
            (problem.tokens < 2**31, f"takes fewer than 2^31 tokens a batch row, got {problem.tokens}"),
            (problem.batch <= LARGEST_GRID, f"takes at most {LARGEST_GRID} batch rows, got {problem.batch}"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        known = backward.HEAD_DIMS
        has = problem.head_dim in known
        return () if has else (f"computes gradients where head_dim is one of {known}, got {problem.head_dim}",)

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
        more, lengths = additional(inputs, problem)
        tensors = [query, inputs.key, inputs.value, *more]
        device = query.get_device()
        launch = launches.find(plan, tensors, device)
        out, lse = outputs_of(query, launch)
        tensors.insert(3, out)
        addresses = [tensor.data_ptr() for tensor in tensors]
        stream = torch._C._cuda_getCurrentRawStream(device)
        on_device(launch, device, addresses, lse.data_ptr(), 0 if lengths is None else lengths.data_ptr(), stream)
        return Output(out, lse)

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        """Gradients, cut by a choice of its own: `plan.tiling` is the forward pass's."""
        return backward.gradients(plan.problem, inputs, output, grad_out, grad_lse, into)


def outputs_of(query: Tensor, launch: Launch) -> Output:
    """Empty outputs. Of the ways to make a tensor these take least time."""
    out = new_as(query, launch.copy_room)
    return Output(out, torch.empty(launch.lse_shape, dtype=torch.float32, device=query.device))


@lru_cache(maxsize=1024)
def prepared(plan: Plan, strides: Strides, device: int) -> Launch | None:
    """The launch of `plan` on tensors with these strides, built once; None if one of them must be copied first."""
    problem = plan.problem
    out = torch.empty((problem.batch, *problem.shape, problem.heads, problem.head_dim), device="meta")
    layouts = layouts_of(problem, (*strides[:3], out.stride(), *strides[3:]))
    return Launch(plan, variant_of(plan), layouts, device) if all(map(can_map, layouts)) else None


launches = Launches(prepared)


def forget() -> None:
    """Forget all launches."""
    launches.forget()
    prepared.cache_clear()
    backward.forget()


backend = Hopper()
