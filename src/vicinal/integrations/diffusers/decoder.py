"""LTX-2.5's video decoder, whose attention is 3-D neighborhood attention already."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vicinal.functional import neighborhood_attention


class LTX2DecoderProcessor:
    """Runs the attention of diffusers' `LTX2VideoDiffusionDecoderModel`; put there the way diffusers has for it:

        decoder.set_attn_processor(LTX2DecoderProcessor())

    The window is the model's own, so nothing but time and memory changes: no mask is ever built, on any device.
    `decoder.set_attn_processor(LTX2VideoVaeNeighborhoodAttnProcessor())` goes back.

    Args:
        backend: insist on one of ours by name, see `vicinal.explain`.
    """

    def __init__(self, backend: str | None = None) -> None:
        self.backend = backend

    def __call__(self, attn: Any, hidden_states: Tensor, block_mask: None = None) -> Tensor:
        query, key, value = attn.project_qkv(hidden_states)
        # The query brings its scale along.
        out = neighborhood_attention(query, key, value, attn.kernel_size, scale=1.0, backend=self.backend)
        return attn.to_out[0](out.flatten(-2))
