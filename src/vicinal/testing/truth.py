"""What the answer is: brute force over every (query, key) pair, from the published rule.

The rule is stated here as a predicate on a query and a key with the window's centre clamped into
the axis, not as a range of keys as in `vicinal.window`, so that a mistake in one shows in the
other. Nothing here is shared with any backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.problem import Axis, Problem


class Answer(NamedTuple):
    """Attention of some query tokens, and the gradients of those alone.

    `tokens [n]` are the queries and `touched [m]` the keys that some of them sees, as flat token
    numbers; `gradients` are named as in `Inputs`, query's `[B, n, H, D]`, key's `[B, m, Hkv, D]`. `summed` tells
    of each gradient the values that it adds up, weighted by probabilities, if large: see `tolerance.allowance`.
    """

    tokens: Tensor
    touched: Tensor
    out: Tensor  # [B, n, H, Dv]
    lse: Tensor  # [B, n, H]
    gradients: dict[str, Tensor]
    summed: dict[str, Tensor]


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


def offsets(problem: Problem, tokens: Tensor | None = None) -> Tensor:
    """How far each key lies from each query on every axis: `[rank, n, problem.tokens]`.

        offset = (key - query) / dilation

    in members of the dilation group. Meaningful for keys that are seen; for those of other groups it is rounded.

    Example:
        >>> offsets(Problem.grid((4,), kernel_size=2), torch.tensor([1])).tolist()
        [[[-1, 0, 1, 2]]]
    """
    keys = torch.arange(problem.tokens, device=None if tokens is None else tokens.device)
    tokens = keys if tokens is None else tokens
    found: list[Tensor] = []
    stretch = problem.tokens
    for axis in problem.axes:
        stretch //= axis.length
        query, key = (t // stretch % axis.length for t in (tokens, keys))
        found.append(torch.div(key[None, :] - query[:, None], axis.dilation, rounding_mode="floor"))
    return torch.stack(found)


def bias(problem: Problem, table: Tensor, seen: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The position bias of each query and key that it sees, `[H, n, problem.tokens]`; elsewhere 0.

    Looked up coordinate by coordinate, so that an entry out of the table's range is an error.
    """
    query, key = seen.nonzero(as_tuple=True)
    places = [
        offset[query, key] + axis.kernel_size - 1
        for offset, axis in zip(offsets(problem, tokens), problem.axes, strict=True)
    ]
    assert all(bool((place >= 0).all()) for place in places), "a negative place would be read from the other end"
    dense = table.new_zeros(problem.heads, *seen.shape)
    dense[:, query, key] = table[(slice(None), *places)]
    return dense


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

        out[i] = sum_j softmax_j(scale * query[i] . key[j] + bias[j - i]) value[j],    lse[i] = log sum_j exp(...)

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
    leaves = {"query": inputs.query.flatten(1, rank)[:, tokens]}
    leaves |= {name: getattr(inputs, name).flatten(1, rank)[:, touched] for name in ("key", "value")}
    visible = seen[:, touched].expand(problem.batch, -1, -1)
    if inputs.additional_keys is not None and inputs.additional_values is not None:
        valid = torch.ones(problem.batch, problem.additional, dtype=torch.bool, device=device)
        if inputs.additional_lengths is not None:
            valid = torch.arange(problem.additional, device=device) < inputs.additional_lengths[:, None]
        # What does not count may hold anything, and 0 * NaN would still be heard.
        hidden = ~valid[:, :, None, None]
        extra = {"additional_keys": inputs.additional_keys, "additional_values": inputs.additional_values}
        leaves |= {name: tensor.masked_fill(hidden, 0) for name, tensor in extra.items()}
        visible = torch.cat([visible, valid[:, None].expand(-1, len(tokens), -1)], 2)
    if inputs.position_bias is not None:
        leaves["position_bias"] = inputs.position_bias
    leaves = {name: leaf.detach().to(dtype) for name, leaf in leaves.items()}

    def biased(table: Tensor) -> Tensor:
        near = bias(problem, table, seen, tokens)[:, :, touched]
        return torch.nn.functional.pad(near, (0, problem.additional))

    grads = None
    if grad_out is not None:
        grad_lse = grad_out.new_zeros(grad_out.shape[:-1]) if grad_lse is None else grad_lse
        grads = grad_out.to(dtype), grad_lse
    case = Case(problem, leaves, visible, biased)
    out, lse, gradients = (_exact if dtype == torch.float64 else _plain)(case, grads)
    return Answer(tokens, touched, out, lse, gradients, {} if grads is None else _summed(case, out, grads))


