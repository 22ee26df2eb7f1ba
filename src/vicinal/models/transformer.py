"""The one model behind NAT, DiNAT and their variants, and the conventions of timm around it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vicinal._tuples import is_integer
from vicinal.errors import InvalidProblem
from vicinal.models.layers import Block, ConvDownsampler, ConvTokenizer, PatchEmbed, PatchMerging


@dataclass(frozen=True)
class Architecture:
    """The numbers that tell one model from another.

    Args:
        embed_dim: channels of the first level; each further one has twice as many.
        depths, num_heads: blocks and heads of each level.
        mlp_ratio: hidden over outer width of the perceptrons.
        kernel_size: keys per window and axis; one number for all levels, or one each.
        dilations: those that the blocks of each level take in turn.
        tokens: `"conv"` for overlapping convolutions, before the first level and between levels; a number
            for patches of that many pixels, and patch merging between levels.
        layer_scale: what residual branches are multiplied by at first, `None` for nothing.
        drop_path_rate: stochastic depth of the last block, growing from 0; for training.
        img_size: pixels of the images that it was published for; it takes any.

    Raises:
        InvalidProblem: if they do not fit each other.
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratio: float
    kernel_size: int | tuple[int, ...] = 7
    dilations: tuple[tuple[int, ...], ...] = ((1,), (1,), (1,), (1,))
    tokens: Literal["conv"] | int = "conv"
    layer_scale: float | None = None
    drop_path_rate: float = 0.2
    img_size: int = 224

    def window(self, level: int) -> int:
        """The kernel size of a level."""
        return self.kernel_size if isinstance(self.kernel_size, int) else self.kernel_size[level]

    def __post_init__(self) -> None:
        counts = {len(self.depths), len(self.num_heads), len(self.dilations)}
        if len(counts) != 1:
            raise InvalidProblem(
                f"depths, num_heads and dilations must have one entry per level, got {len(self.depths)}, "
                f"{len(self.num_heads)} and {len(self.dilations)}"
            )
        if not isinstance(self.kernel_size, int) and len(self.kernel_size) != len(self.depths):
            raise InvalidProblem(f"kernel_size must be a number, or one per level, got {self.kernel_size}")
        if not self.depths or not any(self.depths):
            raise InvalidProblem(f"depths must hold a block at least, got {self.depths}")
        if not all(hasattr(steps, "__len__") and steps for steps in self.dilations):
            raise InvalidProblem(f"dilations must hold one at least for each level, got {self.dilations}")
        if self.tokens != "conv" and not (is_integer(self.tokens) and self.tokens >= 1):
            raise InvalidProblem(f"tokens must be 'conv' or the pixels of a patch's side, got {self.tokens!r}")


