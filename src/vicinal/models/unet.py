"""A U-shaped network for any rank: pictures, volumes, videos to maps of the same size.

Inside, maps are channels last. Windows carry all that is exchanged between tokens: patches, halving and doubling are
linear layers on the pixels or tokens of a box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from vicinal._tuples import is_integer
from vicinal.errors import InvalidProblem
from vicinal.models.layers import DropPath, Mlp
from vicinal.nn import NeighborhoodAttention


@dataclass(frozen=True)
class UShape:
    """The numbers that tell one network from another; those per axis say how many axes there are.

    Args:
        in_chans, out_chans: channels of what comes and of what goes.
        patch: pixels of a token, per axis.
        halved: by how much each level is coarser than the one before, per axis: 2, or 1 for an axis that stays.
        embed_dim: channels of the finest level; each further one has twice as many.
        depths: blocks of each level, the finest first; all but the coarsest have as many again on the way up.
        head_dim: of attention.
        mlp_ratio: hidden over outer width of the perceptrons.
        kernel_size: of the windows, per axis.
        dilations: those that the blocks of a level take in turn.
        is_causal: axes along which nothing is known of what comes later; neither patches nor halving join there.
        drop_path: stochastic depth of every block.
        residual: whether what comes is added to what goes.
        mixer: `"windows"`, or `"convolutions"` for residual blocks of two convolutions, 3 wide, instead.

    Raises:
        InvalidProblem: if they do not fit each other.

    Example:
        >>> video = UShape(
        ...     in_chans=3, out_chans=3, patch=(1, 2, 2), halved=(1, 2, 2), embed_dim=32, depths=(2, 2), head_dim=16,
        ...     mlp_ratio=2.0, kernel_size=(3, 5, 5), is_causal=(True, False, False),
        ... )
        >>> video.rank
        3
    """

    in_chans: int
    out_chans: int
    patch: tuple[int, ...]
    halved: tuple[int, ...]
    embed_dim: int
    depths: tuple[int, ...]
    head_dim: int
    mlp_ratio: float
    kernel_size: tuple[int, ...]
    dilations: tuple[int, ...] = (1,)
    is_causal: tuple[bool, ...] | None = None
    drop_path: float = 0.0
    residual: bool = False
    mixer: Literal["windows", "convolutions"] = "windows"

    @property
    def rank(self) -> int:
        return len(self.patch)

    @property
    def causal(self) -> tuple[bool, ...]:
        """`is_causal` as one value per axis."""
        return (False,) * self.rank if self.is_causal is None else self.is_causal

    def __post_init__(self) -> None:
        for name in ("patch", "halved", "kernel_size", "depths", "dilations"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or not values or not all(is_integer(n) and n >= 0 for n in values):
                raise InvalidProblem(f"{name} must be a tuple of integers, one at least, got {values!r}")
        if min(*self.patch, *self.halved) < 1:
            raise InvalidProblem(f"patch and halved must be at least 1, got {self.patch} and {self.halved}")
        if self.mixer == "windows" and (self.head_dim < 1 or self.embed_dim % self.head_dim):
            raise InvalidProblem(f"head_dim must divide embed_dim {self.embed_dim}, got {self.head_dim}")
        if not self.rank == len(self.halved) == len(self.kernel_size) == len(self.causal):
            raise InvalidProblem(
                f"patch, halved, kernel_size and is_causal must have one value per axis, got {self.patch}, "
                f"{self.halved}, {self.kernel_size} and {self.is_causal}"
            )
        if any(
            causal and box > 1
            for causal, *boxes in zip(self.causal, self.patch, self.halved, strict=True)
            for box in boxes
        ):
            raise InvalidProblem(
                f"patch and halved must be 1 where is_causal, got {self.patch}, {self.halved} and {self.is_causal}"
            )
        if self.mixer not in ("windows", "convolutions"):
            raise InvalidProblem(f"mixer must be 'windows' or 'convolutions', got {self.mixer!r}")
        if self.residual and self.in_chans != self.out_chans:
            raise InvalidProblem(
                f"out_chans must equal in_chans for a residual, got {self.out_chans} and {self.in_chans}"
            )


def to_boxes(x: Tensor, box: tuple[int, ...]) -> Tensor:
    """`[B, *S, C]` to `[B, *S / box, prod(box) * C]`: the channels of each box of tokens side by side.

    Example:
        >>> to_boxes(torch.zeros(1, 6, 4, 3), (2, 4)).shape
        torch.Size([1, 3, 1, 24])
    """
    rank = len(box)
    for axis, size in enumerate(box):
        x = x.unflatten(1 + 2 * axis, (-1, size))
    return x.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), -1).flatten(rank + 1)


def from_boxes(x: Tensor, box: tuple[int, ...]) -> Tensor:
    """`[B, *S, prod(box) * C]` to `[B, *S * box, C]`: what undoes `to_boxes`.

    Example:
        >>> from_boxes(torch.zeros(1, 3, 1, 24), (2, 4)).shape
        torch.Size([1, 6, 4, 3])
    """
    rank = len(box)
    x = x.unflatten(-1, (*box, -1))
    x = x.permute(0, *(i for axis in range(rank) for i in (1 + axis, 1 + rank + axis)), -1)
    for axis in range(rank):
        x = x.flatten(1 + axis, 2 + axis)
    return x


class WindowBlock(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`, on `[B, *S, C]`; rotary positions."""

    def __init__(self, shape: UShape, dim: int, dilation: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = NeighborhoodAttention(
            dim,
            dim // shape.head_dim,
            shape.kernel_size,
            # A causal axis has no far neighbors to skip: what is nearest in time tells most.
            dilation=tuple(1 if causal else dilation for causal in shape.causal),
            is_causal=shape.causal,
            rotary=True,
        )
        self.mlp = Mlp(dim, int(dim * shape.mlp_ratio))
        self.drop_path = DropPath(shape.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvolutionBlock(nn.Module):
    """`x + conv(gelu(norm2(conv(gelu(norm1(x))))))`, 3 wide, on `[B, *S, C]`: pre-activation ResNet's.

    Source: Identity Mappings in Deep Residual Networks, arXiv 1603.05027.
    """

    def __init__(self, shape: UShape, dim: int, dilation: int) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[shape.rank]
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2)])
        self.convolutions = nn.ModuleList([kind(dim, dim, 3) for _ in range(2)])
        # Zeros around, the last axis first; before a causal axis both.
        self.ends = [n for causal in reversed(shape.causal) for n in ((2, 0) if causal else (1, 1))]
        self.drop_path = DropPath(shape.drop_path)

    def forward(self, x: Tensor) -> Tensor:
        change = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            change = nn.functional.gelu(norm(change)).movedim(-1, 1)
            change = convolution(nn.functional.pad(change, self.ends)).movedim(1, -1)
        return x + self.drop_path(change)


