"""Neighborhood attention as a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vicinal._tuples import canonical, is_integer
from vicinal.errors import InvalidProblem
from vicinal.functional import Each, neighborhood_attention, neighborhood_attention_packed
from vicinal.nn.rope import Rotary
from vicinal.problem import WHOLE, Axis


class NeighborhoodAttention(nn.Module):
    """Project to queries, keys and values, attend in windows, project back.

        y = proj(neighborhood_attention(rotary(norm(q)), rotary(norm(k)), v, rpb)),   q, k, v = qkv(x)

    Takes and gives `[B, *S, C]`, channels last. An axis shorter than `kernel_size * dilation` is
    attended to as a whole, so that weights work at any resolution. Parameters are named as NATTEN's
    (`qkv`, `proj`, `rpb`), whose weights load as they are.

    Args:
        embed_dim: channels `C`.
        num_heads: query heads; must divide `embed_dim`.
        kernel_size, stride, dilation, is_causal: as in `neighborhood_attention`; one value per axis,
            or one for all.
        rank: spatial axes; needed only where no argument is given per axis.
        qkv_bias: whether the input projection has a bias.
        qk_scale: multiplies the scores; `None` is `head_dim ** -0.5`.
        proj_drop: dropout after the output projection.
        num_heads_kv: key/value heads; must divide `num_heads`, which is also the default.
        qk_norm: whether queries and keys are RMS-normalised per head, with a learnt gain each.
        rotary: whether they are turned by their place (see `Rotary`).
        position_bias: whether to learn a table `rpb [H, 2 * k - 1, ...]` that is added to the scores (see
            `neighborhood_attention`), see also `table`.
        backend: insist on a backend by name.

    Raises:
        InvalidProblem: if the arguments do not fit each other or, when called, the input.

    Example:
        >>> layer = NeighborhoodAttention(32, num_heads=4, kernel_size=(7, 5), rotary=True)
        >>> layer(torch.randn(2, 12, 20, 32)).shape, layer(torch.randn(2, 3, 4, 32)).shape
        (torch.Size([2, 12, 20, 32]), torch.Size([2, 3, 4, 32]))
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: Each[int],
        stride: Each[int] = 1,
        dilation: Each[int] = 1,
        is_causal: Each[bool] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rank: int | None = None,
        num_heads_kv: int | None = None,
        qk_norm: bool = False,
        rotary: bool = False,
        position_bias: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        windows = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
        self.rank = _rank(rank, windows)
        self.kernel_size: tuple[int, ...] = canonical(kernel_size, self.rank, "kernel_size")
        self.stride: tuple[int, ...] = canonical(stride, self.rank, "stride")
        self.dilation: tuple[int, ...] = canonical(dilation, self.rank, "dilation")
        self.is_causal: tuple[bool, ...] = canonical(is_causal, self.rank, "is_causal", bool)
        for size, step, gap in zip(self.kernel_size, self.stride, self.dilation, strict=True):
            keys = _least(size, step)
            Axis(max(keys * gap, 1), keys, step, gap)  # refuses what fits on no grid
        self.num_heads, self.num_heads_kv = num_heads, num_heads if num_heads_kv is None else num_heads_kv
        for name, count in (("embed_dim", embed_dim), ("num_heads", num_heads), ("num_heads_kv", self.num_heads_kv)):
            if not is_integer(count) or count < 1:
                raise InvalidProblem(f"{name} must be an integer of at least 1, got {count!r}")
        if embed_dim % num_heads:
            raise InvalidProblem(f"num_heads must divide embed_dim {embed_dim}, got {num_heads}")
        if num_heads % self.num_heads_kv:
            raise InvalidProblem(f"num_heads_kv must divide num_heads {num_heads}, got {self.num_heads_kv}")
        self.head_dim = embed_dim // num_heads
        self.scale, self.backend = qk_scale, backend
        self.qkv = nn.Linear(embed_dim, (num_heads + 2 * self.num_heads_kv) * self.head_dim, bias=qkv_bias)
        self.q_norm = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim) if qk_norm else nn.Identity()
        self.rotary = Rotary(self.head_dim, self.rank) if rotary else nn.Identity()
        self.rpb = None
        if position_bias:
            if WHOLE in self.kernel_size:
                raise InvalidProblem(f"position_bias needs a kernel_size in numbers on every axis, got {kernel_size}")
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * size - 1 for size in self.kernel_size)))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, *S, C]` to `[B, *S, C]`.

        Raises:
            InvalidProblem: if `x` has another rank or other channels.
        """
        if x.ndim != self.rank + 2 or x.shape[-1] != self.qkv.in_features:
            raise InvalidProblem(
                f"x must be [B, *S, C] with {self.rank} spatial axes and C = {self.qkv.in_features}, "
                f"got shape {tuple(x.shape)}"
            )
        shape, qkv = x.shape[1:-1], self.qkv(x).unflatten(-1, (-1, self.head_dim))
        call: dict[str, Any] = self.windows(shape) | {
            "scale": self.scale,
            "backend": self.backend,
            "position_bias": self.table(shape),
        }
        steps = self.q_norm, self.k_norm, self.rotary
        if self.num_heads == self.num_heads_kv and all(isinstance(step, nn.Identity) for step in steps):
            out = neighborhood_attention_packed(qkv.unflatten(-2, (3, self.num_heads)), **call)
        else:
            q, k, v = qkv.split((self.num_heads, self.num_heads_kv, self.num_heads_kv), dim=-2)  # [B, *S, H, D]
            q, k = self.rotary(self.q_norm(q)), self.rotary(self.k_norm(k))
            out = neighborhood_attention(q, k, v, **call)
        return self.proj_drop(self.proj(out.flatten(-2)))

    def table(self, shape: tuple[int, ...]) -> Tensor | None:
        """The position bias on a grid of that shape.

        An axis that is attended to whole has its own offsets: those beyond it are left out, those beyond
        the table add nothing.
        """
        if self.rpb is None:
            return None
        ends: list[int] = []  # to add at the ends of the table, the last axis first; negative ones crop
        for size, dilation, length in zip(self.kernel_size, self.dilation, shape, strict=True):
            more = length - size if size * dilation > length else 0
            ends = [more, more, *ends]
        return nn.functional.pad(self.rpb, ends) if any(ends) else self.rpb

    def windows(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The window on a grid of that shape: the whole axis where a window would not fit."""
        axes = zip(self.kernel_size, self.stride, self.dilation, shape, strict=True)
        fits = [_least(size, step) * gap <= length for size, step, gap, length in axes]
        return {
            "kernel_size": [n if fit else WHOLE for n, fit in zip(self.kernel_size, fits, strict=True)],
            "stride": [n if fit else 1 for n, fit in zip(self.stride, fits, strict=True)],
            "dilation": [n if fit else 1 for n, fit in zip(self.dilation, fits, strict=True)],
            "is_causal": list(self.is_causal),
        }

    def extra_repr(self) -> str:
        parts = f"num_heads={self.num_heads}, kernel_size={self.kernel_size}"
        for name in ("stride", "dilation", "is_causal"):
            if set(getattr(self, name)) - {1, False}:
                parts += f", {name}={getattr(self, name)}"
        return parts + (f", num_heads_kv={self.num_heads_kv}" if self.num_heads_kv != self.num_heads else "")


class NeighborhoodAttention1D(NeighborhoodAttention):
    """`NeighborhoodAttention` on sequences `[B, L, C]`.

    Args:
        embed_dim, num_heads, kernel_size, ...: as for `NeighborhoodAttention`, without `rank`.

    Example:
        >>> NeighborhoodAttention1D(32, num_heads=4, kernel_size=7, is_causal=True)(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int, kernel_size: Each[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, kernel_size, *args, rank=1, **kwargs)


class NeighborhoodAttention2D(NeighborhoodAttention):
    """`NeighborhoodAttention` on images `[B, H, W, C]`.

    Args:
        embed_dim, num_heads, kernel_size, ...: as for `NeighborhoodAttention`, without `rank`.

    Example:
        >>> NeighborhoodAttention2D(32, num_heads=4, kernel_size=7, dilation=2)(torch.randn(2, 14, 18, 32)).shape
        torch.Size([2, 14, 18, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int, kernel_size: Each[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, kernel_size, *args, rank=2, **kwargs)


class NeighborhoodAttention3D(NeighborhoodAttention):
    """`NeighborhoodAttention` on videos and volumes `[B, T, H, W, C]`.

    Args:
        embed_dim, num_heads, kernel_size, ...: as for `NeighborhoodAttention`, without `rank`.

    Example:
        >>> layer = NeighborhoodAttention3D(32, num_heads=4, kernel_size=(2, 3, 5), is_causal=(True, False, False))
        >>> layer(torch.randn(1, 4, 6, 10, 32)).shape
        torch.Size([1, 4, 6, 10, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int, kernel_size: Each[int], *args: Any, **kwargs: Any) -> None:
        super().__init__(embed_dim, num_heads, kernel_size, *args, rank=3, **kwargs)


def _least(size: int, step: int) -> int:
    """The least keys that such a window has: its own, or for the whole axis those that share it."""
    return max(step, 1) if size == WHOLE else size


def _rank(rank: int | None, windows: dict[str, Any]) -> int:
    """The number of axes that the arguments speak of."""
    if rank is not None and rank not in (1, 2, 3):
        raise InvalidProblem(f"rank must be 1, 2 or 3, got {rank!r}")
    ranks = {name: len(value) for name, value in windows.items() if isinstance(value, Sequence)}
    if rank is not None:
        ranks = {"rank": rank} | ranks
    if not ranks:
        raise InvalidProblem("rank is needed where kernel_size, stride, dilation and is_causal are single values")
    if len(set(ranks.values())) > 1:
        given = ", ".join(f"{name} has {n}" for name, n in ranks.items())
        raise InvalidProblem(f"all arguments given per axis must have as many values as there are axes, but {given}")
    return next(iter(ranks.values()))
