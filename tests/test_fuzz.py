"""Random problems: drawn the same everywhere, judged hard, and what is wrong is told."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vicinal.backends import blocked, reference
from vicinal.backends import triton as portable
from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.testing import fuzz, fuzzing
from vicinal.testing.cases import make_inputs, make_output_gradients
from vicinal.testing.fuzzing import FAMILY, draw
from vicinal.testing.trial import Trial, assert_solved
from vicinal.testing.truth import truth_and_eager

H100 = Hardware.named("h100-sxm")


def test_a_seed_is_a_problem_that_the_backend_takes() -> None:
    drawn = [draw(seed, portable.backend, H100) for seed in range(0, 2000, 17)]
    assert drawn == [draw(seed, portable.backend, H100) for seed in range(0, 2000, 17)]
    problems = [each.problem for each in drawn]
    assert all(portable.backend.why_not(problem, H100) == () for problem in problems)
    assert {problem.dtype for problem in problems} == {"float16", "bfloat16", "float32"}
    assert {problem.rank for problem in problems} == {1, 2, 3}
    for feature in ("position_bias", "additional", "is_causal"):
        kinds = {
            bool(any(value) if isinstance(value := getattr(problem, feature), tuple) else value) for problem in problems
        }
        assert kinds == {True, False}
    assert any(problem.heads != problem.heads_kv for problem in problems)
    assert any(problem.head_dim % 16 or problem.head_dim != problem.head_dim_v for problem in problems)
    for each in drawn:
        assert [what for what, _ in each.cuts] == ["forward", "queries", "keys"]


def test_families_share_what_is_compiled() -> None:
    family = [draw(seed, portable.backend, H100) for seed in range(FAMILY)]
    assert len({each.cuts for each in family}) <= 8
    kinds = {
        (p.rank, p.dtype, p.head_dim, p.head_dim_v, p.position_bias, p.additional > 0)
        for p in (e.problem for e in family)
    }
    assert len(kinds) == 1
    assert len({each.problem for each in family}) > FAMILY - 3


@dataclass(frozen=True)
class Wrong(blocked.Blocked):
    """The blocked backend with a mistake that only some windows show."""

    name: str = "wrong"

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        output = super().forward(plan, inputs)
        if max(plan.problem.stride) > 1:
            return output._replace(lse=output.lse + 1e-2)
        return output

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        return super().backward(plan, inputs, output, grad_out, grad_lse, into)


def test_a_mistake_is_found_and_can_be_repeated() -> None:
    found = fuzz(Wrong(), 20)
    assert not found.holds and found.ran == 20 and 0 < len(found.failures) < 20
    seed = int(re.match(r"seed (\d+): .*lse is off by", found.failures[0])[1])  # type: ignore[index]
    again = fuzz(Wrong(), 1, first=seed)
    assert again.failures == found.failures[:1]
    assert found.failures[0] in str(found) and f"{len(found.failures)} wrong" in str(found)


@pytest.mark.parametrize("jobs", [1, 2])
def test_no_problem_is_begun_when_time_is_up_and_the_report_says_so(jobs: int) -> None:
    # So many that no machine gets through; processes may need all of their time to begin.
    found = fuzz(reference.backend, 200_000, jobs=jobs, seconds=1.0 if jobs == 1 else 6.0)
    assert (jobs == 2 or found.ran > 0) and found.ran < found.wanted == 200_000 and not found.failures
    assert str(found).startswith(f"reference on cpu: {found.ran} of 200000 random problems")


@dataclass(frozen=True)
class Shifted(reference.Reference):
    """Log-sum-exps off by a constant."""

    name: str = "shifted"
    off: float = 0.0

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        output = super().forward(plan, inputs)
        return output._replace(lse=output.lse + self.off)


def test_where_plain_pytorch_is_exact_one_rounding_of_the_sum_of_weights_is_allowed_and_no_more() -> None:
    # One key and a scale of nothing: every log-sum-exp is 0 to the bit.
    problem = Problem.grid((11, 4), 1, scale=0.0, head_dim=8, dtype="float32")
    cpu, hardware = torch.device("cpu"), Hardware.named("cpu")
    inputs, gradients = make_inputs(problem, cpu, 0), make_output_gradients(problem, cpu, 0)
    flat = [each.flatten(1, problem.rank) for each in gradients]
    answers = truth_and_eager(problem, inputs, grad_out=flat[0], grad_lse=flat[1])
    assert not answers[0].lse.any() and not answers[1].lse.any()
    assert_solved(Trial(Shifted(off=1e-23), problem, cpu, hardware, 0), inputs, gradients, answers)
    with pytest.raises(AssertionError, match=r"lse is off by 1\.000e-06 where 1\.192e-07 is allowed"):
        assert_solved(Trial(Shifted(off=1e-6), problem, cpu, hardware, 0), inputs, gradients, answers)


@dataclass(frozen=True)
class Crashing(blocked.Blocked):
    """Loses the device, as an illegal access does."""

    name: str = "crashing"

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_lost_device_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzzing, "_lost", False)
    found = fuzz(Crashing(), 3)
    assert found.ran == 1 and not found.holds
    assert "AcceleratorError" in found.failures[0] and found.failures[1] == "2 problems from seed 1 on were not tried"


def test_processes_share_the_work() -> None:
    done: list[int] = []
    found = fuzz(reference.backend, 2, first=FAMILY - 1, jobs=2, progress=lambda ran, total, failed: done.append(ran))
    assert found.holds and found.ran == 2 and done == [1, 2]


@dataclass(frozen=True)
class Picky(blocked.Blocked):
    name: str = "picky"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ("never runs",)


def test_a_backend_that_takes_nothing_is_an_error_in_words() -> None:
    with pytest.raises(Unsupported, match="picky takes no problem on h100-sxm: never runs"):
        draw(0, Picky(), H100)