class UNet(nn.Module):
    """Blocks at ever coarser levels, then back, each level joined by what it had on the way down.

    Takes `[B, in_chans, *S]` of any size and gives `[B, out_chans, *S]`; zeros fill the end of an axis up to whole
    tokens of the coarsest level, and are cropped.

    Args:
        shape: the numbers.

    Raises:
        InvalidProblem: when called, if the input has other axes or channels.

    Source: U-Net, arXiv 1505.04597; with windows as in Dilated Neighborhood Attention Transformer, arXiv 2209.15001.

    Example:
        >>> net = UNet(UShape(1, 3, (2, 2), (2, 2), 16, (1, 1), 8, 2.0, (3, 3)))
        >>> net(torch.randn(2, 1, 10, 14)).shape
        torch.Size([2, 3, 10, 14])
    """

    def __init__(self, shape: UShape) -> None:
        super().__init__()
        self.shape = shape
        dims = [shape.embed_dim * 2**level for level in range(len(shape.depths))]
        block = WindowBlock if shape.mixer == "windows" else ConvolutionBlock

        def blocks(level: int) -> nn.Sequential:
            steps = islice(cycle(shape.dilations), shape.depths[level])
            return nn.Sequential(*(block(shape, dims[level], step) for step in steps))

        pixels, join = prod(shape.patch), prod(shape.halved)
        levels = range(len(dims) - 1)
        self.embed = nn.Linear(pixels * shape.in_chans, dims[0])
        self.down = nn.ModuleList([blocks(level) for level in range(len(dims))])
        self.coarsen = nn.ModuleList([nn.Linear(join * dims[i], dims[i + 1]) for i in levels])
        self.refine = nn.ModuleList([nn.Linear(dims[i + 1], join * dims[i]) for i in levels])
        self.meet = nn.ModuleList([nn.Linear(2 * dims[i], dims[i]) for i in levels])
        self.up = nn.ModuleList([blocks(i) for i in levels])
        self.norm = nn.LayerNorm(dims[0])
        self.head = nn.Linear(dims[0], pixels * shape.out_chans)
        if shape.residual:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, in_chans, *S]` to `[B, out_chans, *S]`.

        Raises:
            InvalidProblem: if `x` has another rank or other channels.
        """
        a = self.shape
        if x.ndim != a.rank + 2 or x.shape[1] != a.in_chans:
            raise InvalidProblem(
                f"x must be [B, {a.in_chans}, *S] with {a.rank} spatial axes, got shape {tuple(x.shape)}"
            )
        whole = [p * h ** (len(a.depths) - 1) for p, h in zip(a.patch, a.halved, strict=True)]
        more = [-length % size for length, size in zip(x.shape[2:], whole, strict=True)]
        padded = nn.functional.pad(x, [n for after in reversed(more) for n in (0, after)]) if any(more) else x
        out = from_boxes(self._head(self.embed(to_boxes(padded.movedim(1, -1), a.patch))), a.patch).movedim(-1, 1)
        for axis, length in enumerate(x.shape[2:], start=2):
            out = out.narrow(axis, 0, length)
        return x + out if a.residual else out

    def _head(self, x: Tensor) -> Tensor:
        box = self.shape.halved
        kept: list[Tensor] = []
        for level, blocks in enumerate(self.down):
            x = blocks(x)
            if level < len(self.coarsen):
                kept.append(x)
                x = self.coarsen[level](to_boxes(x, box))
        for level in reversed(range(len(self.up))):
            finer = from_boxes(self.refine[level](x), box)
            x = self.up[level](self.meet[level](torch.cat([kept[level], finer], dim=-1)))
        return self.head(self.norm(x))