class Level(nn.Module):
    """Blocks at one resolution, and what takes their map to the next."""

    def __init__(self, blocks: Sequence[Block], downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """The map after the blocks."""
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and self.training else block(x)
        return x

    def next(self, x: Tensor) -> Tensor:
        """That map as the next level begins with it."""
        return x if self.downsample is None else self.downsample(x)


class NeighborhoodTransformer(nn.Module):
    """A pyramid of neighborhood attention blocks with a classifier: NAT, DiNAT, DiNAT_s, and isotropic ones.

    Takes images `[B, C, H, W]` of any size; inside, maps are channels last. Parameters are named as in the
    published checkpoints (see `vicinal.models.weights`), methods as timm's models' are.

    Args:
        architecture: the numbers; see `vicinal.models.ARCHITECTURES` for the published ones.
        num_classes: of the classifier; 0 leaves it out.
        in_chans: channels of the images.
        global_pool: `"avg"`, or `""` for the map.
        drop_rate: dropout of tokens, perceptrons and projections.
        drop_path_rate: stochastic depth, if not the architecture's.
        backend: insist on a backend of neighborhood attention by name.

    Raises:
        InvalidProblem: if the arguments do not fit each other.

    Source: Neighborhood Attention Transformer, arXiv 2204.07143; Dilated Neighborhood Attention
        Transformer, arXiv 2209.15001.

    Example:
        >>> model = NeighborhoodTransformer(Architecture(16, (1, 1), (2, 4), 2.0, 3, ((1,), (2,))), num_classes=10)
        >>> model(torch.randn(2, 3, 44, 36)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        architecture: Architecture,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.num_classes, self.in_chans, self.backend = num_classes, in_chans, backend
        if a.tokens == "conv":
            self.patch_embed = ConvTokenizer(in_chans, a.embed_dim)
        else:
            self.patch_embed = PatchEmbed(in_chans, a.embed_dim, a.tokens)
        self.pos_drop = nn.Dropout(drop_rate)
        most, last = a.drop_path_rate if drop_path_rate is None else drop_path_rate, max(sum(a.depths) - 1, 1)
        paths = iter([most * i / last for i in range(sum(a.depths))])
        self.levels = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        for i, depth in enumerate(a.depths):
            dim, steps = a.embed_dim * 2**i, a.dilations[i]
            blocks = [
                Block(
                    dim,
                    a.num_heads[i],
                    a.window(i),
                    steps[j % len(steps)],
                    a.mlp_ratio,
                    drop=drop_rate,
                    drop_path=next(paths),
                    layer_scale=a.layer_scale,
                    backend=backend,
                )
                for j in range(depth)
            ]
            between = ConvDownsampler if a.tokens == "conv" else PatchMerging
            self.levels.append(Level(blocks, between(dim) if i + 1 < len(a.depths) else None))
            reduction = self.patch_embed.reduction * 2**i
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"levels.{i}"})
        self.num_features = self.head_hidden_size = a.embed_dim * 2 ** (len(a.depths) - 1)
        self.norm = nn.LayerNorm(self.num_features)
        self.global_pool = global_pool
        self.head = nn.Identity()
        self.reset_classifier(num_classes, global_pool)
        self.apply(_init)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes`, none for 0.

        Raises:
            InvalidProblem: if `num_classes` is negative, or `global_pool` neither "avg" nor "".
        """
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise InvalidProblem(f"global_pool must be 'avg', or '' for the map, got {global_pool!r}")
            self.global_pool = global_pool
        if num_classes < 0:
            raise InvalidProblem(f"num_classes must not be negative, got {num_classes}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        _init(self.head)

    @property
    def stages(self) -> list[Level]:
        return [level for level in self.levels if isinstance(level, Level)]

    def get_classifier(self) -> nn.Module:
        """The classifier: a linear layer, or the identity if there is none."""
        return self.head

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether training computes blocks a second time instead of keeping what they held."""
        for level in self.stages:
            level.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not to decay: the tables of position bias."""
        return {name for name, _ in self.named_parameters() if name.endswith(".rpb")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by depth, for layer-wise learning rates."""
        blocks = [(r"^levels\.(\d+)\.blocks\.(\d+)", None), (r"^levels\.(\d+)\.downsample", (99998,))]
        levels = [(r"^levels\.(\d+)", None)] if coarse else blocks
        return {"stem": r"^patch_embed", "blocks": [*levels, (r"^norm", (99999,))]}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The maps after the blocks of some levels, before downsampling.

        Args:
            x: images `[B, C, H, W]`.
            indices: levels, negative ones from the end; a number means the last so many; `None` all.
            norm: whether the last level's map is normalised as the classifier's is.
            stop_early: whether to stop after the last level wanted; only with `intermediates_only`.
            output_fmt: `"NCHW"` or `"NHWC"`.
            intermediates_only: whether to leave the final map out.

        Returns:
            `(final, maps)`, or `maps`.

        Raises:
            InvalidProblem: if there are no such levels, or no such format.
        """
        wanted, count = self._wanted(indices), len(self.levels)
        if output_fmt not in ("NCHW", "NHWC"):
            raise InvalidProblem(f"output_fmt must be NCHW or NHWC, got {output_fmt!r}")
        maps: list[Tensor] = []
        x = self.pos_drop(self.patch_embed(x))
        for i, level in enumerate(self.stages):
            x = level(x)
            if i in wanted:
                kept = self.norm(x) if norm and i == count - 1 else x
                maps.append(kept.permute(0, 3, 1, 2) if output_fmt == "NCHW" else kept)
            if stop_early and intermediates_only and i == max(wanted):
                return maps
            x = level.next(x)
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` of these levels does not need.

        Raises:
            InvalidProblem: if there are no such levels.
        """
        kept = self._wanted(indices)
        self.levels = self.levels[: max(kept) + 1]
        self.norm = nn.Identity() if prune_norm else self.norm
        if prune_head:
            self.reset_classifier(0, "")
        return kept

    def _wanted(self, indices: int | Sequence[int] | None) -> list[int]:
        """Levels counted from 0, in order: negative ones were from the end, a number meant the last so many."""
        count = len(self.levels)
        last = range(count - indices, count) if isinstance(indices, int) else range(count)
        named = indices if isinstance(indices, Sequence) else last
        wanted = sorted({i % count for i in named if -count <= i < count})
        if not wanted or len(wanted) != len(named):
            raise InvalidProblem(f"indices must be different ones of {count} levels, or how many, got {indices!r}")
        return wanted

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to the last level's map, normalised, `[B, h, w, num_features]`."""
        x = self.pos_drop(self.patch_embed(x))
        for level in self.stages:
            x = level.next(level(x))
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The last map `[B, h, w, num_features]` to logits, or to what the classifier is given."""
        x = x.mean((1, 2)) if self.global_pool == "avg" else x
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, C, H, W]` to logits `[B, num_classes]`."""
        return self.forward_head(self.forward_features(x))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        for bias in (parameter for name, parameter in module.named_parameters() if name == "bias"):
            nn.init.zeros_(bias)


class Features(nn.Module):
    """A model without its classifier, giving the maps of some levels as a list: the backbone of detectors.

    Args:
        model: it loses its classifier and the levels that are not needed.
        indices: levels, negative ones from the end; a number means the last so many; `None` all.
        norm: whether each map gets a normalisation of its own, as detectors' backbones have it.

    Example:
        >>> model = NeighborhoodTransformer(Architecture(16, (1, 1), (2, 4), 2.0, 3, ((1,), (2,))))
        >>> features = Features(model)
        >>> [tuple(map.shape) for map in features(torch.randn(1, 3, 44, 36))], features.channels
        ([(1, 16, 11, 9), (1, 32, 6, 5)], [16, 32])
    """

    def __init__(
        self, model: NeighborhoodTransformer, indices: int | Sequence[int] | None = None, *, norm: bool = False
    ) -> None:
        super().__init__()
        every = len(model.levels)
        self.model, self.indices = model, model.prune_intermediate_layers(every if indices is None else indices, True)
        self.feature_info = [model.feature_info[i] for i in self.indices]
        self.channels: list[int] = [info["num_chs"] for info in self.feature_info]
        layers = zip(self.indices, self.channels, strict=True)
        self.norms = nn.ModuleDict({str(i): nn.LayerNorm(channels) for i, channels in layers} if norm else {})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images `[B, C, H, W]` to maps `[B, channels, h, w]`."""
        maps: list[Tensor] = self.model.forward_intermediates(
            x, self.indices, output_fmt="NHWC", intermediates_only=True
        )
        if self.norms:
            maps = [self.norms[str(i)](each) for i, each in zip(self.indices, maps, strict=True)]
        return [each.permute(0, 3, 1, 2) for each in maps]
