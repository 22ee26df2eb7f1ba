"""LTX-2.5's video decoder, whose attention is 3-D neighborhood attention already."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from vicinal.functional import neighborhood_attention

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

FRAMES = 4
"""Frames that are rotated at once: large videos are to need no second copy in float32."""


class LTX2DecoderProcessor:
    """Runs the attention of diffusers' `LTX2VideoDiffusionDecoderModel`; put there the way diffusers has for it:

        decoder.set_attn_processor(LTX2DecoderProcessor())

    The window is the model's own, so nothing but time and memory changes: no mask is ever built, on any device,
    and queries and keys are rotated in place. `decoder.set_attn_processor(LTX2VideoVaeNeighborhoodAttnProcessor())`
    goes back.

    Args:
        backend: insist on one of ours by name, see `vicinal.explain`.

    Example:
        >>> from vicinal.integrations.diffusers.zoo import specimen
        >>> found = specimen("ltx2-decoder")
        >>> decoder = found.build(tiny=True)
        >>> decoder.set_attn_processor(LTX2DecoderProcessor())
        >>> {type(each).__name__ for each in decoder.attn_processors.values()}
        {'LTX2DecoderProcessor'}
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            # A compiler fuses the model's own rotation into one pass over memory, and cannot fuse complex numbers.
            query, key, value = attn.project_qkv(hidden_states)
            scale = 1.0  # the model's own projection has scaled the query
        else:
            query = _placed(attn.to_q(hidden_states), attn.norm_q, attn)
            key = _placed(attn.to_k(hidden_states), attn.norm_k, attn)
            value = attn.to_v(hidden_states).unflatten(-1, (attn.heads, attn.head_dim))
            scale = attn.scale
        out = neighborhood_attention(query, key, value, attn.kernel_size, scale=scale, backend=self.backend)
        del query, key, value
        return attn.to_out[0](out.flatten(-2))


def _placed(x: Tensor, norm: Any, attn: Any) -> Tensor:
    """Heads of `x [B, T, H, W, C]`, normed and rotated, without a second copy in float32; `x` is not used again."""
    x = x.unflatten(-1, (attn.heads, attn.head_dim))
    split = attn.rope.rope_dim_split
    suits = x.is_cuda and x.is_contiguous() and x.dtype in KERNEL_DTYPES and attn.head_dim.bit_count() == 1
    if suits and is_bare(norm, x.device) and find_spec("triton") is not None:
        from vicinal.integrations.diffusers.rotation import norm_and_rotate_

        turns = turns_of(tuple(x.shape[1:4]), split, attn.rope.base, x.device)
        return norm_and_rotate_(x, norm.weight, norm.eps, turns, tuple(channels // 2 for channels in split))
    return _rotated(norm(x), attn.rope)


def is_bare(norm: nn.Module, device: torch.device) -> bool:
    """Whether calling the norm would do nothing beyond its formula, and its weight is there to be read.

    Offloading, for one, hooks onto modules to bring their weights when they are called.
    """
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, hasattr(norm, "_hf_hook"), hasattr(norm, "_diffusers_hook"))
    return type(norm) is nn.RMSNorm and norm.weight.device == device and norm.eps is not None and not any(hooks)


@lru_cache(maxsize=32)
def turns_of(grid: tuple[int, ...], split: tuple[int, ...], base: float, device: torch.device) -> Tensor:
    """Cosines and sines `[2, n]` of every position of every axis, with all frequencies of that axis: few numbers."""
    angles: list[Tensor] = []
    with torch.inference_mode(False):
        for length, channels in zip(grid, split, strict=True):
            exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
            frequencies = (1.0 / base**exponents).float()
            angles.append((torch.arange(length, dtype=torch.float32)[:, None] * frequencies).flatten())
        all_angles = torch.cat(angles)
        return torch.stack([all_angles.cos(), all_angles.sin()]).to(device)


def _rotated(x: Tensor, rope: Any) -> Tensor:
    """The model's rotary positions on `x [B, T, H, W, heads, D]`, in place.

    A pair of channels is a complex number, and its rotation a product with `exp(i * position * frequency)`,
    where each axis of the grid owns a run of pairs. In float32, as the model does it, or wider.
    """
    grid, split = x.shape[1:4], rope.rope_dim_split
    pairs = [channels // 2 for channels in split]
    table = torch.complex(*turns_of(tuple(grid), split, rope.base, x.device))
    of_axes = table.split([length * count for length, count in zip(grid, pairs, strict=True)])
    wide = torch.promote_types(x.dtype, torch.float32)
    first = 0
    turns: list[tuple[slice, Tensor]] = []
    for axis, (turn, count) in enumerate(zip(of_axes, pairs, strict=True), start=1):
        shape = [1, 1, 1, 1, 1, count]
        shape[axis] = x.shape[axis]
        turns.append((slice(first, first + count), turn.view(shape)))
        first += count
    for begin in range(0, x.shape[1], FRAMES):
        frames = x[:, begin : begin + FRAMES]
        numbers = torch.view_as_complex(frames.to(wide, copy=True).unflatten(-1, (-1, 2)))
        for axis, (pairs, turn) in enumerate(turns):
            numbers[..., pairs] *= turn[:, begin : begin + FRAMES] if axis == 0 else turn
        frames.copy_(torch.view_as_real(numbers).flatten(-2))
    return x
