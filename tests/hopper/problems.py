"""Random problems for the Hopper backend, and what their answers must be."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from math import prod

import torch

from vicinal.backends.base import Inputs, Output
from vicinal.backends.hopper.cost import candidates, ranked_tilings
from vicinal.backends.hopper.cost_backward import Cut, ranked_cuts
from vicinal.backends.hopper.variant import is_odd_box
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling

HEAD_DIMS = (32, 64, 64, 64, 128, 128, 128, 256)
LAYOUTS = ("contiguous", "fused", "fused per head", "heads first", "padded")


@dataclass(frozen=True)
class Case:
    """A problem, how to cut it, and how its tensors lie in memory."""

    problem: Problem
    tiling: Tiling
    layout: str
    has_lengths: bool
    seed: int


def draw(seed: int, most_tokens: int = 900, family: int | None = None, pairs: bool = False) -> Case:
    """The random case of that seed: any rank, ragged, every feature alone and together.

    Cases of one family are all compiled to the same kernel or two. Without one, the tilings are few. All `pairs` have
    heads of 32 that lie next to each other, an even number of them, and tiles that two of them can share.
    """
    rng = random.Random(seed)
    kind = rng if family is None else random.Random(f"family {family}")
    rank = kind.choice((1, 2, 3, 3))
    head_dim = 32 if pairs else kind.choice(HEAD_DIMS)
    dtype = kind.choice(("bfloat16", "bfloat16", "float16"))
    may_be_causal, has_additional = kind.random() < 0.6, kind.random() < 0.25
    tiling = _tiling(kind, rank, head_dim, few=family is None, pairs=pairs)
    shape: tuple[int, ...] = ()
    while not shape or prod(shape) > most_tokens:
        longest = {1: most_tokens, 2: 60, 3: 20}[rank]
        shape = tuple(rng.randint(1, longest) for _ in range(rank))
    dilation = tuple(rng.choice((1, 1, rng.randint(1, n))) for n in shape)
    kernel = tuple(
        rng.choice((rng.randint(1, n // d), min(rng.randint(1, 9), n // d), n // d))
        for n, d in zip(shape, dilation, strict=True)
    )
    stride = tuple(rng.choice((1, rng.randint(1, k), k)) for k in kernel)
    is_causal = tuple(may_be_causal and rng.random() < 0.5 for _ in shape)
    heads_kv = rng.randint(1, 3)
    problem = Problem.grid(
        shape, kernel, stride=stride, dilation=dilation, is_causal=is_causal,
        batch=rng.randint(1, 3), heads=heads_kv * rng.choice((1, 1, 2, 3)), heads_kv=heads_kv, head_dim=head_dim,
        dtype=dtype,
        scale=rng.choice((None, None, None, None, 0.03, 1.0, 0.0, -0.1)),
        additional=rng.randint(1, 300) if has_additional else 0,
    )  # fmt: skip
    if pairs:
        problem = replace(problem, heads=2 * heads_kv, heads_kv=2 * heads_kv)
    tiling = tiling or ranked_tilings(problem)[0]
    layouts = ("contiguous", "fused", "padded") if pairs else LAYOUTS
    return Case(problem, tiling, rng.choice(layouts), has_additional and rng.random() < 0.5, seed)


def _tiling(rng: random.Random, rank: int, head_dim: int, few: bool, pairs: bool) -> Tiling | None:
    """None for the best one, or one that nobody would choose; if few, out of a handful, so that few are compiled."""
    tilings = sorted(candidates(Problem.grid((64,) * rank, 8, head_dim=head_dim)), key=repr)
    if pairs:
        tilings = [tiling for tiling in tilings if prod(tiling.q_tile) == 64 and prod(tiling.kv_tile) <= 64]
    odd = [tiling for tiling in tilings if is_odd_box(tiling.kv_tile)]
    if few:
        fixed = random.Random(0)
        tilings, odd = fixed.sample(tilings, min(3, len(tilings))), fixed.sample(odd, min(2, len(odd)))
    draw = rng.random()
    if draw < 0.25:
        return None
    return rng.choice(odd) if odd and draw < 0.5 else rng.choice(tilings)


def empty(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised `[B, *S, H, D]` that lies in memory as `layout` says, in a larger allocation full of NaN."""
    batch, *axes, heads, head_dim = shape
    guard = 4096
    grids = {
        "contiguous": shape,
        "fused": (batch, *axes, 3, heads, head_dim),
        "fused per head": (batch, *axes, heads, 3, head_dim),
        "heads first": (batch, heads, *axes, head_dim),
        "padded": (batch, *(n + 1 for n in axes), heads, head_dim),
    }
    whole = torch.full((prod(grids[layout]) + 2 * guard,), float("nan"), dtype=dtype, device="cuda")
    tensor = whole[guard:-guard].view(grids[layout])
    if layout == "fused":
        return tensor[..., 1, :, :]
    if layout == "fused per head":
        return tensor[..., 1, :]
    if layout == "heads first":
        return tensor.movedim(1, -2)
    if layout == "padded":
        return tensor[(slice(None), *(slice(n) for n in axes))]
    return tensor


