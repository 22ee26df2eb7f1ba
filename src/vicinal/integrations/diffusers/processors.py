"""Processors that stand in for a layer's own: how each family of models makes queries, keys and values.

Each keeps the processor that it replaces and hands over to it whenever its layer is to be dense. What a
layer computes besides attention is its model's: projections, norms, rotary positions and gates are called
where they are, so that adapters such as LoRA and fused projections take part.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux, transformer_ltx, transformer_ltx2, transformer_wan
from torch import Tensor

from vicinal.integrations.diffusers.attend import on_grid, with_text
from vicinal.integrations.sparsity import Setting

# Taken as they are: what diffusers says about their types has gaps.
rotated: Any = apply_rotary_emb
project_flux: Any = transformer_flux._get_qkv_projections
project_wan: Any = transformer_wan._get_qkv_projections


class SparseProcessor:
    """What all of them share.

    Args:
        own: the processor that the layer had; restored by whoever put this one in its place.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self.handle: Any = None
        """Whoever put this one there, and can put the layer's own back."""
        self.setting: Setting | None = None
        """The layer's window at this step, `None` for dense attention. Set before each forward pass."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy of the model (averaged weights, say) is dense: no handle would ever tell its layers their windows."""
        return copy.deepcopy(self.own, memo)

    # diffusers sets these two on processors that have them; they belong to the one that stays.
    @property
    def _attention_backend(self) -> Any:
        return self.own._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.own._attention_backend = backend

    @property
    def _parallel_config(self) -> Any:
        return self.own._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.own._parallel_config = config


