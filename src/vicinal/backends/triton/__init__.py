"""Neighborhood attention in portable Triton, forward and backward: NVIDIA GPUs from sm_80 on, and AMD's.

Plain pointers and matrix products, no feature of one architecture. A tile of queries walks boxes of
keys that begin where its windows begin; boxes inside every window need no mask. Gradients come
from two passes that each own what they write, so that they are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.devices import empty_as, on_device
from vicinal.backends.remembered import Remembered, Strides
from vicinal.backends.triton import gradients
from vicinal.backends.triton.cost import NAME, choice_of, forward_cut, open_cuts, ranked_tilings
from vicinal.backends.triton.interpreter import is_installed, is_interpreting
from vicinal.backends.triton.launch import (
    Call,
    Operands,
    inputs_of,
    places_of,
    readable,
    small_inputs_of,
    stream_of,
    told,
)
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling
from vicinal.tuned import Choice


class Triton:
    """Everything but float64, head dims that are no multiples of 8 or above 256, and GPUs before sm_80.

    float32 is multiplied as float32, or as TF32 where PyTorch is told that matrix products may be
    (`torch.backends.cuda.matmul.fp32_precision`). Reads strided tensors where they lie if their last
    axis is contiguous and their address and other strides are multiples of 16 bytes; copies others.

    A value outside a window can reach its query's output only if it is a NaN or an infinity and shares a KV
    tile with the window, as in any tiled implementation. Memory outside the tensors is never read.
    """

    name = NAME
    gradient_passes = ("queries", "keys")

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Every reason, as a sentence part, why this backend will not run the problem there."""
        major, minor = hardware.arch
        is_amd = hardware.kind == "cuda" and hardware.arch == (0, 0)
        dims = (problem.head_dim, problem.head_dim_v)
        facts = (
            (is_installed(), "needs the package triton, which is not installed"),
            (
                hardware.kind == "cuda" or is_interpreting(),
                f"needs an NVIDIA or AMD GPU, this is {hardware.kind} (TRITON_INTERPRET=1, set before "
                "Python starts, runs it anywhere, very slowly)",
            ),
            (hardware.kind != "cuda" or is_amd or major >= 8, f"needs sm_80 or newer, this is sm_{major}{minor}"),
            (problem.dtype != "float64", "computes in up to 32 bits, got float64"),
            (
                problem.dtype != "bfloat16" or hardware.kind == "cuda",
                "Triton's interpreter multiplies bfloat16 wrongly, use float16 or float32",
            ),
            (all(n % 8 == 0 and n <= 256 for n in dims), f"head dims must be multiples of 8 up to 256, got {dims}"),
            (problem.tokens < 2**31, f"takes fewer than 2^31 tokens a batch row, got {problem.tokens}"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def tilings(self, problem: Problem, hardware: Hardware) -> Iterable[Tiling]:
        """Tilings worth trying, the one with the least predicted time first."""
        return ranked_tilings(problem, hardware)

    def choices(self, what: str, problem: Problem, hardware: Hardware) -> Iterable[Choice]:
        """Ways worth trying for a pass, the one with the least predicted time first."""
        return (choice_of(cut) for cut in open_cuts(what, problem, hardware))

    def predicted_ms(self, plan: Plan) -> float:
        """Milliseconds that the forward pass takes under `plan` on an H100, whose rates the cost model knows."""
        return forward_cut(plan.problem, plan.tiling, Hardware.named("h100-sxm")).time / 1e3

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        """Attention under `plan`.

        Raises:
            Unsupported: if its tiling is not one that the kernel can be cut into.
        """
        problem, query = plan.problem, inputs.query
        is_alike = problem.head_dim_v == problem.head_dim
        out = empty_as(query) if is_alike else query.new_empty((*query.shape[:-1], problem.head_dim_v))
        lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        if not lse.numel():
            return Output(out, lse)
        device, given = query.get_device(), inputs_of(problem, inputs)
        tensors = list(given.values())
        call = calls.find(plan, tensors, device, *told(problem))
        named = dict(zip(given, tensors, strict=True)) | small_inputs_of(problem, inputs) | {"out": out, "lse": lse}
        on_device(call.start, device, places_of(named), stream_of(device))
        return Output(out, lse)

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        """Gradients, cut by a choice of its own: `plan.tiling` is the forward pass's."""
        if output.lse.numel():
            return gradients.gradients(plan.problem, inputs, output, grad_out, grad_lse, into)
        grads = [None if tensor is None else torch.zeros_like(tensor) for tensor in inputs]
        return Gradients(*grads[:5], position_bias=grads[6]).moved(into)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def prepared(plan: Plan, strides: Strides, device: int, *_: Any) -> Call | None:
    """The forward kernel on tensors with these strides; `None` if one of them must be copied first.

    What it is `told` otherwise it asks for itself: here that only tells one from another.
    """
    problem = plan.problem
    names = ("query", "key", "value", "more_key", "more_value")
    operands = Operands(problem, dict(zip(names, strides, strict=False)), ("out",), device)
    cut = forward_cut(problem, plan.tiling, operands.hardware)
    return operands.call("forward", cut) if operands.is_readable else None


calls = Remembered(prepared, readable)


def forget() -> None:
    """Forget all launches."""
    calls.forget()
    prepared.cache_clear()
    gradients.forget()


backend = Triton()
