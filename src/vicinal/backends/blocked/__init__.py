"""Batched tiles in plain PyTorch, forward and backward: any device PyTorch has, what trains on CPUs.

A *unit* is one key/value head of one batch row in one dilation group: an undilated grid of its own.
Axis 0 of a unit is cut into *rows* of query tiles, the other axes into *columns* of them. The keys
that a column needs are gathered once, as `[length of axis 0, keys across, D]`: in that layout the
keys of every row are one run of memory, so matrix products read them in place although the boxes of
neighboring rows overlap. Only the scores of one row by a few columns and units exist at a time, few
enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.blocked.backward import backward
from vicinal.backends.blocked.choice import default_tilings
from vicinal.backends.blocked.chunks import Chunk, Views, scatter
from vicinal.backends.blocked.threads import spread, workers_for
from vicinal.backends.blocked.work import LN2, Pass, Run
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling


def forward(plan: Plan, inputs: Inputs) -> Output:
    """The forward pass, on as many workers as the device has use for."""
    query = inputs.query
    count = workers_for(query.device)
    workers = [Forward(plan, inputs) for _ in range(count)]
    out = query.new_empty(*query.shape[:-1], plan.problem.head_dim_v)
    lse = query.new_empty(*query.shape[:-1], 1, dtype=workers[0].dtype)
    for part in workers[0].walk(count):
        spread(part, [partial(worker.chunk, out, lse) for worker in workers[: len(part)]])
    for worker in workers:
        worker.scratch.keep()
    return Output(out, lse.squeeze(-1))


class Forward(Pass):
    """Softmax over the keys that a row meets, one run of them at a time."""

    def chunk(self, out: Tensor, lse: Tensor, job: tuple[Views, Chunk]) -> None:
        """Write one chunk's share of the outputs."""
        views, chunk = job
        q = chunk.gather_queries(views.queries(self.inputs.query), self.scratch, "q")
        o = self.scratch.take("o", *q.shape[:-1], self.plan.problem.head_dim_v)
        sums = self.scratch.take("lse", *q.shape[:-1], 1)
        for band, runs in self.bands(views, chunk):
            weighted, total, top = self.attend(chunk.batch_of_queries(q, band), runs, len(chunk.columns))
            target = chunk.piece(o, band)
            torch.div(weighted.view(target.shape), total.view(*target.shape[:-1], 1), out=target)
            target = chunk.piece(sums, band)
            torch.add(top.view(target.shape), total.log2_().view(target.shape), out=target)
        boxes = [column.queries for column in chunk.columns]
        scatter(o, views.queries(out)[chunk.units], chunk.queries, boxes)
        scatter(sums.mul_(LN2), views.queries(lse)[chunk.units], chunk.queries, boxes)

    def attend(self, q: Tensor, runs: Sequence[Run], columns: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of weighted values `[C, queries, Dv]`, sum of weights, log2 of what divides both, `[C, queries, 1]`."""
        s = self.scores(q, runs[0], columns)
        # A row may have no key in a run: keep its maximum finite, so that -inf - top stays -inf.
        top = s.amax(-1, keepdim=True).clamp_(min=torch.finfo(s.dtype).min)
        p = s.sub_(top).exp2_()
        out = torch.bmm(p, runs[0].v, out=self.scratch.take("out", *p.shape[:2], runs[0].v.shape[2]))
        total = p.sum(-1, keepdim=True)
        for run in runs[1:]:
            s = self.scores(q, run, columns)
            highest = torch.maximum(s.amax(-1, keepdim=True), top)
            decay, top = (top - highest).exp2_(), highest
            p = s.sub_(top).exp2_()
            out.mul_(decay).baddbmm_(p, run.v)
            total.mul_(decay).add_(p.sum(-1, keepdim=True))
        return out, total, top


@dataclass(frozen=True)
class Blocked:
    """Tiles of scores in plain PyTorch."""

    name: str = "blocked"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

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
        return backward(plan, inputs, output, grad_out, grad_lse).moved(into)


backend = Blocked()
