"""What `vicinal train` offers: tasks by name, with their data, models and recipes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from vicinal.train import brain, digits, video
from vicinal.train.loop import Task
from vicinal.train.recipe import Recipe


@dataclass(frozen=True)
class Choice:
    """A task: where its data come from, models to compare, a recipe that suits, and a picture of what was learnt."""

    load: Callable[[Path | None], Task]
    models: dict[str, Callable[[], nn.Module]]
    recipe: Recipe
    picture: Callable[[Any, nn.Module, Path], None] | None = None


TASKS = {
    "digits": Choice(lambda data: digits.Digits(digits.mnist(data)), digits.MODELS, Recipe(epochs=30, batch=256)),
    "brain": Choice(
        brain.template, brain.MODELS, Recipe(epochs=40, batch=8, averaging=0.99, warmup=2.0), brain.picture
    ),
    "video": Choice(video.clip, video.MODELS, Recipe(epochs=40, batch=8, averaging=0.99, warmup=2.0), video.picture),
}
"""By name."""
