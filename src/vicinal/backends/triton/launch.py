"""From tensors to a kernel's arguments, and the kernel's start. Nothing here knows what a window is.

Numbers are laid out once, in a `Call` for each kernel of a pass; later calls only fill in addresses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from vicinal import tuned
from vicinal._tuples import ceil_div
from vicinal.backends.base import Inputs
from vicinal.backends.devices import present
from vicinal.backends.remembered import ALIGNMENT
from vicinal.backends.triton.cost import Cut, variant_of
from vicinal.backends.triton.variant import AxisArgs, Box, StepArgs, Steps, Variant, three, three_axes
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.problem import Axis, Problem

LOG2_E = 1.4426950408889634

NOWHERE = StepArgs(0, 0, 0, 0, 0)
LARGEST_GRID = 2**31 - 1

Grid = tuple[int, int, int]


@lru_cache(maxsize=4096)
def steps_of(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> StepArgs | None:
    """How far apart things lie in `[B, *S, H, D]`, in vectors; `None` if kernels cannot read what lies so."""
    unit = ALIGNMENT // itemsize
    *outer, inner = (0 if size == 1 else step for size, step in zip(shape, strides, strict=True))
    units = [step // unit for step in outer]
    reach = sum(step * (size - 1) for step, size in zip(units[1:], shape[1:], strict=False))
    if inner != 1 or any(step % unit for step in outer) or reach >= 2**31:
        return None
    batch, *axes, head = units
    return StepArgs(batch, *[0] * (3 - len(axes)), *axes, head)


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def is_readable(tensor: Tensor) -> bool:
    """Whether kernels can read, and write, a tensor where it lies."""
    is_aligned = tensor.data_ptr() % ALIGNMENT == 0
    return is_aligned and steps_of(tensor.shape, tensor.stride(), tensor.element_size()) is not None


def readable(tensor: Tensor) -> Tensor:
    """`tensor`, or a contiguous copy of it if kernels cannot read it."""
    return tensor if is_readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def is_wide(axes: Sequence[Axis], boxes: Sequence[Box], steps: Steps) -> bool:
    """Whether offsets inside a box need 64 bits: of 2^26 vectors no part is 2^31 elements or bytes away."""
    reach = max(
        sum((n - 1) * axis.dilation * step for n, axis, step in zip(box, axes, steps_of_tensor[1:4], strict=True))
        for box in boxes
        for steps_of_tensor in steps
    )
    return reach >= 2**26


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


def blocks_of(args: Sequence[AxisArgs], problem: Problem, heads: int, chunk: int) -> int:
    """Tiles of all heads and chunks of so many batch rows."""
    blocks = prod(axis.tiles * axis.dilation for axis in args) * ceil_div(problem.batch, chunk) * heads
    if blocks > LARGEST_GRID:
        raise Unsupported(f"triton starts at most {LARGEST_GRID} blocks, this problem has {blocks} tiles")
    return blocks


class Call:
    """One kernel with its numbers, for tensors of given shapes and strides; only addresses change.

    Args:
        variant: what is compiled, when that is first needed.
        grid: blocks.
        device: where, -1 for processors.
        numbers: all arguments that are no addresses, by name; the kernel takes them last.
        instead: what is passed for addresses that this variant does not read, by name.
    """

    def __init__(
        self, variant: Variant, grid: Grid, device: int, numbers: Mapping[str, Any], instead: Mapping[str, str]
    ) -> None:
        from vicinal.backends.triton import compile

        names = compile.KERNELS[variant.kernel].arg_names
        self._tensors = [instead.get(name, name) for name in names if name not in numbers]
        self._start = compile.starter(variant, grid, device, [numbers[name] for name in names[len(self._tensors) :]])

    def start(self, places: Mapping[str, Any], stream: int) -> None:
        """Start the kernel.

        Args:
            places: of tensors, see `places_of`.
            stream: a handle, as `stream_of` gives it.
        """
        self._start([places[name] for name in self._tensors], stream)


def places_of(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Where tensors lie, as a kernel is told: their addresses. Triton's interpreter wants the tensors."""
    from vicinal.backends.triton import compile

    return tensors if compile.IS_INTERPRETED else {name: tensor.data_ptr() for name, tensor in tensors.items()}


def parts_of(scratch: Tensor, starts: Mapping[str, int]) -> dict[str, Any]:
    """The same for what begins in one float32 tensor, after so many numbers."""
    from vicinal.backends.triton import compile

    if compile.IS_INTERPRETED:
        return {name: scratch[start:] for name, start in starts.items()}
    base = scratch.data_ptr()
    return {name: base + 4 * start for name, start in starts.items()}


def stream_of(device: int) -> int:
    """The current stream of a device; processors have none."""
    return torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0


