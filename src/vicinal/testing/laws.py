"""The laws of neighborhood attention, one function each: it judges one backend on one problem.

Each takes a `Trial` and raises `AssertionError` where its sentence does not hold. `checks` runs them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.errors import Unsupported
from vicinal.functional import merge_attentions
from vicinal.problem import Problem
from vicinal.testing.cases import generator, make_output_gradients
from vicinal.testing.layouts import LAYOUTS, with_nan_beyond_lengths
from vicinal.testing.tolerance import assert_as_good_as_eager
from vicinal.testing.trial import Trial, assert_solved
from vicinal.testing.truth import Answer, bias, mask, truth_and_eager
from vicinal.tiling import Tiling


def _flat(problem: Problem, grads: tuple[Tensor, Tensor | None]) -> dict[str, Tensor | None]:
    grad_out, grad_lse = grads
    rank = problem.rank
    return {"grad_out": grad_out.flatten(1, rank), "grad_lse": None if grad_lse is None else grad_lse.flatten(1, rank)}


def _answers(problem: Problem, inputs: Inputs, grads: tuple[Tensor, Tensor | None]) -> tuple[Answer, Answer]:
    return truth_and_eager(problem, inputs, **_flat(problem, grads))


def equals_the_oracle(trial: Trial) -> None:
    """Values, log-sum-exp and all gradients are within twice plain PyTorch's own error in that dtype."""
    inputs = trial.inputs()
    grads = make_output_gradients(trial.problem, trial.device, trial.seed)
    assert_solved(trial, inputs, grads, _answers(trial.problem, inputs, grads))


def gradient_without_lse(trial: Trial) -> None:
    """Gradients are right where the log-sum-exp was not used, so that it has none."""
    inputs = trial.inputs()
    grads = make_output_gradients(trial.problem, trial.device, trial.seed)[0], None
    assert_solved(trial, inputs, grads, _answers(trial.problem, inputs, grads))


def counts_its_keys(trial: Trial) -> None:
    """With zero queries the log-sum-exp is log(number of keys), and coordinates average to the window's centre."""
    problem = trial.problem
    inputs = trial.inputs()
    tokens = torch.arange(problem.tokens, device=trial.device)
    coordinates: list[Tensor] = []
    for axis in reversed(problem.axes):
        coordinates.insert(0, tokens % axis.length + 1)
        tokens = tokens // axis.length
    channels = [coordinates[i % problem.rank] for i in range(problem.head_dim_v)]
    value = torch.stack(channels, 1).to(inputs.value.dtype).reshape(*problem.shape, 1, problem.head_dim_v)
    inputs = _without_bias(inputs)
    inputs = inputs._replace(query=torch.zeros_like(inputs.query), value=value.expand_as(inputs.value).contiguous())
    output = trial.forward(inputs)
    assert_lse_counts(output.lse.flatten(1, problem.rank), _count(problem, inputs))
    truth, eager = truth_and_eager(problem, inputs)
    actual = output.out.flatten(1, problem.rank)
    assert_as_good_as_eager(actual, eager.out, truth.out, summed=inputs.value, what="the mean coordinate")


def _without_bias(inputs: Inputs) -> Inputs:
    """With a table of zeros, if there is one."""
    table = inputs.position_bias
    return inputs if table is None else inputs._replace(position_bias=torch.zeros_like(table))


def _count(problem: Problem, inputs: Inputs) -> Tensor:
    """Keys that each query sees, `[B, N, 1]`."""
    count = mask(problem, torch.arange(problem.tokens, device=inputs.query.device)).sum(1)[None, :, None]
    if inputs.additional_lengths is not None:
        return count + inputs.additional_lengths.clamp(0, problem.additional)[:, None, None]
    return count + problem.additional


def assert_lse_counts(lse: Tensor, count: Tensor) -> None:
    """`lse` is log(count) to a few roundings, which no other count is."""
    wanted = count.double().log().expand_as(lse)
    slack = 8 * torch.finfo(lse.dtype).eps * wanted.abs().clamp(min=1)
    if not bool(((lse.double() - wanted).abs() <= slack).all()):
        wrong = ~((lse.double() - wanted).abs() <= slack)
        where = tuple(int(i) for i in wrong.nonzero()[0])
        raise AssertionError(
            f"{int(wrong.sum())} of {lse.numel()} queries miscount their keys; the one at {where} (batch, token, head) "
            f"counts {lse[where].double().exp().item():.6g} where {count.expand_as(lse)[where].item()} are seen"
        )


def nothing_leaks_in(trial: Trial) -> None:
    """A huge logit just outside each face of a window, or anywhere else outside, changes nothing."""
    _one_window_each(trial, outside=True)


