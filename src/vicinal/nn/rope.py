"""Rotary positions on one to three axes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vicinal._tuples import is_integer
from vicinal.errors import InvalidProblem


class Rotary(nn.Module):
    """Turn pairs of elements by angles proportional to a token's place, so that scores depend on distances.

        (x[2i], x[2i+1]) -> rotation by  place_a * base ** (-2i / d_a)  of  (x[2i], x[2i+1])

    Each axis `a` owns `d_a` consecutive elements of a head. Has no parameters; works at any resolution.

    Args:
        head_dim: elements per head, even.
        rank: spatial axes, 1 to 3.
        base: wavelengths run from `2 pi` to `2 pi * base` tokens.
        axes_dim: elements for each axis, even, `head_dim` in all. By default as equal as pairs
            allow, what is left going to the first axis.

    Raises:
        InvalidProblem: if the arguments do not fit each other or, when called, the input.

    Source: RoFormer, arXiv 2104.09864, applied per axis.

    Example:
        >>> Rotary(head_dim=8, rank=2)(torch.ones(1, 3, 5, 1, 8))[0, 0, 0, 0]
        tensor([1., 1., 1., 1., 1., 1., 1., 1.])
    """

    def __init__(
        self, head_dim: int, rank: int, *, base: float = 10_000.0, axes_dim: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if rank not in (1, 2, 3):
            raise InvalidProblem(f"rank must be 1, 2 or 3, got {rank!r}")
        if not is_integer(head_dim):
            raise InvalidProblem(f"head_dim must be an integer, got {head_dim!r}")
        if axes_dim is None:
            each = head_dim // (2 * rank) * 2
            axes_dim = (head_dim - each * (rank - 1), *[each] * (rank - 1))
        dims: tuple[int, ...] = tuple(axes_dim) if hasattr(axes_dim, "__len__") else ()
        is_even = all(is_integer(d) and d >= 0 and d % 2 == 0 for d in dims)
        if len(dims) != rank or not is_even or sum(dims) != head_dim:
            raise InvalidProblem(
                f"axes_dim must be {rank} even numbers that sum to head_dim {head_dim}, got {axes_dim!r}"
            )
        if not base > 0:
            raise InvalidProblem(f"base must be positive, got {base}")
        self.axes_dim = dims
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        """Turn `[B, *S, H, D]`; the result has the same shape and dtype. Angles are float32 (float64 for float64).

        Raises:
            InvalidProblem: if `x` has another rank or head dim.
        """
        if x.ndim != len(self.axes_dim) + 3 or x.shape[-1] != sum(self.axes_dim):
            raise InvalidProblem(
                f"x must be [B, *S, H, D] with {len(self.axes_dim)} spatial axes and D = {sum(self.axes_dim)}, "
                f"got shape {tuple(x.shape)}"
            )
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        pieces: list[Tensor] = []
        for axis, piece in enumerate(x.to(dtype).split(self.axes_dim, dim=-1)):
            width, length = self.axes_dim[axis], x.shape[1 + axis]
            place = torch.arange(length, device=x.device, dtype=dtype)
            pair = torch.arange(0, width, 2, device=x.device, dtype=dtype)
            angle = place[:, None] * self.base ** (-pair / max(width, 1))
            # [length, pairs] beside [B, *S, H, pairs]: 1 on the other spatial axes and on heads.
            shape = [1] * (x.ndim - 1)
            shape[1 + axis] = length
            angle = angle.view(*shape, -1)
            even, odd = piece.unflatten(-1, (-1, 2)).unbind(-1)
            turned = (even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos())
            pieces.append(torch.stack(turned, dim=-1).flatten(-2))
        return torch.cat(pieces, dim=-1).to(x.dtype)

    def extra_repr(self) -> str:
        return f"axes_dim={self.axes_dim}, base={self.base:g}"
