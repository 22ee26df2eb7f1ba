"""What the forward and the backward pass share: one problem, walked chunk by chunk and row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.backends.blocked.bias import Bias
from vicinal.backends.blocked.chunks import Band, Chunk, Scratch, Views, chunks
from vicinal.backends.blocked.masks import Masks
from vicinal.backends.blocked.tiles import length, parts
from vicinal.plan import Plan

LN2 = math.log(2)


@dataclass(frozen=True)
class Run:
    """Keys and values that all queries of a row meet, and the mask between them, if one is needed."""

    k: Tensor  # [C * rows, keys, D]
    v: Tensor  # [C * rows, keys, Dv]
    mask: Tensor | None  # [columns, units but heads, heads, G, queries, keys], 1 where it is the same for all
    entries: Tensor | None = None  # [columns, queries, keys], those of the table of position bias

    def repeated(self, rows: int) -> Run:
        """The same keys for each of some rows."""
        if rows == 1:
            return self
        return Run(self.k.expand(rows, -1, -1), self.v.expand(rows, -1, -1), self.mask)


def valid_additional(inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Additional keys and values, zero beyond their lengths, and the mask of those, `[B, M]`; or `None` of them."""
    keys, values, lengths = inputs[3:6]
    if keys is None or values is None or keys.shape[1] == 0:
        return None
    if lengths is None:
        return keys, values, None
    beyond = torch.arange(keys.shape[1], device=keys.device) >= lengths[:, None]
    mask = torch.zeros(beyond.shape, dtype=dtype, device=keys.device).masked_fill_(beyond, -torch.inf)
    # What lies beyond a length may hold anything; 0 * inf would still be heard.
    keys, values = (tensor.masked_fill(beyond[:, :, None, None], 0) for tensor in (keys, values))
    return keys, values, mask


@dataclass
class Pass:
    """What the forward and the backward pass share: one problem, walked chunk by chunk and row by row."""

    plan: Plan
    inputs: Inputs

    def __post_init__(self) -> None:
        problem, query = self.plan.problem, self.inputs.query
        # 16-bit inputs are computed in float32: CPUs are no faster in 16 bits, and the sums are long.
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.groups = problem.heads // problem.heads_kv
        self.log2_scale = problem.scale / LN2
        self.masks = Masks(self.dtype, query.device)
        table = self.inputs.position_bias
        if table is not None:
            table = (table.to(self.dtype) / LN2).flatten(1).unflatten(0, (problem.heads_kv, self.groups))
        self.bias = None if table is None else Bias(problem, table, self.masks)
        self.scratch = Scratch(self.dtype, query.device)

    def walk(self, workers: int = 1) -> Iterator[list[tuple[Views, Chunk]]]:
        """The chunks of one part after another, cut so that there are some for each worker."""
        problem = self.plan.problem
        if problem.batch == 0:
            return
        for part in parts(self.plan.axes):
            views = Views(part, problem.dilation, problem.heads_kv)
            units = (problem.batch, *(len(residues) for residues in part.residues), problem.heads_kv)
            width, run = problem.head_dim + problem.head_dim_v, self.plan.tiling.kv_tile[0]
            found = chunks(part, units, self.groups, width, run, workers)
            if (
                self.bias is not None
            ):  # Rows of one pattern may lie elsewhere beside their keys, and then differ in bias.
                found = (replace(chunk, together=1) for chunk in found)
            yield [(views, chunk) for chunk in found]

    def bands(self, views: Views, chunk: Chunk) -> Iterator[tuple[Band, list[Run]]]:
        """The rows of a chunk with the runs of keys that they meet: a box cut along axis 0, and the additional keys.

        Runs are views of what was gathered, in the order of `Chunk.runs`.
        """
        keys = chunk.gather_keys(views.keys(self.inputs.key), self.scratch, "keys")
        values = chunk.gather_keys(views.keys(self.inputs.value), self.scratch, "values")
        extra = self.additional(views, chunk)
        for band in chunk.bands:
            row, across, entries = band.rows[0], keys.shape[2], None
            mask = self.masks.chunk(row, chunk.columns)
            if self.bias is not None:
                mask, entries = self.bias.chunk(row, chunk.columns, chunk.units[-1])
            runs: list[Run] = []
            for piece in chunk.runs(band):
                start = (piece.start - row.keys.start) * across
                parts = (t if t is None else t[..., start : start + length(piece) * across] for t in (mask, entries))
                runs.append(Run(*(chunk.batch_of_keys(tensor, band, piece) for tensor in (keys, values)), *parts))
            yield band, [*runs, *(run.repeated(len(band.rows)) for run in extra)]

    @cached_property
    def valid_additional(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        return valid_additional(self.inputs, self.dtype)

    def additional(self, views: Views, chunk: Chunk) -> list[Run]:
        """The additional keys of a chunk's units, repeated for its columns: there are few of them."""
        if self.valid_additional is None:
            return []
        keys, values, mask = self.valid_additional

        def repeat(tensor: Tensor) -> Tensor:
            piece = views.additional(tensor)[chunk.units].to(self.dtype)
            return piece.expand(len(chunk.columns), *piece.shape).flatten(0, -3)

        if mask is not None:
            units = views.additional(mask[:, :, None, None].expand(-1, -1, keys.shape[2], -1))[chunk.units]
            mask = units.flatten(0, -4)[None, :, :, None, None, :, 0]
        return [Run(repeat(keys), repeat(values), mask)]

    def scores(self, q: Tensor, run: Run, columns: int) -> Tensor:
        """Scores in log2, `[C * rows, G * queries, keys]`, -inf where a key is hidden."""
        s = self.scratch.take("scores", *q.shape[:2], run.k.shape[1])
        s.baddbmm_(q, run.k.transpose(1, 2), beta=0, alpha=self.log2_scale)
        if run.mask is not None:
            heads, queries = run.mask.shape[2], s.shape[1] // self.groups
            s.view(columns, -1, heads, self.groups, queries, s.shape[2]).add_(run.mask)
        return s