def inputs_of(case: Case) -> Inputs:
    """Random tensors for a case. Whatever lies between and around them is NaN, padding of additional keys too."""
    problem, dtype = case.problem, getattr(torch, case.problem.dtype)
    generator = torch.Generator(device="cuda").manual_seed(case.seed)

    def noise(shape: tuple[int, ...], layout: str) -> torch.Tensor:
        tensor = empty(shape, layout, dtype)
        return tensor.copy_(torch.randn(shape, device="cuda", generator=generator))

    grid = (problem.batch, *problem.shape)
    query = noise((*grid, problem.heads, problem.head_dim), case.layout)
    key, value = (noise((*grid, problem.heads_kv, problem.head_dim), case.layout) for _ in range(2))
    if not problem.additional:
        return Inputs(query, key, value)
    shape = (problem.batch, problem.additional, problem.heads_kv, problem.head_dim)
    more = [noise(shape, "contiguous") for _ in range(2)]
    lengths = None
    if case.has_lengths:
        lengths = torch.randint(0, problem.additional + 1, (problem.batch,), device="cuda", generator=generator)
        for b, length in enumerate(lengths.tolist()):
            for tensor in more:
                tensor[b, length:] = float("nan")
    return Inputs(query, key, value, *more, lengths)


def dense_mask(problem: Problem) -> torch.Tensor:
    """`[queries, keys]`, true where a query sees a key: the definition, key by key."""
    mask = torch.ones(1, 1, dtype=torch.bool, device="cuda")
    for axis in problem.axes:
        rows = torch.zeros(axis.length, axis.length, dtype=torch.bool)
        for query in range(axis.length):
            window = axis.window(query)
            rows[query, window.start : window.stop : window.step] = True
        sees = rows.cuda()
        size = mask.shape[0] * axis.length
        mask = (mask[:, None, :, None] & sees[None, :, None, :]).reshape(size, size)
    return mask


def dense(problem: Problem, inputs: Inputs, dtype: torch.dtype) -> Output:
    """Masked softmax over all pairs, computed in `dtype`."""
    repeats = problem.heads // problem.heads_kv

    def flat(tensor: torch.Tensor, repeats: int = 1) -> torch.Tensor:
        return tensor.to(dtype).flatten(1, -3).transpose(1, 2).repeat_interleave(repeats, 1)  # [B, H, N, D]

    query, key, value = flat(inputs.query), flat(inputs.key, repeats), flat(inputs.value, repeats)
    mask = dense_mask(problem)[None].expand(problem.batch, -1, -1)
    if inputs.additional_keys is not None:
        assert inputs.additional_values is not None
        lengths = inputs.additional_lengths
        places = torch.arange(problem.additional, device="cuda")
        if lengths is None:
            lengths = torch.full((problem.batch,), problem.additional, device="cuda")
        valid = places < lengths[:, None]  # [B, M]
        more = [t.where(valid[..., None, None], 0) for t in (inputs.additional_keys, inputs.additional_values)]
        key, value = (torch.cat((a, flat(b, repeats)), 2) for a, b in zip((key, value), more, strict=True))
        mask = torch.cat((mask, valid[:, None].expand(-1, mask.shape[1], -1)), 2)
    scores = (query @ key.transpose(-1, -2) * problem.scale).masked_fill(~mask[:, None], -torch.inf)
    out = scores.softmax(-1) @ value
    lse = scores.logsumexp(-1)
    grid = (problem.batch, problem.heads, *problem.shape)
    return Output(out.reshape(*grid, -1).movedim(1, -2), lse.reshape(grid).movedim(1, -1))


