"""Measure what the cost model leaves open, and remember the best: only when asked to.

Asked by `tune`, by the command `vicinal tune`, or for all calls inside `with tuning():` (or of a process with
`VICINAL_TUNE=1`): then the first call of each new problem takes seconds longer. No call ever tunes by itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from statistics import median
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from vicinal import backends, tuned
from vicinal._clock import mark
from vicinal.backends.base import Backend, Inputs
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import Plan, make_plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling
from vicinal.tuned import Choice, Entry, Key, fingerprint

VARIABLE = "VICINAL_TUNE"
"""Set to 1, all calls of the process tune as inside `with tuning():`."""

MOST = 16
"""Choices measured for a pass, at most."""

FINALISTS = 1.1
"""After a first look, those that take up to so many times the best one's time are measured in earnest."""

WORTH = 0.99
"""A choice replaces the cost model's if it takes less than this share of its time: noise decides nothing."""

Progress = Callable[[str, int, int], None]


class Step(NamedTuple):
    """A pass that is measured: the choice that is tried, and the call."""

    insisted: dict[Key, Choice]
    call: Callable[[], object]

    def run(self) -> object:
        with tuned.insist(self.insisted), torch.no_grad():
            return self.call()

    def clock(self, device: torch.device) -> float:
        with tuned.insist(self.insisted), torch.no_grad():
            self.call()  # what calls keep of a choice is made anew whenever it is insisted on
            return _clock(self.call, device)


@runtime_checkable
class Tunable(Protocol):
    """A backend that leaves more open than the tiles of its forward pass."""

    def choices(self, what: str, problem: Problem, hardware: Hardware) -> Iterable[Choice]:
        """Ways worth trying for a pass, the default first."""
        ...

    @property
    def gradient_passes(self) -> tuple[str, ...]:
        """Names of the passes of `backward` that have choices of their own."""
        ...


@dataclass(frozen=True)
class Finding:
    """What measuring one pass of a problem gave. Prints itself."""

    backend: str
    what: str
    entry: Entry
    tried: int

    def __str__(self) -> str:
        gain = 1 - self.entry.milliseconds / self.entry.untuned_milliseconds
        return (
            f"{self.backend} {self.what}: {self.entry.choice}, {self.entry.milliseconds:.3g} ms "
            f"({gain:.0%} less than the cost model's first), best of {self.tried}"
        )


def choices(backend: Backend, what: str, problem: Problem, hardware: Hardware) -> list[Choice]:
    """What is open for a pass, the default first."""
    if isinstance(backend, Tunable):
        return list(islice(backend.choices(what, problem, hardware), MOST))
    if what != "forward":
        return []
    tilings = islice(backend.tilings(problem, hardware), MOST)
    return [Choice(tiling.q_tile, tiling.kv_tile) for tiling in tilings if tiling.kv_origin == "free"]


def tune(
    problem: Problem,
    *,
    device: torch.device | str = "cuda",
    backend: str | None = None,
    gradients: bool = True,
    keep: bool = True,
    progress: Progress | None = None,
) -> list[Finding]:
    """Measure the ways to cut a problem, and remember the best of each pass.

    Args:
        problem: what is asked; tensors of random numbers are made for it.
        device: where to run.
        backend: whose choices; by default who would run it.
        gradients: whether to tune the passes of the backward pass too, if the backend has some.
        keep: whether to write what was found to the user's file, see `vicinal.tuned.cache_folder`.
        progress: called with what is measured, the number of the step from 0, and how many there are.

    Returns:
        A `Finding` per pass that leaves something open.

    Raises:
        InvalidProblem, Unsupported: if no backend, or not the one named, runs the problem there.
    """
    place = torch.device(device)
    place = torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place
    hardware = backends.present(place)
    chosen = backends.choose(problem, hardware, backend)
    with _alone():
        return _tune(chosen, problem, place, hardware, gradients, keep, progress)


def _tune(
    chosen: Backend,
    problem: Problem,
    place: torch.device,
    hardware: Hardware,
    gradients: bool,
    keep: bool,
    progress: Progress | None,
) -> list[Finding]:
    passes = _passes(chosen, gradients and not chosen.why_not_gradients(problem, hardware))
    inputs = _numbers(problem, place)
    found: list[Finding] = []
    entries: dict[Key, Entry] = {}
    for i, what in enumerate(passes):
        steps = _steps(chosen, what, problem, hardware, inputs)
        if len(steps) < 2:
            continue
        if progress is not None:
            progress(f"{chosen.name} {what}", i, len(passes))
        times = _measure(steps, place)
        default = next(iter(steps))
        best = min(times, key=lambda choice: times[choice])
        best = best if times[best] < WORTH * times[default] else default
        entry = Entry(best, times[best], times[default])
        entries[chosen.name, what, fingerprint(problem)] = entry
        found.append(Finding(chosen.name, what, entry, len(times)))
    if keep and entries:
        tuned.remember(hardware.name, entries)
    return found


