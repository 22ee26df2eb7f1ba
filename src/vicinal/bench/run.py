"""Runs a suite: first whether the answers are right, then how long they take, everyone in turn."""

from __future__ import annotations

import gc
import random
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor

from vicinal import backends
from vicinal._clock import mark
from vicinal.backends.base import Inputs, Predicts
from vicinal.bench.contender import Call, Contender
from vicinal.bench.contenders import Ours, contenders
from vicinal.bench.results import Measurement, today
from vicinal.bench.specs import BACKWARD, BOTH, FORWARD, Spec
from vicinal.errors import InvalidProblem
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.simulate import simulate
from vicinal.testing.cases import make_inputs, make_output_gradients
from vicinal.testing.tolerance import allowance, error
from vicinal.testing.truth import Answer, truth_and_eager

SAMPLES = 24
"""Queries whose answers are checked: brute force over all of them would take longer than the benchmark."""

Progress = Callable[[str, int, int], None]
Record = Callable[[list[Measurement]], object]


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least `rounds` rounds, and more up to `most` until `seconds` are spent."""

    rounds: int = 5
    most: int = 50
    seconds: float = 4.0
    threads: int = 2


class Steps(NamedTuple):
    """What is timed, and what comes before it each time."""

    ready: Callable[[], object]
    timed: Callable[[], object]


@dataclass
class Lane:
    """One contender on one case and pass, and what was found."""

    contender: Contender
    steps: Steps
    wrong: float | None
    device_s: list[float]
    host_s: list[float]

    @property
    def is_red(self) -> bool:
        """Not shown to be right: NaN counts as wrong, too."""
        return self.wrong is not None and not self.wrong <= 1


def run(
    specs: tuple[Spec, ...],
    *,
    device: torch.device | str = "cpu",
    only: tuple[str, ...] = (),
    effort: Effort | None = None,
    progress: Progress | None = None,
    record: Record | None = None,
) -> list[Measurement]:
    """Measure every pass of every case with everyone who runs it.

    Answers are checked before anything is timed: the output, and for a backward pass all gradients,
    of a few queries against brute force in float64. A contender that is wrong gets a row with its error
    and no time. Then all take turns, so that a machine that slows down slows all of them; times are medians.

    Args:
        specs: a suite, see `vicinal.bench.specs.suite`.
        device: where to run.
        only: names of contenders, all if empty.
        effort: how long to measure.
        progress: called with a sentence, the number of the step from 0, and how many there are.
        record: called with the rows of each pass of a case as soon as they are there, to save what an
            interrupted run has measured.

    Returns:
        One `Measurement` per case, pass and contender.

    Warns:
        UserWarning: if a peer fails; it is left out of that case. A failure of ours is an error.

    Raises:
        InvalidProblem: if a contender of that name is not known, or none runs a case.
    """
    device, effort = torch.device(device), effort or Effort()
    everyone = contenders(only)
    missing = set(only) - {contender.name for contender in everyone}
    if missing:
        known = ", ".join(contender.name for contender in contenders())
        raise InvalidProblem(f"backends must be among {known}, got {', '.join(sorted(missing))}")
    steps = [(spec, what) for spec in specs for what in spec.passes]
    found: list[Measurement] = []
    with threads(effort.threads):
        for i, (spec, what) in enumerate(steps):
            if progress is not None:
                progress(f"{spec.name}, {what}", i, len(steps))
            rows = measure_case(spec, what, everyone, device, effort)
            if record is not None:
                record(rows)
            found += rows
            _release(device)
    return found


@contextmanager
def threads(count: int) -> Generator[None, None, None]:
    """PyTorch on that many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_case(
    spec: Spec, what: str, everyone: tuple[Contender, ...], device: torch.device, effort: Effort
) -> list[Measurement]:
    """One pass of one case: check everyone, then time everyone in turn."""
    problem = spec.problem
    inputs = make_inputs(problem, device, seed=0, quickly=True)
    willing = [contender for contender in everyone if not contender.why_not(problem, device, what)]
    if not willing:
        reasons = [f"{c.name}: {', '.join(c.why_not(problem, device, what))}" for c in everyone]
        raise InvalidProblem(f"no contender runs {spec.name} ({problem}) on {device}: {'; '.join(reasons)}")
    exam = Exam.of(problem, inputs, what)
    lanes: list[Lane] = []
    for contender in willing:
        try:
            call = contender.prepare(problem, inputs)
            wrong = None if contender.is_dense else exam.grade(call)
            lanes.append(Lane(contender, _steps(call, inputs, what), wrong, [], []))
        except Exception as failure:
            if isinstance(contender, Ours):
                raise
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
            warnings.warn(f"{contender.name} is left out of {spec.name}, {what}: {reason}", stacklevel=2)
        _release(device)
    _time([lane for lane in lanes if not lane.is_red], device, effort)
    return [_measurement(spec, what, lane, device) for lane in lanes]


