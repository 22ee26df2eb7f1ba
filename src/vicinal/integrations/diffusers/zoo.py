"""Models by name, full-size and tiny, with random weights, and inputs of any grid: for timing, tests and examples."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from vicinal.errors import InvalidProblem

Make = Callable[..., Tensor]
"""`make(*shape)`: standard normal numbers on the model's device, in its dtype."""


@dataclass(frozen=True)
class Specimen:
    """One model, at its published size and at a tiny one.

    Args:
        name: on the command line.
        kind: name of its class in diffusers.
        config: what differs from the class's defaults at full size.
        tiny: configuration for tests on a CPU.
        inputs: `(config, grid, text tokens, make) -> arguments of forward`.
        grid, tiny_grid: tokens per axis, where it is used and for tests.
        text, tiny_text: text tokens.
        window, tiny_window: what `vicinal e2e` puts on it by default, arguments of `sparsify`.
        joint: whether text shares the attention of the grid: its position, or `None`.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    inputs: Callable[[Any, tuple[int, ...], int, Make], dict[str, Any]]
    grid: tuple[int, ...]
    tiny_grid: tuple[int, ...]
    text: int
    window: Mapping[str, Any]
    tiny_window: Mapping[str, Any]
    tiny_text: int = 7
    joint: str | None = None

    @property
    def is_decoder(self) -> bool:
        """Whether it decodes in one pass instead of denoising in steps."""
        return self.kind == "LTX2VideoDiffusionDecoderModel"

    def layers(self, *, tiny: bool = False) -> int:
        """Attention layers over the grid, of the whole model."""
        return sum(self._counts(tiny).values())

    def layers_of(self, model: nn.Module) -> int:
        """The same of a model that may have been built shorter."""
        config: Any = model.config
        return sum(_total(config[name]) for name in self._counts(tiny=False))

    def _counts(self, tiny: bool) -> dict[str, int]:
        """Layers by the name of the argument that sets their number, defaults included."""
        names = ("decoder_stage_depths",) if self.is_decoder else ("num_layers", "num_single_layers")
        defaults = inspect.signature(getattr(diffusers, self.kind).__init__).parameters
        given = self.tiny if tiny else self.config
        return {name: _total(given.get(name, defaults[name].default)) for name in names if name in defaults}

    def build(
        self,
        *,
        tiny: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layers: int | None = None,
    ) -> nn.Module:
        """The model with random weights, drawn on the device itself, in `eval` mode.

        Args:
            tiny, device, dtype: which configuration, where, in what.
            layers: build about so many only, each kind of block in its proportion.
        """
        kind = getattr(diffusers, self.kind)
        config = dict(self.tiny if tiny else self.config)
        if layers is not None:
            counts = self._counts(tiny)
            if self.is_decoder or not 1 <= layers <= sum(counts.values()):
                raise InvalidProblem(f"layers must lie in [1, {sum(counts.values())}], and {self.name} be no decoder")
            config |= {name: max(round(n * layers / sum(counts.values())), 1) for name, n in counts.items()}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: nn.Module = kind(**config)
        finally:
            torch.set_default_dtype(before)
        return model.eval()

    def arguments(
        self,
        model: nn.Module,
        grid: tuple[int, ...] | None = None,
        *,
        batch: int = 1,
        tiny: bool = False,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Random arguments of the model's forward, for a grid of tokens."""
        like = next(model.parameters())
        numbers = torch.Generator(like.device).manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=numbers, device=like.device, dtype=like.dtype)

        grid = grid or (self.tiny_grid if tiny else self.grid)
        return self.inputs(model.config, grid, self.tiny_text if tiny else self.text, make)


def specimen(name: str) -> Specimen:
    """By name.

    Raises:
        InvalidProblem: if there is none.
    """
    if name not in ZOO:
        raise InvalidProblem(f"model must be one of {', '.join(ZOO)}, got {name!r}")
    return ZOO[name]


def _total(count: int | Sequence[int]) -> int:
    return count if isinstance(count, int) else sum(count)


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


def _flux(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": make(grid[0] * grid[1], config.in_channels),
        "encoder_hidden_states": make(text, config.joint_attention_dim),
        "pooled_projections": make(config.pooled_projection_dim),
        "timestep": _time(make) / 1000,
        "img_ids": _positions(grid, 3, make),
        "txt_ids": make(text, 3)[0] * 0,
        "guidance": _time(make) / 1000 if config.guidance_embeds else None,
    }