def the_window_is_complete(trial: Trial) -> None:
    """Every key of a window counts, its outermost ones too: those on its faces alone, against huge negative logits."""
    _one_window_each(trial, outside=False)


def _one_window_each(trial: Trial, *, outside: bool) -> None:
    """Each batch row picks a query; its keys score 0, all others huge, or those on no face hugely negative."""
    picks = _picks(trial.problem, random.Random(trial.seed))
    problem = replace(trial.problem, batch=len(picks), additional=0)
    trial = replace(trial, problem=problem)
    inputs = _without_bias(trial.inputs())
    seen = mask(problem, torch.tensor(picks, device=trial.device))  # [B, N]
    # The largest whole number whose products do not overflow float16, a score far beyond any -1e4 of a sloppy mask
    # in the other dtypes.
    size = float(int((3e4 / problem.head_dim) ** 0.5))
    sign = 1.0 if problem.scale >= 0 else -1.0
    kept = seen if outside else _faces(problem, seen)
    score = ~seen if outside else -(seen & ~kept).int()
    keys = (sign * size * score).to(inputs.key.dtype).reshape(len(picks), *problem.shape, 1, 1)
    query = torch.full_like(inputs.query, size)
    output = trial.forward(inputs._replace(query=query, key=keys.expand_as(inputs.key).contiguous()))
    rows, tokens = torch.arange(len(picks)), torch.tensor(picks)
    if problem.scale:
        lse = output.lse.flatten(1, problem.rank)[rows, tokens]
        assert_lse_counts(lse[:, None], kept.sum(1)[:, None, None])
    value = inputs.value.flatten(1, problem.rank)
    weights = (kept if problem.scale else seen).double()
    group = problem.heads // problem.heads_kv
    truth, eager = (
        torch.einsum("bn,bnhd->bhd", (weights / weights.sum(1, keepdim=True)).to(d), value.to(d)).repeat_interleave(
            group, 1
        )
        for d in (torch.float64, value.dtype)
    )
    actual = output.out.flatten(1, problem.rank)[rows, tokens]
    assert_as_good_as_eager(actual, eager, truth, summed=value, what="the output of the picked queries")


