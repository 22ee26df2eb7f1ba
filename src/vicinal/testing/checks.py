"""The conformance suite: a backend is in when it obeys every law. Also for backends written elsewhere."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from vicinal.backends import present
from vicinal.backends.base import Backend
from vicinal.hardware import Hardware
from vicinal.problem import Problem
from vicinal.testing import laws
from vicinal.testing.cases import GEOMETRIES, SMALL, variants
from vicinal.testing.laws import Trial

WHOLE = tuple(Problem.grid(shape, -1) for shape in ((97,), (11, 18), (3, 7, 10)))
BLOCKED = tuple(
    Problem.grid(shape, window, stride=window)
    for shape, window in (((96,), (12,)), ((63,), (7,)), ((12, 20), (4, 5)), ((4, 12, 9), (2, 6, 3)))
)
CROWDED = tuple(
    Problem.grid(shape, window, additional=additional)
    for shape, window, additional in (((70,), 9, 33), ((9, 14), (4, 3), 7), ((3, 6, 7), (3, 2, 5), 70))
)


@dataclass(frozen=True)
class Outcome:
    """What became of a law: how many problems it ran on, and why it did not run on others."""

    ran: int
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Law:
    """A sentence that any backend must make true, with the problems that it is tried on.

    Calling it, `law(backend, device="cpu")`, raises `AssertionError` with a problem and a seed where the
    sentence is false, and also where the backend refused every problem, since nothing was shown then.

    Args:
        check: what must not raise for any `Trial`; its name is the sentence.
        problems: those tried, each in dtypes and with riders that the backend takes.
        most: variants of a problem, at most.

    Example:
        >>> from vicinal.backends import blocked
        >>> LAWS[-2].name, LAWS[-2](blocked.backend).ran > 0
        ('an_empty_batch_is_answered', True)
    """

    check: Callable[[Trial], None]
    problems: tuple[Problem, ...]
    most: int = 2

    @property
    def name(self) -> str:
        return self.check.__name__

    def __call__(self, backend: Backend, device: torch.device | str = "cpu") -> Outcome:
        device = torch.device(device)
        hardware = present(device)
        ran, skipped = 0, list[str]()
        for i, problem in enumerate(self.problems):
            accepted, refusals = self._accepted(backend, problem, hardware, i)
            skipped += refusals
            for chosen in accepted:
                seed = zlib.crc32(f"{self.name} {chosen!r}".encode()) % 2**31
                self._try(Trial(backend, chosen, device, hardware, seed))
                ran += 1
        if not ran:
            raise AssertionError(f"{self.name}: {backend.name} ran none of its problems: {'; '.join(skipped)}")
        return Outcome(ran, tuple(skipped))

    def _accepted(
        self, backend: Backend, problem: Problem, hardware: Hardware, number: int
    ) -> tuple[list[Problem], list[str]]:
        """Up to `most` variants of the problem that the backend takes, in dtypes that vary."""
        reasons: dict[str, None] = {}
        takes: dict[str, list[Problem]] = {}
        for variant in variants(problem):
            refusal = backend.why_not(variant, hardware)
            reasons |= dict.fromkeys(refusal)
            if not refusal:
                takes.setdefault(variant.dtype, []).append(variant)
        if not takes:
            return [], [f"{problem}: {', '.join(reasons)}"]
        dtypes = list(takes)
        # Dtypes and riders turn at different speeds, so that over the problems each meets each.
        chosen = [takes[dtypes[(number * self.most + j) % len(dtypes)]] for j in range(self.most)]
        return [options[(number + 3 * j) % len(options)] for j, options in enumerate(chosen)], []

    def _try(self, trial: Trial) -> None:
        try:
            self.check(trial)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {describe(trial.problem)}, seed {trial.seed}: {error}") from error
        except Exception as error:
            error.add_note(f"in {self.name}: {describe(trial.problem)}, seed {trial.seed}")
            raise


def describe(problem: Problem) -> str:
    """The problem with all that rides on it.

    Example:
        >>> describe(Problem.grid((8,), 3))
        '8 grid, window 3; batch 1, heads 1/1, head dims 64/64, bfloat16, scale 0.125'
    """
    return (
        f"{problem}; batch {problem.batch}, heads {problem.heads}/{problem.heads_kv}, "
        f"head dims {problem.head_dim}/{problem.head_dim_v}, {problem.dtype}, scale {problem.scale:g}"
    )


LAWS: tuple[Law, ...] = (
    Law(laws.equals_the_oracle, GEOMETRIES),
    Law(laws.gradient_without_lse, SMALL),
    Law(laws.counts_its_keys, GEOMETRIES, most=1),
    Law(laws.nothing_leaks_in, GEOMETRIES, most=1),
    Law(laws.the_window_is_complete, GEOMETRIES, most=1),
    Law(laws.whole_window_is_dense_attention, WHOLE),
    Law(laws.strided_window_is_blocked_attention, BLOCKED),
    Law(laws.batch_and_heads_permute, SMALL),
    Law(laws.merged_halves_are_the_whole, CROWDED),
    Law(laws.memory_around_is_not_read, SMALL),
    Law(laws.two_runs_are_bitwise_equal, SMALL),
    Law(laws.gradients_go_where_they_are_wanted, SMALL),
    Law(laws.an_empty_batch_is_answered, SMALL),
    Law(laws.the_plan_does_not_change_the_answer, SMALL),
)
"""What any backend must obey."""


@dataclass(frozen=True)
class Finding:
    """One law's verdict on one backend. Prints itself.

    Args:
        law: which.
        error: what broke it; empty if it holds.
        ran: problems that it was tried on.
        skipped: why others were not.
        time_s: how long it took.
    """

    law: Law
    error: str
    ran: int
    skipped: tuple[str, ...]
    time_s: float

    @property
    def holds(self) -> bool:
        return not self.error

    def __str__(self) -> str:
        verdict = f"holds on {self.ran} problems" if self.holds else "BROKEN"
        lines = [f"{self.law.name:<40} {verdict}, {self.time_s:.1f} s"]
        lines += [f"    skipped {reason}" for reason in self.skipped]
        return "\n".join(lines if self.holds else [*lines, f"    {self.error}"])


@dataclass(frozen=True)
class Report:
    """Every law's verdict on one backend. Printing it tells the whole story.

    Args:
        backend, device: by name.
        findings: one per law.
    """

    backend: str
    device: str
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def __str__(self) -> str:
        broken = sum(not finding.holds for finding in self.findings)
        end = "every law holds" if self.holds else f"{broken} of {len(self.findings)} laws are broken"
        return "\n".join([f"{self.backend} on {self.device}", *(str(finding) for finding in self.findings), end])


def check_backend(
    backend: Backend,
    *,
    device: torch.device | str = "cpu",
    laws: tuple[Law, ...] = LAWS,
    progress: Callable[[Law, int, int], None] | None = None,
) -> Report:
    """Try every law on a backend, broken ones too, and report.

    Args:
        backend: any value that follows the protocol, the library's or your own.
        device: where its tensors lie.
        laws: all of them, or some.
        progress: called before each law with it, its number from 0 and how many there are.

    Returns:
        A `Report`; `report.holds` says whether the backend is in, `print(report)` says why not.

    Example:
        >>> from vicinal.backends import reference
        >>> print(check_backend(reference.backend, laws=LAWS[-2:-1]))  # doctest: +ELLIPSIS
        reference on cpu
        an_empty_batch_is_answered ... holds on 12 problems, ... s
        every law holds
    """
    findings: list[Finding] = []
    for i, law in enumerate(laws):
        if progress is not None:
            progress(law, i, len(laws))
        began, outcome, error = time.perf_counter(), Outcome(0, ()), ""
        try:
            outcome = law(backend, device)
        except Exception as failure:
            # A crash is a broken law like any other; the report goes on.
            notes: list[str] = getattr(failure, "__notes__", [])
            kind = "" if isinstance(failure, AssertionError) else f"{type(failure).__name__}: "
            error = " ".join([f"{kind}{failure}", *notes]) or repr(failure)
        findings.append(Finding(law, error, outcome.ran, outcome.skipped, time.perf_counter() - began))
    return Report(backend.name, str(device), tuple(findings))
