"""Root-mean-square norm and rotary positions of a video's heads, in place in one kernel: read once, written once.

PyTorch's own operations do the same in some twenty passes over memory, which takes LTX-2.5's decoder longer than its
attention does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Heads that a block holds at once."""


@triton.jit
def norm_and_rotate(
    x, weight, turns, rows, heads, frames, height, width, eps,
    D: tl.constexpr, T_PAIRS: tl.constexpr, H_PAIRS: tl.constexpr, W_PAIRS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rows of `x [rows, D]`, a row for each head of each token.

        y = x / sqrt(mean(x^2) + eps) * weight,   (y[2i], y[2i+1]) turned by the angle of pair i

    Args:
        turns: cosines and then sines, each `frames * T_PAIRS`, `height * H_PAIRS` and `width * W_PAIRS` in a row.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lane, pair = tl.arange(0, D), tl.arange(0, D // 2)
    at = x + row[:, None] * D + lane[None, :]
    inside = (row < rows)[:, None]
    values = tl.load(at, inside, 0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 1) / D + eps)[:, None]
    values *= tl.load(weight + lane).to(tl.float32)[None, :]
    # The model rounds here, before it rotates in 32 bits.
    values = values.to(x.dtype.element_ty).to(tl.float32)
    even, odd = tl.split(tl.reshape(values, (ROWS, D // 2, 2)))

    token = row // heads
    column, line, frame = token % width, token // width % height, token // width // height % frames
    of_lines = frames * T_PAIRS
    of_columns = of_lines + height * H_PAIRS
    place = tl.where(
        (pair < T_PAIRS)[None, :],
        (frame * T_PAIRS)[:, None] + pair[None, :],
        tl.where(
            (pair < T_PAIRS + H_PAIRS)[None, :],
            (of_lines + line * H_PAIRS)[:, None] + (pair - T_PAIRS)[None, :],
            (of_columns + column * W_PAIRS)[:, None] + (pair - T_PAIRS - H_PAIRS)[None, :],
        ),
    )
    cosine, sine = tl.load(turns + place), tl.load(turns + of_columns + width * W_PAIRS + place)
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (ROWS, D))
    tl.store(at, turned.to(x.dtype.element_ty), inside)


def norm_and_rotate_(x: Tensor, weight: Tensor, eps: float, turns: Tensor, pairs: tuple[int, int, int]) -> Tensor:
    """The same of `x [B, T, H, W, heads, D]`, contiguous; returns it.

    Args:
        x: changed in place.
        weight: `[D]`.
        eps: of the norm.
        turns: `[2, T * pairs[0] + H * pairs[1] + W * pairs[2]]`, float32: cosines and sines of each axis's angles.
        pairs: how many pairs of channels turn with each axis; `D / 2` in all, a power of two.
    """
    _, frames, height, width, heads, head_dim = x.shape
    rows = x.numel() // head_dim
    with torch.cuda.device_of(x):
        norm_and_rotate[(triton.cdiv(rows, ROWS),)](
            x, weight, turns, rows, heads, frames, height, width, eps, head_dim, *pairs, ROWS
        )
    return x