def _picks(problem: Problem, rng: random.Random) -> list[int]:
    """The first and the last query, and some between."""
    last = problem.tokens - 1
    return sorted({0, last, last // 2, *(rng.randint(0, last) for _ in range(3))})


def _faces(problem: Problem, seen: Tensor) -> Tensor:
    """The outermost seen keys: those that are first or last on some axis of their box. `[B, N]`"""
    box = seen.reshape(-1, *problem.shape)
    outer = torch.zeros_like(box)
    for dim in range(1, box.dim()):
        length = box.shape[dim]
        number = torch.arange(length, device=seen.device).reshape(-1, *[1] * (box.dim() - dim - 1)).expand(box.shape)
        last = torch.where(box, number, -1).amax(tuple(range(1, box.dim())), keepdim=True)
        first = torch.where(box, number, length).amin(tuple(range(1, box.dim())), keepdim=True)
        outer |= box & ((number == first) | (number == last))
    return outer.reshape(seen.shape)


def whole_window_is_dense_attention(trial: Trial) -> None:
    """A window as large as the grid is dense attention, as PyTorch's own operator computes it."""

    def cut(tensor: Tensor) -> Tensor:
        return tensor.flatten(1, trial.problem.rank).transpose(1, 2)

    _equals_sdpa(trial, cut)


def strided_window_is_blocked_attention(trial: Trial) -> None:
    """Where the stride is the window and both divide the grid, tokens attend to their own block."""
    problem = trial.problem
    blocks = [axis.length // axis.kernel_size for axis in problem.axes]

    def cut(tensor: Tensor) -> Tensor:
        for i, (n, axis) in enumerate(zip(blocks, problem.axes, strict=True)):
            tensor = tensor.unflatten(1 + 2 * i, (n, axis.kernel_size))
        order = [0, *range(1, 2 * problem.rank, 2), *range(2, 2 * problem.rank + 1, 2)]
        tensor = tensor.permute(*order, -2, -1).flatten(problem.rank + 1, 2 * problem.rank)
        return tensor.flatten(0, problem.rank).transpose(1, 2)

    _equals_sdpa(trial, cut)


def _equals_sdpa(trial: Trial, cut: Callable[[Tensor], Tensor]) -> None:
    """`cut` turns `[B, *S, H, D]` into independent dense problems `[.., H, tokens, D]`."""
    inputs, problem = trial.inputs(), trial.problem
    q, k, v = (cut(tensor) for tensor in inputs[:3])
    group = problem.heads // problem.heads_kv
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    added = None
    if inputs.position_bias is not None:
        # Each of the dense problems is a grid of the window's size, seen whole.
        block = replace(problem, axes=Problem.grid(problem.kernel_size, -1).axes)
        added = bias(block, inputs.position_bias.double(), mask(block))
    truth = scaled_dot_product_attention(q.double(), k.double(), v.double(), added, scale=problem.scale)
    # The fused operator is itself as careful as a kernel; plain PyTorch is the measure, as everywhere.
    _, eager = truth_and_eager(problem, inputs)
    eager_out = eager.out.reshape(*inputs.query.shape[:-1], -1)
    assert_as_good_as_eager(cut(trial.forward(inputs).out), cut(eager_out), truth, summed=v, what="out")


def batch_and_heads_permute(trial: Trial) -> None:
    """Permuting batch rows or heads of the inputs permutes those of the outputs and of the gradients."""
    problem, inputs = trial.problem, trial.inputs()
    grads = make_output_gradients(problem, trial.device, trial.seed)
    answers = _answers(problem, inputs, grads)
    numbers = generator(trial.seed)
    rows = torch.randperm(problem.batch, generator=numbers).to(trial.device)
    kv_heads = torch.randperm(problem.heads_kv, generator=numbers).to(trial.device)
    group = problem.heads // problem.heads_kv
    heads = (kv_heads[:, None] * group + torch.randperm(group, generator=numbers).to(trial.device)).flatten()

    def move(tensor: Tensor, order: Tensor, head_axis: int) -> Tensor:
        return tensor.index_select(0, rows).index_select(head_axis, order)

    orders = {name: heads if name == "query" else kv_heads for name in inputs._fields[:5]}

    def move_all(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        moved = {name: move(t, orders[name], -2) for name, t in tensors.items() if name in orders}
        if "position_bias" in tensors:  # which has no batch rows
            moved["position_bias"] = tensors["position_bias"].index_select(0, heads)
        return moved

    lengths = None if inputs.additional_lengths is None else inputs.additional_lengths.index_select(0, rows)
    given = {name: getattr(inputs, name) for name in answers[0].gradients}
    moved = inputs._replace(**move_all(given), additional_lengths=lengths)
    truth, eager = (
        answer._replace(
            out=move(answer.out, heads, -2), lse=move(answer.lse, heads, -1), gradients=move_all(answer.gradients)
        )
        for answer in answers
    )
    moved_grads = move(grads[0], heads, -2), move(grads[1], heads, -1)
    assert_solved(trial, moved, moved_grads, (truth, eager))


def merged_halves_are_the_whole(trial: Trial) -> None:
    """Attention to the windows, merged with attention to the additional keys, is attention to both at once."""
    problem, inputs = trial.problem, trial.inputs()
    keys, values, lengths = inputs.additional_keys, inputs.additional_values, inputs.additional_lengths
    assert keys is not None
    assert values is not None
    windows = replace(trial, problem=replace(problem, additional=0))
    out, lse = windows.forward(Inputs(*inputs[:3], position_bias=inputs.position_bias))
    group = problem.heads // problem.heads_kv
    scores = problem.scale * torch.einsum(
        "b...hd,bmhd->b...hm", inputs.query.double(), keys.double().repeat_interleave(group, 2)
    )
    if lengths is not None:
        beyond = torch.arange(problem.additional, device=lengths.device) >= lengths[:, None]
        scores = scores.masked_fill(beyond.reshape(problem.batch, *[1] * (problem.rank + 1), -1), -torch.inf)
    other_lse = scores.logsumexp(-1)
    weights = (scores - other_lse[..., None]).exp().nan_to_num(0.0)  # a row without any key weighs nothing
    other = torch.einsum("b...hm,bmhd->b...hd", weights, values.double().repeat_interleave(group, 2))
    merged_out, merged_lse = merge_attentions([out, other.to(out.dtype)], [lse, other_lse.to(lse.dtype)])
    truth, eager = truth_and_eager(problem, inputs)
    # Its outputs were rounded twice more than the whole's.
    for what, actual, a, b in (("out", merged_out, eager.out, truth.out), ("lse", merged_lse, eager.lse, truth.lse)):
        assert_as_good_as_eager(actual.reshape(b.shape), a, b, slack=3, summed=values, what=f"the merged {what}")


def memory_around_is_not_read(trial: Trial) -> None:
    """NaN in the memory around the tensors leaves no trace, and strided inputs are computed right."""
    problem, inputs = trial.problem, with_nan_beyond_lengths(trial.inputs())
    grads = make_output_gradients(problem, trial.device, trial.seed)
    answers = _answers(problem, inputs, grads)
    for name, lay in LAYOUTS.items():
        laid = {field: lay(t) for field, t in inputs._asdict().items() if t is not None and t.is_floating_point()}
        tensors = inputs._replace(**laid)
        try:
            assert_solved(trial, tensors, (lay(grads[0]), grads[1]), answers)
        except AssertionError as error:
            raise AssertionError(f"inputs laid out as {name}: {error}") from None
    ones = torch.ones((), device=trial.device, dtype=grads[0].dtype).expand_as(grads[0])  # what sum() sends back
    assert_solved(trial, inputs, (ones, None), _answers(problem, inputs, (ones, None)))


def two_runs_are_bitwise_equal(trial: Trial) -> None:
    """The same call twice gives the same bits. A backend whose gradients may differ says so: `reproducible = False`."""
    inputs = trial.inputs()
    grads = make_output_gradients(trial.problem, trial.device, trial.seed)
    first = trial.forward(inputs)
    for again in range(3):
        for name, a, b in zip(Output._fields, first, trial.forward(inputs), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"{name} differs in run {again + 2}")
    if trial.has_gradients and getattr(trial.backend, "reproducible", True):
        one, two = (trial.backward(inputs, first, *grads) for _ in range(2))
        for name, a, b in zip(Gradients._fields, one, two, strict=True):
            if a is not None and b is not None and not torch.equal(a, b):
                raise AssertionError(f"the gradient of {name} differs in run 2")


def gradients_go_where_they_are_wanted(trial: Trial) -> None:
    """Gradients written into slices of larger tensors have the bits of others, and what lies around stays as it was."""
    if not trial.has_gradients:
        return
    inputs = trial.inputs()
    output, grads = trial.forward(inputs), make_output_gradients(trial.problem, trial.device, trial.seed)
    apart = trial.backward(inputs, output, *grads)
    wholes = [torch.full((*t.shape[:-2], 3, *t.shape[-2:]), torch.nan).to(t) for t in inputs[:3]]
    into = [whole.select(-3, i) for i, whole in enumerate(wholes)]  # as in one tensor that all three share
    found = trial.backward(inputs, output, *grads, into=into)
    for i, (name, whole) in enumerate(zip(Gradients._fields, wholes, strict=False)):
        if found[i] is not into[i] or not torch.equal(into[i], apart[:3][i]):
            raise AssertionError(f"the gradient of {name} is another where it was wanted")
        if not whole[..., [n for n in range(3) if n != i], :, :].isnan().all():
            raise AssertionError(f"around the gradient of {name} something was written")
    for name, a, b in zip(Gradients._fields[3:], found[3:], apart[3:], strict=True):
        if a is not b and not (a is not None and b is not None and torch.equal(a, b)):
            raise AssertionError(f"the gradient of {name} is another where others went elsewhere")


def an_empty_batch_is_answered(trial: Trial) -> None:
    """No batch rows in, none out, and no complaint."""
    trial = replace(trial, problem=replace(trial.problem, batch=0))
    inputs = trial.inputs()
    grads = make_output_gradients(trial.problem, trial.device, trial.seed)
    output = trial.forward(inputs)
    if output.out.shape != grads[0].shape or output.lse.shape != grads[1].shape:
        raise AssertionError(f"out and lse have shapes {tuple(output.out.shape)} and {tuple(output.lse.shape)}")
    if not trial.has_gradients:
        return
    for name, a in trial.backward(inputs, output, *grads)._asdict().items():
        b = getattr(inputs, name)
        if b is not None and (a is None or a.shape != b.shape):
            raise AssertionError(f"the gradient of {name} must have shape {tuple(b.shape)}")


def the_plan_does_not_change_the_answer(trial: Trial) -> None:
    """Whatever the tiling, the answer is the same: the backend's own ones, and random ones where it takes them."""
    problem, inputs, rng = trial.problem, trial.inputs(), random.Random(trial.seed)
    grads = make_output_gradients(problem, trial.device, trial.seed)
    answers = _answers(problem, inputs, grads)
    own = list(islice(trial.backend.tilings(problem, trial.hardware), 4))
    strange = [random_tiling(problem, rng) for _ in range(5)]
    for tiling in (*own, *strange):
        try:
            assert_solved(trial, inputs, grads, answers, tiling)
        except Unsupported:
            if tiling in own:
                raise
        except AssertionError as error:
            raise AssertionError(f"{tiling}: {error}") from None


def random_tiling(problem: Problem, rng: random.Random) -> Tiling:
    """Any tiles at all, larger than the grid among them."""

    def tile(length: int) -> int:
        return rng.choice((1, 2, 3, 4, 7, 8, 16, length, length + 3, rng.randint(1, length)))

    q_tile, kv_tile = (tuple(tile(axis.length) for axis in problem.axes) for _ in range(2))
    return Tiling(q_tile, kv_tile, rng.choice(("free", "grid")))
