"""What both passes of the backward need of each query: its log-sum-exp, and how far its output stands out."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def sums(
    out, grad_out, lse, grad_lse, lse_by_head, delta_by_head, axes, step, heads, batch_step,
    D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """One block: `delta = rowsum(dO * O) - dlse` and the log-sum-exp, for some queries of one head.

    Args:
        out: `[B, *S, H, D]`, contiguous.
        grad_out: `[B, *S, H, D]`, whose strides are multiples of 8 elements.
        lse, grad_lse: `[B, *S, H]`, contiguous; no second one (a null pointer) means zeros.
        lse_by_head, delta_by_head: `[B, H, tokens]`, written; the former in powers of two.
        axes: three lengths.
        step: a `StepArgs` of `grad_out`, in steps of 8 elements.
        heads: their number.
        batch_step: of `grad_out`, in steps of 8 elements.
    """
    tokens = axes[0] * axes[1] * axes[2]
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    exists = token < tokens
    element = tl.arange(0, D)[None, :]
    row = (batch * tokens + token) * heads + head
    o = tl.load(out + row[:, None] * D + element, mask=exists[:, None], other=0.0).to(tl.float32)
    line = token // axes[2]
    plane = line // axes[1]
    at = batch * batch_step + head.to(tl.int64) * step.head + (token - line * axes[2]).to(tl.int64) * step.w
    at += (line - plane * axes[1]).to(tl.int64) * step.h + plane.to(tl.int64) * step.t
    do = tl.load(grad_out + at[:, None] * 8 + element, mask=exists[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(o * do, 1)
    if grad_lse.to(tl.int64) != 0:
        delta -= tl.load(grad_lse + row, mask=exists, other=0.0)
    place = (batch * heads + head) * tokens + token
    tl.store(lse_by_head + place, tl.load(lse + row, mask=exists, other=0.0) * LOG2_E, mask=exists)
    tl.store(delta_by_head + place, delta, mask=exists)
