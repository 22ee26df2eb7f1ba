"""The two halves of neighborhood attention, for those who need the weights between them.

Three linear operators that are each other's derivatives, so that derivatives of any order are right:

    scores    s[i, t] = q[i] . k[j]               j the key in slot t of the window of i
    aggregate o[i]    = sum_t w[i, t] v[j]
    spread    y[j]    = sum_(i, t) w[i, t] q[i]   over all slots that j fills

Plain PyTorch on any device: one product of a tile of queries with the box of keys that it sees, of
which each query's own are taken. Besides inputs and outputs they hold one tile of scores, of up to
`SCORES` elements; what is slow about them is that the weights, `prod(kernel_size)` for each query
and head, are written to memory at all. `neighborhood_attention` never does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from vicinal._transforms import bilinear, by_rows
from vicinal.backends.base import Inputs
from vicinal.errors import InvalidProblem
from vicinal.functional import Each, autocast, each
from vicinal.plan import AxisPlan, Span
from vicinal.problem import Axis, Problem, make_axes, recorded_axes

SCORES = 2**22
"""Scores of one tile, of all batch rows and heads, at most: 16 MiB in float32."""


@dataclass(frozen=True)
class Tile:
    """Queries and the box of keys that they see, as slices of the grid, and the key in each slot."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    slots: Tensor  # [queries, slots], a number in the box; where a slot is empty, the number of its keys


def tiles(axes: tuple[Axis, ...], copies: int, device: torch.device) -> Iterator[Tile]:
    """Cut the grid, so that `copies` times a tile's scores are no more than `SCORES` if possible."""
    sizes = [max(axis.kernel_size, 8) for axis in axes]
    while max(sizes) > 1 and copies * math.prod(map(_scores, axes, sizes)) > SCORES:
        longest = sizes.index(max(sizes))
        sizes[longest] = (sizes[longest] + 1) // 2
    plans = [AxisPlan(axis, size, 1) for axis, size in zip(axes, sizes, strict=True)]
    for spans in product(*(plan.spans for plan in plans)):
        steps = [axis.dilation for axis in axes]
        queries = [_tokens(s.group, s.first, s.last, step) for s, step in zip(spans, steps, strict=True)]
        keys = [_tokens(s.group, s.start, s.stop, step) for s, step in zip(spans, steps, strict=True)]
        slots, count = torch.zeros(1, 1, dtype=torch.int64, device=device), 1
        for axis, span in zip(axes, spans, strict=True):
            along, across = _slots(axis, span).to(device), span.stop - span.start
            pairs = slots[:, None, :, None] * across + along[None, :, None, :]
            empty = (slots[:, None, :, None] == count) | (along[None, :, None, :] == across)
            slots, count = pairs.masked_fill(empty, count * across).flatten(0, 1).flatten(1), count * across
        yield Tile(tuple(queries), tuple(keys), slots)


def _scores(axis: Axis, size: int) -> int:
    return size * (size + axis.kernel_size)


def _tokens(group: int, first: int, last: int, step: int) -> slice:
    return slice(group + first * step, group + (last - 1) * step + 1, step)


@lru_cache(maxsize=4096)
def _slots(axis: Axis, span: Span) -> Tensor:
    """The key in each slot of each query of a span, counted from its first: `[queries, slots]`; empty: one too many."""
    alone = axis.subaxes()[span.group]
    windows = [alone.window(query) for query in range(span.first, span.last)]
    start = torch.tensor([window.start - span.start for window in windows])
    number = torch.tensor([len(window) for window in windows])
    slot = torch.arange(axis.kernel_size)
    return (start[:, None] + slot).masked_fill_(slot >= number[:, None], span.stop - span.start)


def _take(tensor: Tensor, box: tuple[slice, ...], heads_kv: int) -> Tensor:
    """A box of `[B, *S, H, D]` as `[B, Hkv, G * tokens, D]`, in the precision of computation."""
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    piece = tensor[(slice(None), *box)].flatten(1, len(box)).unflatten(2, (heads_kv, -1))
    return piece.permute(0, 2, 3, 1, 4).flatten(2, 3).to(dtype)


