"""`train`: small models on real data that packages ship."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from vicinal.cli._console import Json, progress, say, say_json
from vicinal.errors import InvalidProblem


def train(
    task: Annotated[str, typer.Argument(metavar="TASK", help="digits, brain or video.")],
    model: Annotated[str, typer.Option("--model", "-m", help="dinat, convolutions; of digits also dense.")] = "dinat",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; one that holds it is gone on with.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder or file of the data, if no package has it.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data, if not the task's own.")] = None,
    batch: Annotated[int | None, typer.Option(help="Examples a step, likewise.")] = None,
    rate: Annotated[float | None, typer.Option(help="Highest learning rate, likewise.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32, or bfloat16 for mixed precision.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Leave accelerators alone.")] = False,
    as_json: Json = False,
) -> None:
    """Train a small model: tell digits apart, find grey and white matter, take noise from a video.

    Writes history.csv, curves.png, run.json and last.pt, from which an interrupted run goes on. Several devices:
    `torchrun --nproc-per-node N -m vicinal train ...`.
    """
    from vicinal.train.tasks import TASKS

    if task not in TASKS:
        raise InvalidProblem(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    choice = TASKS[task]
    if model not in choice.models:
        raise InvalidProblem(f"model must be one of {', '.join(choice.models)}, got {model!r}")
    given = {"epochs": epochs, "batch": batch, "rate": rate, "precision": precision, "seed": seed}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if epochs is not None:
        changes["warmup"] = min(choice.recipe.warmup, epochs / 2)
    recipe = replace(choice.recipe, **changes)
    folder = out or Path(f"{task}-{model}")
    if folder.exists() and not folder.is_dir():
        raise InvalidProblem(f"out must be a folder, got the file {str(folder)!r}")
    with progress(f"reading {task}") as update:
        problem = choice.load(data)
        import torch

        from vicinal.train import Run
        from vicinal.train.loop import number_of

        with torch.random.fork_rng():
            torch.manual_seed(number_of(seed))
            network = choice.models[model]()
        run = Run(network, problem, recipe, cpu=cpu)
        history = run.fit(folder, update)
    run.machine.end_training()  # the processes part
    if not run.machine.is_main_process:
        return
    facts = {"model": model, **run.facts(), "device": _device(run.machine.device), "last": history[-1]}
    _write(folder, facts, history)
    if choice.picture is not None:
        choice.picture(run.task, run.average.module, folder / "result.png")
    if as_json:
        say_json(facts)
    else:
        found = ", ".join(f"{name} {value:.4g}" for name, value in history[-1].items() if name not in ("epoch", "rate"))
        say(f"{task}, {model}, {facts['parameters']:,} parameters, {len(history)} epochs: {found}; see {folder}")


def _device(device: Any) -> str:
    import platform

    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}"


def _write(folder: Path, facts: dict[str, Any], history: list[dict[str, float]]) -> None:
    from vicinal._files import write_whole
    from vicinal.train.curves import draw_curves

    text = json.dumps(facts, indent=2) + "\n"
    write_whole(folder / "run.json", lambda file: file.write(text.encode()))
    draw_curves({facts["model"]: history}, folder / "curves.png")
