"""The backward pass on the host: what its kernels are told, and in which order they run.

The pass for queries leaves to the others what they must know of each query; then come keys and values, additional
ones, and the position bias. Where windows are whole dilation groups one kernel does most of it, see `whole`. Nothing
is added to memory, so the same inputs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from vicinal._tuples import ceil_div
from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.devices import empty_as, on_device
from vicinal.backends.remembered import ALIGNMENT, Remembered, Strides
from vicinal.backends.triton.bias import SlotCut, bias_cut, summed_cut
from vicinal.backends.triton.cost import Cut, best_cut
from vicinal.backends.triton.launch import (
    Call,
    Operands,
    inputs_of,
    is_readable,
    parts_of,
    places_of,
    readable,
    small_inputs_of,
    stream_of,
    told,
)
from vicinal.backends.triton.variant import FACTS
from vicinal.problem import Problem

MOST_BLOCKS = 1024
"""Blocks that the gradients of additional keys are spread over, about."""


class Passes:
    """All kernels of a backward pass, for tensors that lie in a certain way; only addresses change.

    `scratch` float32 numbers are to be lent to them, in which `parts` begin, and two tensors of `partial_shapes`, if
    there are additional keys.
    """

    def __init__(self, operands: Operands, has_grad_lse: bool) -> None:
        problem, hardware = operands.problem, operands.hardware
        keys = best_cut("keys", problem, hardware)
        cut = best_cut("queries", problem, hardware)
        summed = summed_cut(problem, cut)
        cut = cut._replace(sums=summed is not None)
        sizes: dict[str, int] = {}
        if summed is not None and problem.heads == problem.heads_kv:
            self._calls = [operands.call("whole", cut, has_grad_lse=int(has_grad_lse))]
        else:
            self._calls = [operands.call("queries", cut, has_grad_lse=int(has_grad_lse)), operands.call("keys", keys)]
            queries = problem.batch * problem.heads * problem.tokens
            sizes["facts"] = FACTS * queries
            if problem.additional or problem.position_bias:
                sizes |= {"sums": queries, "delta": queries}
        self.partial_shapes: list[tuple[int, ...]] = []
        if problem.additional:
            call, chunks = additional_call(operands, keys)
            self._calls.append(call)
            shape = chunks, problem.batch, problem.additional, problem.heads_kv
            self.partial_shapes = [(*shape, problem.head_dim), (*shape, problem.head_dim_v)]
        if problem.position_bias:
            found = summed or bias_cut(problem, hardware)
            self._calls += bias_calls(operands, found, is_summed=summed is not None)
            sizes["partial_bias"] = found.scratch
        # Whatever begins in there begins at an address that vectors may be loaded from.
        numbers = ALIGNMENT // 4
        ends = list(accumulate(ceil_div(size, numbers) * numbers for size in sizes.values()))
        self.scratch, self.parts = ends[-1], dict(zip(sizes, [0, *ends], strict=False))

    def start(self, places: dict[str, Any], stream: int) -> None:
        """Start them all on `stream`, one after another; `places` as in `Call.start`."""
        for call in self._calls:
            call.start(places, stream)


def additional_call(operands: Operands, cut: Cut) -> tuple[Call, int]:
    """The pass for additional keys and values: sums over all queries, in chunks that run side by side; how many."""
    problem = operands.problem
    rows, columns = cut.shape.rows, cut.shape.columns
    blocks = ceil_div(problem.additional, rows) * problem.heads_kv * problem.batch
    chunks = min(ceil_div(MOST_BLOCKS, blocks), ceil_div(problem.tokens, columns))
    chunk = ceil_div(ceil_div(problem.tokens, chunks), columns) * columns
    chunks = ceil_div(problem.tokens, chunk)
    flat = cut._replace(rows=(rows,), columns=(columns,))
    return operands.call("additional", flat, (blocks, chunks), chunk=chunk), chunks


def bias_calls(operands: Operands, found: SlotCut, *, is_summed: bool) -> list[Call]:
    """The pass for the position bias: two kernels for as many heads as there is scratch memory for, then for others.

    Only the second, if the pass for queries did what the first does.
    """
    problem = operands.problem
    shared = {"slots": found.slots, "chunks": found.chunks}
    calls: list[Call] = []
    for first in range(0, problem.heads, found.heads):
        heads = min(found.heads, problem.heads - first)
        grid = heads * found.boxes, found.chunks
        more = {"chunk": found.chunk, "batches": problem.batch, "first_head": first}
        if not is_summed:
            calls.append(operands.call("bias", found.cut, grid, **shared, **more))
        grid = heads * prod(problem.bias_shape[1:]), 1
        calls.append(operands.call("diagonals", found.cut, grid, **shared, heads=heads, first_head=first))
    return calls


GRADIENTS = ("grad_query", "grad_key", "grad_value")


@lru_cache(maxsize=1024)
def prepared(
    problem: Problem, strides: Strides, device: int, into: Strides, has_grad_lse: bool, *_: Any
) -> Passes | None:
    """The passes on tensors with these strides, `into` such; `None` if one of them must be copied first.

    What they are `told` otherwise they ask for themselves: here that only tells some from others.
    """
    names = ("query", "key", "value", *(("more_key", "more_value") if problem.additional else ()), "out", "grad_out")
    given = dict(zip(names, strides, strict=True)) | dict(zip(GRADIENTS, into, strict=False))
    operands = Operands(problem, given, () if into else GRADIENTS, device)
    return Passes(operands, has_grad_lse) if operands.is_readable else None


passes = Remembered(prepared, readable)


def forget() -> None:
    """Forget all launches."""
    passes.forget()
    prepared.cache_clear()


def gradients(
    problem: Problem,
    inputs: Inputs,
    output: Output,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    into: Sequence[Tensor] = (),
) -> Gradients:
    """Gradients of all inputs, see `Backend.backward`, where there is at least one query."""
    if not all(map(is_readable, into)):
        return gradients(problem, inputs, output, grad_out, grad_lse).moved(into)
    device = inputs.query.get_device()
    given = inputs_of(problem, inputs) | {"out": output.out, "grad_out": grad_out}
    tensors = list(given.values())
    into_strides = tuple([grad.stride() for grad in into])
    found = passes.find(problem, tensors, device, into_strides, grad_lse is not None, *told(problem))
    lse = output.lse.contiguous()
    at = inputs.query.device
    grads = into or [empty_as(inputs.query), empty_as(inputs.key), empty_as(inputs.value)]
    scratch = torch.empty(found.scratch, dtype=torch.float32, device=at)
    partial = [torch.empty(shape, dtype=torch.float32, device=at) for shape in found.partial_shapes]
    table = torch.empty(problem.bias_shape, dtype=torch.float32, device=at) if problem.position_bias else None
    named = dict(zip(given, tensors, strict=True)) | small_inputs_of(problem, inputs)
    named |= dict(zip(GRADIENTS, grads, strict=True)) | {"lse": lse}
    named["grad_lse"] = lse if grad_lse is None else grad_lse.contiguous()
    named |= dict(zip(("partial_key", "partial_value"), partial, strict=False))
    if table is not None:
        named["grad_bias"] = table
    on_device(found.start, device, places_of(named) | parts_of(scratch, found.parts), stream_of(device))
    more = [part.sum(0).to(grads[0].dtype) for part in partial] or [None, None]
    return Gradients(*grads, *more, table if table is None else table.to(inputs.position_bias.dtype))
