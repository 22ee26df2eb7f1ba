"""Run in several processes: two epochs of a task without anything random but the order of examples."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicinal.train import Recipe, Run

SHARES: set[int] = set()


@dataclass(frozen=True)
class Line:
    """Fitting a plane to points."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def facts(self) -> dict[str, Any]:
        return {"name": "line"}

    def to(self, device: torch.device) -> Line:
        return Line(self.x.to(device), self.y.to(device))

    def loss(self, model: nn.Module, picked: Tensor, numbers: torch.Generator) -> Tensor:
        SHARES.add(len(picked))
        return nn.functional.mse_loss(model(self.x[picked]), self.y[picked])

    def measure(self, model: nn.Module) -> dict[str, float]:
        return {"error": float(nn.functional.mse_loss(model(self.x), self.y))}


if __name__ == "__main__":
    numbers = torch.Generator().manual_seed(0)
    x = torch.randn(24, 5, generator=numbers)
    torch.manual_seed(1)
    run = Run(nn.Linear(5, 3), Line(x, x[:, :3] * 2), Recipe(epochs=2, batch=8, rate=1e-2), cpu=True)
    run.fit(sys.argv[1])
    seen = Path(sys.argv[1]) / f"seen-{run.machine.process_index}.txt"
    seen.write_text(f"{run.machine.num_processes} {SHARES}")
    run.machine.wait_for_everyone()
    run.machine.end_training()
