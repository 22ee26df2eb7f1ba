"""The models that can be made sparse: where their layers lie, and how their grid is read off a call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from diffusers.models.transformers import (
    transformer_cosmos,
    transformer_flux,
    transformer_flux2,
    transformer_hunyuan_video,
    transformer_hunyuan_video15,
    transformer_ltx,
    transformer_ltx2,
    transformer_wan,
)
from torch import nn

from vicinal._tuples import times
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.integrations.diffusers import processors
from vicinal.integrations.diffusers.processors import SparseProcessor

Arguments = Mapping[str, Any]
"""Of one call of the model's forward, by name."""

Grid = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """Models of one architecture.

    Args:
        blocks: `(list of blocks, its attention over the grid)`, in the order in which they run.
        processors: ours, for each processor of the model that it can stand in for.
        grid: tokens per axis, from a call's arguments; `None` where they do not say it.
        tokens: how many tokens of the grid the call brings, where that has to be compared.
        refused: arguments that change who sees whom, so that a window cannot be put on top.
    """

    blocks: tuple[tuple[str, str], ...]
    processors: Mapping[type, type[SparseProcessor]]
    grid: Callable[[nn.Module, Arguments], Grid | None]
    tokens: Callable[[Arguments], int] | None = None
    refused: tuple[str, ...] = field(default=())

    def layers(self, model: nn.Module) -> Iterator[tuple[str, Any]]:
        """Name and module of each self-attention over the grid, in the order in which they run."""
        for blocks, attention in self.blocks:
            for index, block in enumerate(getattr(model, blocks)):
                yield f"{blocks}.{index}.{attention}", getattr(block, attention)

    def read_grid(self, model: nn.Module, arguments: Arguments, given: Grid | None) -> Grid:
        """The grid of a call, compared with the tokens that it brings.

        Raises:
            InvalidProblem: if it cannot be read off the call, or contradicts it.
        """
        for name in self.refused:
            if arguments.get(name) is not None:
                raise Unsupported(f"{name} decides by itself who sees whom; a window cannot be put on top of it")
        grid = self.grid(model, arguments)
        if grid is None and given is None:
            raise InvalidProblem(
                f"the grid of this call of {type(model).__name__} cannot be read off its arguments; "
                "pass sparsify(..., grid=(frames, rows, columns)), in tokens"
            )
        if grid is not None and given is not None and grid != given:
            raise InvalidProblem(f"grid was given as {times(given)}, but this call has {times(grid)} tokens")
        found = grid or given
        assert found is not None
        tokens = None if self.tokens is None else self.tokens(arguments)
        if tokens is not None and tokens != prod(found):
            raise InvalidProblem(
                f"this call brings {tokens} tokens, which is no grid of {times(found)}: reference images or "
                "conditioning frames among them have no place on the grid; remove() the windows for such calls"
            )
        return found


