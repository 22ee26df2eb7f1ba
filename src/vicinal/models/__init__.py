"""NAT and DiNAT, the models that neighborhood attention is known by, in plain PyTorch with timm's conventions."""

from __future__ import annotations

from typing import Any

from vicinal.errors import InvalidProblem
from vicinal.models import dinat, nat
from vicinal.models.transformer import Architecture, Features, NeighborhoodTransformer

ARCHITECTURES: dict[str, Architecture] = {**nat.ARCHITECTURES, **dinat.ARCHITECTURES}
"""The published variants by name."""

__all__ = ["ARCHITECTURES", "Architecture", "Features", "NeighborhoodTransformer", "create_model", "default_cfgs"]


def create_model(
    name: str, *, features_only: bool = False, out_indices: Any = None, **kwargs: Any
) -> NeighborhoodTransformer | Features:
    """A published variant by name, with random weights.

    Args:
        name: one of `ARCHITECTURES`.
        features_only: whether to give the maps of levels instead of logits, see `Features`.
        out_indices: which levels then; all by default.
        kwargs: as for `NeighborhoodTransformer`.

    Raises:
        InvalidProblem: if there is no such name, or the arguments do not fit each other.

    Example:
        >>> model = create_model("dinat_mini", num_classes=10)
        >>> sum(parameter.numel() for parameter in model.parameters())
        19476304
    """
    if name not in ARCHITECTURES:
        raise InvalidProblem(f"name must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if out_indices is not None and not features_only:
        raise InvalidProblem(f"out_indices needs features_only=True, got {out_indices!r} without it")
    model = NeighborhoodTransformer(ARCHITECTURES[name], **kwargs)
    return Features(model, out_indices) if features_only else model


def _cfg(architecture: Architecture) -> dict[str, Any]:
    stem = "patch_embed.proj.0" if architecture.tokens == "conv" else "patch_embed.proj"
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, architecture.img_size, architecture.img_size),
        "pool_size": None,
        "crop_pct": 0.9 if architecture.img_size == 224 else 1.0,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": stem,
        "classifier": "head",
        "license": "mit",
    }


default_cfgs: dict[str, dict[str, Any]] = {name: _cfg(each) for name, each in ARCHITECTURES.items()}
"""What timm wants to know of each: image size and statistics, names of the first and the last layer. No weights."""
