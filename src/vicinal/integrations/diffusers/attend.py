"""Attention of a token grid with text beside it: the one computation that all models share."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from vicinal.functional import neighborhood_attention
from vicinal.integrations.sparsity import Setting

dispatch: Any = dispatch_attention_fn
"""Taken as it is: what diffusers says about its types has gaps."""


def on_grid(setting: Setting, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Self-attention of a flat grid, every query within its window: `[B, N, H, D]` in and out."""
    return _windows(setting, query, key, value, None, None, None)


def with_text(
    setting: Setting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    text_first: bool,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Joint attention of a grid of N tokens and T tokens of text, first or last: `[B, N + T, H, D]` in and out.

        grid token i:  softmax over its window and all valid text
        text token i:  softmax over the whole grid and all valid text

    Args:
        setting: grid and window.
        query, key, value: of the joint sequence.
        text_first: whether the text stands before the grid; padding counts as text.
        mask: `[B, 1, 1, N + T]`, true where a key is valid; padding follows valid text.
        backend: of diffusers, for the dense attention of text queries.
    """
    length = query.shape[1]
    text = length - prod(setting.grid)
    words = slice(0, text) if text_first else slice(length - text, length)
    tokens = slice(text, length) if text_first else slice(0, length - text)
    lengths = None if mask is None else mask[:, 0, 0, words].sum(-1, dtype=torch.int32)
    grid = _windows(
        setting, query[:, tokens], key[:, tokens], value[:, tokens], key[:, words], value[:, words], lengths
    )
    told = dispatch(query[:, words], key, value, attn_mask=mask, backend=backend)
    return torch.cat([told, grid] if text_first else [grid, told], dim=1)


def _windows(
    setting: Setting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    additional_lengths: Tensor | None,
) -> Tensor:
    query, key, value = (tensor.unflatten(1, setting.grid) for tensor in (query, key, value))
    out = neighborhood_attention(
        query,
        key,
        value,
        setting.kernel_size,
        stride=setting.stride,
        dilation=setting.dilation,
        is_causal=setting.is_causal,
        additional_keys=additional_keys,
        additional_values=additional_values,
        additional_lengths=additional_lengths,
    )
    return out.flatten(1, len(setting.grid))
