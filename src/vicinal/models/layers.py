"""What neighborhood attention transformers are made of. Maps are channels last, `[B, H, W, C]`, throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vicinal.errors import InvalidProblem
from vicinal.nn import NeighborhoodAttention2D


class PaddedNeighborhoodAttention2D(NeighborhoodAttention2D):
    """`NeighborhoodAttention2D` with position bias, on maps of any size: those smaller than a window are padded.

    A map shorter than `kernel_size * dilation` grows to that with zeros at its end, which are attended to, and
    the result is cropped. That is how the published models were trained, so their weights need it.
    """

    def __init__(self, dim: int, num_heads: int, kernel_size: int, dilation: int, **more: Any) -> None:
        super().__init__(dim, num_heads, kernel_size, dilation=dilation, position_bias=True, **more)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the same."""
        height, width = x.shape[1:3]
        least = [size * step for size, step in zip(self.kernel_size, self.dilation, strict=True)]
        below, right = (max(n - length, 0) for n, length in zip(least, (height, width), strict=True))
        if not (below or right):
            return super().forward(x)
        return super().forward(nn.functional.pad(x, (0, 0, 0, right, 0, below)))[:, :height, :width]


class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves a residual branch out for whole samples, and scales the others up.

    Raises:
        InvalidProblem: if the probability does not lie in `[0, 1)`; 1 would leave nothing to scale up.

    Source: Deep Networks with Stochastic Depth, arXiv 1603.09382.
    """

    def __init__(self, probability: float = 0.0) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise InvalidProblem(f"the probability of stochastic depth must lie in [0, 1), got {probability}")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        kept = torch.empty([len(x)] + [1] * (x.ndim - 1), dtype=x.dtype, device=x.device).bernoulli_(keep)
        return x * kept / keep

    def extra_repr(self) -> str:
        return f"probability={self.probability:g}"


class Block(nn.Module):
    """`x + gamma1 attn(norm1(x))`, then `x + gamma2 mlp(norm2(x))`.

    Args:
        dim, num_heads, kernel_size, dilation: of the attention.
        mlp_ratio: hidden over outer width of the perceptron.
        drop, drop_path: dropout, and stochastic depth.
        layer_scale: what the gammas begin at; `None` leaves them out.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        dilation: int,
        mlp_ratio: float,
        *,
        drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = PaddedNeighborhoodAttention2D(
            dim, num_heads, kernel_size, dilation, proj_drop=drop, backend=backend
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)
        has_scale = layer_scale is not None
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale)) if has_scale else None
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale)) if has_scale else None

    def forward(self, x: Tensor) -> Tensor:
        for branch, norm, gamma in ((self.attn, self.norm1, self.gamma1), (self.mlp, self.norm2, self.gamma2)):
            change = branch(norm(x))
            x = x + self.drop_path(change if gamma is None else gamma * change)
        return x


class ConvTokenizer(nn.Module):
    """Overlapping tokens, one for 4x4 pixels, by two 3x3 convolutions: `[B, C, H, W]` to `[B, H / 4, W / 4, D]`."""

    reduction = 4

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        # Convolutions on GPUs are channels last inside: told here, they turn no map around on its way in or out.
        x = x.contiguous(memory_format=torch.channels_last)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchEmbed(nn.Module):
    """Tokens of `patch_size` squared pixels, side by side; images are padded to whole ones with zeros at their end."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.reduction = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        below, right = (-length % self.reduction for length in x.shape[-2:])
        return self.norm(self.proj(nn.functional.pad(x, (0, right, 0, below))).permute(0, 2, 3, 1))


class ConvDownsampler(nn.Module):
    """Half the resolution, twice the channels, by one 3x3 convolution with stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Half the resolution, twice the channels, by one linear layer on 2x2 tokens side by side, as in Swin.

    Source: Swin Transformer, arXiv 2103.14030.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(quarters, dim=-1)))
