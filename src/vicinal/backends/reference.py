"""The oracle: one dense masked softmax over all tokens. Slow, short, and right on any device.

Its mask is stated differently from `vicinal.window`, as conditions on pairs of coordinates around
the centre of a window, so that a mistake in one of the two shows in the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod

import torch
from torch import Tensor

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.devices import add_at
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling


def axis_mask(axis: Axis, device: torch.device | str = "cpu") -> Tensor:
    """Whether the query of a row sees the key of a column: bool `[L, L]`."""
    token = torch.arange(axis.length, device=device)
    residue, place = token % axis.dilation, token // axis.dilation
    members = torch.bincount(residue, minlength=axis.dilation)[residue]
    same_group = residue[:, None] == residue[None, :]
    first_of_stride = place - place % axis.stride
    if axis.is_causal:
        leader = torch.minimum(first_of_stride + axis.stride - 1, members - 1)
        behind = leader[:, None] - place[None, :]
        return same_group & (behind < axis.kernel_size) & (place[None, :] <= place[:, None])
    to_left, to_right = axis.kernel_size // 2, (axis.kernel_size - 1) // 2
    centre = torch.minimum(first_of_stride + axis.stride // 2, members - 1)
    centre = torch.maximum(torch.minimum(centre, members - 1 - to_right), torch.full_like(centre, to_left))
    offset = place[None, :] - centre[:, None]
    return same_group & (offset >= -to_left) & (offset <= to_right)


def dense_mask(problem: Problem, device: torch.device | str = "cpu") -> Tensor:
    """Whether a query sees a key, tokens in row-major order: bool `[N, N]`."""

    def product(left: Tensor, right: Tensor) -> Tensor:
        pairs = left[:, None, :, None] & right[None, :, None, :]
        return pairs.reshape(left.shape[0] * right.shape[0], left.shape[1] * right.shape[1])

    return reduce(product, (axis_mask(axis, device) for axis in problem.axes))


def bias_index(problem: Problem, device: torch.device | str = "cpu") -> Tensor:
    """Which entry of a head's table, flattened, belongs to a query and a key in its window: `[N, N]`.

    Pairs outside windows get some entry or other.
    """
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    for axis in problem.axes:
        place = torch.arange(axis.length, device=device) // axis.dilation
        most = axis.kernel_size - 1
        along = (place[None, :] - place[:, None]).clamp(-most, most) + most
        pairs = index[:, None, :, None] * (2 * most + 1) + along[None, :, None, :]
        index = pairs.reshape(index.shape[0] * axis.length, index.shape[1] * axis.length)
    return index


def _weights(problem: Problem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Dense probabilities and what they were made of, in the precision of computation.

    Returns:
        p `[B, Hkv, G, N, N + M]`, lse `[B, Hkv, G, N]`, and q `[B, N, Hkv, G, D]`,
        k `[B, N + M, Hkv, D]`, v `[B, N + M, Hkv, Dv]` with the additional keys at the end.
    """
    dtype = torch.float64 if problem.dtype == "float64" else torch.float32
    groups = problem.heads // problem.heads_kv
    q = inputs.query.to(dtype).flatten(1, -3).unflatten(2, (problem.heads_kv, groups))
    k = inputs.key.to(dtype).flatten(1, -3)
    v = inputs.value.to(dtype).flatten(1, -3)
    allowed = dense_mask(problem, q.device).expand(problem.batch, -1, -1)
    if inputs.additional_keys is not None and inputs.additional_values is not None:
        k = torch.cat([k, inputs.additional_keys.to(dtype)], dim=1)
        v = torch.cat([v, inputs.additional_values.to(dtype)], dim=1)
        valid = torch.ones(problem.batch, problem.additional, dtype=torch.bool, device=q.device)
        if inputs.additional_lengths is not None:
            valid = torch.arange(problem.additional, device=q.device) < inputs.additional_lengths[:, None]
        allowed = torch.cat([allowed, valid[:, None, :].expand(-1, problem.tokens, -1)], dim=2)
    # Keys that no query sees may hold anything, and 0 * nan would still be heard.
    seen = allowed.any(dim=1)[:, :, None, None]
    k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
    hidden = ~allowed[:, None, None]
    scores = problem.scale * torch.einsum("bnhgd,bmhd->bhgnm", q, k)
    if inputs.position_bias is not None:
        table = inputs.position_bias.to(dtype).flatten(1).unflatten(0, (problem.heads_kv, groups))
        scores[..., : problem.tokens] += table[..., bias_index(problem, q.device)]
    scores = scores.masked_fill(hidden, -torch.inf)
    lse = scores.logsumexp(dim=-1)
    return torch.exp(scores - lse[..., None]), lse, q, k, v


