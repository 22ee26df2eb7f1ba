"""Neighborhood Attention Transformers: Mini to Base, and isotropic ones. Source: arXiv 2204.07143 and 2209.15001."""

from __future__ import annotations

from typing import Any

from vicinal.models.transformer import Architecture, NeighborhoodTransformer

ARCHITECTURES = {
    "nat_mini": Architecture(64, (3, 4, 6, 5), (2, 4, 8, 16), 3.0),
    "nat_tiny": Architecture(64, (3, 4, 18, 5), (2, 4, 8, 16), 3.0),
    "nat_small": Architecture(96, (3, 4, 18, 5), (3, 6, 12, 24), 2.0, layer_scale=1e-5, drop_path_rate=0.3),
    "nat_base": Architecture(128, (3, 4, 18, 5), (4, 8, 16, 32), 2.0, layer_scale=1e-5, drop_path_rate=0.5),
    "nat_isotropic_small": Architecture(384, (12,), (12,), 4.0, dilations=((1,),), tokens=16, drop_path_rate=0.1),
    "nat_isotropic_base": Architecture(768, (12,), (24,), 4.0, dilations=((1,),), tokens=16, drop_path_rate=0.4),
}
"""The published variants by name."""


def nat_mini(**kwargs: Any) -> NeighborhoodTransformer:
    """NAT-Mini, 20 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["nat_mini"], **kwargs)


def nat_tiny(**kwargs: Any) -> NeighborhoodTransformer:
    """NAT-Tiny, 28 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["nat_tiny"], **kwargs)


def nat_small(**kwargs: Any) -> NeighborhoodTransformer:
    """NAT-Small, 51 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["nat_small"], **kwargs)


def nat_base(**kwargs: Any) -> NeighborhoodTransformer:
    """NAT-Base, 90 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["nat_base"], **kwargs)


def nat_isotropic_small(**kwargs: Any) -> NeighborhoodTransformer:
    """NAT-iso-Small, 22 million parameters: one level of 16x16 pixels a token, as in ViT."""
    return NeighborhoodTransformer(ARCHITECTURES["nat_isotropic_small"], **kwargs)


def nat_isotropic_base(**kwargs: Any) -> NeighborhoodTransformer:
    """NAT-iso-Base, 86 million parameters: one level of 16x16 pixels a token, as in ViT."""
    return NeighborhoodTransformer(ARCHITECTURES["nat_isotropic_base"], **kwargs)
