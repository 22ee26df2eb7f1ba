"""What the answer is: brute force over every (query, key) pair, from the published rule.

The rule is stated here as a predicate on a query and a key with the window's centre clamped into
the axis, not as a range of keys as in `vicinal.window`, so that a mistake in one shows in the
other. Nothing here is shared with any backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.problem import Axis, Problem


class Answer(NamedTuple):
    """Attention of some query tokens, and the gradients of those alone.

    `tokens [n]` are the queries and `touched [m]` the keys that some of them sees, as flat token
    numbers; `gradients` follow `Inputs`, query's `[B, n, H, D]`, key's `[B, m, Hkv, D]`.
    """

    tokens: Tensor
    touched: Tensor
    out: Tensor  # [B, n, H, Dv]
    lse: Tensor  # [B, n, H]
    gradients: tuple[Tensor, ...]


def axis_mask(axis: Axis, queries: Tensor) -> Tensor:
    """Which keys of an axis the given queries see: bools `[len(queries), length]`.

        key ~ query (mod dilation)   and   |key - centre| reaches no further than the window,
        centre = leader of the query's stride group, clamped so that the window lies inside

    counted in members of the dilation group. A causal window ends at the query instead.

    Source: Generalized Neighborhood Attention, arXiv 2504.16922; the clamped centre is how NATTEN's
    FlexAttention mask says it.

    Example:
        >>> axis_mask(Axis(5, 3), torch.tensor([0])).int().tolist()
        [[1, 1, 1, 0, 0]]
    """
    query, key = queries[:, None], torch.arange(axis.length, device=queries.device)[None, :]
    same_group = (query - key) % axis.dilation == 0
    last = torch.div(axis.length - 1 - query % axis.dilation, axis.dilation, rounding_mode="floor")
    query, key = query // axis.dilation, key // axis.dilation
    if axis.is_causal:
        leader = torch.minimum((query // axis.stride + 1) * axis.stride - 1, last)
        return same_group & (key <= query) & (leader - key < axis.kernel_size)
    before = axis.kernel_size // 2
    after = axis.kernel_size - before - 1
    leader = torch.minimum(query // axis.stride * axis.stride + axis.stride // 2, last)
    centre = torch.minimum(leader.clamp(min=before), last - after)
    return same_group & (centre - key <= before) & (key - centre <= after)


def mask(problem: Problem, tokens: Tensor | None = None) -> Tensor:
    """Which keys of the grid the given query tokens see: bools `[len(tokens), problem.tokens]`.

    Args:
        tokens: flat token numbers, `None` for all of them.

    Example:
        >>> mask(Problem.grid((3, 4), kernel_size=(1, 2))).sum().item()
        24
    """
    if tokens is None:
        tokens = torch.arange(problem.tokens)
    seen = torch.ones(len(tokens), 1, dtype=torch.bool, device=tokens.device)
    stretch = problem.tokens
    for axis in problem.axes:
        stretch //= axis.length
        one = axis_mask(axis, tokens // stretch % axis.length)
        seen = (seen[:, :, None] & one[:, None, :]).flatten(1)
    return seen


def attention(
    problem: Problem,
    inputs: Inputs,
    *,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    tokens: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Answer:
    """Masked softmax attention of `tokens` by brute force, everything rounded to `dtype`, as plain PyTorch does.

        out[i] = sum_j softmax_j(scale * query[i] . key[j]) value[j],    lse[i] = log sum_j exp(...)

    Args:
        problem, inputs: what is asked. Holds `B * H * len(tokens) * (keys seen)` scores at once.
        grad_out: `[B, n, H, Dv]`, grad_lse: `[B, n, H]`; gradients are left out if `grad_out` is `None`.
        tokens: flat numbers of the queries to answer, `None` for all.
        dtype: that of all arithmetic, except that `lse` is at least float32.
    """
    device = inputs.query.device
    tokens = torch.arange(problem.tokens, device=device) if tokens is None else tokens
    seen = mask(problem, tokens)
    touched = seen.any(0).nonzero()[:, 0]
    rank = problem.rank
    leaves = [inputs.query.flatten(1, rank)[:, tokens]]
    leaves += [tensor.flatten(1, rank)[:, touched] for tensor in (inputs.key, inputs.value)]
    visible = seen[:, touched].expand(problem.batch, -1, -1)
    if inputs.additional_keys is not None and inputs.additional_values is not None:
        leaves += [inputs.additional_keys, inputs.additional_values]
        valid = torch.ones(problem.batch, len(tokens), problem.additional, dtype=torch.bool, device=device)
        if inputs.additional_lengths is not None:
            valid = valid & (torch.arange(problem.additional, device=device) < inputs.additional_lengths[:, None, None])
        visible = torch.cat([visible, valid], 2)
    wants_gradients = grad_out is not None
    leaves = [leaf.detach().to(dtype).requires_grad_(wants_gradients) for leaf in leaves]
    out, lse = _attend(problem, leaves, visible)
    gradients: tuple[Tensor, ...] = ()
    if grad_out is not None:
        grads = [grad_out.to(dtype), torch.zeros_like(lse) if grad_lse is None else grad_lse.to(lse.dtype)]
        gradients = torch.autograd.grad([out, lse], leaves, grads)
    return Answer(tokens, touched, out.detach(), lse.detach(), gradients)


def _attend(problem: Problem, leaves: list[Tensor], visible: Tensor) -> tuple[Tensor, Tensor]:
    query = leaves[0].transpose(1, 2)  # [B, H, n, D]
    key, value = leaves[1], leaves[2]
    if len(leaves) > 3:
        key, value = torch.cat([key, leaves[3]], 1), torch.cat([value, leaves[4]], 1)
    group = problem.heads // problem.heads_kv
    key, value = (t.transpose(1, 2).repeat_interleave(group, 1) for t in (key, value))
    scores = (query @ key.transpose(2, 3) * problem.scale).masked_fill(~visible[:, None], -torch.inf)
    out = scores.softmax(3) @ value
    lse = scores.to(torch.promote_types(scores.dtype, torch.float32)).logsumexp(3)
    return out.transpose(1, 2), lse.transpose(1, 2)


def truth_and_eager(
    problem: Problem,
    inputs: Inputs,
    *,
    grad_out: Tensor | None = None,
    grad_lse: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Answer, Answer]:
    """The answer in float64, and what plain PyTorch makes of it in the dtype of the inputs.

    float64 has no wider truth to be measured against; there, the second answer is the truth moved by
    float32's error times the ratio of the two roundings.
    """

    def solve(dtype: torch.dtype) -> Answer:
        return attention(problem, inputs, grad_out=grad_out, grad_lse=grad_lse, tokens=tokens, dtype=dtype)

    truth, dtype = solve(torch.float64), inputs.query.dtype
    if dtype != torch.float64:
        return truth, solve(dtype)
    single, ratio = solve(torch.float32), torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    out, lse, *gradients = (
        there + (here.double() - there) * ratio
        for here, there in zip(
            (single.out, single.lse, *single.gradients), (truth.out, truth.lse, *truth.gradients), strict=True
        )
    )
    return truth, Answer(truth.tokens, truth.touched, out, lse, tuple(gradients))
