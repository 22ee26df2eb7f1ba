"""NATTEN's layers by ours, with the arguments of today and those up to 0.17 (`dim`, `rel_pos_bias`, `bias`)."""

from __future__ import annotations

from typing import Any

from vicinal import nn as ours
from vicinal.errors import Unsupported


def _arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Old names as ours; what cannot be honoured is refused."""
    if kwargs.pop("attn_drop", 0.0):
        raise Unsupported("attn_drop: dropout of attention weights is not offered; use proj_drop")
    for old, new in (("dim", "embed_dim"), ("rel_pos_bias", "position_bias"), ("bias", "position_bias")):
        if old in kwargs:
            kwargs[new] = kwargs.pop(old)
    return kwargs


class NeighborhoodAttention1D(ours.NeighborhoodAttention1D):
    """`vicinal.nn.NeighborhoodAttention1D` with NATTEN's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_arguments(kwargs))


class NeighborhoodAttention2D(ours.NeighborhoodAttention2D):
    """`vicinal.nn.NeighborhoodAttention2D` with NATTEN's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_arguments(kwargs))


class NeighborhoodAttention3D(ours.NeighborhoodAttention3D):
    """`vicinal.nn.NeighborhoodAttention3D` with NATTEN's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **_arguments(kwargs))


__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]
