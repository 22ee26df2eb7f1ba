"""Random problems against the oracle, as many as there is time for, in several processes if wanted."""

from __future__ import annotations

import math
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch

from vicinal.backends import present
from vicinal.backends.base import Backend, Inputs
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.problem import FLOATS, Problem
from vicinal.testing.cases import make_output_gradients, random_axes
from vicinal.testing.checks import describe
from vicinal.testing.layouts import LAYOUTS, with_nan_beyond_lengths
from vicinal.testing.trial import Trial, assert_solved
from vicinal.testing.truth import Answer, truth_and_eager
from vicinal.tuned import Choice, fingerprint, insist
from vicinal.tuning import Tunable, choices

FAMILY = 50
"""Neighboring seeds that share what kernels are compiled for: rank, dtype, head dims, features, and a few cuts."""

MOST_TOKENS = 900

MOST_TOLD = 20
"""Failures that a report tells of."""

CUTS = 2
"""Ways to cut each pass in a family."""

SLACK, SLACK_OF_FEW = 2.0, 8.0
"""Times plain PyTorch's own error that is allowed; of few numbers the largest error may by luck be far below what it
usually is."""

FEW = 300
"""Numbers of an answer that are few."""

HEAD_DIMS = (
    *((n, n) for n in (32, 64, 128, 256, 64, 128, 8, 16, 40, 72, 80, 96, 120, 192)),
    *((64, 32), (32, 64), (16, 40), (128, 64), (24, 8), (96, 128), (20, 12)),
)


@dataclass(frozen=True)
class Drawn:
    """What a seed stands for: a problem, how its passes are cut, and how its tensors lie in memory."""

    seed: int
    problem: Problem
    cuts: tuple[tuple[str, Choice], ...]
    layout: str

    def __str__(self) -> str:
        cuts = ", ".join(f"{what} {choice}" for what, choice in self.cuts)
        return f"seed {self.seed}: {describe(self.problem)}; {cuts}; {self.layout}"


def family(seed: int, backend: Backend, hardware: Hardware) -> dict[str, Any]:
    """What the problem of a seed shares with those of its neighbors: something that the backend takes.

    Raises:
        Unsupported: if it takes nothing at all there.
    """
    rng = random.Random(f"family {seed // FAMILY}")
    reasons: dict[str, None] = {}
    for _ in range(400):
        head_dim, head_dim_v = rng.choice(HEAD_DIMS)
        additional = rng.random() < 0.3
        position_bias = rng.random() < 0.3
        rank, dtype = rng.choice((1, 2, 2, 3, 3)), rng.choice(tuple(FLOATS))
        fields: dict[str, Any] = {"head_dim": head_dim, "head_dim_v": head_dim_v, "dtype": dtype}
        fields |= {"additional": int(additional), "position_bias": position_bias}
        refusal = backend.why_not(Problem.grid((7,) * rank, 3, **fields), hardware)
        if not refusal:
            return {**fields, "rank": rank}
        reasons |= dict.fromkeys(refusal)
    raise Unsupported(f"{backend.name} takes no problem on {hardware.name}: {'; '.join(reasons)}")


def draw(seed: int, backend: Backend, hardware: Hardware) -> Drawn:
    """The random problem of that seed: any window, ragged, every feature of the backend alone and together.

    Example:
        >>> from vicinal.backends import reference
        >>> draw(5, reference.backend, Hardware.named("cpu")).problem.tokens <= MOST_TOKENS
        True
    """
    shared, rng = family(seed, backend, hardware), random.Random(seed)
    geometry = random_axes(rng, shared.pop("rank"), rng.choice((60, MOST_TOKENS)))
    heads_kv = rng.randint(1, 3)
    fields = {
        **shared,
        "batch": rng.randint(1, 3),
        "heads_kv": heads_kv,
        "heads": heads_kv * rng.choice((1, 1, 2, 3)),
        "scale": rng.choice((None, None, None, 0.3, 0.0, -0.2)),
        "additional": shared["additional"] and rng.choice((1, rng.randint(2, 150))),
    }
    problem = Problem.grid(geometry.pop("shape"), **geometry, **fields)
    usual = replace(problem, axes=Problem.grid((47, 31, 23)[-problem.rank :], 9).axes, batch=1, heads=1, heads_kv=1)
    passes = ("forward", *(backend.gradient_passes if isinstance(backend, Tunable) else ()))
    few = [(what, _few(choices(backend, what, usual, hardware), seed)) for what in passes]
    cuts = tuple((what, rng.choice(some)) for what, some in few if some)
    return Drawn(seed, problem, cuts, rng.choice(tuple(LAYOUTS)))


