"""Inference on CPUs, by the fused kernel inside PyTorch's own scaled_dot_product_attention.

That kernel keeps scores in the caches, shares its work among threads without Python, and takes a mask and any strides
(but a head's elements must lie side by side): so all query tiles that have the same pattern of windows are one call,
though their keys overlap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.blocked.choice import default_tilings
from vicinal.backends.blocked.chunks import Band, Chunk, Scratch, Views, slices, stretches
from vicinal.backends.blocked.masks import Masks
from vicinal.backends.blocked.tiles import Column, Part, length, parts
from vicinal.backends.blocked.work import valid_additional
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

KEYS = 2**23
"""Elements of gathered keys and values held at a time."""

# Its public face, scaled_dot_product_attention, keeps the log-sum-exp to itself.
_attend: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def forward(plan: Plan, inputs: Inputs) -> Output:
    """The forward pass."""
    query = inputs.query
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    masks, scratch = Masks(dtype, query.device), Scratch(dtype, query.device)
    out = query.new_empty(query.shape, dtype=dtype if plan.problem.additional else query.dtype)
    lse = query.new_empty(query.shape[:-1], dtype=dtype)
    for part in parts(plan.axes) if plan.problem.batch else ():
        views = Views(part, plan.problem.dilation, plan.problem.heads_kv)
        targets = views.queries(out), views.queries(lse[..., None])
        for chunk in chunks(plan.problem, part):
            q = chunk.gather_queries(views.queries(query), scratch, "q")
            k = chunk.gather_keys(views.keys(inputs.key), scratch, "keys")
            v = chunk.gather_keys(views.keys(inputs.value), scratch, "values")
            for band in chunk.bands:
                mask = masks.chunk(band.rows[0], chunk.columns[:1])
                found = attend(plan.problem, chunk, band, (q, k, v), mask)
                for result, target in zip(found, targets, strict=True):
                    put(result, target[chunk.units], chunk, band)
    scratch.keep()
    if plan.problem.batch:
        add_additional(plan.problem, inputs, out, lse)
    return Output(out.to(query.dtype), lse)


def add_additional(problem: Problem, inputs: Inputs, out: Tensor, lse: Tensor) -> None:
    """Merge attention over the additional keys into the outputs over the windows, in place."""
    additional = valid_additional(inputs, lse.dtype)
    if additional is None:
        return
    *pairs, mask = additional
    groups = problem.heads // problem.heads_kv
    query = inputs.query.flatten(1, problem.rank).transpose(1, 2).to(lse.dtype)  # [B, H, N, D]
    query = query if query.stride(-1) == 1 else query.contiguous()  # the kernel believes so, and does not look
    keys, values = (pair.to(lse.dtype).transpose(1, 2).repeat_interleave(groups, 1) for pair in pairs)
    there, lse_there = _attend(
        query, keys, values, attn_mask=None if mask is None else mask[:, None, None], scale=problem.scale
    )
    there, lse_there = there.transpose(1, 2).reshape(out.shape), lse_there.transpose(1, 2).reshape(lse.shape)
    if inputs.additional_lengths is not None:
        nobody = (inputs.additional_lengths <= 0).nonzero().flatten()
        there[nobody], lse_there[nobody] = 0, -torch.inf
    both = torch.logaddexp(lse, lse_there)
    out.mul_((lse - both).exp_()[..., None]).addcmul_(there, (lse_there - both).exp_()[..., None])
    lse.copy_(both)


def attend(
    problem: Problem, chunk: Chunk, band: Band, gathered: Sequence[Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of a band, `[C, rows, G * queries, D]` and `[.., 1]`."""
    q, k, v = gathered
    queries = chunk.piece(q, band).flatten(-4, -2).flatten(0, -4)
    keys, values = (chunk.rows_of_keys(tensor, band, band.rows[0].keys) for tensor in (k, v))
    if mask is not None:
        # Query heads that read the same keys lie one after the other, and so must their masks.
        mask = mask[0, 0].expand(1, problem.heads // problem.heads_kv, -1, -1).flatten(1, 2)[None]
    out, lse = _attend(queries, keys, values, attn_mask=mask, scale=problem.scale)
    return out, lse[..., None]


def put(result: Tensor, view: Tensor, chunk: Chunk, band: Band) -> None:
    """Write `[C, rows, G * queries, D]` where it belongs in `[*units, G, *S, D]`."""
    rows = slice(band.rows[0].queries.start, band.rows[-1].queries.stop)
    for which, target in stretches(view, rows, [column.queries for column in chunk.columns]):
        at = len(chunk.units) + 2  # the rows, after columns, units and G
        apart = target.unflatten(at, (len(band.rows), -1)).movedim(at, at - 1)
        part = result.unflatten(0, (len(chunk.columns), -1))[which]
        apart.copy_(part.reshape(apart.shape))


def chunks(problem: Problem, part: Part) -> Iterator[Chunk]:
    """All rows of some units and of some columns that have one pattern, as many as the budget allows."""
    units = (problem.batch, *(len(residues) for residues in part.residues), problem.heads_kv)
    slab, width = part.lengths[0], problem.head_dim + problem.head_dim_v

    def pattern(column: Column) -> tuple[object, ...]:
        return tuple((tile.pattern, length(tile.keys)) for tile in column.tiles)

    for _, alike in groupby(sorted(part.columns, key=pattern), key=pattern):
        columns = list(alike)
        unit = slab * prod(length(piece) for piece in columns[0].keys) * width
        count = min(max(KEYS // unit, 1), len(columns))
        for at in range(0, len(columns), count):
            some = columns[at : at + count]
            for box in slices(units, max(KEYS // (unit * len(some)), 1)):
                yield Chunk(part, box, some, part.rows, slab, len(part.rows))


@dataclass(frozen=True)
class Fused:
    """The boxes of `blocked`, in the hands of PyTorch's fused kernel for CPUs."""

    name: str = "fused"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        widths = f"{problem.head_dim} and {problem.head_dim_v}"
        facts = (
            (hardware.kind == "cpu", f"runs on CPUs only, this is {hardware.kind}"),
            (problem.head_dim == problem.head_dim_v, f"needs keys and values of one width, these have {widths}"),
            (not problem.position_bias, "adds no position bias"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ("its exponentials keep 20 bits, and gradients made from them miss the promised accuracy",)

    def tilings(self, problem: Problem, hardware: Hardware) -> tuple[Tiling, ...]:
        return default_tilings(problem)

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        return forward(plan, inputs)

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        raise Unsupported("backend 'fused' computes no gradients")


backend = Fused()
