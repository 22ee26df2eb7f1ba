"""NATTEN's layers by ours, with the arguments of today and those up to 0.17 (`dim`, `rel_pos_bias`, `bias`)."""

from __future__ import annotations

from typing import Any

from vicinal import nn as ours
from vicinal.errors import InvalidProblem, Unsupported

OLD = {"dim": "embed_dim", "rel_pos_bias": "position_bias", "bias": "position_bias", "attn_drop": "attn_drop"}
"""Arguments that only releases up to 0.17 had, and what they are called here."""


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All by name, old names as ours; what cannot be honoured is refused."""
    names = [
        "embed_dim",
        "num_heads",
        "kernel_size",
        "stride",
        "dilation",
        "is_causal",
        "qkv_bias",
        "qk_scale",
        "proj_drop",
    ]
    if kwargs.keys() & OLD.keys():
        names.remove("stride")  # those releases had none
        del names[5:]  # nor one order of all that follows
    if len(args) > len(names):
        raise InvalidProblem(f"these arguments go by position: {', '.join(names)}; pass the others by name, got {args}")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if OLD.get(name, name) in given:
            raise InvalidProblem(f"{name} came twice, by position and by name, or by two names")
        given[OLD.get(name, name)] = value
    if given.pop("attn_drop", 0.0):
        raise Unsupported("attn_drop: dropout of attention weights is not offered; use proj_drop")
    return given


class NeighborhoodAttention1D(ours.NeighborhoodAttention1D):
    """`vicinal.nn.NeighborhoodAttention1D` with NATTEN's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**_arguments(args, kwargs))


class NeighborhoodAttention2D(ours.NeighborhoodAttention2D):
    """`vicinal.nn.NeighborhoodAttention2D` with NATTEN's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**_arguments(args, kwargs))


class NeighborhoodAttention3D(ours.NeighborhoodAttention3D):
    """`vicinal.nn.NeighborhoodAttention3D` with NATTEN's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(**_arguments(args, kwargs))


__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]