def _few(everything: list[Choice], seed: int) -> list[Choice]:
    return random.Random(f"cuts {seed // FAMILY}").sample(everything, min(CUTS, len(everything)))


def check_drawn(drawn: Drawn, backend: Backend, device: torch.device, hardware: Hardware) -> None:
    """Whether output, log-sum-exp and, if offered, all gradients err by at most `SLACK` times plain PyTorch's error.

    What lies around the tensors, and beyond the lengths of additional keys, is NaN.

    Raises:
        AssertionError: if not.
    """
    problem = drawn.problem
    counts = [problem.batch * problem.tokens * problem.heads_kv]
    counts += [prod(problem.bias_shape)] if problem.position_bias else []
    counts += [problem.batch * problem.additional * problem.heads_kv] if problem.additional else []
    slack = SLACK if min(counts) >= FEW else SLACK_OF_FEW
    trial = Trial(backend, problem, device, hardware, drawn.seed, slack=slack)
    inputs = with_nan_beyond_lengths(trial.inputs()) if drawn.seed % 2 else trial.inputs()
    grad_out, grad_lse = make_output_gradients(problem, device, drawn.seed)
    truth, eager = truth_and_eager(
        problem, inputs, grad_out=grad_out.flatten(1, problem.rank), grad_lse=grad_lse.flatten(1, problem.rank)
    )
    answers = truth._replace(summed=_recomputed(truth, problem, inputs, grad_out, grad_lse)), eager
    lay = LAYOUTS[drawn.layout]
    laid = {name: lay(t) for name, t in inputs._asdict().items() if t is not None and t.is_floating_point()}
    words = fingerprint(problem)
    with insist({(backend.name, what, words): choice for what, choice in drawn.cuts}):
        tiling = next((choice.tiling for what, choice in drawn.cuts if what == "forward"), None)
        assert_solved(trial, inputs._replace(**laid), (lay(grad_out), grad_lse), answers, tiling)


