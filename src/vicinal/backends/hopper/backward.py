"""The backward pass on the host: what its kernels are told, and in which order they run.

    delta = rowsum(dO * O) - dlse,  then dK and dV by tiles of keys, and dQ by tiles of queries

Nothing is added to memory, so the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from vicinal._tuples import ceil_div
from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.devices import on_device
from vicinal.backends.hopper.cost_backward import HEAD_DIMS, additional_variant, ranked_cuts
from vicinal.backends.hopper.launch import (
    MULTIPROCESSORS,
    Call,
    Geometry,
    Layout,
    TensorMap,
    axis_args,
    can_map,
    function,
    geometry,
    is_mappable,
    kernel_scale,
    layout_of,
    slab,
    tiles_of,
)
from vicinal.backends.hopper.memory import Launches, additional, new_as, zero_from
from vicinal.backends.hopper.variant import StepArgs, Sums, Variant, three_axes
from vicinal.backends.remembered import ALIGNMENT, Strides
from vicinal.problem import Axis, Problem

__all__ = ["HEAD_DIMS", "forget", "gradients"]

SUMS_ROWS = 64
"""Queries of one block of the kernel that makes the sums."""

ADDITIONAL_BLOCKS = 2 * MULTIPROCESSORS
"""Blocks that the gradients of additional keys are spread over, about."""


def gradients(
    problem: Problem,
    inputs: Inputs,
    output: Output,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    into: Sequence[Tensor] = (),
) -> Gradients:
    """Gradients of all inputs, see `Backend.backward`."""
    query, device = inputs.query, inputs.query.device
    if not can_write(problem, into):
        return gradients(problem, inputs, output, grad_out, grad_lse).moved(into)
    if problem.batch == 0:
        return Gradients(*(torch.zeros_like(tensor) for tensor in inputs[:5] if tensor is not None))
    if problem.scale < 0:
        query = -query  # masks need a positive scale, see `launch.kernel_scale`
    more, lengths = additional(inputs, problem)
    tensors = [query, grad_out, inputs.key, inputs.value, *more]
    at = query.get_device()
    passes = launches.find(problem, tensors, at, tuple([grad.stride() for grad in into]))
    addresses = [tensor.data_ptr() for tensor in tensors]
    out, lse = output.out.contiguous(), output.lse.contiguous()
    if out.data_ptr() % ALIGNMENT:
        out = out.clone()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    by_head, sums = two((problem.batch, problem.heads, problem.tokens), device)
    grads = into or [new_as(tensor, passes.copy_room) for tensor in (query, inputs.key, inputs.value)]
    partial, partials = two(passes.partial_shape, device) if problem.additional else (by_head, sums)
    stream = torch._C._cuda_getCurrentRawStream(at)
    pointers = (out.data_ptr(), addresses[1], lse.data_ptr(), 0 if grad_lse is None else grad_lse.data_ptr(), *sums)
    to_grads = [grad.data_ptr() for grad in grads]
    lengths_at = 0 if lengths is None else lengths.data_ptr()
    on_device(passes.start, at, addresses, to_grads, pointers, sums, partials, lengths_at, stream)
    if not problem.additional:
        return Gradients(*grads)
    more_grads = [part.sum(0).to(query.dtype) for part in partial]
    if lengths is not None:
        more_grads = [zero_from(grad, lengths) for grad in more_grads]
    return Gradients(*grads, *more_grads)


def can_write(problem: Problem, into: Sequence[Tensor]) -> bool:
    """Whether kernels can write to these. Where dilations do not divide axes, maps begin before their tensors."""
    if not into:
        return True
    is_even = all(axis.length % axis.dilation == 0 for axis in problem.axes)
    return problem.batch > 0 and is_even and all(map(is_mappable, into))


def two(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """Two float32 tensors of a shape in one, and their addresses."""
    both = torch.empty((2, *shape), dtype=torch.float32, device=device)
    start = both.data_ptr()
    return both, (start, start + 4 * prod(shape))


@lru_cache(maxsize=1024)
def prepared(problem: Problem, strides: Strides, device: int, into: Strides) -> Passes | None:
    """The passes on tensors with these strides, `into` such; built once; None if one must be copied first."""
    queries, keys = (problem.heads, problem.head_dim), (problem.heads_kv, problem.head_dim)
    shapes = [(*problem.shape, *queries)] * 2 + [(*problem.shape, *keys)] * 2 + [(problem.additional, *keys)] * 2
    layouts = [layout_of((problem.batch, *shape), step) for shape, step in zip(shapes, strides, strict=False)]
    grads = [layout_of((problem.batch, *shapes[i]), step) for i, step in zip((0, 2, 3), into, strict=False)]
    grads = grads or [contiguous(layout) for layout in (layouts[0], *layouts[2:4])]
    return Passes(problem, layouts, grads, device) if all(map(can_map, layouts)) else None


class Passes:
    """All kernels of a backward pass, for tensors of given shapes and strides; only addresses change.

    Takes the layouts of the query, the output's gradient, the key, the value and the additional keys and values, and
    those of the gradients of query, key and value.
    """

    def __init__(self, problem: Problem, layouts: Sequence[Layout], gradients: Sequence[Layout], device: int) -> None:
        axes = three_axes(problem.axes)
        single = (Axis(1, 1), Axis(1, 1), Axis(max(problem.additional, 1), 1))
        inputs = [geometry(layout, single if i >= 4 else axes) for i, layout in enumerate(layouts)]
        grads = [geometry(layout, axes) for layout in gradients]
        self.rooms = [place.room for place in inputs]
        self.needs_room = any(self.rooms)
        self.copy_room = grads[0].room  # no fewer heads than any other
        self._sums = sums_call(problem, layouts[1], device)
        self._keys = keys_call(problem, inputs, grads[1:], device)
        self._queries = queries_call(problem, inputs, grads[0], device)
        self._additional = None
        self.partial_shape: tuple[int, ...] = ()
        if problem.additional:
            plain = tuple(Axis(axis.length, axis.length) for axis in axes)
            undilated = [geometry(layout, plain) for layout in layouts[:2]] + inputs[4:]
            self._additional, chunks = additional_call(problem, undilated, plain, device)
            self.partial_shape = chunks, problem.batch, problem.additional, problem.heads_kv, problem.head_dim

    def start(
        self, inputs: Sequence[int], grads: Sequence[int], pointers: Sequence[int], sums: Sequence[int],
        partials: Sequence[int], lengths: int, stream: int,
    ) -> None:  # fmt: skip
        """Start them all on `stream`. Everything else is an address."""
        query, grad_out, key, value, *more = inputs
        self._sums.start_on((), pointers, stream)
        self._keys.start_on((query, grad_out, key, value, *grads[1:]), sums, stream)
        self._queries.start_on((query, grad_out, key, value, grads[0], *more), (*sums, lengths), stream)
        if self._additional is not None:
            self._additional.start_on((query, grad_out, *more), (*partials, *sums), stream)


def contiguous(layout: Layout) -> Layout:
    """That of a contiguous tensor of the same shape."""
    return Layout(layout.shape, tuple(prod(layout.shape[i + 1 :]) for i in range(len(layout.shape))))


def sums_call(problem: Problem, grad_out: Layout, device: int) -> Call:
    lengths = [axis.length for axis in three_axes(problem.axes)]
    batch, t, h, w, head = (step // 8 for step in grad_out.strides[:-1])
    grid = (ceil_div(problem.tokens, SUMS_ROWS), problem.heads, problem.batch)
    kernel = function(Sums(problem.dtype, problem.head_dim, SUMS_ROWS), device)
    return Call(kernel, grid, (), 6, [*lengths, head, t, h, w, problem.heads, batch])


def keys_call(problem: Problem, inputs: Sequence[Geometry], grads: Sequence[Geometry], device: int) -> Call:
    variant = ranked_cuts("keys", problem)[0].variant
    places = [*inputs[:4], *grads]
    maps = map_all(places, [variant.kv_box] * 2 + [variant.box] * 4, variant)
    integers, blocks = axis_integers(problem, variant)
    integers += [n for place in places for n in place.steps]
    integers += [problem.heads, problem.heads // problem.heads_kv, slab(three_axes(problem.axes), variant, 1)]
    scale = kernel_scale(problem.scale)
    grid = (blocks, problem.heads_kv, problem.batch)
    return Call(function(variant, device), grid, maps, 2, integers, [scale, abs(problem.scale)])


def queries_call(problem: Problem, inputs: Sequence[Geometry], grad: Geometry, device: int) -> Call:
    variant = ranked_cuts("queries", problem)[0].variant
    places = [*inputs[:4], grad, *inputs[4:]]
    boxes = [variant.box] * 2 + [variant.kv_box] * 2 + [variant.box] + [(1, 1, variant.keys)] * 2
    maps = map_all(places, boxes, variant)
    steps = [place.steps for place in places] + [StepArgs(0, 0, 0, 0)] * (7 - len(places))
    maps += [maps[0]] * (7 - len(maps))
    integers, blocks = axis_integers(problem, variant)
    integers += [n for step in steps for n in step]
    integers += [problem.heads, problem.heads // problem.heads_kv, problem.additional]
    integers += [slab(three_axes(problem.axes), variant, 1)]
    grid = (blocks, problem.heads, problem.batch)
    # Queries have changed sign where the scale is negative, their gradients have not.
    return Call(function(variant, device), grid, maps, 3, integers, [kernel_scale(problem.scale), problem.scale])


def additional_call(
    problem: Problem, inputs: Sequence[Geometry], axes: Sequence[Axis], device: int
) -> tuple[Call, int]:  # fmt: skip
    """The pass for additional keys over a grid of `axes`, and into how many chunks it cuts the queries."""
    variant = additional_variant(problem)
    maps = map_all(inputs, [variant.kv_box] * 2 + [variant.box] * 2, variant)
    tiles = ceil_div(problem.additional, prod(variant.q_tile))
    boxes = prod(ceil_div(axis.length, n) for axis, n in zip(axes, variant.kv_box, strict=True))
    chunks = min(ceil_div(ADDITIONAL_BLOCKS, tiles * problem.heads_kv * problem.batch), boxes)
    chunk = ceil_div(boxes, chunks)
    chunks = ceil_div(boxes, chunk)
    integers = [n for axis in axes for n in axis_args(axis, 1)]
    integers += [n for place in inputs for n in place.steps]
    integers += [problem.heads, problem.heads // problem.heads_kv, problem.additional, chunk]
    grid = (tiles * chunks, problem.heads_kv, problem.batch)
    floats = [kernel_scale(problem.scale), abs(problem.scale)]
    return Call(function(variant, device), grid, maps, 4, integers, floats), chunks


def map_all(places: Sequence[Geometry], boxes: Sequence[tuple[int, ...]], variant: Variant) -> list[TensorMap]:
    return [TensorMap(place, variant.dtype, box, variant.head_dim) for place, box in zip(places, boxes, strict=False)]


def axis_integers(problem: Problem, variant: Variant) -> tuple[list[int], int]:
    """What a kernel is told of the axes, and how many tiles of rows there are."""
    axes = three_axes(problem.axes)
    tiles, blocks = tiles_of(axes, variant)
    return [n for axis, count in zip(axes, tiles, strict=True) for n in axis_args(axis, count)], blocks


launches = Launches(prepared)


def forget() -> None:
    """Forget all launches."""
    launches.forget()
    prepared.cache_clear()