def _passes(chosen: Backend, needs_grad: bool) -> tuple[str, ...]:
    gradients = chosen.gradient_passes if needs_grad and isinstance(chosen, Tunable) else ()
    return ("forward", *gradients)


def _numbers(problem: Problem, device: torch.device) -> Inputs:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=getattr(torch, problem.dtype), device=device)

    grid, more = (problem.batch, *problem.shape), (problem.batch, problem.additional)
    query = draw(*grid, problem.heads, problem.head_dim)
    key, value = (draw(*grid, problem.heads_kv, dim) for dim in (problem.head_dim, problem.head_dim_v))
    inputs = Inputs(query, key, value, position_bias=draw(*problem.bias_shape) if problem.position_bias else None)
    if not problem.additional:
        return inputs
    keys, values = (draw(*more, problem.heads_kv, dim) for dim in (problem.head_dim, problem.head_dim_v))
    return inputs._replace(additional_keys=keys, additional_values=values)


def _steps(chosen: Backend, what: str, problem: Problem, hardware: Hardware, inputs: Inputs) -> dict[Choice, Step]:
    """A pass, once for everything that is open."""
    plan = make_plan(problem, backends.preferred(chosen, problem, hardware))

    def forward(choice: Choice) -> Callable[[], object]:
        return partial(chosen.forward, make_plan(problem, choice.tiling), inputs)

    def backward(choice: Choice) -> Callable[[], object]:
        return partial(chosen.backward, plan, inputs, output, grad_out, None)

    open_choices = choices(chosen, what, problem, hardware)
    call = forward
    if what != "forward" and open_choices:
        with torch.no_grad():
            output = chosen.forward(plan, inputs)
        grad_out, call = torch.randn_like(output.out), backward
    key = chosen.name, what, fingerprint(problem)
    return {choice: Step({key: choice}, call(choice)) for choice in open_choices}


def _measure(steps: dict[Choice, Step], device: torch.device) -> dict[Choice, float]:
    """Milliseconds of each choice that runs: medians, taken in turns so that a changing clock changes all."""
    ready: dict[Choice, Step] = {}
    for choice, step in steps.items():
        try:
            step.run()  # compiles
            _wait(device)
        except Unsupported:
            continue
        ready[choice] = step
    first = {choice: min(step.clock(device) for _ in range(2)) for choice, step in ready.items()}
    limit = FINALISTS * min(first.values())
    default = next(iter(steps))
    finalists = [choice for choice in ready if first[choice] <= limit or choice == default]
    taken: dict[Choice, list[float]] = {choice: [] for choice in finalists}
    for turn in range(9):
        for choice in finalists[turn % len(finalists) :] + finalists[: turn % len(finalists)]:
            taken[choice].append(ready[choice].clock(device))
    return first | {choice: median(values) for choice, values in taken.items()}


def _clock(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e3
    cover = torch.empty(2**26, dtype=torch.int32, device=device)
    _wait(device)
    for _ in range(4):
        cover.zero_()  # the host gets ahead, and the second-level cache is cold
    start = mark(device)
    call()
    stop = mark(device)
    _wait(device)
    return start.elapsed_time(stop)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_asked = False
"""Whether calls tune, by `tuning`."""

_measuring = False
"""Whether a problem is being measured: meanwhile no other is."""


@contextmanager
def tuning() -> Generator[None]:
    """Inside, the first call of each problem that nothing is remembered of tunes it, and remembers.

    Example:
        >>> with tuning():
        ...     pass  # out = model(x)
    """
    global _asked
    before, _asked = _asked, True
    tuned.changed()  # calls that were settled before are settled again
    try:
        yield
    finally:
        _asked = before
        tuned.changed()


@contextmanager
def _alone() -> Generator[None]:
    global _measuring
    before, _measuring = _measuring, True
    try:
        yield
    finally:
        _measuring = before


def is_asked(device: torch.device) -> bool:
    """Whether a call on that device is to tune what is new."""
    if _measuring or not (_asked or os.environ.get(VARIABLE, "").lower() in ("1", "true", "yes", "on")):
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())  # a graph takes what there is


def settle(
    problem: Problem, device: torch.device, name: str | None, tiling: Tiling | None, *, needs_grad: bool = False
) -> tuple[Backend, Plan]:
    """As `backends.settle`, and tunes first if that was asked for.

    Raises:
        InvalidProblem, Unsupported: as `backends.choose`.
    """
    if tiling is None and problem.batch and is_asked(device):
        hardware = backends.present(device)
        chosen = backends.choose(problem, hardware, name, needs_grad=needs_grad)
        if any(tuned.pick(chosen.name, what, problem, hardware) is None for what in _passes(chosen, needs_grad)):
            tune(problem, device=device, backend=chosen.name, gradients=needs_grad)
    return backends.settle(problem, device, name, tiling, needs_grad=needs_grad)