def _of_latents(patch: Callable[[Any], tuple[int, int, int]]) -> Callable[[nn.Module, Arguments], Grid]:
    """The grid of `hidden_states [B, C, T, H, W]`, cut into patches."""

    def grid(model: nn.Module, arguments: Arguments) -> Grid:
        sides = arguments["hidden_states"].shape[2:]
        return tuple(int(side) // size for side, size in zip(sides, patch(model.config), strict=True))

    return grid


def _of_positions(row: int) -> Callable[[nn.Module, Arguments], Grid]:
    """FLUX's grid, from the row and column that `img_ids` gives each token; they lie at `row` and `row + 1`."""

    def grid(model: nn.Module, arguments: Arguments) -> Grid:
        ids = arguments["img_ids"]
        ids = ids[0] if ids.ndim == 3 else ids
        places = ids[:, row : row + 2].long()
        first = places.amin(0)
        height, width = (places.amax(0) - first + 1).tolist()
        rows, columns = torch.arange(height, device=ids.device), torch.arange(width, device=ids.device)
        if len(ids) != height * width or not torch.equal(places - first, torch.cartesian_prod(rows, columns)):
            raise InvalidProblem(
                f"img_ids name {len(ids)} tokens that are no picture of {height}x{width}, row by row: "
                "reference images have no place on the grid; remove() the windows for such calls"
            )
        return height, width

    return grid


def _of_arguments(model: nn.Module, arguments: Arguments) -> Grid | None:
    """LTX's grid: the call says how many latent frames, rows and columns there are."""
    sides = [arguments.get(name) for name in ("num_frames", "height", "width")]
    if any(side is None for side in sides):
        return None
    config: Any = model.config
    patch = (config.patch_size_t, config.patch_size, config.patch_size)
    return tuple(int(side) // size for side, size in zip(sides, patch, strict=True))  # type: ignore[arg-type]


def _sequence(arguments: Arguments) -> int:
    return arguments["hidden_states"].shape[1]


def _time_and_space(config: Any) -> tuple[int, int, int]:
    return config.patch_size_t, config.patch_size, config.patch_size


def _each_axis(config: Any) -> tuple[int, int, int]:
    return tuple(config.patch_size)


FAMILIES: dict[type[nn.Module], Family] = {
    transformer_flux.FluxTransformer2DModel: Family(
        blocks=(("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")),
        processors={transformer_flux.FluxAttnProcessor: processors.Flux},
        grid=_of_positions(1),
        tokens=_sequence,
    ),
    transformer_flux2.Flux2Transformer2DModel: Family(
        blocks=(("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")),
        processors={
            transformer_flux2.Flux2AttnProcessor: processors.Flux,
            transformer_flux2.Flux2ParallelSelfAttnProcessor: processors.Flux2Single,
        },
        grid=_of_positions(1),
        tokens=_sequence,
        refused=("kv_cache_mode",),
    ),
    transformer_hunyuan_video.HunyuanVideoTransformer3DModel: Family(
        blocks=(("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")),
        processors={transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0: processors.Hunyuan},
        grid=_of_latents(_time_and_space),
    ),
    transformer_hunyuan_video15.HunyuanVideo15Transformer3DModel: Family(
        blocks=(("transformer_blocks", "attn"),),
        processors={transformer_hunyuan_video15.HunyuanVideo15AttnProcessor2_0: processors.Hunyuan15},
        grid=_of_latents(_time_and_space),
    ),
    transformer_wan.WanTransformer3DModel: Family(
        blocks=(("blocks", "attn1"),),
        processors={transformer_wan.WanAttnProcessor: processors.Wan},
        grid=_of_latents(_each_axis),
    ),
    transformer_cosmos.CosmosTransformer3DModel: Family(
        blocks=(("transformer_blocks", "attn1"),),
        processors={transformer_cosmos.CosmosAttnProcessor2_0: processors.Cosmos},
        grid=_of_latents(_each_axis),
    ),
    transformer_ltx.LTXVideoTransformer3DModel: Family(
        blocks=(("transformer_blocks", "attn1"),),
        processors={transformer_ltx.LTXVideoAttnProcessor: processors.LTX},
        grid=_of_arguments,
        tokens=_sequence,
    ),
    transformer_ltx2.LTX2VideoTransformer3DModel: Family(
        blocks=(("transformer_blocks", "attn1"),),
        processors={
            transformer_ltx2.LTX2AudioVideoAttnProcessor: processors.LTX2,
            transformer_ltx2.LTX2PerturbedAttnProcessor: processors.LTX2,
        },
        grid=_of_arguments,
        tokens=_sequence,
        refused=("video_self_attention_mask",),
    ),
}
"""By class of the transformer; subclasses count as their parents."""


def family_of(model: Any) -> Family:
    """How to handle this model.

    Raises:
        Unsupported: if nobody has taught us.
    """
    for kind in type(model).__mro__:
        if kind in FAMILIES:
            return FAMILIES[kind]
    known = ", ".join(kind.__name__ for kind in FAMILIES)
    inside = next((name for name in ("transformer", "unet") if hasattr(model, name)), None)
    advice = f"; pass the model inside it, .{inside}" if inside else ""
    raise Unsupported(f"no windows for {type(model).__name__}{advice}; the models known are {known}")
