"""One backend on one problem, and the verdict on all that it computes there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vicinal.backends.base import Backend, Gradients, Inputs, Output
from vicinal.hardware import Hardware
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.testing.cases import make_inputs
from vicinal.testing.tolerance import assert_as_good_as_eager
from vicinal.testing.truth import Answer
from vicinal.tiling import Tiling


@dataclass(frozen=True)
class Trial:
    """One backend on one problem on one device, with a seed for the numbers.

    `slack` is how many times plain PyTorch's own error is allowed: the laws' 2, more where few numbers are computed.
    """

    backend: Backend
    problem: Problem
    device: torch.device
    hardware: Hardware
    seed: int
    slack: float = 2.0

    @property
    def has_gradients(self) -> bool:
        """Whether the backend gives gradients of this problem; if not, its outputs alone are judged."""
        return not self.backend.why_not_gradients(self.problem, self.hardware)

    @property
    def default(self) -> Tiling:
        return next(iter(self.backend.tilings(self.problem, self.hardware)))

    def inputs(self) -> Inputs:
        return make_inputs(self.problem, self.device, self.seed)

    def forward(self, inputs: Inputs, tiling: Tiling | None = None) -> Output:
        output = self.backend.forward(make_plan(self.problem, tiling or self.default), inputs)
        return Output(*output)

    def backward(
        self,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        tiling: Tiling | None = None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        plan = make_plan(self.problem, tiling or self.default)
        return self.backend.backward(plan, inputs, output, grad_out, grad_lse, into)


def assert_solved(
    trial: Trial,
    inputs: Inputs,
    grads: tuple[Tensor, Tensor | None],
    answers: tuple[Answer, Answer],
    tiling: Tiling | None = None,
) -> None:
    """Values, log-sum-exp and every gradient are as good as plain PyTorch's, of the promised shapes and dtypes."""
    problem, (truth, eager) = trial.problem, answers
    output = trial.forward(inputs, tiling)
    dtype = inputs.query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    if (output.out.dtype, output.lse.dtype) != (dtype, wide):
        raise AssertionError(f"out and lse must be {dtype} and {wide}, got {output.out.dtype} and {output.lse.dtype}")
    if not (output.out.is_contiguous() and output.lse.is_contiguous()):
        raise AssertionError("out and lse must be contiguous")
    grid = inputs.query.shape[:-1]
    if output.out.shape != (*grid, problem.head_dim_v) or output.lse.shape != grid:
        raise AssertionError(f"out and lse have shapes {tuple(output.out.shape)} and {tuple(output.lse.shape)}")
    out, lse = output.out.flatten(1, problem.rank), output.lse.flatten(1, problem.rank)
    assert_as_good_as_eager(out, eager.out, truth.out, slack=trial.slack, summed=inputs.value, what="out")
    # lse = max + log(sum of weights), and the largest weight is 1: that sum is rounded even where the logarithm is 0.
    weight = torch.ones(1)
    assert_as_good_as_eager(lse, eager.lse, truth.lse, slack=trial.slack, summed=weight, what="lse")
    if not trial.has_gradients:
        return
    gradients = trial.backward(inputs, output, *grads, tiling)
    for name, wanted in truth.gradients.items():
        gradient, tensor = getattr(gradients, name), getattr(inputs, name)
        if gradient is None or gradient.shape != tensor.shape or gradient.dtype != tensor.dtype:
            raise AssertionError(f"the gradient of {name} must be like it, {tuple(tensor.shape)} {tensor.dtype}")
        actual = gradient.reshape(wanted.shape)
        what = f"the gradient of {name}"
        assert_as_good_as_eager(
            actual, eager.gradients[name], wanted, slack=trial.slack, summed=truth.summed[name], what=what
        )