def _flux2(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
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


def _hunyuan(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_embed_dim),
        "encoder_attention_mask": _valid(text, make),
        "pooled_projections": make(config.pooled_projection_dim),
        "guidance": _time(make) if config.guidance_embeds else None,
    }


def _hunyuan15(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_embed_dim),
        "encoder_attention_mask": _valid(text, make),
        "encoder_hidden_states_2": make(5, config.text_embed_2_dim),
        "encoder_attention_mask_2": _valid(5, make),
        "image_embeds": make(3, config.image_embed_dim),
    }


def _wan(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_dim),
    }


def _cosmos(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    return {
        "hidden_states": _latents(config, grid, make),
        "timestep": _time(make),
        "encoder_hidden_states": make(text, config.text_embed_dim),
        "fps": 24,
    }


def _ltx(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    tokens = grid[0] * grid[1] * grid[2]
    return {
        "hidden_states": make(tokens, config.in_channels),
        "encoder_hidden_states": make(text, config.caption_channels),
        "timestep": _time(make),
        "encoder_attention_mask": _valid(text, make),
        **dict(zip(("num_frames", "height", "width"), grid, strict=True)),
    }


def _ltx2(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    audio = 5
    return {
        **_ltx(config, grid, text, make),
        "audio_hidden_states": make(audio, config.audio_in_channels),
        "audio_encoder_hidden_states": make(text, config.caption_channels),
        "audio_encoder_attention_mask": _valid(text, make),
        "audio_num_frames": audio,
    }


def _decoder(config: Any, grid: tuple[int, ...], text: int, make: Make) -> dict[str, Any]:
    like = make(1)
    numbers = torch.Generator(like.device).manual_seed(1)
    return {"z": make(config.latent_channels, *grid), "generator": numbers}


_SMALL = {"num_attention_heads": 2, "attention_head_dim": 16}
_VIDEO = (4, 6, 7)
_VIDEO_WINDOW = {"kernel_size": (2, 3, 5), "stride": (2, 1, 2)}
_COSMOS = {"concat_padding_mask": False, "extra_pos_embed_type": None}
# Cosmos concatenates a padding mask, which needs torchvision; a channel more in the input costs the same.
_COSMOS_TINY = {**_SMALL, **_COSMOS, "num_layers": 3, "in_channels": 4, "out_channels": 4, "text_embed_dim": 12}

ZOO: dict[str, Specimen] = {
    found.name: found
    for found in (
        Specimen(
            name="flux",
            kind="FluxTransformer2DModel",
            config={"guidance_embeds": True},
            tiny={
                **_SMALL,
                "num_layers": 2,
                "num_single_layers": 2,
                "in_channels": 8,
                "joint_attention_dim": 12,
                "pooled_projection_dim": 6,
                "axes_dims_rope": (4, 6, 6),
                "guidance_embeds": True,
            },
            inputs=_flux,
            grid=(256, 256),
            tiny_grid=(9, 14),
            text=512,
            window={"kernel_size": (80, 80), "stride": (16, 16)},
            tiny_window={"kernel_size": (4, 5), "stride": (2, 1)},
            joint="first",
        ),
        Specimen(
            name="flux2",
            kind="Flux2Transformer2DModel",
            config={},
            tiny={
                **_SMALL,
                "num_layers": 2,
                "num_single_layers": 2,
                "in_channels": 8,
                "joint_attention_dim": 12,
                "timestep_guidance_channels": 8,
                "axes_dims_rope": (4, 4, 4, 4),
            },
            inputs=_flux2,
            grid=(128, 128),
            tiny_grid=(9, 14),
            text=512,
            window={"kernel_size": (40, 40), "stride": (8, 8)},
            tiny_window={"kernel_size": (4, 5), "stride": (2, 1)},
            joint="first",
        ),
        Specimen(
            name="hunyuan-video",
            kind="HunyuanVideoTransformer3DModel",
            config={},
            tiny={
                **_SMALL,
                "num_layers": 2,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "in_channels": 4,
                "out_channels": 4,
                "text_embed_dim": 12,
                "pooled_projection_dim": 6,
                "rope_axes_dim": (4, 6, 6),
            },
            inputs=_hunyuan,
            grid=(30, 48, 80),
            tiny_grid=_VIDEO,
            text=256,
            window={"kernel_size": (18, 24, 24), "stride": (16, 8, 8)},
            tiny_window=_VIDEO_WINDOW,
            joint="last",
        ),
        Specimen(
            name="hunyuan-video-1.5",
            kind="HunyuanVideo15Transformer3DModel",
            config={},
            tiny={
                **_SMALL,
                "num_layers": 2,
                "num_refiner_layers": 1,
                "in_channels": 4,
                "out_channels": 4,
                "text_embed_dim": 12,
                "text_embed_2_dim": 10,
                "image_embed_dim": 6,
                "rope_axes_dim": (4, 6, 6),
            },
            inputs=_hunyuan15,
            grid=(31, 45, 80),
            tiny_grid=_VIDEO,
            text=1000,
            window={"kernel_size": (18, 24, 24), "stride": (16, 8, 8)},
            tiny_window=_VIDEO_WINDOW,
            joint="last",
        ),
        Specimen(
            name="wan-14b",
            kind="WanTransformer3DModel",
            config={},
            tiny={
                **_SMALL,
                "num_layers": 3,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": 12,
                "freq_dim": 8,
                "ffn_dim": 48,
            },
            inputs=_wan,
            grid=(21, 45, 80),
            tiny_grid=_VIDEO,
            text=512,
            window={"kernel_size": (12, 24, 24)},
            tiny_window=_VIDEO_WINDOW,
        ),
        Specimen(
            name="cosmos-7b",
            kind="CosmosTransformer3DModel",
            config={**_COSMOS, "in_channels": 17},
            tiny=_COSMOS_TINY,
            inputs=_cosmos,
            grid=(16, 44, 80),
            tiny_grid=_VIDEO,
            text=512,
            window={"kernel_size": (16, 24, 16), "stride": (1, 8, 16)},
            tiny_window=_VIDEO_WINDOW,
        ),
        Specimen(
            name="cosmos-predict2-2b",
            kind="CosmosTransformer3DModel",
            config={**_COSMOS, "in_channels": 18, "num_attention_heads": 16},
            tiny=_COSMOS_TINY,
            inputs=_cosmos,
            grid=(24, 44, 80),
            tiny_grid=_VIDEO,
            text=512,
            window={"preset": "cosmos-predict2-2b"},
            tiny_window=_VIDEO_WINDOW,
        ),
        Specimen(
            name="cosmos-predict2-14b",
            kind="CosmosTransformer3DModel",
            config={**_COSMOS, "in_channels": 18, "num_attention_heads": 40, "num_layers": 36},
            tiny=_COSMOS_TINY,
            inputs=_cosmos,
            grid=(24, 44, 80),
            tiny_grid=_VIDEO,
            text=512,
            window={"preset": "cosmos-predict2-14b"},
            tiny_window=_VIDEO_WINDOW,
        ),
        Specimen(
            name="ltx-video",
            kind="LTXVideoTransformer3DModel",
            config={},
            tiny={
                **_SMALL,
                "num_layers": 3,
                "in_channels": 8,
                "out_channels": 8,
                "cross_attention_dim": 32,
                "caption_channels": 12,
            },
            inputs=_ltx,
            grid=(21, 16, 22),
            tiny_grid=_VIDEO,
            text=128,
            window={"kernel_size": (-1, 8, 11)},
            tiny_window=_VIDEO_WINDOW,
        ),
        Specimen(
            name="ltx2",
            kind="LTX2VideoTransformer3DModel",
            config={},
            tiny={
                **_SMALL,
                "num_layers": 2,
                "in_channels": 8,
                "out_channels": 8,
                "cross_attention_dim": 32,
                "audio_in_channels": 8,
                "audio_out_channels": 8,
                "audio_num_attention_heads": 2,
                "audio_attention_head_dim": 8,
                "audio_cross_attention_dim": 16,
                "caption_channels": 12,
                "gated_attn": True,
                "rope_type": "split",
            },
            inputs=_ltx2,
            grid=(16, 34, 60),
            tiny_grid=_VIDEO,
            text=256,
            window={"kernel_size": (8, 16, 20), "stride": (1, 8, 4)},
            tiny_window=_VIDEO_WINDOW,
        ),
        Specimen(
            name="ltx2-decoder",
            kind="LTX2VideoDiffusionDecoderModel",
            config={},
            tiny={
                "latent_channels": 8,
                "decoder_head_dim": 8,
                "decoder_stage_channels": (64, 32, 16, 16, 8),
                "decoder_stage_depths": (1, 1, 1, 1, 2),
                "decoder_t_emb_dim": 16,
                "decoder_stage_kernels": ((3, 3, 3), (3, 3, 3), (3, 3, 5), (3, 5, 3)),
                "decoder_stage5_kernel": (5, 3, 5),
            },
            inputs=_decoder,
            grid=(8, 16, 24),
            tiny_grid=(2, 3, 4),
            text=0,
            window={},
            tiny_window={},
        ),
    )
}
"""By name on the command line."""
