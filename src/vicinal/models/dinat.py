"""Dilated Neighborhood Attention Transformers: NAT with every other window dilated. Source: arXiv 2209.15001."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vicinal.models.nat import ARCHITECTURES as NAT
from vicinal.models.transformer import Architecture, NeighborhoodTransformer

AT_224 = ((1, 8), (1, 4), (1, 2), (1,))
"""Dilations with which 7x7 windows span the maps of a 224x224 image."""

AT_384 = ((1, 13), (1, 6), (1, 3), (1,))
"""Those of a 384x384 image."""

_LARGE = Architecture(192, (3, 4, 18, 5), (6, 12, 24, 48), 2.0, dilations=AT_224, drop_path_rate=0.35)
_SWIN = Architecture(96, (2, 2, 18, 2), (3, 6, 12, 24), 4.0, dilations=AT_224, tokens=4, drop_path_rate=0.3)
_SWIN_LARGE = replace(_SWIN, embed_dim=192, num_heads=(4, 8, 16, 32), drop_path_rate=0.35)

ARCHITECTURES = {
    "dinat_mini": replace(NAT["nat_mini"], dilations=AT_224),
    "dinat_tiny": replace(NAT["nat_tiny"], dilations=AT_224),
    "dinat_small": replace(NAT["nat_small"], dilations=AT_224, layer_scale=None),
    "dinat_base": replace(NAT["nat_base"], dilations=AT_224),
    "dinat_large": _LARGE,
    "dinat_large_384": replace(_LARGE, dilations=AT_384, img_size=384),
    "dinat_large_384_11x11": replace(_LARGE, kernel_size=11, img_size=384),
    "dinat_s_tiny": replace(_SWIN, depths=(2, 2, 6, 2), drop_path_rate=0.2),
    "dinat_s_small": _SWIN,
    "dinat_s_base": replace(_SWIN, embed_dim=128, num_heads=(4, 8, 16, 32), drop_path_rate=0.5),
    "dinat_s_large": _SWIN_LARGE,
    "dinat_s_large_384": replace(_SWIN_LARGE, dilations=AT_384, img_size=384),
    "dinat_isotropic_small": replace(NAT["nat_isotropic_small"], dilations=((1, 2),)),
    "dinat_isotropic_base": replace(NAT["nat_isotropic_base"], dilations=((1, 2),)),
}
"""The published variants by name."""


def dinat_mini(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-Mini, 20 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_mini"], **kwargs)


def dinat_tiny(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-Tiny, 28 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_tiny"], **kwargs)


def dinat_small(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-Small, 51 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_small"], **kwargs)


def dinat_base(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-Base, 90 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_base"], **kwargs)


def dinat_large(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-Large, 201 million parameters; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_large"], **kwargs)


def dinat_large_384(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-Large with dilations for 384x384 images; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_large_384"], **kwargs)


def dinat_large_384_11x11(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-Large with 11x11 windows, for 384x384 images; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_large_384_11x11"], **kwargs)


def dinat_s_tiny(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT_s-Tiny, 28 million parameters: Swin-T with our windows; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_s_tiny"], **kwargs)


def dinat_s_small(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT_s-Small, 50 million parameters: Swin-S with our windows; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_s_small"], **kwargs)


def dinat_s_base(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT_s-Base, 88 million parameters: Swin-B with our windows; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_s_base"], **kwargs)


def dinat_s_large(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT_s-Large, 197 million parameters: Swin-L with our windows; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_s_large"], **kwargs)


def dinat_s_large_384(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT_s-Large with dilations for 384x384 images; arguments as `NeighborhoodTransformer`."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_s_large_384"], **kwargs)


def dinat_isotropic_small(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-iso-Small, 22 million parameters: one level of 16x16 pixels a token, as in ViT."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_isotropic_small"], **kwargs)


def dinat_isotropic_base(**kwargs: Any) -> NeighborhoodTransformer:
    """DiNAT-iso-Base, 86 million parameters: one level of 16x16 pixels a token, as in ViT."""
    return NeighborhoodTransformer(ARCHITECTURES["dinat_isotropic_base"], **kwargs)
