"""From tensors to a kernel's arguments, and the kernel's start. Nothing here knows what a window is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from vicinal._tuples import ceil_div
from vicinal.backends.base import Inputs
from vicinal.backends.devices import on_device, present
from vicinal.backends.triton.cost import Cut, variant_of
from vicinal.backends.triton.variant import AxisArgs, Box, StepArgs, Steps, Variant, three, three_axes
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.problem import Axis, Problem

VECTOR_BYTES = 16
"""Kernels load so many bytes at a time: what addresses and strides must be multiples of."""

LOG2_E = 1.4426950408889634

NOWHERE = StepArgs(0, 0, 0, 0, 0)
LARGEST_GRID = 2**31 - 1


def steps_of(tensor: Tensor) -> StepArgs | None:
    """How far apart things lie in `[B, *S, H, D]`, in vectors; `None` if kernels cannot read it where it lies."""
    return None if tensor.data_ptr() % VECTOR_BYTES else _steps(tensor.shape, tensor.stride(), tensor.element_size())


@lru_cache(maxsize=4096)
def _steps(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> StepArgs | None:
    unit = VECTOR_BYTES // itemsize
    *outer, inner = (0 if size == 1 else step for size, step in zip(shape, strides, strict=True))
    units = [step // unit for step in outer]
    reach = sum(step * (size - 1) for step, size in zip(units[1:], shape[1:], strict=False))
    if inner != 1 or any(step % unit for step in outer) or reach >= 2**31:
        return None
    batch, *axes, head = units
    return StepArgs(batch, *[0] * (3 - len(axes)), *axes, head)


def readable(tensor: Tensor) -> tuple[Tensor, StepArgs]:
    """`tensor`, or a contiguous copy of it if kernels cannot read it, and its steps."""
    steps = steps_of(tensor)
    if steps is None:
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        steps = steps_of(tensor)
        assert steps is not None  # heads are multiples of a vector
    return tensor, steps


def is_wide(axes: Sequence[Axis], boxes: Sequence[Box], steps: Steps, itemsize: int) -> bool:
    """Whether offsets inside a box, in elements, need 64 bits."""
    reach = max(
        sum((n - 1) * axis.dilation * step for n, axis, step in zip(box, axes, steps_of_tensor[1:4], strict=True))
        for box in boxes
        for steps_of_tensor in steps
    )
    return reach * (VECTOR_BYTES // itemsize) >= 2**31


def axis_args(axes: Sequence[Axis], rows: Box) -> tuple[AxisArgs, ...]:
    """What a kernel is told of each axis that is cut into tiles of `rows`."""
    return tuple(
        AxisArgs(
            axis.length,
            axis.kernel_size,
            axis.stride,
            axis.dilation,
            int(axis.is_causal),
            ceil_div(ceil_div(axis.length, axis.dilation), n),
        )
        for axis, n in zip(axes, rows, strict=True)
    )


def blocks_of(args: Sequence[AxisArgs], problem: Problem, heads: int) -> int:
    """Tiles of all heads and batch rows."""
    blocks = prod(axis.tiles * axis.dilation for axis in args) * problem.batch * heads
    if blocks > LARGEST_GRID:
        raise Unsupported(f"triton starts at most {LARGEST_GRID} blocks, this problem has {blocks} tiles")
    return blocks


class Operands:
    """The tensors and numbers of a problem, as all its passes are told them. What kernels cannot read is copied."""

    def __init__(self, problem: Problem, inputs: Inputs, **more: Tensor) -> None:
        self.problem = problem
        self.device = inputs.query.device
        self.hardware = present(self.device)
        self.precision = precision_of(problem, self.hardware)
        tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value, **more}
        self.lengths = inputs.query  # not read where there are no additional keys
        if inputs.additional_keys is not None and inputs.additional_values is not None and problem.additional:
            tensors |= {"more_key": inputs.additional_keys, "more_value": inputs.additional_values}
            lengths = inputs.additional_lengths
            if lengths is None:
                lengths = torch.full((problem.batch,), problem.additional, device=self.device)
            self.lengths = lengths.to(torch.int32)
        self.tensors: dict[str, Tensor] = {}
        self.steps: dict[str, StepArgs] = {}
        for name, tensor in tensors.items():
            self.tensors[name], self.steps[name] = readable(tensor)
        self.bias = inputs.query  # likewise
        if inputs.position_bias is not None:
            self.bias = (inputs.position_bias.float() * LOG2_E).contiguous()

    def run(self, kernel: str, cut: Cut, grid: tuple[int, int] | None = None, **more: Any) -> None:
        """Start a pass on the current stream.

        Args:
            kernel: as in `Variant`.
            cut: its tiles.
            grid: blocks, if not one for each tile.
            more: arguments of the kernel beyond what all passes share, outputs among them.
        """
        problem = self.problem
        found = self.steps | {name: readable(value)[1] for name, value in more.items() if name in Steps._fields}
        steps = Steps(*(found.get(name, NOWHERE) for name in Steps._fields))
        variant, axes, blocks = prepared(kernel, problem, cut, self.precision, steps)
        values = {
            "more_key": self.tensors["key"],
            "more_value": self.tensors["value"],
            "lengths": self.lengths,
            "bias": self.bias,
            "axes": axes,
            "steps": steps,
            "heads": problem.heads,
            "group": problem.heads // problem.heads_kv,
            "additional": problem.additional,
            "scale": problem.scale * LOG2_E,
            "V": variant,
            **self.tensors,
            **more,
        }
        start(variant, (*(grid or (blocks, 1)), 1), self.device, values)


@lru_cache(maxsize=1024)
def prepared(
    kernel: str, problem: Problem, cut: Cut, precision: str, steps: Steps
) -> tuple[Variant, tuple[AxisArgs, ...], int]:
    """What does not change from call to call: the variant, what it is told of the axes, and the number of tiles."""
    axes = three_axes(problem.axes)
    wide = is_wide(axes, (three(cut.rows), three(cut.columns)), steps, problem.itemsize)
    variant = variant_of(kernel, problem, cut, precision, wide)
    args = axis_args(axes, variant.rows)
    return variant, args, blocks_of(args, problem, problem.heads_kv if variant.are_keys else problem.heads)


def precision_of(problem: Problem, hardware: Hardware) -> str:
    """How float32 is multiplied, in Triton's words: as PyTorch is told to multiply it.

    NVIDIA's tensor cores know no float32: three products of its TF32 parts come as near, and AMD's do.
    """
    if problem.dtype != "float32":
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if hardware.arch >= (8, 0) else "ieee"


def start(variant: Variant, grid: tuple[int, int, int], device: torch.device, values: dict[str, Any]) -> None:
    """Start the kernel of `variant` on the current stream of `device`, or run it in Triton's interpreter."""
    from vicinal.backends.triton import compile

    arguments = [values[name] for name in compile.KERNELS[variant.kernel].arg_names]
    if compile.IS_INTERPRETED:
        compile.interpret(variant, grid, arguments)
        return
    on_device(lambda: compile.loaded(variant, device.index)[grid](*arguments), device.index)