def _steps(call: Call, inputs: Inputs, what: str) -> Steps:
    with torch.no_grad():
        query, key, value = (call.enter(tensor) for tensor in inputs[:3])
    if what == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return call.attend(query, key, value)

        return Steps(_nothing, forward)
    qkv = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    more = (inputs.additional_keys, inputs.additional_values, inputs.position_bias)
    leaves = [*qkv, *(tensor.requires_grad_() for tensor in more if tensor is not None)]
    grad_out = torch.randn_like(call.attend(*qkv))

    if what == BACKWARD:
        outputs: list[Tensor] = []
        return Steps(
            lambda: outputs.append(call.attend(*qkv)),
            lambda: torch.autograd.grad(outputs.pop(), leaves, grad_out),
        )
    return Steps(_nothing, lambda: torch.autograd.grad(call.attend(*qkv), leaves, grad_out))


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Exam:
    """A few queries of a problem, and the truth about them.

    Only they have a gradient at their output, so that brute force over these few gives the
    gradients of all keys and values that they see.
    """

    problem: Problem
    inputs: Inputs
    tokens: Tensor
    grad_out: Tensor | None
    truth: Answer
    eager: Answer

    @classmethod
    def of(cls, problem: Problem, inputs: Inputs, what: str) -> Exam:
        rng, last = random.Random(0), problem.tokens - 1
        picks = sorted({0, last, *(rng.randint(0, last) for _ in range(SAMPLES - 2))})
        tokens = torch.tensor(picks, device=inputs.query.device)
        grad_out = picked = None
        if what != FORWARD:
            shape = (*inputs.query.shape[:-1], problem.head_dim_v)
            grad_out = torch.zeros(shape, dtype=inputs.query.dtype, device=tokens.device)
            some = make_output_gradients(Problem.grid((len(picks),), 1), torch.device("cpu"), 0)[0].mean(-1).flatten()
            grad_out.flatten(1, problem.rank)[:, tokens] = some[None, :, None, None].to(grad_out)
            picked = grad_out.flatten(1, problem.rank)[:, tokens]
        answers = truth_and_eager(problem, inputs, grad_out=picked, tokens=tokens)
        return cls(problem, inputs, tokens, grad_out, *answers)

    def grade(self, call: Call) -> float:
        """The largest error, as a share of what is allowed."""
        rank, truth, eager = self.problem.rank, self.truth, self.eager
        leaves = [tensor.detach().requires_grad_(self.grad_out is not None) for tensor in self.inputs[:3]]
        out = call(*leaves)
        shares = [_share(out.detach().flatten(1, rank)[:, self.tokens], eager.out, truth.out, self.inputs.value)]
        if self.grad_out is not None:
            gradients = torch.autograd.grad(out, leaves, self.grad_out)
            at = {"query": truth.tokens, "key": truth.touched, "value": truth.touched}
            shares += [
                _share(gradient.flatten(1, rank)[:, where], eager.gradients[name], truth.gradients[name], self.grad_out)
                for gradient, (name, where) in zip(gradients, at.items(), strict=True)
            ]
        return max(shares, key=lambda share: (share != share, share))  # a NaN beats everything


