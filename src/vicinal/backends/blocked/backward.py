"""The backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Output
from vicinal.backends.blocked.chunks import Chunk, Views, scatter
from vicinal.backends.blocked.tiles import length
from vicinal.backends.blocked.work import LN2, Pass, Run, scores


class Queries(NamedTuple):
    """What the backward pass knows of the queries of one row."""

    q: Tensor  # [C, rows, D], scaled to log2
    do: Tensor  # [C, rows, Dv]
    delta: Tensor  # [C, rows, 1]
    lse: Tensor  # [C, rows, 1], in log2


class Backward(Pass):
    """Recompute the weights from the log-sum-exp, tile by tile.

        p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q

    with `delta = rowsum(do * o) - dlse`.
    """

    def run(self, output: Output, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        inputs = self.inputs
        dq = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
        summed = [
            None if tensor is None else torch.zeros(tensor.shape, dtype=self.dtype, device=tensor.device)
            for tensor in (inputs.key, inputs.value, inputs.additional_keys, inputs.additional_values)
        ]
        for views, chunk in self.walk():
            self.chunk(views, chunk, output, grad_out, grad_lse, dq, summed)
        dk, dv, dak, dav = (None if grad is None else grad.to(inputs.query.dtype) for grad in summed)
        assert dk is not None and dv is not None
        return Gradients(dq, dk, dv, dak, dav)

    def chunk(
        self,
        views: Views,
        chunk: Chunk,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        dq: Tensor,
        summed: Sequence[Tensor | None],
    ) -> None:
        """Add one chunk's share to the gradients."""

        def take(tensor: Tensor, name: str) -> Tensor:
            return chunk.gather_queries(views.queries(tensor), self.scratch, name)

        q, do = take(self.inputs.query, "q").mul_(self.log2_scale), take(grad_out, "do")
        delta = take(output.out, "o").mul_(do).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= take(grad_lse[..., None], "dlse")
        lse = take(output.lse[..., None], "lse").div_(LN2)
        grad_q = self.scratch.take("dq", *q.shape)
        sums = self.zero_sums(chunk)
        for row, runs in self.rows(views, chunk):
            queries = Queries(*(chunk.row_of_queries(tensor, row) for tensor in (q, do, delta, lse)))
            boxes = [chunk.run_of_keys(tensor, piece) for piece in chunk.runs(row) for tensor in sums[:2]]
            targets = [*boxes, *sums[2:]]
            grad = self.scratch.take("dq row", *queries.q.shape).zero_()
            for run, dk, dv in zip(runs, targets[::2], targets[1::2], strict=True):
                self.tile(queries, run, len(chunk.columns), grad, dk, dv)
            chunk.put_row(grad, grad_q, row)
        boxes = [column.queries for column in chunk.columns]
        scatter(grad_q.mul_(self.plan.problem.scale), views.queries(dq)[chunk.units], chunk.queries, boxes)
        self.collect(views, chunk, sums, summed)

    def tile(self, queries: Queries, run: Run, columns: int, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add `ds k`, `ds^T q` and `p^T do` of one row and one run of keys."""
        q, do, delta, lse = queries
        p = scores(q, run, columns, self.groups, self.scratch).sub_(lse).exp2_()
        dv.add_(torch.bmm(p.transpose(1, 2), do, out=self.scratch.take("dv row", *run.v.shape)))
        ds = torch.bmm(do, run.v.transpose(1, 2), out=self.scratch.take("ds", *p.shape)).sub_(delta).mul_(p)
        dk.add_(torch.bmm(ds.transpose(1, 2), q, out=self.scratch.take("dk row", *run.k.shape)))
        dq.baddbmm_(ds, run.k)

    def zero_sums(self, chunk: Chunk) -> list[Tensor]:
        """Zeros for the gathered keys and values, and for the additional ones if there are any."""
        problem = self.plan.problem
        across = prod(length(piece) for piece in chunk.columns[0].keys)
        batch = len(chunk.columns) * prod(length(piece) for piece in chunk.units)
        shapes: dict[str, tuple[int, ...]] = {"keys": (batch, length(chunk.keys), across)}
        if problem.additional:
            shapes["additional"] = (batch, problem.additional)
        widths = {"d k": problem.head_dim, "d v": problem.head_dim_v}
        return [
            self.scratch.take(f"{of} of {keys}", *shape, width).zero_()
            for keys, shape in shapes.items()
            for of, width in widths.items()
        ]

    def collect(self, views: Views, chunk: Chunk, sums: Sequence[Tensor], summed: Sequence[Tensor | None]) -> None:
        """Fold a chunk's sums over keys back onto the grid, and those over additional keys onto their rows."""
        boxes = [column.keys for column in chunk.columns]
        units = [length(piece) for piece in chunk.units]
        # Queries carry scale / ln 2 in their scores, so the gradient by the keys owes ln 2.
        for i, (tensor, factor) in enumerate(zip(sums, (LN2, 1.0, LN2, 1.0), strict=False)):
            target = summed[i]
            assert target is not None
            tensor = tensor.mul_(factor).view(len(boxes), *units, *tensor.shape[1:])
            if i < 2:
                scatter(tensor, views.keys(target)[chunk.units], chunk.keys, boxes, add=True)
            else:
                rank = len(chunk.units) - 2
                folded = tensor.sum(dim=[0, *range(2, 2 + rank)])  # [B, Hkv, M, D]
                target.transpose(1, 2)[chunk.units[0], chunk.units[-1]] += folded