class Flux(SparseProcessor):
    """FLUX.1, and FLUX.2's double blocks: text first, and single blocks get the joint sequence."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        if self.setting is None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        heads = (-1, attn.head_dim)
        projected = project_flux(attn, hidden_states, encoder_hidden_states)
        query, key, value = (tensor.unflatten(-1, heads) for tensor in projected[:3])
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            words = [tensor.unflatten(-1, heads) for tensor in projected[3:]]
            query = torch.cat([attn.norm_added_q(words[0]), query], dim=1)
            key = torch.cat([attn.norm_added_k(words[1]), key], dim=1)
            value = torch.cat([words[2], value], dim=1)
        query, key = (rotated(tensor, image_rotary_emb, sequence_dim=1) for tensor in (query, key))
        out = with_text(self.setting, query, key, value, text_first=True, backend=self._attention_backend).flatten(2)
        if encoder_hidden_states is None:
            return out  # FLUX.1's single blocks project out by themselves.
        text = encoder_hidden_states.shape[1]
        return attn.to_out[1](attn.to_out[0](out[:, text:])), attn.to_add_out(out[:, :text])


class Flux2Single(SparseProcessor):
    """FLUX.2's single blocks, where one projection makes queries, keys, values and the MLP's input."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, image_rotary_emb: Any = None
    ) -> Tensor:
        if self.setting is None:
            return self.own(attn, hidden_states, attention_mask, image_rotary_emb)
        projected = attn.to_qkv_mlp_proj(hidden_states)
        # By ratio, so that it stays right where the projection is sharded over devices.
        whole = 3 * attn.inner_dim + attn.mlp_hidden_dim * attn.mlp_mult_factor
        inner = projected.shape[-1] * 3 * attn.inner_dim // whole
        qkv, mlp = projected.split([inner, projected.shape[-1] - inner], dim=-1)
        query, key, value = (tensor.unflatten(-1, (-1, attn.head_dim)) for tensor in qkv.chunk(3, dim=-1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = (rotated(tensor, image_rotary_emb, sequence_dim=1) for tensor in (query, key))
        out = with_text(self.setting, query, key, value, text_first=True, backend=self._attention_backend).flatten(2)
        return attn.to_out(torch.cat([out, attn.mlp_act_fn(mlp)], dim=-1))


class Hunyuan(SparseProcessor):
    """HunyuanVideo: text last, padded, without rotary positions; single blocks share the video's projections."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> tuple[Tensor, Tensor]:
        if self.setting is None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        tokens = hidden_states.shape[1]
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = self._project(attn, hidden_states, projections, attn.norm_q, attn.norm_k)
        query, key = (rotated(tensor, image_rotary_emb, sequence_dim=1) for tensor in (query, key))
        norms = attn.norm_q, attn.norm_k
        if attn.add_q_proj is not None:
            projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            norms = attn.norm_added_q, attn.norm_added_k
        words = self._project(attn, encoder_hidden_states, projections, *norms)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip((query, key, value), words, strict=True))
        out = with_text(
            self.setting,
            query,
            key,
            value,
            text_first=False,
            mask=self._mask(attention_mask, tokens),
            backend=self._attention_backend,
        ).flatten(2)
        video, told = out[:, :tokens], out[:, tokens:]
        if getattr(attn, "to_out", None) is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        if getattr(attn, "to_add_out", None) is not None:
            told = attn.to_add_out(told)
        return video, told

    @staticmethod
    def _project(attn: Any, states: Tensor, projections: tuple[Any, ...], norm_q: Any, norm_k: Any) -> list[Tensor]:
        query, key, value = (project(states).unflatten(2, (attn.heads, -1)) for project in projections)
        query = query if norm_q is None else norm_q(query)
        key = key if norm_k is None else norm_k(key)
        return [query, key, value]

    @staticmethod
    def _mask(mask: Tensor | None, tokens: int) -> Tensor | None:
        """Valid keys of the joint sequence, `[B, 1, 1, N + T]`: here as the model has it."""
        return mask


class Hunyuan15(Hunyuan):
    """HunyuanVideo 1.5: double blocks only, and a mask over the text alone."""

    @staticmethod
    def _mask(mask: Tensor | None, tokens: int) -> Tensor | None:
        return None if mask is None else torch.nn.functional.pad(mask.bool(), (tokens, 0), value=True)[:, None, None]


class Wan(SparseProcessor):
    """Wan 2.x: text comes by cross-attention, which is left alone; norms run across heads."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if self.setting is None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        query, key, value = project_wan(attn, hidden_states, None)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        if rotary_emb is not None:
            query, key = (self._rotated(tensor, *rotary_emb) for tensor in (query, key))
        out = on_grid(self.setting, query, key, value).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))

    @staticmethod
    def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Pairs of neighboring channels; the tables hold each angle twice."""
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos[..., 0::2], sin[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class Cosmos(SparseProcessor):
    """Cosmos 1, Predict2 and 2.5: text comes by cross-attention; rotary positions pair halves of a head."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if self.setting is None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        query, key, value = (
            project(hidden_states).unflatten(2, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                rotated(tensor, image_rotary_emb, use_real_unbind_dim=-2, sequence_dim=1) for tensor in (query, key)
            )
        out = on_grid(self.setting, query, key, value).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class LTX(SparseProcessor):
    """LTX-Video: norms and rotary positions across heads; text comes by cross-attention."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if self.setting is None:
            return self.own(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        if image_rotary_emb is not None:
            query, key = (transformer_ltx.apply_rotary_emb(tensor, image_rotary_emb) for tensor in (query, key))
        heads = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, attn.to_v(hidden_states)))
        out = on_grid(self.setting, *heads).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class LTX2(SparseProcessor):
    """LTX-2's video self-attention: LTX-Video's with a gate per head, and guidance that perturbs rows of a batch."""

    _rotate: ClassVar = {
        "interleaved": transformer_ltx2.apply_interleaved_rotary_emb,
        "split": transformer_ltx2.apply_split_rotary_emb,
    }

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: Any = None,
    ) -> Tensor:
        guided = perturbation_mask is not None or bool(all_perturbed)
        if self.setting is None or (guided and (all_perturbed is None or bool(all_perturbed))):
            rest = (perturbation_mask, all_perturbed) if guided else ()
            return self.own(
                attn, hidden_states, encoder_hidden_states, attention_mask, query_rotary_emb, key_rotary_emb, *rest
            )
        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        if query_rotary_emb is not None:
            rotate = self._rotate[attn.rope_type]
            query, key = rotate(query, query_rotary_emb), rotate(key, query_rotary_emb)
        heads = (tensor.unflatten(2, (attn.heads, -1)) for tensor in (query, key, value))
        out = on_grid(self.setting, *heads).flatten(2)
        if perturbation_mask is not None:
            out = torch.lerp(value, out, perturbation_mask)
        if attn.to_gate_logits is not None:
            # Twice, so that gates are 1 where their logits start at 0.
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))