class Case(NamedTuple):
    """Leaves by name, which keys (those additional at the end) are visible, `[B, n, keys]`, and bias by pairs."""

    problem: Problem
    leaves: dict[str, Tensor]
    visible: Tensor
    biased: Callable[[Tensor], Tensor]  # [H, 2 * k - 1, ...] to [H, n, keys]

    def hide(self, scores: Tensor) -> Tensor:
        """Scores `[B, H, n, keys]` with the bias, if there is one, and -inf where a key is not visible."""
        if "position_bias" in self.leaves:
            scores = scores + self.biased(self.leaves["position_bias"])
        return scores.masked_fill(~self.visible[:, None], -torch.inf)

    def heads_first(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and all keys and values with the additional ones at the end, `[B, H, tokens, D]`."""
        query, key, value = (self.leaves[name] for name in ("query", "key", "value"))
        if "additional_keys" in self.leaves:
            key = torch.cat([key, self.leaves["additional_keys"]], 1)
            value = torch.cat([value, self.leaves["additional_values"]], 1)
        group = self.problem.heads // self.problem.heads_kv
        return (
            query.transpose(1, 2),
            key.transpose(1, 2).repeat_interleave(group, 1),
            value.transpose(1, 2).repeat_interleave(group, 1),
        )


Grads = tuple[Tensor, Tensor] | None
Solution = tuple[Tensor, Tensor, dict[str, Tensor]]


def _exact(case: Case, grads: Grads) -> Solution:
    """In float64, gradients by automatic differentiation."""
    leaves = {name: leaf.requires_grad_(grads is not None) for name, leaf in case.leaves.items()}
    query, key, value = case.heads_first()
    scores = case.hide(query @ key.transpose(2, 3) * case.problem.scale)
    out, lse = (scores.softmax(3) @ value).transpose(1, 2), scores.logsumexp(3).transpose(1, 2)
    gradients: tuple[Tensor, ...] = ()
    if grads is not None:
        gradients = torch.autograd.grad([out, lse], list(leaves.values()), [grads[0], grads[1].double()])
    return out.detach(), lse.detach(), dict(zip(leaves, gradients, strict=False))


def _plain(case: Case, grads: Grads) -> Solution:
    """Every step rounded to the dtype of the leaves, gradients by the textbook's formulas:

        dS = P * (dO V^T - rowsum(dO * O) + dlse),   dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO

    which is how PyTorch's own operators do it; a bias entry's is the sum of `dS` where it was added, rounded
    once. Differentiating softmax instead would be exact where a window holds one key, and no yardstick.
    """
    problem, leaves = case.problem, case.leaves
    dtype, group = leaves["query"].dtype, problem.heads // problem.heads_kv
    q, k, v = case.heads_first()
    scores = case.hide(_matmul(q, k.transpose(2, 3)) * problem.scale)
    p, lse = scores.softmax(3), scores.to(torch.promote_types(dtype, torch.float32)).logsumexp(3)
    out = _matmul(p, v)
    solution = out.transpose(1, 2), lse.transpose(1, 2)
    if grads is None:
        return *solution, {}
    grad_out = grads[0].transpose(1, 2)
    delta = (grad_out * out).sum(3) - grads[1].to(dtype).transpose(1, 2)
    grad_scores = p * (_matmul(grad_out, v.transpose(2, 3)) - delta[..., None])
    gradients: dict[str, Tensor] = {}
    if "position_bias" in leaves:
        table = leaves["position_bias"].float()
        pull: Any = torch.autograd.functional.vjp(case.biased, table, grad_scores.float().sum(0))[1]
        gradients["position_bias"] = pull.to(dtype)
    grad_scores = grad_scores * problem.scale
    gradients["query"] = _matmul(grad_scores, k).transpose(1, 2)
    tokens = leaves["key"].shape[1]
    for name, left, right in (("key", grad_scores, q), ("value", p, grad_out)):
        grad = _matmul(left.transpose(2, 3), right).unflatten(1, (-1, group)).sum(2).transpose(1, 2)
        gradients[name], gradients[f"additional_{name}s"] = grad[:, :tokens], grad[:, tokens:]
    return *solution, {name: gradients[name] for name in leaves}


def _summed(case: Case, out: Tensor, grads: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What each gradient sums, at its largest. With `slope = dO V^T - rowsum(dO * O) + dlse`:

    dQ = sum P (scale slope K),   dK = sum P (scale slope Q),   dV = sum P dO,   dbias = sum P slope
    """
    q, k, v = (tensor.detach().double() for tensor in case.heads_first())
    grad_out, out = (tensor.double().transpose(1, 2) for tensor in (grads[0], out))
    delta = (grad_out * out).sum(3) - grads[1].double().transpose(1, 2)
    slope = (grad_out @ v.transpose(2, 3) - delta[..., None]).masked_fill(~case.visible[:, None], 0)
    sums = {
        "query": case.problem.scale * slope.abs().amax((2, 3), keepdim=True) * k,
        "key": case.problem.scale * slope.abs().amax((2, 3), keepdim=True) * q,
        "value": grad_out,
        "position_bias": slope,
    }
    sums |= {"additional_keys": sums["key"], "additional_values": sums["value"]}
    return {name: sums[name] for name in case.leaves}


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """A 16-bit product is one with float32 sums, rounded; on CPUs faster so."""
    if left.is_cuda or left.dtype.itemsize > 2:
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)


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

    def moved(there: Tensor, here: Tensor) -> Tensor:
        return there + (here.double() - there) * ratio

    gradients = {name: moved(there, single.gradients[name]) for name, there in truth.gradients.items()}
    out, lse = moved(truth.out, single.out), moved(truth.lse, single.lse)
    return truth, truth._replace(out=out, lse=lse, gradients=gradients)
