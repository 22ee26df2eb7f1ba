"""What decides a training run, next to the model and the data."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vicinal.errors import InvalidProblem


@dataclass(frozen=True)
class Recipe:
    """AdamW, a warm-up and half a cosine, averaged weights.

    Args:
        epochs, batch: passes over the data, and examples a step (of all processes together).
        rate: highest learning rate, reached after `warmup` epochs and falling to 0 in half a cosine.
        decay: of weights; vectors, and what a model's `no_weight_decay()` names, do not decay.
        averaging: decay of the exponential average of weights, which is what is tested. It begins at 0.1 and grows,
            so that the random weights of the start are soon forgotten.
        clip: largest norm of a gradient.
        precision: `"float32"`, or `"bfloat16"` for mixed precision.
        seed: of everything random.

    Raises:
        InvalidProblem: naming the argument that makes no sense.

    Source: AdamW, arXiv 1711.05101; the cosine, arXiv 1608.03983.
    """

    epochs: int = 20
    batch: int = 128
    rate: float = 2e-3
    warmup: float = 1.0
    decay: float = 0.05
    averaging: float = 0.995
    clip: float = 1.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "batch": (self.batch >= 1, "at least 1"),
            "rate": (0 < self.rate < math.inf, "positive"),
            "warmup": (0 <= self.warmup <= self.epochs, f"between 0 and epochs, {self.epochs}"),
            "decay": (0 <= self.decay < math.inf, "0 or positive"),
            "averaging": (0 <= self.averaging < 1, "at least 0 and below 1"),
            "clip": (self.clip > 0, "positive"),
            "precision": (self.precision in ("float32", "bfloat16"), "float32 or bfloat16"),
            "seed": (0 <= self.seed < 2**63, "0 or positive"),
        }
        for name, (holds, wanted) in ranges.items():
            if not holds:
                raise InvalidProblem(f"{name} must be {wanted}, got {getattr(self, name)!r}")

    def rate_at(self, epoch: float) -> float:
        """The learning rate after so many epochs, whole or not.

        Example:
            >>> recipe = Recipe(epochs=5, rate=1.0, warmup=1.0)
            >>> [round(recipe.rate_at(epoch), 3) for epoch in (0, 0.5, 1, 3, 5)]
            [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        if epoch < self.warmup:
            return self.rate * epoch / self.warmup
        left = self.epochs - self.warmup
        return self.rate * (1 + math.cos(math.pi * min((epoch - self.warmup) / left, 1))) / 2 if left else self.rate