def _put(tile: Tensor, target: Tensor, box: tuple[slice, ...], *, add: bool = False) -> None:
    """The way back from `[B, Hkv, G * tokens, D]`."""
    view = target[(slice(None), *box)]
    batch, *shape, heads, width = view.shape
    tile = tile.unflatten(2, (heads // tile.shape[1], -1)).permute(0, 3, 1, 2, 4).reshape(batch, *shape, heads, width)
    view.copy_(view + tile if add else tile)


def _dense(weights: Tensor, slots: Tensor, keys: int) -> Tensor:
    """Weights by slot `[B, Hkv, G * queries, slots]`, as weights by key of the box."""
    groups = weights.shape[2] // slots.shape[0]
    dense = weights.new_zeros(*weights.shape[:3], keys + 1)
    return dense.scatter_(3, slots.repeat(groups, 1).expand_as(weights), weights)[..., :keys]


@torch.library.custom_op("vicinal::neighborhood_scores", mutates_args=())
def scores_of(
    query: Tensor,
    key: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Tensor:
    """`s[i, t] = query[i] . key[j]`, 0 in empty slots: `[B, *S, H, slots]`."""
    axes, heads_kv = _axes(query, kernel_size, stride, dilation, is_causal), key.shape[-2]
    scores = query.new_empty(*query.shape[:-1], _slot_count(axes))
    for tile in tiles(axes, query.shape[0] * query.shape[-2], query.device):
        q, k = _take(query, tile.queries, heads_kv), _take(key, tile.keys, heads_kv)
        pairs = torch.nn.functional.pad(q @ k.transpose(2, 3), (0, 1))
        slots = tile.slots.repeat(q.shape[2] // tile.slots.shape[0], 1)
        _put(pairs.gather(3, slots.expand(*q.shape[:2], -1, -1)), scores, tile.queries)
    return scores


@torch.library.custom_op("vicinal::neighborhood_aggregate", mutates_args=())
def aggregate_of(
    weights: Tensor,
    value: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Tensor:
    """`o[i] = sum_t weights[i, t] value[j]`, whatever the weights of empty slots: `[B, *S, H, Dv]`."""
    axes, heads_kv = _axes(weights, kernel_size, stride, dilation, is_causal), value.shape[-2]
    out = weights.new_empty(*weights.shape[:-1], value.shape[-1])
    for tile in tiles(axes, weights.shape[0] * weights.shape[-2], weights.device):
        w, v = _take(weights, tile.queries, heads_kv), _take(value, tile.keys, heads_kv)
        _put(_dense(w, tile.slots, v.shape[2]) @ v, out, tile.queries)
    return out


@torch.library.custom_op("vicinal::neighborhood_spread", mutates_args=())
def spread_of(
    weights: Tensor,
    query: Tensor,
    heads_kv: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Tensor:
    """`y[j] = sum weights[i, t] query[i]` over the slots that `j` fills: `[B, *S, Hkv, D]`."""
    axes = _axes(weights, kernel_size, stride, dilation, is_causal)
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    total = weights.new_zeros(*weights.shape[:-2], heads_kv, query.shape[-1], dtype=dtype)
    for tile in tiles(axes, weights.shape[0] * weights.shape[-2], weights.device):
        w, q = _take(weights, tile.queries, heads_kv), _take(query, tile.queries, heads_kv)
        count = math.prod(len(range(piece.start, piece.stop, piece.step)) for piece in tile.keys)
        _put(_dense(w, tile.slots, count).transpose(2, 3) @ q, total, tile.keys, add=True)
    return total.to(weights.dtype)


@torch.library.custom_op("vicinal::neighborhood_entries", mutates_args=())
def entries_of(
    query: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> Tensor:
    """Which entry of a head's table of position bias, flattened, each slot has; -1 where it is empty: `[*S, slots]`."""
    axes, rank = _axes(query, kernel_size, stride, dilation, is_causal), len(query.shape) - 3
    entries = torch.zeros([1] * 2 * rank, dtype=torch.int64)
    for i, axis in enumerate(axes):
        entry = torch.empty(axis.length, axis.kernel_size, dtype=torch.int64)
        for span in AxisPlan(axis, axis.length, 1).spans:
            slots = _slots(axis, span)
            offset = slots + span.start - torch.arange(span.first, span.last)[:, None]
            is_empty = slots == span.stop - span.start
            place = (offset + axis.kernel_size - 1).masked_fill_(is_empty, -1)
            entry[_tokens(span.group, span.first, span.last, axis.dilation)] = place
        shape = [1] * 2 * rank
        shape[i], shape[rank + i] = entry.shape
        along = entry.view(shape)
        is_empty = (entries < 0) | (along < 0)
        entries = (entries * (2 * axis.kernel_size - 1) + along).masked_fill(is_empty, -1)
    return entries.flatten(rank).to(query.device)


@entries_of.register_fake
def _(query: Tensor, *window: Any) -> Tensor:
    return query.new_empty(*query.shape[1:-2], _slot_count(_axes(query, *window)), dtype=torch.int64)


@scores_of.register_fake
def _(query: Tensor, key: Tensor, *window: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], _slot_count(_axes(query, *window)))


@aggregate_of.register_fake
def _(weights: Tensor, value: Tensor, *window: Any) -> Tensor:
    return weights.new_empty(*weights.shape[:-1], value.shape[-1])


@spread_of.register_fake
def _(weights: Tensor, query: Tensor, heads_kv: int, *window: Any) -> Tensor:
    return weights.new_empty(*weights.shape[:-2], heads_kv, query.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.settings = inputs[2:]


def _scores_derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (query, key), settings = ctx.saved_tensors, ctx.settings
    gradients = _apply(aggregate_of, grad, key, *settings), _apply(spread_of, grad, query, key.shape[-2], *settings)
    return *gradients, *[None] * len(settings)


def _aggregate_derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (weights, value), settings = ctx.saved_tensors, ctx.settings
    gradients = _apply(scores_of, grad, value, *settings), _apply(spread_of, weights, grad, value.shape[-2], *settings)
    return *gradients, *[None] * len(settings)


def _spread_derivative(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (weights, query), (_, *window) = ctx.saved_tensors, ctx.settings
    gradients = _apply(scores_of, query, grad, *window), _apply(aggregate_of, weights, grad, *window)
    return *gradients, *[None] * len(ctx.settings)


scores_of.register_autograd(_scores_derivative, setup_context=_save)
aggregate_of.register_autograd(_aggregate_derivative, setup_context=_save)
spread_of.register_autograd(_spread_derivative, setup_context=_save)
for _operator in (scores_of, aggregate_of, spread_of):
    _operator.register_vmap(by_rows(_operator))


@entries_of.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], query: Tensor, *window: Any) -> tuple[Tensor, None]:
    return entries_of(query.select(in_dims[0], 0), *window), None


_DERIVATIVES = {scores_of: _scores_derivative, aggregate_of: _aggregate_derivative, spread_of: _spread_derivative}


def _apply(operator: Any, *arguments: Any) -> Tensor:
    """An operator with its derivatives, whoever asks for them."""
    return bilinear(operator, _DERIVATIVES[operator], *arguments)


def neighborhood_scores(
    query: Tensor,
    key: Tensor,
    kernel_size: Each[int],
    *,
    stride: Each[int] = 1,
    dilation: Each[int] = 1,
    is_causal: Each[bool] = False,
    scale: float | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """The scores of each query with the keys of its window: the first half of `neighborhood_attention`.

        scores[i, t] = scale * query[i] . key[j] + bias[j - i],   j the key in slot t of the window of i

    A window has `prod(kernel_size)` slots in row-major order. Along an axis, slot `t` holds the `t`-th
    key of `vicinal.window.window`, the first one first: windows that are pushed inside at a border fill
    all slots. A causal window may hold fewer keys; its last slots are empty, and their score is -inf.
    So `scores.softmax(-1)` is the weights of attention, 0 in empty slots.

    Args:
        query, key, kernel_size, stride, dilation, is_causal, scale, position_bias: as for
            `neighborhood_attention`. Additional keys have no slots; merge them by their log-sum-exp.

    Returns:
        `[B, *S, H, prod(kernel_size)]`, contiguous, in the dtype of the inputs, or autocast's. That is the memory it
        takes, plus one tile of up to `SCORES` scores. It has derivatives of any order.

    Raises:
        InvalidProblem: the arguments do not fit each other; the message names the one at fault.

    Example:
        >>> query, key, value = torch.randn(3, 1, 12, 20, 4, 16)
        >>> weights = neighborhood_scores(query, key, kernel_size=(3, 5)).softmax(-1)
        >>> out = neighborhood_aggregate(weights, value, kernel_size=(3, 5))
        >>> weights.shape, out.shape
        (torch.Size([1, 12, 20, 4, 15]), torch.Size([1, 12, 20, 4, 16]))
    """
    settings: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "is_causal": is_causal,
    }
    query, key, position_bias = autocast((query, key, position_bias))
    if not torch.compiler.is_compiling():  # compiled calls meet the checks of windows in the operators
        Inputs(query, key, key, position_bias=position_bias).problem({**settings, "scale": scale})
    window = [each(setting, query.ndim - 3) for setting in settings.values()]
    scores = _apply(scores_of, query, key, *window) * (query.shape[-1] ** -0.5 if scale is None else float(scale))
    if position_bias is None and not any(window[-1]):
        return scores
    entries = entries_of(query.detach(), *window)
    if position_bias is not None:
        bias = position_bias.flatten(1)[:, entries.clamp(min=0)]  # [H, *S, slots]
        scores = scores + bias.movedim(0, -2).to(scores.dtype)
    return scores.masked_fill(entries.unsqueeze(-2) < 0, -torch.inf)


def neighborhood_aggregate(
    weights: Tensor,
    value: Tensor,
    kernel_size: Each[int],
    *,
    stride: Each[int] = 1,
    dilation: Each[int] = 1,
    is_causal: Each[bool] = False,
) -> Tensor:
    """Sums of values by weights that you bring: the second half of `neighborhood_attention`.

        out[i] = sum_t weights[i, t] * value[j],   j the key in slot t of the window of i

    Args:
        weights: `[B, *S, H, prod(kernel_size)]`, slots as in `neighborhood_scores`; any numbers. What
            empty slots hold has no effect.
        value: `[B, *S, Hkv, Dv]`; `H` must be a multiple of `Hkv`.
        kernel_size, stride, dilation, is_causal: as for `neighborhood_attention`.

    Returns:
        `[B, *S, H, Dv]`, contiguous, in the dtype of the inputs, or autocast's. It has derivatives of any order.

    Raises:
        InvalidProblem: the arguments do not fit each other; the message names the one at fault.

    Example:
        >>> value = torch.arange(5.0).view(1, 5, 1, 1)
        >>> neighborhood_aggregate(torch.ones(1, 5, 1, 3), value, kernel_size=3).flatten().tolist()
        [3.0, 3.0, 6.0, 9.0, 9.0]
    """
    settings: dict[str, Any] = {
        "kernel_size": kernel_size,
        "stride": stride,
        "dilation": dilation,
        "is_causal": is_causal,
    }
    weights, value, _ = autocast((weights, value, None))
    if not torch.compiler.is_compiling():
        _check_weighted(weights, value, settings)
    window = [each(setting, weights.ndim - 3) for setting in settings.values()]
    return _apply(aggregate_of, weights, value, *window)


def _check_weighted(weights: Any, value: Any, settings: dict[str, Any]) -> None:
    """Whether these are weights of the values of windows.

    Raises:
        InvalidProblem: if not, naming what does not fit.
    """
    for name, tensor in (("weights", weights), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise InvalidProblem(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not 4 <= weights.ndim <= 6:
        raise InvalidProblem(
            f"weights must be [B, *S, H, prod(kernel_size)] with 1 to 3 spatial axes, got shape {tuple(weights.shape)}"
        )
    if value.shape[:-2] != weights.shape[:-2] or not value.shape[-1]:
        raise InvalidProblem(
            f"value must be [B, *S, Hkv, Dv] with weights' batch and grid {tuple(weights.shape[:-2])}, "
            f"got shape {tuple(value.shape)}"
        )
    for what in ("dtype", "device"):
        if (there := getattr(weights, what)) != (here := getattr(value, what)):
            raise InvalidProblem(f"value and weights must share one {what}, got {here} and {there}")
    slots = _slot_count(make_axes(tuple(weights.shape[1:-2]), **settings))
    if weights.shape[-1] != slots:
        raise InvalidProblem(
            f"weights must hold prod(kernel_size) = {slots} numbers for each query and head, "
            f"got shape {tuple(weights.shape)}"
        )
    Problem.of(weights[..., :1], value[..., :1], value, **settings)  # queries and keys of one element: the rest


def _axes(tensor: Tensor, *window: Any) -> tuple[Axis, ...]:
    return recorded_axes(tensor.shape[1:-2], *window)


def _slot_count(axes: tuple[Axis, ...]) -> int:
    return math.prod(axis.kernel_size for axis in axes)
