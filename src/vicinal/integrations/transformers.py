"""Hugging Face transformers on our attention: causal sliding windows by `register`, Dinat by `patch_dinat`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vicinal.errors import Unsupported
from vicinal.functional import neighborhood_attention
from vicinal.integrations import natten
from vicinal.integrations.natten.functional import natten2dav, natten2dqkrpb

NAME = "vicinal"
"""What `attn_implementation` is to be set to."""


def register() -> None:
    """Offer `attn_implementation="vicinal"`: layers with a causal sliding window run our 1-D attention.

    A window of `w` keys, the query and the `w - 1` before it, is causal neighborhood attention with
    `kernel_size=w`, exactly. Its time and memory grow with `w`, not with the sequence; the mask that PyTorch's
    operator needs, of all pairs of tokens, is not made. Other layers, and calls with other keys than queries
    (steps of `generate`, static caches, packed sequences), go to PyTorch's `scaled_dot_product_attention`
    with the mask that transformers makes for it.

    Padding at either end of a row is honoured; a mask with holes is handed to PyTorch as well.

    Raises (when a model is called):
        Unsupported: for a sliding window that looks both ways. Such windows lose keys at the ends of a
            sequence, ours are pushed inside there: the numbers would be other ones.
        Unsupported: for sinks, soft caps and dropout in a windowed layer.

    Tried with transformers 5.17.

    Example:
        >>> register()  # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="vicinal")  # doctest: +SKIP
    """
    transformers: Any = importlib.import_module("transformers")
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, make_mask)


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    device: Any = "cpu",
    **more: Any,
) -> Tensor | None:
    """Which tokens are padding, `[B, L]`, where `attend` uses a window; else the mask of PyTorch's operator.

    Never `None` for a window: `attend` would take the layer for one without.
    """
    is_ours = (
        local_size is not None
        and local_size == getattr(config, "sliding_window", None)  # and not, for example, a chunk
        and allow_is_causal_skip  # not packed, not bidirectional
        and (q_length, q_offset) == (kv_length, kv_offset)
    )
    if is_ours:
        if attention_mask is None:
            return torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        return attention_mask[:, -kv_length:].bool()
    masks: Any = importlib.import_module("transformers.masking_utils")
    return masks.sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        config=config,
        device=device,
        **more,
    )


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention of `[B, H, L, D]`, as transformers' layers call it; gives `[B, L, H, D]`."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if sliding_window is not None and not causal and sliding_window < key.shape[2]:
        raise Unsupported(
            f"a sliding window of {sliding_window} that looks both ways loses keys at the ends of a sequence, while "
            f"vicinal's are pushed inside: the numbers would differ; use attn_implementation='sdpa' for this model"
        )
    for name in ("s_aux", "softcap", "position_bias"):
        if more.get(name) is not None:
            raise Unsupported(f"{name} is not offered with attn_implementation={NAME!r}; use 'eager'")
    if attention_mask is None or attention_mask.ndim != 2:
        dense: Any = importlib.import_module("transformers.integrations.sdpa_attention")
        return dense.sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **more
        )
    if sliding_window is None:
        raise Unsupported(
            f"{type(module).__name__} made a mask for a sliding window and then attends without one; "
            f"use attn_implementation='sdpa' for this model"
        )
    if dropout:
        raise Unsupported(f"attention_dropout={dropout} is not offered in windowed layers; set it to 0")
    return windowed(query, key, value, attention_mask, sliding_window, scaling), None


def windowed(
    query: Tensor, key: Tensor, value: Tensor, valid: Tensor, window: int, scale: float | None = None
) -> Tensor:
    """Causal attention to the `window` latest tokens that are no padding.

    Args:
        query, key, value: `[B, H, L, D]`, `[B, Hkv, L, D]`, `[B, Hkv, L, Dv]`.
        valid: which tokens are no padding, bools `[B, L]`.
        window: tokens seen, the query itself counted.
        scale: multiplies the scores; `None` is `D ** -0.5`.

    Returns:
        `[B, L, H, Dv]`. What queries of padding get is finite, and of no meaning.

    Example:
        >>> query, key, value = torch.randn(3, 1, 4, 10, 16)  # heads before tokens
        >>> valid = torch.arange(10)[None] >= 3  # three tokens of padding at the left
        >>> windowed(query, key, value, valid, window=4).shape
        torch.Size([1, 10, 4, 16])
    """
    length, place = query.shape[2], torch.arange(query.shape[2], device=query.device)
    first = valid.int().argmax(1, keepdim=True)
    is_run = valid == ((place >= first) & (place < first + valid.sum(1, keepdim=True)))
    if not is_run.all():
        seen = (place <= place[:, None]) & (place[:, None] - place < window) & valid[:, None]
        seen = seen | (place == place[:, None])  # a query of padding sees itself, rather than nothing
        group = query.shape[1] // key.shape[1]
        k, v = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, seen[:, None], scale=scale)
        return out.transpose(1, 2).contiguous()
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    # Turned so that tokens come first, no token looks at padding: it all comes later. Distances stay.
    turned = bool(first.any())
    if turned:
        there = ((place + first) % length)[:, :, None, None]
        q, k, v = (tensor.take_along_dim(there, 1) for tensor in (q, k, v))
    out = neighborhood_attention(q, k, v, min(window, length), is_causal=True, scale=scale)
    return out.take_along_dim(((place - first) % length)[:, :, None, None], 1) if turned else out


def patch_dinat() -> Callable[[], None]:
    """Make transformers' Dinat run on our attention, on every device; returns what undoes it.

    Since NATTEN 0.20 it finds no functions to call, and since transformers 5 it passes tensors with axes
    swapped. Patched, it also runs the fused operator unless attention weights are asked for or dropped out.

    Tried with transformers 4.46 and 5.17.

    Example:
        >>> undo = patch_dinat()  # doctest: +SKIP
        >>> model = transformers.DinatModel(transformers.DinatConfig())  # doctest: +SKIP
    """
    natten.install(replace=True)
    utils: Any = importlib.import_module("transformers.utils.import_utils")
    dinat: Any = importlib.import_module("transformers.models.dinat.modeling_dinat")
    layer = dinat.NeighborhoodAttention
    before = {name: getattr(dinat, name) for name in ("natten2dqkrpb", "natten2dav")}
    forward, known = layer.forward, getattr(utils, "_natten_available", None)
    dinat.natten2dqkrpb, dinat.natten2dav, layer.forward = natten2dqkrpb, natten2dav, _dinat_forward
    if known is None:
        utils.is_natten_available.cache_clear()
    else:
        utils._natten_available = True

    def undo() -> None:
        layer.forward = forward
        for name, function in before.items():
            setattr(dinat, name, function)
        natten.uninstall()
        if known is None:
            utils.is_natten_available.cache_clear()
        else:
            utils._natten_available = known

    return undo


def _dinat_forward(self: Any, hidden_states: Tensor, output_attentions: bool | None = False) -> tuple[Tensor, ...]:
    """Dinat's attention `[B, H, W, C]` to the same, with the weights if they are asked for."""
    q, k, v = (
        project(hidden_states).unflatten(-1, (-1, self.attention_head_size))
        for project in (self.query, self.key, self.value)
    )
    window = {"kernel_size": self.kernel_size, "dilation": self.dilation}
    if not output_attentions and not (self.training and self.dropout.p):
        return (neighborhood_attention(q, k, v, **window, position_bias=self.rpb).flatten(-2),)
    q, k, v = (tensor.movedim(-2, 1) for tensor in (q * self.attention_head_size**-0.5, k, v))
    weights = self.dropout(natten2dqkrpb(q, k, self.rpb, self.kernel_size, self.dilation).softmax(-1))
    out = natten2dav(weights, v, self.kernel_size, self.dilation).movedim(1, -2).flatten(-2)
    return (out, weights) if output_attentions else (out,)