def errors(case: Case, backend: object) -> tuple[float, float]:
    """Run a case; its errors in `out` and `lse` as shares of what is allowed. NaN never passes.

    Outputs may be twice as far from float64 as eager PyTorch in the same dtype, plus one rounding;
    log-sum-exps twice as far as eager float32, plus what the hardware's exponential may be off.
    """
    inputs = inputs_of(case)
    output = backend.forward(make_plan(case.problem, case.tiling), inputs)  # type: ignore[attr-defined]
    truth = dense(case.problem, inputs, torch.float64)
    eager = dense(case.problem, inputs, getattr(torch, case.problem.dtype))
    single = dense(case.problem, inputs, torch.float32)
    assert output.out.is_contiguous() and output.lse.is_contiguous() and output.lse.dtype == torch.float32
    rounding = torch.finfo(output.out.dtype).eps * truth.out.abs().max().item()
    allowed = 2 * (eager.out.double() - truth.out).abs().max().item() + rounding
    allowed_lse = 2 * (single.lse.double() - truth.lse).abs().max().item() + 1e-5 * (1 + truth.lse.abs().max().item())
    out_error = (output.out.double() - truth.out).abs().max().item() / allowed
    lse_error = (output.lse.double() - truth.lse).abs().max().item() / allowed_lse
    return out_error, lse_error


def gradient_errors(case: Case, backend: object, has_grad_lse: bool = True) -> dict[str, float]:
    """Run a case forward and backward; the errors of the gradients as shares of what is allowed. NaN never passes.

    They may be twice as far from float64 as those of eager PyTorch in the same dtype, plus one rounding. Where windows
    of one key make all gradients of scores zero, what is left are roundings of sums in float32.
    """
    problem, inputs = case.problem, inputs_of(case)
    plan = make_plan(problem, case.tiling)
    output = backend.forward(plan, inputs)  # type: ignore[attr-defined]
    generator = torch.Generator(device="cuda").manual_seed(case.seed + 1)
    grad_out = empty(tuple(output.out.shape), case.layout, output.out.dtype)
    grad_out.copy_(torch.randn(grad_out.shape, device="cuda", generator=generator))
    grad_lse = torch.randn(output.lse.shape, device="cuda", generator=generator) if has_grad_lse else None
    found = backend.backward(plan, inputs, output, grad_out, grad_lse)  # type: ignore[attr-defined]
    truth = dense_gradients(problem, inputs, grad_out, grad_lse, torch.float64)
    eager = dense_gradients(problem, inputs, grad_out, grad_lse, output.out.dtype)
    errors: dict[str, float] = {}
    for name, wanted in truth.items():
        actual = getattr(found, name)
        assert actual.is_contiguous() and actual.dtype == output.out.dtype and actual.shape == wanted.shape
        rounding = torch.finfo(actual.dtype).eps * wanted.abs().max().item()
        allowed = 2 * (eager[name].double() - wanted).abs().max().item() + rounding + 1e-5
        errors[name] = (actual.double() - wanted).abs().max().item() / allowed
    return errors


def dense_gradients(
    problem: Problem, inputs: Inputs, grad_out: torch.Tensor, grad_lse: torch.Tensor | None, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """By autograd, through `dense`."""
    leaves: dict[str, torch.Tensor] = {}
    for name, tensor in inputs._asdict().items():
        if tensor is not None and tensor.is_floating_point():
            clean = tensor.nan_to_num(nan=0.0) if name.startswith("additional") else tensor
            leaves[name] = clean.to(dtype, copy=True).contiguous().requires_grad_()
    out, lse = dense(problem, inputs._replace(**leaves), dtype)
    wanted = (out * grad_out.to(dtype)).sum()
    if grad_lse is not None:
        wanted = wanted + (lse * grad_lse.to(dtype)).sum()
    grads = torch.autograd.grad(wanted, list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def check_gradients(case: Case, backend: object, has_grad_lse: bool = True) -> dict[str, float]:
    found = gradient_errors(case, backend, has_grad_lse)
    if not all(error <= 1 for error in found.values()):  # also catches NaN
        raise AssertionError(f"errors of gradients are {found} times what is allowed: {case}")
    return found


def check(case: Case, backend: object) -> tuple[float, float]:
    out_error, lse_error = errors(case, backend)
    if not (out_error <= 1 and lse_error <= 1):  # also catches NaN
        raise AssertionError(f"errors are {out_error:.2f} and {lse_error:.2f} times what is allowed: {case}")
    return out_error, lse_error


def kind_of_cut(seed: int, kernel: str, problem: Problem, most: int = 1) -> tuple[Cut, ...]:
    """Instead of `ranked_cuts`: the first cut of one kind, of large problems' kinds too; the seed says which."""
    kinds: dict[tuple[int, int], Cut] = {}
    for cut in ranked_cuts(kernel, problem, 10_000):
        kinds.setdefault((cut.variant.consumers, prod(cut.variant.kv_box)), cut)
    return (list(kinds.values())[seed % len(kinds)],)