@dataclass(frozen=True)
class Reference:
    """Dense masked softmax in float32, or float64 for float64: memory grows with the square of the tokens."""

    name: str = "reference"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def tilings(self, problem: Problem, hardware: Hardware) -> tuple[Tiling, ...]:
        """One tile: the whole grid."""
        return (Tiling(problem.shape, problem.shape, kv_origin="grid"),)

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        p, lse, _, _, v = _weights(plan.problem, inputs)
        out = torch.einsum("bhgnm,bmhd->bnhgd", p, v)
        shape = inputs.query.shape[:-1]
        out = out.reshape(*shape, plan.problem.head_dim_v).to(inputs.query.dtype)
        return Output(out.contiguous(), lse.permute(0, 3, 1, 2).reshape(shape).contiguous())

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        p, _, q, k, v = _weights(plan.problem, inputs)
        grad_out = grad_out.to(p.dtype).reshape(*q.shape[:-1], v.shape[-1])
        grad_v = torch.einsum("bhgnm,bnhgd->bmhd", p, grad_out)
        grad_p = torch.einsum("bnhgd,bmhd->bhgnm", grad_out, v)
        grad_scores = p * (grad_p - (p * grad_p).sum(dim=-1, keepdim=True))
        if grad_lse is not None:
            grad_lse = grad_lse.to(p.dtype).reshape(q.shape[:-1]).permute(0, 2, 3, 1)
            grad_scores = grad_scores + p * grad_lse[..., None]
        grad_bias = _table_gradient(plan.problem, grad_scores)
        grad_scores = grad_scores * plan.problem.scale
        grad_q = torch.einsum("bhgnm,bmhd->bnhgd", grad_scores, k)
        grad_k = torch.einsum("bhgnm,bnhgd->bmhd", grad_scores, q)
        tokens = plan.problem.tokens

        def like(grad: Tensor, tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else grad.reshape(tensor.shape).to(tensor.dtype).contiguous()

        gradients = Gradients(
            grad_q.reshape(inputs.query.shape).to(inputs.query.dtype).contiguous(),
            grad_k[:, :tokens].reshape(inputs.key.shape).to(inputs.key.dtype).contiguous(),
            grad_v[:, :tokens].reshape(inputs.value.shape).to(inputs.value.dtype).contiguous(),
            like(grad_k[:, tokens:], inputs.additional_keys),
            like(grad_v[:, tokens:], inputs.additional_values),
            like(grad_bias, inputs.position_bias),
        )
        return gradients.moved(into)


def _table_gradient(problem: Problem, grad_scores: Tensor) -> Tensor:
    """Gradients of scores `[B, Hkv, G, N, N + M]`, summed over those that an entry was added to: `[H, entries]`."""
    table = grad_scores.new_zeros(problem.heads, prod(problem.bias_shape[1:]))
    if problem.position_bias:
        index = bias_index(problem, table.device).flatten()
        add_at(table, index, grad_scores[..., : problem.tokens].sum(0).reshape(problem.heads, -1))
    return table


backend = Reference()
