"""Neighborhood attention in portable Triton, forward and backward: NVIDIA GPUs from sm_80 on, and AMD's.

Plain pointers and matrix products, no feature of one architecture. A tile of queries walks boxes of
keys that begin where its windows begin; boxes inside every window need no mask. Gradients come
from two passes that each own what they write, so that they are the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vicinal._tuples import ceil_div
from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.devices import present
from vicinal.backends.triton.bias import bias_gradients
from vicinal.backends.triton.cost import NAME, Cut, best_cut, choice_of, forward_cut, open_cuts, ranked_tilings
from vicinal.backends.triton.interpreter import is_installed, is_interpreting
from vicinal.backends.triton.launch import Operands
from vicinal.backends.triton.variant import FACTS
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling
from vicinal.tuned import Choice

MOST_BLOCKS = 1024
"""Blocks that the gradients of additional keys are spread over, about."""


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
        cut = forward_cut(problem, plan.tiling, present(query.device))
        out = torch.empty(*query.shape[:-1], problem.head_dim_v, dtype=query.dtype, device=query.device)
        lse = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        if lse.numel():
            Operands(problem, inputs).run("forward", cut, out=out, lse=lse)
        return Output(out, lse)

    def backward(
        self, plan: Plan, inputs: Inputs, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        """Gradients, cut by a choice of its own: `plan.tiling` is the forward pass's."""
        problem = plan.problem
        tensors = [tensor for tensor in inputs[:5] if tensor is not None]
        grads = [torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors]
        if not output.lse.numel():
            table = None if inputs.position_bias is None else torch.zeros_like(inputs.position_bias)
            return Gradients(*(grad.zero_() for grad in grads))._replace(position_bias=table)
        lse = output.lse.contiguous()
        grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.contiguous()
        facts = torch.empty(problem.batch, problem.heads, *problem.shape, FACTS, device=lse.device)
        known = dict.fromkeys(("sums", "delta"), facts)  # not written where nobody asks for them
        if problem.additional or problem.position_bias:
            known = dict(zip(known, torch.empty(2, *facts.shape[:-1], device=lse.device), strict=True))
        operands = Operands(problem, inputs, out=output.out, grad_out=grad_out)
        cut = best_cut("queries", problem, operands.hardware)
        operands.run("queries", cut, grad_query=grads[0], lse=lse, grad_lse=grad_lse, facts=facts, **known)
        cut = best_cut("keys", problem, operands.hardware)
        operands.run("keys", cut, grad_key=grads[1], grad_value=grads[2], facts=facts)
        if problem.additional:
            grads[3:] = additional_gradients(operands, cut, known)
        if inputs.position_bias is None:
            return Gradients(*grads)
        return Gradients(*grads)._replace(position_bias=bias_gradients(operands, known))


def additional_gradients(operands: Operands, cut: Cut, known: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of the additional keys and values: sums over all queries, in chunks that run side by side."""
    problem = operands.problem
    rows, columns = cut.shape.rows, cut.shape.columns
    blocks = ceil_div(problem.additional, rows) * problem.heads_kv * problem.batch
    chunks = min(ceil_div(MOST_BLOCKS, blocks), ceil_div(problem.tokens, columns))
    chunk = ceil_div(ceil_div(problem.tokens, chunks), columns) * columns
    chunks = ceil_div(problem.tokens, chunk)
    partial = [
        torch.empty(chunks, *operands.tensors[name].shape, dtype=torch.float32, device=operands.device)
        for name in ("more_key", "more_value")
    ]
    flat = cut._replace(rows=(rows,), columns=(columns,))
    parts = dict(zip(("partial_key", "partial_value"), partial, strict=True))
    operands.run("additional", flat, (blocks, chunks), chunk=chunk, **parts, **known)
    return [part.sum(0).to(operands.tensors["query"].dtype) for part in partial]


backend = Triton()
