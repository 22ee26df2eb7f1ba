"""Runs the kernel's own arithmetic of spans and windows and brings back what it says."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vicinal._tuples import ceil_div
from vicinal.backends.hopper.tile import seen_start, seen_stop, span_of
from vicinal.backends.hopper.variant import AxisArgs
from vicinal.problem import Axis

NUMBERS = ["length", "kernel_size", "stride", "dilation", "is_causal", "tiles"]


@gluon.jit(do_not_specialize=NUMBERS)
def _span(
    out, length, kernel_size, stride, dilation, is_causal, tiles,
    Q: gl.constexpr, K: gl.constexpr, INVERSE: gl.constexpr,  # noqa: N803
):  # fmt: skip
    axis = AxisArgs(length, kernel_size, stride, dilation, is_causal, tiles)
    span = span_of(gl.program_id(0), axis, Q, K, INVERSE)
    row = out + gl.program_id(0) * 4
    gl.store(row, span.group)
    gl.store(row + 1, span.first)
    gl.store(row + 2, span.origin)
    gl.store(row + 3, span.visited)


@gluon.jit(do_not_specialize=["members", *NUMBERS])
def _window(out, members, length, kernel_size, stride, dilation, is_causal, tiles, INVERSE: gl.constexpr):  # noqa: N803
    axis = AxisArgs(length, kernel_size, stride, dilation, is_causal, tiles)
    member = gl.program_id(0)
    gl.store(out + 2 * member, seen_start(member, members, axis, INVERSE))
    gl.store(out + 2 * member + 1, seen_stop(member, members, axis, INVERSE))


def _numbers(axis: Axis, q: int) -> tuple[int, ...]:
    tiles = ceil_div(ceil_div(axis.length, axis.dilation), q)
    return axis.length, axis.kernel_size, axis.stride, axis.dilation, int(axis.is_causal), tiles


def spans_on_device(axis: Axis, q: int, k: int, is_inverse: bool) -> list[tuple[int, ...]]:
    """Group, first query, origin and visited boxes of every query tile, dilation groups one after another.

    If `is_inverse`, of every tile of keys, as in `AxisPlan`.
    """
    numbers = _numbers(axis, q)
    count = numbers[-1] * axis.dilation
    out = torch.empty(count, 4, dtype=torch.int32, device="cuda")
    _span[(count,)](out, *numbers, q, k, is_inverse, num_warps=1)
    return [tuple(row) for row in out.tolist()]


def windows_on_device(axis: Axis, members: int, is_inverse: bool) -> list[tuple[int, ...]]:
    """Start and stop of the window of every member of a dilation group, or of the queries that see it."""
    out = torch.empty(members, 2, dtype=torch.int32, device="cuda")
    _window[(members,)](out, members, *_numbers(axis, 1), is_inverse, num_warps=1)
    return [tuple(row) for row in out.tolist()]
