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
    tokens = torch.arange(problem.tokens) if tokens is None else tokens
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
        valid = torch.ones(problem.batch, problem.additional, dtype=torch.bool, device=device)
        if inputs.additional_lengths is not None:
            valid = torch.arange(problem.additional, device=device) < inputs.additional_lengths[:, None]
        # What does not count may hold anything, and 0 * NaN would still be heard.
        hidden = ~valid[:, :, None, None]
        leaves += [t.masked_fill(hidden, 0) for t in (inputs.additional_keys, inputs.additional_values)]
        visible = torch.cat([visible, valid[:, None].expand(-1, len(tokens), -1)], 2)
    leaves = [leaf.detach().to(dtype) for leaf in leaves]
    grads = None
    if grad_out is not None:
        grad_lse = grad_out.new_zeros(grad_out.shape[:-1]) if grad_lse is None else grad_lse
        grads = grad_out.to(dtype), grad_lse
    out, lse, gradients = (_exact if dtype == torch.float64 else _plain)(problem, leaves, visible, grads)
    return Answer(tokens, touched, out, lse, gradients)


Grads = tuple[Tensor, Tensor] | None
Solution = tuple[Tensor, Tensor, tuple[Tensor, ...]]


def _exact(problem: Problem, leaves: list[Tensor], visible: Tensor, grads: Grads) -> Solution:
    """In float64, gradients by automatic differentiation."""
    leaves = [leaf.requires_grad_(grads is not None) for leaf in leaves]
    query, key, value = _heads_first(problem, leaves)
    scores = (query @ key.transpose(2, 3) * problem.scale).masked_fill(~visible[:, None], -torch.inf)
    out, lse = (scores.softmax(3) @ value).transpose(1, 2), scores.logsumexp(3).transpose(1, 2)
    gradients = () if grads is None else torch.autograd.grad([out, lse], leaves, [grads[0], grads[1].double()])
    return out.detach(), lse.detach(), gradients


def _plain(problem: Problem, leaves: list[Tensor], visible: Tensor, grads: Grads) -> Solution:
    """Every step rounded to the dtype of the leaves, gradients by the textbook's formulas:

        dS = P * (dO V^T - rowsum(dO * O) + dlse),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO

    which is how PyTorch's own operators do it. Differentiating softmax instead would be exact where a
    window holds one key, and no yardstick.
    """
    dtype, group = leaves[0].dtype, problem.heads // problem.heads_kv
    q, k, v = _heads_first(problem, leaves)
    scores = (_matmul(q, k.transpose(2, 3)) * problem.scale).masked_fill(~visible[:, None], -torch.inf)
    p, lse = scores.softmax(3), scores.to(torch.promote_types(dtype, torch.float32)).logsumexp(3)
    out = _matmul(p, v)
    solution = out.transpose(1, 2), lse.transpose(1, 2)
    if grads is None:
        return *solution, ()
    grad_out = grads[0].transpose(1, 2)
    delta = (grad_out * out).sum(3) - grads[1].to(dtype).transpose(1, 2)
    grad_scores = p * (_matmul(grad_out, v.transpose(2, 3)) - delta[..., None]) * problem.scale
    grad_q = _matmul(grad_scores, k).transpose(1, 2)
    grad_kv = [_matmul(left.transpose(2, 3), right) for left, right in ((grad_scores, q), (p, grad_out))]
    tokens = leaves[1].shape[1]
    grad_k, grad_v = (g.unflatten(1, (-1, group)).sum(2).transpose(1, 2) for g in grad_kv)
    near = grad_q, grad_k[:, :tokens], grad_v[:, :tokens]
    return *solution, near if len(leaves) == 3 else (*near, grad_k[:, tokens:], grad_v[:, tokens:])


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """A 16-bit product is one with float32 sums, rounded; on CPUs faster so."""
    if left.is_cuda or left.dtype.itemsize > 2:
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)


def _heads_first(problem: Problem, leaves: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, and all keys and values with the additional ones at the end, `[B, H, tokens, D]`."""
    query, key, value = leaves[:3]
    if len(leaves) > 3:
        key, value = torch.cat([key, leaves[3]], 1), torch.cat([value, leaves[4]], 1)
    group = problem.heads // problem.heads_kv
    return (
        query.transpose(1, 2),
        key.transpose(1, 2).repeat_interleave(group, 1),
        value.transpose(1, 2).repeat_interleave(group, 1),
    )


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
    four times float32's error times the ratio of the two roundings: the truth errs as much itself.
    """

    def solve(dtype: torch.dtype) -> Answer:
        return attention(problem, inputs, grad_out=grad_out, grad_lse=grad_lse, tokens=tokens, dtype=dtype)

    truth, dtype = solve(torch.float64), inputs.query.dtype
    if dtype != torch.float64:
        return truth, solve(dtype)
    single = solve(torch.float32)
    ratio = 4 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    out, lse, *gradients = (
        there + (here.double() - there) * ratio
        for here, there in zip(
            (single.out, single.lse, *single.gradients), (truth.out, truth.lse, *truth.gradients), strict=True
        )
    )
    return truth, Answer(truth.tokens, truth.touched, out, lse, tuple(gradients))
