"""One training run by several backends: `same_curve.py OUT.csv --data CLIP`, the loss of every step of each.

A small U-shaped network with windows takes noise from pieces of a video, in mixed precision. All runs begin with the
same weights. Two runs of `reference` say what noise is: one in float32 throughout, and one that sees other pieces.
"""

from __future__ import annotations

import argparse
import csv
import time
from dataclasses import replace
from pathlib import Path

import torch

from vicinal.errors import InvalidProblem, Unsupported
from vicinal.models.unet import UNet
from vicinal.nn import NeighborhoodAttention
from vicinal.train.video import DINAT, Video, clip

SHAPE = replace(DINAT, embed_dim=64, head_dim=32)
"""Heads of 32, which every backend takes."""

RUNS = {  # backend, precision, seed of the pieces and their noise
    "hopper": ("hopper", "bfloat16", 0),
    "reference": ("reference", "bfloat16", 0),
    "reference float32": ("reference", "float32", 0),
    "reference other pieces": ("reference", "bfloat16", 1),
}


def losses(task: Video, backend: str, precision: str, seed: int, steps: int, batch: int, device: str) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    model = UNet(SHAPE).to(device)
    for module in model.modules():
        if isinstance(module, NeighborhoodAttention):
            module.backend = backend
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    numbers = torch.Generator().manual_seed(seed)
    found: list[torch.Tensor] = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = task.loss(model, torch.arange(batch), numbers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).tolist()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("--data", type=Path)
    options.add_argument("--steps", type=int, default=200)
    options.add_argument("--batch", type=int, default=4)
    options.add_argument("--crop", type=int, nargs=3, default=(6, 48, 64))
    options.add_argument("--device", default="cuda")
    options.add_argument("--ours", default="hopper", help="the backend to compare")
    given = options.parse_args()
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        options.error("there is no accelerator that PyTorch calls cuda; pass --device cpu --ours blocked")
    try:
        task = clip(given.data, crop=tuple(given.crop)).to(torch.device(given.device))
    except (InvalidProblem, Unsupported) as error:
        options.error(str(error))
    columns: dict[str, list[float]] = {}
    for name, (backend, *run) in RUNS.items():
        begin = time.perf_counter()
        backend = given.ours if name == "hopper" else backend
        columns[name] = losses(task, backend, *run, given.steps, given.batch, given.device)
        last = columns[name][-given.steps // 4 :]
        print(f"{name}: {sum(last) / len(last):.6g} at the end, {time.perf_counter() - begin:.0f} s", flush=True)
    for name, values in columns.items():
        pairs = list(zip(values, columns["reference"], strict=True))
        apart = sum((a / b - 1) ** 2 for a, b in pairs) / len(pairs)
        print(f"{name}: {100 * apart**0.5:.3g}% from reference, root mean square over steps")
    with given.out.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["step", *columns])
        table.writerows(
            [i + 1, *(f"{value:.6g}" for value in row)] for i, row in enumerate(zip(*columns.values(), strict=True))
        )


if __name__ == "__main__":
    main()
