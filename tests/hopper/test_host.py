"""The host side of the Hopper backend, on any machine: what it takes, how it cuts, where things lie."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vicinal.backends import hopper, remembered
from vicinal.backends.hopper import memory
from vicinal.backends.hopper.cost import candidates, kv_tiles, predicted_ms, ranked_tilings
from vicinal.backends.hopper.launch import (
    ENOUGH_BOXES,
    LOG2_E,
    Layout,
    can_map,
    geometry,
    heads_abreast,
    heads_per_block,
    kernel_scale,
    layouts_of,
)
from vicinal.backends.hopper.variant import ROWS, SMEM_BYTES, Variant, code_width, is_odd_box, three_axes, variant_of
from vicinal.errors import Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import make_plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

H100 = Hardware.named("h100-sxm")
PROBLEM = Problem.grid((9, 14, 22), (3, 5, 7), heads=2, head_dim=64)


def test_takes_what_it_can_run() -> None:
    assert hopper.backend.why_not(PROBLEM, H100) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "computes in 16 bits only, got float32"),
        ({"head_dim": 80, "head_dim_v": 80}, r"head_dim must be one of .*, got 80"),
        ({"head_dim_v": 32}, "values must have the head_dim of the keys, got 32 and 64"),
        ({"batch": 70000}, "at most 65535 batch rows, got 70000"),
    ],
)
def test_says_why_not(change: dict[str, object], reason: str) -> None:
    (said,) = hopper.backend.why_not(replace(PROBLEM, **change), H100)
    assert re.search(reason, said)


def test_says_why_not_on_other_hardware() -> None:
    for hardware in (replace(H100, arch=(8, 0)), replace(H100, arch=(10, 0)), replace(H100, kind="cpu", arch=(0, 0))):
        (said,) = hopper.backend.why_not(PROBLEM, hardware)
        assert "needs sm_90" in said


def test_refuses_a_tiling_in_a_sentence() -> None:
    with pytest.raises(Unsupported, match=r"64, 128 or 192 queries, got 80; .*powers of two"):
        variant_of(make_plan(PROBLEM, Tiling((4, 4, 5), (2, 4, 12))))


def test_every_candidate_can_be_cut() -> None:
    for rank in (1, 2, 3):
        for head_dim in hopper.HEAD_DIMS:
            problem = Problem.grid((64,) * rank, 8, head_dim=head_dim)
            for tiling in candidates(problem):
                variant = variant_of(make_plan(problem, tiling))
                assert variant.q_tile[3 - rank :] == tiling.q_tile
                assert prod(variant.box) == ROWS
                in_flight = 2 * head_dim * (ROWS * variant.consumers + 2 * variant.stages * variant.keys)
                assert in_flight + 64 * variant.keys <= SMEM_BYTES


def test_prefers_what_the_model_predicts_fastest() -> None:
    problem = Problem.grid((30, 48, 80), (18, 24, 24), heads=24, head_dim=128)
    times = [predicted_ms(make_plan(problem, tiling)) for tiling in ranked_tilings(problem)]
    everything = [predicted_ms(make_plan(problem, tiling)) for tiling in candidates(problem)]
    assert times == pytest.approx(sorted(times), rel=1e-3)
    assert times[0] == pytest.approx(min(everything), rel=1e-3)


@pytest.mark.parametrize("kv_box", [(2, 8, 8), (4, 4, 8), (1, 8, 8), (2, 2, 16), (8, 16), (8, 8)])
def test_code_tells_every_place_from_every_other(kv_box: tuple[int, ...]) -> None:
    width, is_reduced = code_width(kv_box)
    columns = sum(kv_box) - (len(kv_box) - 1 if is_reduced else 0)
    assert width in (16, 32) and columns <= width
    assert not (is_reduced and sum(kv_box) <= width)  # used only where it saves an instruction


@pytest.mark.parametrize("seed", range(200))
def test_every_token_has_its_place_in_the_map_and_no_other_token_has_one(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 12) for _ in range(3)]
    axes = [Axis(n, 1, dilation=rng.randint(1, n)) for n in lengths]
    steps = [rng.randint(1, 50) * 8 for _ in range(3)]
    heads, head_step = rng.randint(1, 3), 8 * rng.randint(8, 20)
    layout = Layout((2, *lengths, heads, 64), (8 * rng.randint(1, 99), *steps, head_step, 1))
    place = geometry(layout, axes)
    columns, *extents = place.sizes
    for i, axis in enumerate(axes):
        long_groups = axis.length % axis.dilation
        reach, stride = extents[2 - i], place.strides[2 - i]
        for group, members in enumerate(a.length for a in axis.subaxes()):
            # As `tile.span_of` computes them.
            residue = group - long_groups + (axis.dilation if group < long_groups else 0)
            shift = int(0 < long_groups <= group)
            others = sum(s * (-a.length % a.dilation) for s, a in zip(steps, axes, strict=True) if a is not axis)
            step = place.steps[i + 1]
            for member in range(members):
                address = -place.room + 2 * others + 2 * residue * step + (member + shift) * stride
                assert address == 2 * (group + member * axis.dilation) * step
            assert members + shift == reach  # the engine clips at the true end
            assert 0 <= residue < axis.dilation
    assert columns >= (heads - 1) * head_step + 64


def test_layouts_that_the_engine_reads_in_place() -> None:
    problem = Problem.grid((6, 10), (3, 5), heads=4, head_dim=64, batch=2)
    fused = (6 * 10 * 3 * 256, 10 * 3 * 256, 3 * 256, 64, 1)
    heads_first = (4 * 60 * 64, 10 * 64, 64, 60 * 64, 1)
    assert all(map(can_map, layouts_of(problem, [fused, heads_first, fused, fused])))
    for broken in ((*fused[:-1], 2), (*fused[:3], 60, 1), (0, *fused[1:])):
        assert not can_map(layouts_of(problem, [broken])[0])


def test_a_scale_of_zero_still_hides() -> None:
    assert kernel_scale(0.125) == 0.125 * LOG2_E == kernel_scale(-0.125)
    assert kernel_scale(0.0) * 2.0**100 > 1e5 and kernel_scale(0.0) * 2.0**50 < 1e-6


def test_heads_share_a_block_where_windows_are_small_and_blocks_many() -> None:
    small = Problem.grid((56, 56), 7, heads=12, head_dim=32, batch=64)
    plan = make_plan(small, Tiling((8, 8), (8, 8)))
    variant, blocks = variant_of(plan), plan.q_tiles
    together = [heads_per_block(small, variant, n, n * 4) for n in (1, 10, 49, 1000)]
    assert together == sorted(together) and together[0] == 1 and together[-1] == ENOUGH_BOXES // 4
    assert all(small.heads % n == 0 for n in together)
    assert heads_per_block(replace(small, heads=7, heads_kv=7), variant, blocks, blocks * 4) in (1, 7)
    assert heads_per_block(small, variant, blocks, blocks * 50) == 1  # many boxes: nothing to gain
    large = make_plan(PROBLEM, Tiling((12, 4, 4), (4, 4, 8)))
    assert heads_per_block(PROBLEM, variant_of(large), 10**6, 10**6) == 1  # the other kernel


def test_two_heads_of_32_share_a_box_where_they_lie_next_to_each_other() -> None:
    problem = Problem.grid((6, 10), (3, 5), heads=4, head_dim=32, batch=2)
    plain = (6 * 10 * 128, 10 * 128, 128, 32, 1)
    per_head = (6 * 10 * 3 * 128, 10 * 3 * 128, 3 * 128, 3 * 32, 1)

    def abreast(strides: list[tuple[int, ...]], tile: tuple[int, int] = (8, 8), **change: int) -> int:
        changed = replace(problem, **change)
        places = [geometry(layout, three_axes(changed.axes)) for layout in layouts_of(changed, strides)]
        return heads_abreast(changed, variant_of(make_plan(changed, Tiling(tile, (8, 8)))), places)

    assert abreast([plain] * 4) == 2
    assert abreast([plain, per_head, plain, plain]) == 1
    assert abreast([plain] * 4, heads=3, heads_kv=3) == 1
    assert abreast([plain] * 4, heads_kv=2) == 1
    assert abreast([plain] * 4, (24, 8)) == 1  # the other kernel
    variant = replace(variant_of(make_plan(problem, Tiling((8, 8), (8, 8)))), abreast=2)
    assert heads_per_block(problem, variant, 1, 1) == 2


def test_refuses_groups_spread_too_far() -> None:
    axes = (Axis(1, 1), Axis(1, 1), Axis(1000, 10, dilation=100))
    far = Layout((1, 1, 1, 1000, 1, 64), (8, 8, 8, 2**26, 64, 1))
    with pytest.raises(Unsupported, match="smaller dilation"):
        geometry(far, axes)


class Asked(list[tuple[object, ...]]):
    """What was asked for; every answer is the same empty shell."""

    def __call__(self, *question: object) -> SimpleNamespace:
        self.append(question)
        return SimpleNamespace(rooms=[0] * 3, needs_room=False, copy_room=0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    monkeypatch.setattr(remembered, "on_device", lambda run, device, *args: run(*args))
    return Asked()


def test_launches_are_found_again(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(PROBLEM, ranked_tilings(PROBLEM)[0])
    shape = 1, *PROBLEM.shape, 2, 64
    tensors = [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(3)]
    launches = memory.Launches(asked)
    first = launches.find(plan, tensors, 0)
    assert launches.find(plan, [tensor.clone() for tensor in tensors], 0) is first
    assert len(asked) == 1
    sliced = torch.zeros(1, *PROBLEM.shape, 3, 2, 64, dtype=torch.bfloat16)[..., 1, :, :]
    for other in ((plan, tensors, 1), (plan, [*tensors[:2], sliced], 0), (replace(plan), tensors, 0)):
        assert launches.find(*other) is not first
    assert len(asked) == 4
    assert asked[2][1] == tuple(tensor.stride() for tensor in (*tensors[:2], sliced))
    monkeypatch.setattr(remembered, "MOST", 4)
    launches.find(plan, tensors, 2)
    assert len(asked) == 5
    launches.find(plan, tensors, 0)  # has been forgotten with all others
    assert len(asked) == 6


def test_unaligned_tensors_are_replaced_by_copies(asked: Asked) -> None:
    plan = make_plan(PROBLEM, ranked_tilings(PROBLEM)[0])
    shape = 1, *PROBLEM.shape, 2, 64
    good = torch.zeros(shape, dtype=torch.bfloat16)
    unaligned = torch.ones(good.numel() + 1, dtype=torch.bfloat16)[1:].view(shape)
    tensors = [good, unaligned, good]
    memory.Launches(asked).find(plan, tensors, 0)
    assert tensors[0] is good and tensors[1] is not unaligned
    assert tensors[1].data_ptr() % 16 == 0 and torch.equal(tensors[1], unaligned)


@pytest.mark.parametrize("dense", [True, False])
def test_outputs_are_contiguous(dense: bool) -> None:
    query = torch.zeros(2, 3, 5, 4, 32, dtype=torch.float16)
    query = query if dense else query.movedim(3, 1)
    for room in (0, 64):
        launch: Any = SimpleNamespace(copy_room=room, lse_shape=tuple(query.shape[:-1]))
        out, lse = hopper.outputs_of(query, launch)
        assert out.shape == query.shape and out.dtype == torch.float16 and out.is_contiguous()
        assert 2 * out.storage_offset() == room
        assert lse.shape == query.shape[:-1] and lse.dtype == torch.float32 and lse.is_contiguous()


ODD = [box for box in kv_tiles(1, 64, 3) if is_odd_box(box)]


@pytest.mark.parametrize("box", ODD, ids=str)
def test_boxes_that_leave_slots_empty(box: tuple[int, ...]) -> None:
    """They nearly fill the slots, run in the small kernel only, and always with a mask that hides what is empty."""
    variant = variant_of(make_plan(replace(PROBLEM, heads=1, heads_kv=1), Tiling((4, 4, 4), box)))
    assert variant.keys == 64 and 0 < variant.empty == 64 - prod(box) <= 8
    assert variant.mask == "coded" and variant.code_width == 16 and not variant.code_is_reduced
    assert not variant.shares_heads
    with pytest.raises(Unsupported, match="powers of two"):
        variant_of(make_plan(PROBLEM, Tiling((4, 8, 4), box)))
    shape = tuple(4 * n for n in box)
    aligned = make_plan(Problem.grid(shape, shape, heads=1, head_dim=64), Tiling((4, 4, 4), box))
    assert aligned.masked == 0 and variant_of(aligned).mask == "coded"


def test_a_variant_is_cached_under_all_that_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    variant = variant_of(make_plan(PROBLEM, Tiling((4, 4, 4), (2, 8, 4))))
    assert replace(variant).cache_key == variant.cache_key != replace(variant, stages=3).cache_key
    before = variant.cache_key
    monkeypatch.setattr(Variant, "overlaps", property(lambda _: True))
    assert variant.cache_key != before