def _recomputed(
    truth: Answer, problem: Problem, inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What each gradient sums, at its largest, for backends that compute weights again from the log-sum-exp:

    P = exp(S - lse) errs by |lse| roundings,   dP - delta by one of |dP|, also where they cancel to nothing
    """
    largest = truth.lse.abs().max().item() if truth.lse.numel() else 0.0
    value = inputs.value.repeat_interleave(problem.heads // problem.heads_kv, -2)
    slope = ((grad_out.double() * value.double()).sum(-1).abs() + grad_lse.double().abs()).max().item()
    scale = abs(problem.scale) * slope
    query, key = (tensor.double().abs().max().item() for tensor in (inputs.query, inputs.key))
    more = {"query": scale * key, "key": scale * query, "additional_keys": scale * query, "position_bias": slope}
    return {name: tensor.abs() * (1 + largest) + more.get(name, 0.0) for name, tensor in truth.summed.items()}


@dataclass(frozen=True)
class Fuzzed:
    """What became of random problems. Prints itself."""

    backend: str
    device: str
    ran: int
    with_gradients: int
    failures: tuple[str, ...]
    wanted: int

    @property
    def holds(self) -> bool:
        return not self.failures and self.ran > 0

    def __str__(self) -> str:
        ran = str(self.ran) if self.ran == self.wanted else f"{self.ran} of {self.wanted}"
        lines = [
            f"{self.backend} on {self.device}: {ran} random problems, {self.with_gradients} with gradients, "
            f"{len(self.failures)} wrong"
        ]
        more = len(self.failures) - MOST_TOLD
        return "\n".join([*lines, *self.failures[:MOST_TOLD], *(f"and {more} more" for _ in range(more > 0))])


def fuzz(
    backend: Backend,
    count: int,
    *,
    device: torch.device | str = "cpu",
    first: int = 0,
    jobs: int = 1,
    seconds: float = math.inf,
    progress: Callable[[int, int, tuple[str, ...]], None] | None = None,
) -> Fuzzed:
    """Try a backend on the problems of seeds `first` to `first + count - 1`.

    Args:
        backend: any value that follows the protocol and, for several jobs, can be pickled.
        count: how many problems.
        device: where their tensors lie.
        first: the first seed.
        jobs: processes; kernels that must be compiled take nearly all the time.
        seconds: no problem is begun after that many; the report says how many were.
        progress: called with the number of problems done, how many there are, and new failures.

    Example:
        >>> from vicinal.backends import reference
        >>> print(fuzz(reference.backend, 3))
        reference on cpu: 3 random problems, 3 with gradients, 0 wrong
    """
    seeds = range(first, first + count)
    families = [list(group) for _, group in groupby(seeds, lambda seed: seed // FAMILY)]
    found: list[Result] = []
    deadline = time.time() + seconds
    for result in _results(backend, str(device), families, jobs, deadline):
        found.append(result)
        if progress is not None:
            progress(sum(each.ran for each in found), count, result.failures)
    ran, with_gradients = sum(each.ran for each in found), sum(each.with_gradients for each in found)
    failures = tuple(failure for each in found for failure in each.failures)
    return Fuzzed(backend.name, str(device), ran, with_gradients, failures, count)


class Result(NamedTuple):
    """What became of the seeds of a family; `left` are those that a lost device kept from being tried."""

    ran: int
    with_gradients: int
    failures: tuple[str, ...]
    left: list[int]


def _results(backend: Backend, device: str, families: list[list[int]], jobs: int, deadline: float) -> Iterator[Result]:
    if jobs <= 1:
        for seeds in families:
            result = _try(backend, device, seeds, deadline)
            lost = (f"{len(result.left)} problems from seed {result.left[0]} on were not tried",) if result.left else ()
            yield result._replace(failures=result.failures + lost)
        return
    while families:
        left: list[list[int]] = []
        # A process that was forked cannot use CUDA.
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_alone) as pool:
            for done in as_completed([pool.submit(_try, backend, device, seeds, deadline) for seeds in families]):
                result = done.result()
                left += [result.left] if result.left else []
                yield result
        families = left  # for processes that have not lost the device


def _alone() -> None:
    torch.set_num_threads(1)


_lost = False
"""Whether an earlier problem has lost the device for this process, as an illegal access does."""


def _try(backend: Backend, device: str, seeds: list[int], deadline: float) -> Result:
    global _lost
    failures: list[str] = []
    ran = graded = 0
    for seed in () if _lost else seeds:
        if time.time() > deadline:
            return Result(ran, graded, tuple(failures), [])
        what = f"seed {seed}"
        ran += 1
        try:
            place = torch.device(device)
            hardware = present(place)
            drawn = draw(seed, backend, hardware)
            what = str(drawn)
            graded += not backend.why_not_gradients(drawn.problem, hardware)
            check_drawn(drawn, backend, place, hardware)
        except Exception as error:  # a crash is wrong, too, and the others go on
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            failures.append(f"{what}: {kind}{error}")
            if isinstance(error, torch.AcceleratorError):
                _lost = True
                break
    return Result(ran, graded, tuple(failures), seeds[ran:])
