"""Our models among timm's: `timm.create_model("dinat_tiny")` after `register`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from vicinal.models import ARCHITECTURES
from vicinal.models import default_cfgs as plain_cfgs
from vicinal.models.transformer import NeighborhoodTransformer

default_cfgs: dict[str, Any] = {}
"""timm's own records of our variants, made by `register`: timm looks for them here."""


def register() -> None:
    """Offer every variant of `vicinal.models` by name to `timm.create_model`, `timm.list_models` and timm's scripts.

    `features_only=True` gives the maps of levels. There are no weights to download: `pretrained=True` is timm's
    error. Tried with timm 1.0.31.

    Example:
        >>> register()  # doctest: +SKIP
        >>> timm.create_model("dinat_tiny", num_classes=10, features_only=True)  # doctest: +SKIP
    """
    registry: Any = importlib.import_module("timm.models")
    if not default_cfgs:
        default_cfgs.update(registry.generate_default_cfgs(plain_cfgs))
    for name in ARCHITECTURES:
        if not registry.is_model(name):
            registry.register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., Any]:
    """What timm calls to build that variant."""

    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        builder: Any = importlib.import_module("timm.models")
        levels = tuple(range(len(ARCHITECTURES[name].depths)))
        return builder.build_model_with_cfg(
            partial(NeighborhoodTransformer, ARCHITECTURES[name]),
            name,
            pretrained,
            feature_cfg={"out_indices": levels, "feature_cls": "getter"},
            **kwargs,
        )

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"`vicinal.models.create_model({name!r})`, as timm builds models."
    return build
