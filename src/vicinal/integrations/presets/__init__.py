"""Published windows for known models, as data: one JSON file each, with its source.

{"name": ..., "source": ..., "model": {"class", "layers", "heads", "head_dim"},
 "base": grid that the numbers are for, "dense_steps": ..., "steps": ...,
 "windows": {label: {"kernel_size", "stride", "dilation"} or null for dense},
 "layers": [[label, number of consecutive layers], ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from vicinal.errors import InvalidProblem
from vicinal.integrations.sparsity import Window


@dataclass(frozen=True)
class Preset:
    """Windows for every layer of one model.

    Args:
        name: of its file.
        source: where the numbers were published.
        model: `class`, `layers`, `heads` and `head_dim` of the only model that it is for.
        base: the grid that it is for; on others the windows scale with each axis.
        windows: one per layer, `None` where it is dense.
        dense_steps: how many steps stay dense at first, out of `steps`.
        steps: denoising steps of the published setting.

    Example:
        >>> found = load_preset("hunyuan-video")
        >>> found.base, found.dense_steps, found.steps
        ((30, 48, 80), 15, 50)
    """

    name: str
    source: str
    model: Mapping[str, Any]
    base: tuple[int, ...]
    windows: tuple[Window | None, ...]
    dense_steps: int
    steps: int


def preset_names() -> tuple[str, ...]:
    """What `load_preset` knows.

    Example:
        >>> "cosmos-predict2-2b" in preset_names()
        True
    """
    found = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in found if name.endswith(".json")))


def load_preset(name: str) -> Preset:
    """A preset by name.

    Args:
        name: one of `preset_names()`.

    Raises:
        InvalidProblem: if there is none of that name.

    Example:
        >>> load_preset("cosmos-predict2-14b").windows[27] is None
        True
    """
    if name not in preset_names():
        raise InvalidProblem(f"preset must be one of {', '.join(preset_names())}, got {name!r}")
    data = json.loads(files(__name__).joinpath(f"{name}.json").read_text())
    base = tuple(data["base"])
    kinds = {
        label: None if fields is None else Window(**{key: tuple(value) for key, value in fields.items()}, base=base)
        for label, fields in data["windows"].items()
    }
    windows = tuple(kinds[label] for label, count in data["layers"] for _ in range(count))
    return Preset(name, data["source"], data["model"], base, windows, data["dense_steps"], data["steps"])
