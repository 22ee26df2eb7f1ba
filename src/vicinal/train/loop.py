"""The loop: any model, any task, any number of processes; stopped at any moment, it goes on to the same numbers.

What is random in an epoch depends on the seed and the number of the epoch alone, so that a run needs to keep no
state of generators.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from vicinal._files import write_whole
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.train.recipe import Recipe

LAST = "last.pt"
"""What a run goes on from."""

History = list[dict[str, float]]


class Task(Protocol):
    """What is to be learnt: examples, what is lost on some, and how good a model is on what was held out."""

    def __len__(self) -> int:
        """Examples of an epoch."""
        ...

    def facts(self) -> dict[str, Any]:
        """What tells it from other tasks, for the record."""
        ...

    def to(self, device: torch.device) -> Task:
        """The same on a device."""
        ...

    def loss(self, model: nn.Module, picked: Tensor, numbers: torch.Generator) -> Tensor:
        """Mean loss on the examples with these numbers, changed at random by `numbers`, of the CPU."""
        ...

    def measure(self, model: nn.Module) -> dict[str, float]:
        """What the history tells of a model, by name."""
        ...


class Run:
    """A model under training, and all that it needs to go on.

    Args:
        model: changed in place.
        task: what it is to learn.
        recipe: how.
        cpu: whether to leave accelerators alone.

    Raises:
        InvalidProblem: if a step would take more examples than there are.
        Unsupported: without the package accelerate.

    Example:
        >>> from vicinal.train.digits import Digits, Pictures
        >>> digits, labels = torch.randn(60, 1, 28, 28), torch.arange(60) % 10
        >>> task = Digits(Pictures(digits, labels, digits[:10], labels[:10]))
        >>> run = Run(nn.Sequential(nn.Flatten(), nn.Linear(3136, 10)), task, Recipe(epochs=2, batch=30))
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     [row["epoch"] for row in run.fit(folder)]
        [1, 2]
    """

    def __init__(self, model: nn.Module, task: Task, recipe: Recipe, *, cpu: bool = False) -> None:
        if recipe.batch > len(task):
            raise InvalidProblem(f"batch must be at most the {len(task)} examples of an epoch, got {recipe.batch}")
        self.machine = machine = _accelerator(cpu)
        if recipe.batch % machine.num_processes:
            raise InvalidProblem(
                f"batch must be a multiple of the {machine.num_processes} processes, got {recipe.batch}"
            )
        self.recipe, self.task, self.history = recipe, task.to(machine.device), History()
        self.model = model.to(machine.device)
        # `use_buffers` is left out: the models here have none to average.
        self.average = AveragedModel(self.model, multi_avg_fn=averaging(recipe.averaging))
        keeps = getattr(model, "no_weight_decay", set[str])()
        groups = {True: list[nn.Parameter](), False: list[nn.Parameter]()}
        for name, parameter in model.named_parameters():
            groups[parameter.ndim > 1 and name not in keeps].append(parameter)
        decays = {True: recipe.decay, False: 0.0}
        self.optimizer = torch.optim.AdamW(
            [{"params": group, "weight_decay": decays[decay]} for decay, group in groups.items() if group],
            lr=recipe.rate,
        )
        self.prepared, self.stepper = machine.prepare(self.model, self.optimizer)

    @property
    def steps(self) -> int:
        """Of an epoch; examples that fill no step are left for another epoch."""
        return len(self.task) // self.recipe.batch

    def fit(self, folder: str | Path, tell: Callable[[int, int, str], None] | None = None) -> History:
        """Train to the end of the recipe, from where `folder` has it, if it does.

        After every epoch `last.pt` (all that is needed to go on) and `history.csv` are written, each whole or not at
        all. An interrupted run that is called again gives the same numbers as one that was not, on CPUs to the bit.

        Args:
            folder: of this run; made if it is not there.
            tell: called after each step with steps done, steps in all, and what is being done.

        Returns:
            One row per epoch: its number, learning rate, training loss, seconds, and what the task measures of the
            averaged weights. `self.average.module` is the model to keep.

        Raises:
            InvalidProblem: if the folder holds a run of another recipe, task or model, or the loss is not finite.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / LAST).is_file():
            self.load(folder / LAST)
        while len(self.history) < self.recipe.epochs:
            row = self._epoch(len(self.history), tell)
            self.history.append(row)
            if self.machine.is_main_process:
                self.save(folder / LAST)
                write_whole(folder / "history.csv", lambda file: file.write(_table(self.history).encode()))
            self.machine.wait_for_everyone()
        return self.history

    def _epoch(self, epoch: int, tell: Callable[[int, int, str], None] | None) -> dict[str, float]:
        begin, device, rank = time.perf_counter(), self.machine.device, self.machine.process_index
        order = torch.randperm(
            len(self.task), generator=torch.Generator().manual_seed(number_of(self.recipe.seed, epoch))
        )
        numbers = torch.Generator().manual_seed(number_of(self.recipe.seed, epoch, rank))
        lost, total = torch.zeros((), device=device), self.recipe.epochs * self.steps
        self.prepared.train()
        # Dropout takes its numbers from PyTorch's own generators; whoever called us gets them back as they were.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(number_of(self.recipe.seed, epoch, rank, 1))
            for step in range(self.steps):
                picked = order[step * self.recipe.batch : (step + 1) * self.recipe.batch]
                lost += self._step(epoch + step / self.steps, picked[rank :: self.machine.num_processes], numbers)
                if tell is not None:
                    tell(epoch * self.steps + step + 1, total, f"epoch {epoch + 1} of {self.recipe.epochs}")
        loss = float(self.machine.reduce(lost, "mean")) / self.steps
        if not math.isfinite(loss):
            raise InvalidProblem(
                f"rate must be lower: the loss is {loss} in epoch {epoch + 1}, got rate {self.recipe.rate}"
            )
        self.average.eval()
        with torch.no_grad():
            measured = self.task.measure(self.average.module)
        rate = self.recipe.rate_at(epoch)
        return {"epoch": epoch + 1, "rate": rate, "loss": loss, "seconds": time.perf_counter() - begin, **measured}

    def _step(self, epoch: float, picked: Tensor, numbers: torch.Generator) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(epoch)
        lowers = self.recipe.precision == "bfloat16"
        with torch.autocast(self.machine.device.type, torch.bfloat16, enabled=lowers):
            loss = self.task.loss(self.prepared, picked.to(self.machine.device), numbers)
        self.optimizer.zero_grad()
        self.machine.backward(loss)
        self.machine.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.stepper.step()
        self.average.update_parameters(self.model)
        return loss.detach()

    def facts(self) -> dict[str, Any]:
        """What tells this run from others."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        return {"recipe": asdict(self.recipe), "task": self.task.facts(), "parameters": count}

    def save(self, path: Path) -> None:
        """Write all that is needed to go on, whole or not at all."""
        state = {
            "facts": json.dumps(self.facts()),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_whole(path, lambda file: file.write(buffer.getbuffer()))

    def load(self, path: Path) -> None:
        """Go on from where a file was written.

        Raises:
            InvalidProblem: if that was another run's, naming what differs, or it is no such file.
        """
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.machine.device, weights_only=True)
            theirs: dict[str, Any] = json.loads(state["facts"])
        except Exception as error:  # whatever a reader of pickles makes of other bytes
            raise InvalidProblem(f"out holds a {path.name} that no run wrote, use another folder: {error!r}") from error
        ours = json.loads(json.dumps(self.facts()))
        for kind, wanted in ours.items():
            if theirs.get(kind) != wanted:
                raise InvalidProblem(
                    f"out holds another run, use another folder or the same {kind}: "
                    f"{path} has {theirs.get(kind)}, got {wanted}"
                )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]


def averaging(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential average whose decay grows from 0.1 to `decay`: after `n` steps at most (1 + n) / (10 + n)."""

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        n = int(count)
        share = 1 - min(decay, (1 + n) / (10 + n))
        for kept, new in zip(averaged, current, strict=True):
            kept.lerp_(new, share)

    return update


def number_of(*parts: int) -> int:
    """A seed from several numbers: seeds that differ in one of them have nothing in common."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _accelerator(cpu: bool) -> Any:
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        if error.name != "accelerate":
            raise
        raise Unsupported("training needs the package accelerate; install it as pip install 'vicinal[train]'") from None
    return Accelerator(cpu=cpu)


def _table(history: History) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(history[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([{name: f"{value:.6g}" for name, value in row.items()} for row in history])
    return text.getvalue()