def _share(actual: Tensor, eager: Tensor, truth: Tensor, summed: Tensor) -> float:
    return error(actual, truth) / allowance(eager, truth, actual.dtype, summed=summed)


def _time(lanes: list[Lane], device: torch.device, effort: Effort) -> None:
    if not lanes:
        return
    for lane in lanes:
        for _ in range(3 if device.type == "cuda" else 1):
            lane.steps.ready()
            lane.steps.timed()
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    began, done = time.perf_counter(), 0
    while done < effort.rounds or (done < effort.most and time.perf_counter() - began < effort.seconds):
        # Everyone follows everyone else once in a while: nobody always runs on a neighbor's warm cache.
        for lane in lanes[done % len(lanes) :] + lanes[: done % len(lanes)]:
            device_s, host_s = clock(lane.steps)
            lane.device_s.append(device_s)
            lane.host_s.append(host_s)
        done += 1


def _cpu_clock(steps: Steps) -> tuple[float, float]:
    steps.ready()
    began = time.perf_counter()
    steps.timed()
    taken = time.perf_counter() - began
    return taken, taken


def _cuda_clock(device: torch.device) -> Callable[[Steps], tuple[float, float]]:
    # Writing it empties the second-level cache, and keeps the device busy until the host has queued the step:
    # device times then hold no waiting for the host.
    cover = torch.empty(2**28, dtype=torch.int32, device=device)

    def clock(steps: Steps) -> tuple[float, float]:
        steps.ready()
        torch.cuda.synchronize(device)
        cover.zero_()
        cover.zero_()
        start = mark(device)
        began = time.perf_counter()
        steps.timed()
        host_s = time.perf_counter() - began
        stop = mark(device)
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) / 1e3, host_s

    return clock


def _measurement(spec: Spec, what: str, lane: Lane, device: torch.device) -> Measurement:
    problem, hardware = spec.problem, backends.present(device)
    taken = median(lane.device_s) if lane.device_s else None
    predicted = None
    if isinstance(lane.contender, Ours) and what == FORWARD and problem.dtype in dict(hardware.flops_per_s):
        backend = lane.contender.backend
        plan = make_plan(problem, next(iter(backend.tilings(problem, hardware))))
        if isinstance(backend, Predicts) and hardware.arch == (9, 0):
            predicted = backend.predicted_ms(plan)
        else:
            predicted = simulate(plan, hardware).time_s * 1e3
    return Measurement(
        **today(device),
        case=spec.name,
        backend=lane.contender.name,
        pass_=what,
        milliseconds=None if taken is None else taken * 1e3,
        spread=None if taken is None else _spread(lane.device_s) / taken,
        host_milliseconds=None if taken is None else median(lane.host_s) * 1e3,
        useful_tflops_per_s=None if taken is None else useful_flops(problem, what) / taken / 1e12,
        predicted_milliseconds=predicted,
        error=lane.wrong,
    )


def useful_flops(problem: Problem, what: str) -> int:
    """Arithmetic that no implementation can avoid: pairs inside windows, and with additional keys.

        forward 2 (D + Dv) per pair and head;  backward, with scores computed again, 2 (3 D + 2 Dv)

    Example:
        >>> useful_flops(Problem.grid((10,), 2, head_dim=8), "forward")
        640
    """
    pairs = problem.batch * problem.heads * (problem.pairs + problem.tokens * problem.additional)
    d, dv = problem.head_dim, problem.head_dim_v
    return 2 * pairs * {FORWARD: d + dv, BACKWARD: 3 * d + 2 * dv, BOTH: 4 * d + 3 * dv}[what]


def _spread(times: list[float]) -> float:
    if len(times) < 2:
        return 0.0
    low, _, high = quantiles(times, n=4, method="inclusive")
    return high - low


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
