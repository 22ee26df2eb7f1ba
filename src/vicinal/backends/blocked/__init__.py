"""Batched tiles in plain PyTorch, forward and backward: any device PyTorch has, the default on CPUs.

A *unit* is one key/value head of one batch row in one dilation group: an undilated grid of its own.
Axis 0 of a unit is cut into *rows* of query tiles, the other axes into *columns* of them. The keys
that a column needs are gathered once, as `[length of axis 0, keys across, D]`: in that layout the
keys of every row are one run of memory, so matrix products read them in place although the boxes of
neighboring rows overlap. Only the scores of one row by a few columns and units exist at a time, few
enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.blocked.backward import Backward
from vicinal.backends.blocked.choice import default_tilings
from vicinal.backends.blocked.chunks import Scratch, scatter
from vicinal.backends.blocked.work import LN2, Pass, Run, scores
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling


def attend(q: Tensor, runs: Iterable[Run], columns: int, groups: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of all runs, one run at a time: `[C, rows, Dv]` and the log2-sum-exp2, `[C, rows, 1]`."""
    out = total = top = None
    for run in runs:
        s = scores(q, run, columns, groups, scratch)
        highest = s.amax(-1, keepdim=True)
        if out is None or total is None or top is None:
            # A row may have no key in this run: keep its maximum finite, so that -inf - top stays -inf.
            top = highest.clamp_(min=torch.finfo(s.dtype).min)
            p = s.sub_(top).exp2_()
            out = torch.bmm(p, run.v, out=scratch.take("out", *p.shape[:2], run.v.shape[2]))
            total = p.sum(-1, keepdim=True)
        else:
            highest = torch.maximum(highest, top)
            decay = (top - highest).exp2_()
            p = s.sub_(highest).exp2_()
            out = out.mul_(decay).baddbmm_(p, run.v)
            total, top = total.mul_(decay).add_(p.sum(-1, keepdim=True)), highest
    assert out is not None and total is not None and top is not None
    return out.div_(total), top + total.log2()


@dataclass(frozen=True)
class Blocked:
    """Tiles of scores in plain PyTorch."""

    name: str = "blocked"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def tilings(self, problem: Problem, hardware: Hardware) -> tuple[Tiling, ...]:
        return default_tilings(problem.axes, problem.heads // problem.heads_kv)

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        problem, query = plan.problem, inputs.query
        work = Pass(plan, inputs)
        out = query.new_empty(*query.shape[:-1], problem.head_dim_v)
        lse = query.new_empty(*query.shape[:-1], 1, dtype=work.dtype)
        for views, chunk in work.walk():
            q = chunk.gather_queries(views.queries(query), work.scratch, "q").mul_(work.log2_scale)
            o = work.scratch.take("o", *q.shape[:-1], problem.head_dim_v)
            sums = work.scratch.take("lse", *q.shape[:-1], 1)
            for row, runs in work.rows(views, chunk):
                q_row = chunk.row_of_queries(q, row)
                found, total = attend(q_row, runs, len(chunk.columns), work.groups, work.scratch)
                chunk.put_row(found, o, row)
                chunk.put_row(total, sums, row)
            boxes = [column.queries for column in chunk.columns]
            scatter(o, views.queries(out)[chunk.units], chunk.queries, boxes)
            scatter(sums.mul_(LN2), views.queries(lse)[chunk.units], chunk.queries, boxes)
        return Output(out, lse.squeeze(-1))

    def backward(
        self, plan: Plan, inputs: Inputs, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        work = Backward(plan, inputs)
        return work.run(output, grad_out, grad_lse)


backend = Blocked()
