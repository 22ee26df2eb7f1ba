"""What this machine has: packages, devices, and the backends that run on them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from vicinal.errors import InvalidProblem


def torch_device(name: str) -> torch.device:
    """A device by name, if this machine has it."""
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("tensors there hold no numbers")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidProblem(f"device must be one that this machine has, such as cpu, got {name!r}: {reason}") from None
    return device


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, by package."""
    import vicinal

    found = {"vicinal": vicinal.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cuda"] = torch.version.cuda or "none, in this build of torch"
    return found


def devices() -> list[dict[str, Any]]:
    """The processor and every accelerator, each with the backends' reasons not to run there, if they have any."""
    found = [_device(torch.device("cpu"), f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        arch = f"sm_{properties.major}{properties.minor}"
        found.append(_device(torch.device("cuda", index), f"{properties.name}, {arch}, {memory:.0f} GiB"))
    return found


def _device(device: torch.device, name: str) -> dict[str, Any]:
    from vicinal.backends import explain, present
    from vicinal.problem import Problem

    # What people run most there; `vicinal explain` answers for any other problem.
    problem = Problem.grid((64, 64), 7, heads=4, dtype="float32" if device.type == "cpu" else "bfloat16")
    return {
        "device": str(device),
        "name": name,
        "problem": f"{problem}, {problem.dtype}",
        "backends": dict(explain(problem, present(device)).reasons),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
