"""Whole kernels of the Hopper backward against the definition, on any machine: their own source, run by NumPy.

They are told what the host side tells them: only the driver is replaced. `VICINAL_FUZZ=2000 pytest
tests/hopper/test_gradients_on_cpu.py` runs that many random problems; few by default.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels' source needs triton, which is not installed")

from on_cpu import Map, Pointer, array, device, launch

from vicinal.backends.base import Inputs
from vicinal.backends.hopper import backward, backward_keys, backward_queries, cost_backward
from vicinal.backends.hopper.launch import Geometry, Layout, layout_of
from vicinal.backends.hopper.variant import AxisArgs, StepArgs, Sums, Variant
from vicinal.plan import AxisPlan
from vicinal.problem import Problem
from vicinal.testing.truth import truth_and_eager

KERNELS = {
    "keys": device(backward_keys).key_gradients,
    "additional": device(backward_keys).additional_gradients,
    "queries": device(backward_queries).query_gradients,
}
LOG2_E = 1.4426950408889634


class Told:
    """In the place of `launch.TensorMap`: what it was told."""

    def __init__(self, place: Geometry, dtype: str, box: tuple[int, ...], head_dim: int) -> None:
        self.place, self.box, self.head_dim = place, box, head_dim

    def of(self, memory: np.ndarray[Any, Any]) -> Map:
        return Map(memory, self.place, self.box, self.head_dim, prod(self.box))


class Run:
    """In the place of `launch.Call`: runs a kernel on the arrays that its addresses stand for."""

    arrays: dict[int, np.ndarray[Any, Any]] = {}  # noqa: RUF012
    rooms: dict[int, int] = {}  # noqa: RUF012

    def __init__(
        self, variant: Variant | Sums, grid: tuple[int, int, int], maps: Sequence[Told], pointers: int,
        integers: Sequence[int], floats: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.variant, self.grid, self.maps, self.integers, self.floats = variant, grid, maps, integers, floats

    def start_on(self, addresses: Sequence[int], pointers: Sequence[int], stream: int) -> None:
        if isinstance(self.variant, Sums):
            return
        at = dict(zip(dict.fromkeys(self.maps), addresses, strict=True))
        maps = [told.of(self.arrays[at[told]][(self.rooms[at[told]] - told.place.room) // 2 :]) for told in self.maps]
        numbers = [array(n) for n in self.integers]
        axes = tuple(AxisArgs(*numbers[6 * i : 6 * i + 6]) for i in range(3))
        steps = tuple(StepArgs(*numbers[18 + 4 * i : 22 + 4 * i]) for i in range(len(maps)))
        rest = numbers[18 + 4 * len(maps) :]
        given = [Pointer(self.arrays.get(pointer)) for pointer in pointers]
        launch(KERNELS[self.variant.kernel], self.grid, *maps, *given, axes, steps, *rest, *self.floats, self.variant)


def draw(seed: int) -> Problem:
    """A small problem of any features."""
    rng = random.Random(seed)
    rank = rng.choice((1, 2, 3, 3))
    shape = tuple(rng.randint(1, {1: 90, 2: 12, 3: 6}[rank]) for _ in range(rank))
    dilation = tuple(rng.choice((1, 1, rng.randint(1, n))) for n in shape)
    kernel = tuple(rng.randint(1, n // d) for n, d in zip(shape, dilation, strict=True))
    heads_kv = rng.randint(1, 2)
    return Problem.grid(
        shape, kernel, stride=tuple(rng.choice((1, rng.randint(1, k))) for k in kernel), dilation=dilation,
        is_causal=tuple(rng.random() < 0.3 for _ in shape), batch=rng.randint(1, 2),
        heads=heads_kv * rng.randint(1, 2), heads_kv=heads_kv, head_dim=rng.choice((32, 64, 128)), dtype="bfloat16",
        additional=rng.choice((0, 0, rng.randint(1, 150))),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(int(os.environ.get("VICINAL_FUZZ", "16"))))
def test_kernels_compute_gradients(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, rng = draw(seed), random.Random(seed)
    ranked = {kernel: cost_backward.ranked_cuts(kernel, problem, 10_000) for kernel in ("keys", "queries")}
    check(problem, {kernel: rng.choice((found[0], rng.choice(found))) for kernel, found in ranked.items()}, monkeypatch)


PASSING = [  # windows smaller than a tile: what one warpgroup's rows see, the other's do not
    Problem.grid((500,), 30, heads=1, head_dim=128),
    Problem.grid((450,), 21, stride=21, heads=2, heads_kv=1, head_dim=128, additional=70),
    Problem.grid((20, 40), (3, 9), dilation=(1, 2), heads=1, head_dim=128),
    Problem.grid((3, 18, 40), (2, 3, 17), is_causal=(True, False, False), heads=1, head_dim=128, additional=5),
]


@pytest.mark.parametrize(("problem", "stack"), [(p, n) for p in PASSING for n in range(3 - p.rank, 3)], ids=str)
def test_warpgroups_pass_by_boxes(problem: Problem, stack: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each passes by boxes that only the other's rows see, also more than there are slots: nobody waits in vain."""
    cuts: dict[str, cost_backward.Cut] = {}
    for kernel in ("keys", "queries"):
        ranked = cost_backward.ranked_cuts(kernel, problem, 10_000)
        skipping = [cut for cut in ranked if cut.variant.skips and cut.variant.stack == stack]
        cuts[kernel] = next((cut for cut in skipping if cut.variant.is_late), skipping[0])
    check(problem, cuts, monkeypatch)