def inputs_of(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """What all passes read where it lies, if it can be read there."""
    tensors = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if inputs.additional_keys is not None and inputs.additional_values is not None and problem.additional:
        tensors |= {"more_key": inputs.additional_keys, "more_value": inputs.additional_values}
    return tensors


def small_inputs_of(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """What all passes read of one form alone: lengths and a bias in 32 bits."""
    tensors: dict[str, Tensor] = {}
    if problem.additional:
        lengths, (batch, most, *_) = inputs.additional_lengths, inputs.additional_keys.shape
        if lengths is None:
            tensors["lengths"] = torch.full((batch,), most, dtype=torch.int32, device=inputs.query.device)
        else:
            tensors["lengths"] = lengths.to(torch.int32)
    if inputs.position_bias is not None:
        table = inputs.position_bias.float().contiguous()  # as a layer's is: nothing to be done
        tensors["bias"] = table.clone() if table.data_ptr() % ALIGNMENT else table
    return tensors


def shapes_of(problem: Problem) -> dict[str, tuple[int, ...]]:
    """Of all tensors that have a `StepArgs`."""
    grid, more = (problem.batch, *problem.shape), (problem.batch, problem.additional)
    query, key = (problem.heads, problem.head_dim), (problem.heads_kv, problem.head_dim)
    out, value = (problem.heads, problem.head_dim_v), (problem.heads_kv, problem.head_dim_v)
    of_tensors = ((*grid, *query), (*grid, *key), (*grid, *value), (*grid, *out), (*more, *key), (*more, *value))
    of_grads = ((*grid, *out), (*grid, *query), (*grid, *key), (*grid, *value))
    return dict(zip(Steps._fields, of_tensors + of_grads, strict=True))


class Operands:
    """A problem on tensors that lie in a certain way, as the kernels of all its passes are told of it.

    Args:
        problem: what is asked.
        strides: of what comes from outside, by name, see `Steps`.
        own: names of what this backend makes, which is contiguous.
        device: where, -1 for processors.
    """

    def __init__(
        self, problem: Problem, strides: Mapping[str, tuple[int, ...]], own: Sequence[str], device: int
    ) -> None:
        self.problem, self.device = problem, device
        self.hardware = present(torch.device("cpu") if device < 0 else torch.device("cuda", device))
        self._precision = precision_of(problem, self.hardware)
        shapes = shapes_of(problem)
        lies = strides | {name: contiguous(shapes[name]) for name in own}
        steps = {name: steps_of(shapes[name], step, problem.itemsize) for name, step in lies.items()}
        self.is_readable = None not in steps.values()
        self._steps = Steps(*(steps.get(name) or NOWHERE for name in Steps._fields))
        self._instead: dict[str, str] = {} if problem.position_bias else {"bias": "query"}
        if not problem.additional:
            self._instead |= {"more_key": "key", "more_value": "value", "lengths": "query"}
            if not problem.position_bias:
                self._instead |= {"sums": "facts", "delta": "facts"}  # not written where nobody asks for them

    def call(self, kernel: str, cut: Cut, grid: tuple[int, int] | None = None, **numbers: Any) -> Call:
        """A kernel of a pass.

        Args:
            kernel: as in `Variant`.
            cut: its tiles.
            grid: blocks, if not one for each tile.
            numbers: arguments of the kernel beyond those that all share.
        """
        problem, steps = self.problem, self._steps
        axes = three_axes(problem.axes)
        wide = is_wide(axes, (three(cut.rows), three(cut.columns)), steps)
        variant = variant_of(kernel, problem, cut, self._precision, wide)
        args = axis_args(axes, variant.rows)
        heads = problem.heads_kv if variant.are_keys else problem.heads
        blocks = blocks_of(args, problem, heads, cut.chunk)
        shared = {
            "axes": args,
            "steps": steps,
            "batches": problem.batch,
            "chunk": cut.chunk,
            "heads": problem.heads,
            "group": problem.heads // problem.heads_kv,
            "additional": problem.additional,
            "scale": problem.scale * LOG2_E,
            "V": variant,
        }
        return Call(variant, (*(grid or (blocks, 1)), 1), self.device, shared | numbers, self._instead)


def told(problem: Problem) -> tuple[Any, ...]:
    """What else a pass depends on: what tuning has found, and how PyTorch is told to multiply float32."""
    return tuned.epoch, problem.dtype == "float32" and torch.backends.cuda.matmul.fp32_precision


def precision_of(problem: Problem, hardware: Hardware) -> str:
    """How float32 is multiplied, in Triton's words: as PyTorch is told to multiply it.

    NVIDIA's tensor cores know no float32: three products of its TF32 parts come as near, and AMD's do.
    """
    if problem.dtype != "float32":
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if hardware.arch >= (8, 0) else "ieee"
