"""The backends, in order of preference, and the choice among them.

No decorators and no registration: the tuple is the registry, its order is the policy.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from vicinal import tuned
from vicinal.backends import blocked, hopper, reference, triton
from vicinal.backends.base import Backend
from vicinal.backends.blocked import fused
from vicinal.backends.devices import present
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import Plan, make_plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

ALL: tuple[Backend, ...] = (hopper.backend, triton.backend, fused.backend, blocked.backend, reference.backend)

VARIABLE = "VICINAL_BACKEND"
"""The environment variable that names a backend where a call names none. `tuned` and `tuning` have one each."""


@dataclass(frozen=True)
class Explanation:
    """Which backends would run a problem, and why the others would not. Prints itself."""

    reasons: tuple[tuple[str, tuple[str, ...]], ...]
    chosen: str | None

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.reasons)
        lines: list[str] = []
        for name, reasons in self.reasons:
            mark = "<- chosen" if name == self.chosen else ""
            lines.append(f"{name:<{width}}  {'no ' if reasons else 'yes'}  {'; '.join(reasons) or mark}".rstrip())
        return "\n".join(lines)


def named(name: str, said: str = "backend") -> Backend:
    """The backend of that name; `said` is what named it, for the message if there is none.

    Raises:
        InvalidProblem: if there is none.
    """
    for backend in ALL:
        if backend.name == name:
            return backend
    raise InvalidProblem(f"{said} must be one of {', '.join(b.name for b in ALL)}, got {name!r}")


def explain(
    problem: Problem, hardware: Hardware | None = None, backend: str | None = None, *, needs_grad: bool = False
) -> Explanation:
    """Which backend would run `problem` on `hardware`, and why the others would not. Runs nothing.

    Args:
        problem: what is asked.
        hardware: where; `None` means this machine's accelerator, or its processor if it has none.
        backend: as in a call: a name to insist on, or `None` for the first that can.
        needs_grad: whether gradients will be asked for.

    Example:
        >>> print(explain(Problem.grid((8, 12), kernel_size=3), Hardware.named("a100-80gb")))
        hopper     no   needs sm_90, this is cuda sm_80
        triton     yes  <- chosen
        fused      no   runs on CPUs only, this is cuda
        blocked    yes
        reference  yes
    """
    hardware = present(_default_device()) if hardware is None else hardware
    reasons = tuple((candidate.name, _reasons(candidate, problem, hardware, needs_grad)) for candidate in ALL)
    name = backend or os.environ.get(VARIABLE)
    if name:
        willing = () if dict(reasons)[named(name, "backend" if backend else VARIABLE).name] else (name,)
    else:
        willing = tuple(candidate for candidate, why in reasons if not why)
    return Explanation(reasons, willing[0] if willing else None)


def _reasons(backend: Backend, problem: Problem, hardware: Hardware, needs_grad: bool) -> tuple[str, ...]:
    gradients = backend.why_not_gradients(problem, hardware) if needs_grad else ()
    return backend.why_not(problem, hardware) + gradients


def choose(problem: Problem, hardware: Hardware, name: str | None = None, *, needs_grad: bool = False) -> Backend:
    """The backend called `name`, or the first in `ALL` that will run the problem, gradients included if needed.

    A name is never overruled: if that backend will not run, it is an error. Where none is given,
    the environment variable `VICINAL_BACKEND` may name one.

    Raises:
        InvalidProblem: if there is no backend of that name.
        Unsupported: if it (or every one) declines; the message gives each one's reasons.
    """
    found = explain(problem, hardware, name, needs_grad=needs_grad)
    if found.chosen is not None:
        return named(found.chosen)
    name = name or os.environ.get(VARIABLE)
    who = f"backend {name!r} declines" if name else "no backend runs"
    raise Unsupported(f"{who} this problem ({problem}) on {hardware.name}:\n{found}")


def settle(
    problem: Problem, device: torch.device, name: str | None, tiling: Tiling | None, *, needs_grad: bool = False
) -> tuple[Backend, Plan]:
    """Who computes `problem` on `device`, and how it is cut: as `tiling` says, or as that backend likes it best.

    Raises:
        InvalidProblem, Unsupported: as `choose`.
    """
    hardware = present(device)
    chosen = choose(problem, hardware, name, needs_grad=needs_grad)
    return chosen, make_plan(problem, tiling or preferred(chosen, problem, hardware))


def preferred(backend: Backend, problem: Problem, hardware: Hardware) -> Tiling:
    """How `backend` cuts a problem: as was measured to be fastest, if that is remembered, or as it likes it best."""
    remembered = tuned.pick(backend.name, "forward", problem, hardware)
    tilings = backend.tilings(problem, hardware)
    if remembered is not None:
        tilings = list(tilings)
        if remembered.tiling in tilings:
            return remembered.tiling
    return next(iter(tilings))


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
