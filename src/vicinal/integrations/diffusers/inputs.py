"""Random arguments for the forward pass of each family, for any grid: `(config, grid, text tokens, make)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Make = Callable[..., Tensor]
"""`make(*shape)`: standard normal numbers on the model's device, in its dtype."""


def _time(make: Make) -> Tensor:
    like = make(1)
    return torch.full((like.shape[0],), 500.0, device=like.device, dtype=like.dtype)


def _latents(config: Any, grid: tuple[int, ...], make: Make, channels: int | None = None) -> Tensor:
    patch = config.patch_size
    sizes = tuple(patch) if isinstance(patch, (tuple, list)) else (config.patch_size_t, patch, patch)
    return make(channels or config.in_channels, *(n * size for n, size in zip(grid, sizes, strict=True)))


def _positions(grid: tuple[int, ...], columns: int, make: Make) -> Tensor:
    """FLUX's ids: row and column in the second and third place."""
    like = make(1)
    rows = torch.cartesian_prod(*(torch.arange(n, device=like.device, dtype=like.dtype) for n in grid))
    ids = torch.zeros(len(rows), columns, device=like.device, dtype=like.dtype)
    ids[:, 1:3] = rows
    return ids


def flux(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": make(grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": make(text, config.joint_attention_dim),
        "pooled_projections": make(config.pooled_projection_dim),
        "timestep": _time(make) / 1000,
        "img_ids": _positions(grid, 3, make),
        "txt_ids": make(text, 3)[0] * 0,
        "guidance": _time(make) / 1000 if config.guidance_embeds else None,
    }


def flux2(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": make(grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": make(text, config.joint_attention_dim),
        "timestep": _time(make) / 1000,
        "img_ids": _positions(grid, 4, make),
        "txt_ids": make(text, 4)[0] * 0,
        "guidance": _time(make) / 1000 if config.guidance_embeds else None,
    }


def _valid(text: int, make: Make) -> Tensor:
    """All text is valid, as in the paper's measurements."""
    return torch.ones_like(make(text), dtype=torch.long)


def hunyuan(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_embed_dim),
        "encoder_attention_mask": _valid(text, make),
        "pooled_projections": make(config.pooled_projection_dim),
        "guidance": _time(make) if config.guidance_embeds else None,
    }


def hunyuan15(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_embed_dim),
        "encoder_attention_mask": _valid(text, make),
        "encoder_hidden_states_2": make(5, config.text_embed_2_dim),
        "encoder_attention_mask_2": _valid(5, make),
        "image_embeds": make(3, config.image_embed_dim),
    }


def wan(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_dim),
    }


def cosmos(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_embed_dim),
        "fps": 24,
    }


def ltx(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    tokens = grid[0] * grid[1] * grid[2]
    return {
        "hidden_states": make(tokens, config.in_channels),
        "encoder_hidden_states": make(text, config.caption_channels),
        "timestep": _time(make),
        "encoder_attention_mask": _valid(text, make),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
    }


def ltx2(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    audio = 5
    return {
        **ltx(config, grid, text, make),
        "audio_hidden_states": make(audio, config.audio_in_channels),
        "audio_encoder_hidden_states": make(text, config.caption_channels),
        "audio_encoder_attention_mask": _valid(text, make),
        "audio_num_frames": audio,
    }


def decoder(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    like = make(1)
    numbers = torch.Generator(like.device).manual_seed(1)
    return {"z": make(config.latent_channels, *grid), "generator": numbers}
