"""The models by name, for timing, tests and examples."""

from __future__ import annotations

from vicinal.errors import InvalidProblem
from vicinal.integrations.diffusers import inputs
from vicinal.integrations.diffusers.specimen import Specimen

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
            inputs=inputs.flux,
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
            inputs=inputs.flux2,
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
            inputs=inputs.hunyuan,
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
            inputs=inputs.hunyuan15,
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
            inputs=inputs.wan,
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
            inputs=inputs.cosmos,
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
            inputs=inputs.cosmos,
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
            inputs=inputs.cosmos,
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
            inputs=inputs.ltx,
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
            inputs=inputs.ltx2,
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
            inputs=inputs.decoder,
            grid=(8, 16, 24),
            tiny_grid=(2, 3, 4),
            text=0,
            window={},
            tiny_window={},
        ),
    )
}
"""By name on the command line."""


def specimen(name: str) -> Specimen:
    """By name.

    Raises:
        InvalidProblem: if there is none.
    """
    if name not in ZOO:
        raise InvalidProblem(f"model must be one of {', '.join(ZOO)}, got {name!r}")
    return ZOO[name]
