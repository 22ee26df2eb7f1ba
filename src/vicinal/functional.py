"""Neighborhood attention as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicinal import ops
from vicinal._tuples import canonical
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.problem import Problem
from vicinal.tiling import Tiling


class AttentionOutput(NamedTuple):
    """`out [B, *S, H, Dv]` and the natural log-sum-exp of the scaled scores, `lse [B, *S, H]`."""

    out: Tensor
    lse: Tensor


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    backend: str | None = None,
    tiling: Tiling | None = None,
) -> AttentionOutput:
    """`neighborhood_attention`, and with it the log-sum-exp that lets results be merged.

        lse[i] = log sum_j exp(scale * query[i] . key[j]),   j in the window of i, or additional

    Both outputs have right gradients.

    Args:
        query, key, value, ...: as for `neighborhood_attention`.

    Returns:
        `(out, lse)`: `[B, *S, H, Dv]` in the dtype of the inputs, and `[B, *S, H]` in float32
        (float64 for float64).

    Raises:
        InvalidProblem: the arguments do not fit each other; the message names the one at fault.
        Unsupported: no backend, or not the one named, runs this problem on this device.

    Example:
        >>> q = k = v = torch.zeros(1, 5, 7, 2, 8)
        >>> out, lse = attention_with_lse(q, k, v, kernel_size=3)
        >>> lse.exp().mean().item()  # nine equal scores of 0 in each window
        9.0
    """
    tensors = (query, key, value, additional_keys, additional_values, additional_lengths)
    if not torch.compiler.is_compiling():
        # Compiled calls meet the same checks in the operator's own entry; here they come before dispatch.
        Problem.of(
            query,
            key,
            value,
            kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            scale=scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
            additional_lengths=additional_lengths,
        )
    rank = query.ndim - 3
    out, lse = ops.attention(
        *tensors,
        _each(kernel_size, rank),
        _each(stride, rank),
        _each(dilation, rank),
        _each(is_causal, rank),
        query.shape[-1] ** -0.5 if scale is None else float(scale),
        backend or "",
        ops.encode(tiling),
    )
    return AttentionOutput(out, lse)


def _each(value: Any, rank: int) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value] * rank
