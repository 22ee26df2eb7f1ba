"""NATTEN's functions by ours. Names and arguments are theirs, today's (0.21) and those up to 0.17."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vicinal import functional as ours
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.functional import Each
from vicinal.unfused import neighborhood_aggregate, neighborhood_scores


def _fused(rank: int) -> Callable[..., Any]:
    call: Any = getattr(ours, f"na{rank}d")

    def na(query: Tensor, key: Tensor, value: Tensor, kernel_size: Each[int], *args: Any, **kwargs: Any) -> Any:
        rpb = kwargs.pop("rpb", None)
        kwargs.pop("backend", None)  # theirs are not ours
        if rpb is None:
            return call(query, key, value, kernel_size, *args, **kwargs)
        # Only releases up to 0.17 had a bias, and they had no stride.
        names = ("dilation", "is_causal")
        if len(args) > len(names):
            raise InvalidProblem(f"na{rank}d with rpb takes dilation and is_causal after kernel_size, got {args}")
        more = dict(zip(names, args, strict=False)) | kwargs
        if not more.get("return_lse", False):
            more.pop("return_lse", None)
            return ours.neighborhood_attention(query, key, value, kernel_size, position_bias=rpb, **more)
        more.pop("return_lse")
        return ours.attention_with_lse(query, key, value, kernel_size, position_bias=rpb, **more)

    na.__name__ = na.__qualname__ = f"na{rank}d"
    na.__doc__ = (
        f"""`vicinal.na{rank}d`; with `rpb`, as NATTEN 0.17 had it: `(..., kernel_size, dilation, is_causal)`."""
    )
    return na


def _qk(rank: int) -> Callable[..., Tensor]:
    def qk(
        query: Tensor,
        key: Tensor,
        kernel_size: Each[int],
        dilation: Each[int] = 1,
        additional_keys: Tensor | None = None,
        is_causal: Each[bool] | None = False,
        rpb: Tensor | None = None,
    ) -> Tensor:
        _check(rank, f"na{rank}d_qk", query=query, key=key)
        q, k = (tensor.movedim(1, -2) for tensor in (query, key))
        causal = False if is_causal is None else is_causal
        scores = neighborhood_scores(
            q, k, kernel_size, dilation=dilation, is_causal=causal, scale=1.0, position_bias=rpb
        ).movedim(-2, 1)
        if additional_keys is None:
            return scores
        more = query.flatten(2, -2) @ additional_keys.transpose(-2, -1)
        return torch.cat([scores, more.view(*scores.shape[:-1], -1)], dim=-1)

    qk.__name__ = qk.__qualname__ = f"na{rank}d_qk"
    qk.__doc__ = f"""Scores `[B, H, *S, prod(kernel_size) + M]` of `[B, H, *S, D]` on {rank}-D grids, not scaled."""
    return qk


def _av(rank: int) -> Callable[..., Tensor]:
    def av(
        attn: Tensor,
        value: Tensor,
        kernel_size: Each[int],
        dilation: Each[int] = 1,
        additional_values: Tensor | None = None,
        is_causal: Each[bool] | None = False,
    ) -> Tensor:
        _check(rank, f"na{rank}d_av", attn=attn, value=value)
        extra = 0 if additional_values is None else additional_values.shape[-2]
        near = attn[..., : attn.shape[-1] - extra].movedim(1, -2)
        causal = False if is_causal is None else is_causal
        out = neighborhood_aggregate(near, value.movedim(1, -2), kernel_size, dilation=dilation, is_causal=causal)
        out = out.movedim(-2, 1)
        if additional_values is None:
            return out
        return out + (attn[..., attn.shape[-1] - extra :].flatten(2, -2) @ additional_values).view(out.shape)

    av.__name__ = av.__qualname__ = f"na{rank}d_av"
    av.__doc__ = (
        f"""Sums `[B, H, *S, Dv]` of values by weights `[B, H, *S, prod(kernel_size) + M]` on {rank}-D grids."""
    )
    return av


def _check(rank: int, who: str, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.ndim != rank + 3:
            raise InvalidProblem(f"{who} takes {name} as [B, H, *S, D], of rank {rank + 3}, got {tuple(tensor.shape)}")


def _before_names(rank: int) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """`natten{rank}dqkrpb`, `natten{rank}dqk`, `natten{rank}dav`: the names of before 0.17."""
    qk, av = _qk(rank), _av(rank)

    def qkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: Any, dilation: Any = 1) -> Tensor:
        return qk(query, key, kernel_size, dilation, rpb=rpb)

    def plain(query: Tensor, key: Tensor, kernel_size: Any, dilation: Any = 1) -> Tensor:
        return qk(query, key, kernel_size, dilation)

    def weighted(attn: Tensor, value: Tensor, kernel_size: Any, dilation: Any = 1) -> Tensor:
        return av(attn, value, kernel_size, dilation)

    words = "up to 0.17, heads first: `[B, H, *S, D]`"
    for function, name, what in (
        (qkrpb, f"natten{rank}dqkrpb", "Scores with position bias"),
        (plain, f"natten{rank}dqk", "Scores"),
        (weighted, f"natten{rank}dav", "Sums of values by weights"),
    ):
        function.__name__ = function.__qualname__ = name
        function.__doc__ = f"""{what} on {rank}-D grids, by the name of NATTEN {words}."""
    return qkrpb, plain, weighted


def neighborhood_attention_generic(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`na1d`, `na2d` or `na3d`, by the rank of the tensors."""
    if not 4 <= query.ndim <= 6:
        raise InvalidProblem(f"query must be [B, *S, H, D] with 1 to 3 spatial axes, got shape {tuple(query.shape)}")
    return (na1d, na2d, na3d)[query.ndim - 4](query, key, value, *args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    seqlens_Q: Tensor | None = None,  # noqa: N803  (their names)
    seqlens_KV: Tensor | None = None,  # noqa: N803
    cumulative_seqlen_Q: Tensor | None = None,  # noqa: N803
    cumulative_seqlen_KV: Tensor | None = None,  # noqa: N803
    *_: Any,
    return_lse: bool = False,
    **__: Any,
) -> Any:
    """Dense attention on `[B, L, H, D]`, keys of another length if not causal, with its log-sum-exp.

    Raises:
        Unsupported: for packed sequences of several lengths.
    """
    if any(lengths is not None for lengths in (seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV)):
        raise Unsupported("attention: packed sequences (seqlens, cumulative_seqlen) are not offered; pad them")
    if query.shape[1] == key.shape[1]:
        output = ours.attention_with_lse(query, key, value, -1, is_causal=is_causal, scale=scale)
        return (output.out, output.lse) if return_lse else output.out
    if is_causal:
        raise Unsupported(f"attention: causal needs as many queries as keys, got {query.shape[1]} and {key.shape[1]}")
    group = query.shape[2] // key.shape[2]
    k, v = (tensor.repeat_interleave(group, 2).transpose(1, 2) for tensor in (key, value))
    scores = query.transpose(1, 2) @ k.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    out = (scores.softmax(-1) @ v).transpose(1, 2).contiguous()
    return (out, scores.float().logsumexp(-1).transpose(1, 2)) if return_lse else out


def merge_attentions(
    outputs: list[Tensor], lse_tensors: list[Tensor], torch_compile: bool = True, use_autograd_fix: bool = True
) -> tuple[Tensor, Tensor]:
    """`vicinal.merge_attentions`, differentiable as it is."""
    merged = ours.merge_attentions(outputs, lse_tensors)
    return merged.out, merged.lse


na1d, na2d, na3d = _fused(1), _fused(2), _fused(3)
na1d_qk, na2d_qk, na3d_qk = _qk(1), _qk(2), _qk(3)
na1d_av, na2d_av, na3d_av = _av(1), _av(2), _av(3)
natten1dqkrpb, natten1dqk, natten1dav = _before_names(1)
natten2dqkrpb, natten2dqk, natten2dav = _before_names(2)
natten3dqkrpb, natten3dqk, natten3dav = _before_names(3)

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    "neighborhood_attention_generic",
]
