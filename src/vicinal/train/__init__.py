"""Training that runs on a laptop and scales: mixed precision, averaged weights, resumable, on real data."""

from vicinal.train.loop import Run, Task
from vicinal.train.recipe import Recipe

__all__ = ["Recipe", "Run", "Task"]
