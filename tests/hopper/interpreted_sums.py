"""Runs the kernel that prepares Hopper's backward in Triton's interpreter; wants TRITON_INTERPRET=1."""

from __future__ import annotations

import itertools

import torch

from vicinal.backends.hopper.backward_sums import sums
from vicinal.backends.hopper.variant import StepArgs


def check(layout: str, has_grad_lse: bool) -> None:
    batch, axes, heads, head_dim, rows = 2, (3, 4, 7), 3, 32, 64
    shape = batch, *axes, heads, head_dim
    out = torch.randn(shape, dtype=torch.float16)
    grad_out = torch.randn(shape, dtype=torch.float16)
    if layout == "heads first":
        grad_out = grad_out.movedim(-2, 1).contiguous().movedim(1, -2)
    if layout == "padded":
        grad_out = torch.nn.functional.pad(grad_out, (0, 8, 0, 2, 0, 1, 0, 2, 0, 1))[:, :3, :4, :7, :3, :32]
    assert grad_out.is_contiguous() == (layout == "contiguous")
    lse, grad_lse = torch.randn(2, batch, *axes, heads)
    by_head = torch.full((2, batch, heads, 84), torch.nan)
    steps = grad_out.stride()
    step = StepArgs(steps[4] // 8, steps[1] // 8, steps[2] // 8, steps[3] // 8)
    null = torch.zeros(0)
    assert null.data_ptr() == 0
    grid = (-(-84 // rows), heads, batch)
    given = grad_lse if has_grad_lse else null
    sums[grid](out, grad_out, lse, given, *by_head, axes, step, heads, steps[0] // 8, head_dim, rows)
    delta = (out.double() * grad_out.double()).sum(-1) - has_grad_lse * grad_lse.double()
    for found, wanted in zip(by_head, (lse.double() / torch.log(torch.tensor(2.0).double()), delta), strict=True):
        torch.testing.assert_close(found.double(), wanted.flatten(1, 3).movedim(2, 1), rtol=1e-5, atol=1e-4)


if __name__ == "__main__":
    for layout, has_grad_lse in itertools.product(("contiguous", "heads first", "padded"), (True, False)):
        check(layout, has_grad_lse)
    print("all equal")
