"""The backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.blocked.bias import add_gradient
from vicinal.backends.blocked.chunks import Band, Chunk, Views, scatter, scatter_add
from vicinal.backends.blocked.threads import spread, workers_for
from vicinal.backends.blocked.tiles import length
from vicinal.backends.blocked.work import LN2, Pass, Run
from vicinal.plan import Plan


class Queries(NamedTuple):
    """What the backward pass knows of the queries of one row."""

    q: Tensor  # [C, rows, D]
    do: Tensor  # [C, rows, Dv]
    delta: Tensor  # [C, rows, 1]
    lse: Tensor  # [C, rows, 1], in log2


class Given(NamedTuple):
    """What the forward pass left, and what came back."""

    output: Output
    grad_out: Tensor
    grad_lse: Tensor | None


class Sums(NamedTuple):
    """The gradients while they are summed, in the precision of computation; the query's is final."""

    query: Tensor
    keys: tuple[Tensor | None, ...]  # of Inputs[1:5]
    bias: Tensor | None  # [B, Hkv, G, entries]: batch rows apart, for workers have rows and heads of their own


def backward(plan: Plan, inputs: Inputs, output: Output, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """The backward pass, on as many workers as the device has use for."""
    count = workers_for(inputs.query.device)
    workers = [Backward(plan, inputs) for _ in range(count)]
    bias = workers[0].bias
    sums = Sums(
        torch.empty_like(inputs.query, memory_format=torch.contiguous_format),
        tuple(
            None if tensor is None else torch.zeros(tensor.shape, dtype=workers[0].dtype, device=tensor.device)
            for tensor in inputs[1:5]
        ),
        None if bias is None else bias.table.new_zeros(plan.problem.batch, *bias.table.shape),
    )
    given = Given(output, grad_out, grad_lse)
    for part in workers[0].walk(count):
        jobs = by_heads(part)
        spread(jobs, [partial(worker.chunks, given, sums) for worker in workers[: len(jobs)]])
    for worker in workers:
        worker.scratch.keep()
    dk, dv, dak, dav = (None if grad is None else grad.to(inputs.query.dtype) for grad in sums.keys)
    assert dk is not None and dv is not None
    table = inputs.position_bias
    if table is not None and sums.bias is not None:
        table = sums.bias.sum(0).view(table.shape).to(table.dtype)
    return Gradients(sums.query, dk, dv, dak, dav, table)


def by_heads(part: Sequence[tuple[Views, Chunk]]) -> list[list[tuple[Views, Chunk]]]:
    """Chunks that add to the same heads of the same batch rows belong together, in their order.

    One worker each has them: nobody waits for another's sum, and bits repeat.
    """
    jobs: dict[str, list[tuple[Views, Chunk]]] = {}
    for views, chunk in part:
        jobs.setdefault(f"{chunk.units[0]} {chunk.units[-1]}", []).append((views, chunk))
    return list(jobs.values())


class Backward(Pass):
    """Recompute the weights from the log-sum-exp, tile by tile.

        p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q

    with `delta = rowsum(do * o) - dlse`.
    """

    def chunks(self, given: Given, sums: Sums, jobs: Sequence[tuple[Views, Chunk]]) -> None:
        """Add the shares of some chunks to the gradients."""
        for views, chunk in jobs:
            self.chunk(given, sums, views, chunk)

    def chunk(self, given: Given, gradients: Sums, views: Views, chunk: Chunk) -> None:
        """Add one chunk's share."""

        def take(tensor: Tensor, name: str) -> Tensor:
            return chunk.gather_queries(views.queries(tensor), self.scratch, name)

        q, do = take(self.inputs.query, "q"), take(given.grad_out, "do")
        delta = take(given.output.out, "o").mul_(do).sum(-1, keepdim=True)
        if given.grad_lse is not None:
            delta -= take(given.grad_lse[..., None], "dlse")
        lse = take(given.output.lse[..., None], "lse").div_(LN2)
        grad_q = self.scratch.take("dq", *q.shape)
        sums = self.zero_sums(chunk)
        for band, runs in self.bands(views, chunk):
            queries = Queries(*(chunk.batch_of_queries(tensor, band) for tensor in (q, do, delta, lse)))
            targets = self.targets(chunk, band, sums)
            grad = self.scratch.take("dq row", *queries.q.shape).zero_()
            for run, dk, dv in zip(runs, targets[::2], targets[1::2], strict=True):
                ds = self.tile(queries, run, len(chunk.columns), grad, dk, dv)
                if run.entries is not None and gradients.bias is not None:
                    add_gradient(gradients.bias[chunk.units[0].start, chunk.units[-1]], ds, run.entries)
            target = chunk.piece(grad_q, band)
            torch.mul(grad.view(target.shape), self.plan.problem.scale, out=target)
        boxes = [column.queries for column in chunk.columns]
        scatter(grad_q, views.queries(gradients.query)[chunk.units], chunk.queries, boxes)
        self.collect(views, chunk, sums, gradients.keys)

    def targets(self, chunk: Chunk, band: Band, sums: Sequence[Tensor]) -> list[list[Tensor]]:
        """Where the keys' and values' gradients of each run go, in turn: a view for each row, since rows overlap."""

        def along(piece: slice, tensor: Tensor) -> list[Tensor]:
            starts = [piece.start + i * band.step for i in range(len(band.rows))]
            return [chunk.run_of_keys(tensor, slice(start, start + length(piece))) for start in starts]

        boxes = [along(piece, tensor) for piece in chunk.runs(band) for tensor in sums[:2]]
        return [*boxes, *([tensor] * len(band.rows) for tensor in sums[2:])]

    def tile(
        self, queries: Queries, run: Run, columns: int, dq: Tensor, dk: Sequence[Tensor], dv: Sequence[Tensor]
    ) -> Tensor:
        """Add `ds k`, `ds^T q` and `p^T do` of some rows and one run of keys; returns `ds`."""
        q, do, delta, lse = queries
        p = self.scores(q, run, columns).sub_(lse).exp2_()
        add_rows(torch.bmm(p.transpose(1, 2), do, out=self.scratch.take("dv row", *run.v.shape)), dv)
        ds = torch.bmm(do, run.v.transpose(1, 2), out=self.scratch.take("ds", *p.shape)).sub_(delta).mul_(p)
        add_rows(torch.bmm(ds.transpose(1, 2), q, out=self.scratch.take("dk row", *run.k.shape)), dk)
        dq.baddbmm_(ds, run.k)
        return ds

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
        scale = self.plan.problem.scale
        for i, (tensor, factor) in enumerate(zip(sums, (scale, 1.0, scale, 1.0), strict=False)):
            target = summed[i]
            assert target is not None
            tensor = tensor.mul_(factor).view(len(boxes), *units, *tensor.shape[1:])
            if i < 2:
                scatter_add(tensor, views.keys(target)[chunk.units], chunk.keys, boxes)
            else:
                rank = len(chunk.units) - 2
                folded = tensor.sum(dim=[0, *range(2, 2 + rank)])  # [B, Hkv, M, D]
                target.transpose(1, 2)[chunk.units[0], chunk.units[-1]] += folded


def add_rows(source: Tensor, targets: Sequence[Tensor]) -> None:
    """Add `[C * rows, keys, D]` to a `[C, keys, D]` for each row."""
    for target, rows in zip(targets, source.view(-1, len(targets), *source.shape[1:]).unbind(1), strict=True):
        target.add_(rows)