def test_more_boxes_than_slots_are_passed_by(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two boxes that a warpgroup's rows see lie a whole line that they do not: it must not wait in vain."""
    problem = Problem.grid((3, 18, 40), (2, 3, 17), is_causal=(True, False, False), heads=1, head_dim=128)
    cuts = {kernel: cost_backward.ranked_cuts(kernel, problem, 10_000) for kernel in ("keys", "queries")}
    shape = (1, 8, 8), (1, 8, 8), 1
    cut = next(cut for cut in cuts["queries"] if (cut.variant.box, cut.variant.kv_box, cut.variant.stack) == shape)
    assert cut.variant.skips
    assert cut.variant.is_late
    assert AxisPlan(problem.axes[2], 8, 8).most_visited >= cut.variant.stages - 1
    check(problem, {"keys": cuts["keys"][0], "queries": cut}, monkeypatch)


@pytest.mark.parametrize("problem", [
    Problem.grid((8, 8, 16), (8, 8, 8), stride=(1, 1, 8), heads=2, heads_kv=1, head_dim=128, additional=70),
    Problem.grid((128,), 128, heads=2, head_dim=128),
], ids=str)  # fmt: skip
def test_boxes_that_every_row_sees(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    cuts = {kernel: cost_backward.ranked_cuts(kernel, problem, 10_000) for kernel in ("keys", "queries")}
    late = {kernel: next(cut for cut in found if cut.variant.is_late) for kernel, found in cuts.items()}
    assert {cut.variant.mask for cut in late.values()} == {"none"}
    check(problem, late, monkeypatch)


@pytest.mark.parametrize("problem", [
    Problem.grid((11, 19), (3, 5), stride=(1, 2), batch=2, heads=2, head_dim=32),
    Problem.grid((4, 6, 9), (2, 3, 2), dilation=(1, 2, 3), heads=3, head_dim=64, additional=33),
], ids=str)  # fmt: skip
def test_gradients_of_what_is_packed(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of queries, keys and values as slices of one tensor; nothing between them is written by two."""
    cuts = {kernel: cost_backward.ranked_cuts(kernel, problem)[0] for kernel in ("keys", "queries")}
    check(problem, cuts, monkeypatch, is_packed=True)


def check(
    problem: Problem, cuts: dict[str, cost_backward.Cut], monkeypatch: pytest.MonkeyPatch, *, is_packed: bool = False
) -> None:
    """Run both passes, cut like that, and the one for additional keys."""
    monkeypatch.setattr(backward, "ranked_cuts", lambda kernel, _: (cuts[kernel],))
    monkeypatch.setattr(backward, "function", lambda variant, _: variant)
    monkeypatch.setattr(backward, "Call", Run)
    monkeypatch.setattr(backward, "TensorMap", Told)
    noise = torch.Generator().manual_seed(0)
    grid, more = (problem.batch, *problem.shape), (problem.batch, problem.additional)
    shapes = [(*grid, problem.heads), *[(*grid, problem.heads_kv)] * 2, *[(*more, problem.heads_kv)] * 2]
    tensors = [
        torch.randn(*s, problem.head_dim, generator=noise) for s in (shapes if problem.additional else shapes[:3])
    ]
    grad_out = torch.randn(*shapes[0], problem.head_dim, generator=noise)
    grad_lse = torch.randn(*shapes[0], generator=noise)
    inputs = Inputs(*tensors)
    flat = {"grad_out": grad_out.flatten(1, problem.rank), "grad_lse": grad_lse.flatten(1, problem.rank)}
    truth, _ = truth_and_eager(replace(problem, dtype="float32"), inputs, **flat)
    delta = (truth.out * flat["grad_out"].double()).sum(-1) - flat["grad_lse"].double()
    by_head = [x.transpose(1, 2).contiguous().numpy().astype(np.float32).ravel() for x in (truth.lse * LOG2_E, delta)]
    layouts: list[Layout] = [layout_of(t.shape, t.stride()) for t in (tensors[0], grad_out, *tensors[1:])]
    whole = torch.full((*shapes[0][:-1], 3, problem.heads, problem.head_dim), torch.nan)
    wanted_at = whole.unbind(-3) if is_packed else [torch.full_like(t, torch.nan) for t in tensors[:3]]
    passes = backward.Passes(problem, layouts, [layout_of(t.shape, t.stride()) for t in wanted_at], 0)

    def placed(tensor: torch.Tensor, room: int) -> np.ndarray[Any, Any]:
        return np.concatenate([np.full(room // 2, np.nan, np.float32), tensor.numpy().ravel()])

    given = [placed(t, room) for t, room in zip((tensors[0], grad_out, *tensors[1:]), passes.rooms, strict=True)]
    rooms = [passes.rooms[0], *passes.rooms[2:4]]
    if is_packed:
        assert not any(rooms)
        grads = [whole.numpy().ravel()[t.storage_offset() :] for t in wanted_at]
    else:
        grads = [placed(t, room) for t, room in zip(wanted_at, rooms, strict=True)]
    partial = [np.full(prod(passes.partial_shape), np.nan, np.float32) for _ in range(2)]
    Run.arrays = dict(enumerate([*given, *grads, *by_head, *partial], 1))
    Run.rooms = dict(enumerate([*passes.rooms, *rooms], 1))
    n = len(given)
    sums = (n + 4, n + 5)
    passes.start(range(1, n + 1), range(n + 1, n + 4), (), sums, (n + 6, n + 7), 0, 0)
    if is_packed:
        found = [t.numpy() for t in wanted_at]
    else:
        found = [g[room // 2 :].reshape(t.shape) for g, room, t in zip(grads, rooms, tensors, strict=False)]
    if problem.additional:
        found += [p.reshape(passes.partial_shape).sum(0) for p in partial]
    for name, ours in zip(inputs._fields, found, strict=False):
        wanted = truth.gradients[name].reshape(ours.shape).numpy()
        np.testing.assert_allclose(ours, wanted, rtol=1e-3, atol=2e-4 * max(1.0, np.abs(wanted).max()), err_msg=name)
