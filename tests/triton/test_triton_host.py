"""The host side of the portable backend, on any machine: what it takes, how it cuts, how it is chosen."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicinal import backends
from vicinal._tuples import ceil_div
from vicinal.backends import triton
from vicinal.backends.triton import bias, cost
from vicinal.backends.triton.bias import slots_of
from vicinal.backends.triton.cost import best_cut, forward_cut, ranked_tilings, room_of, smem_bytes
from vicinal.backends.triton.launch import precision_of, readable, steps_of
from vicinal.backends.triton.variant import StepArgs
from vicinal.errors import Unsupported
from vicinal.hardware import KNOWN, Hardware
from vicinal.plan import make_plan
from vicinal.problem import Axis, Problem
from vicinal.testing.strategies import axes, problems
from vicinal.tiling import Tiling

H100 = Hardware.named("h100-sxm")
PROBLEM = Problem.grid((9, 14, 22), (3, 5, 7), heads=2, head_dim=64)
GPUS = [hardware for hardware in KNOWN.values() if hardware.kind == "cuda"]


@pytest.mark.parametrize("hardware", GPUS, ids=lambda hardware: hardware.name)
def test_takes_what_it_can_run(hardware: Hardware) -> None:
    for dtype in ("float16", "bfloat16", "float32"):
        for dims in ((8, 8), (40, 24), (256, 64)):
            problem = replace(PROBLEM, dtype=dtype, head_dim=dims[0], head_dim_v=dims[1])
            assert triton.backend.why_not(problem, hardware) == ()
            assert triton.backend.why_not_gradients(problem, hardware) == ()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float64"}, "computes in up to 32 bits, got float64"),
        ({"head_dim": 20}, r"multiples of 8 up to 256, got \(20, 64\)"),
        ({"head_dim_v": 264}, r"multiples of 8 up to 256, got \(64, 264\)"),
    ],
)
def test_says_why_not(change: dict[str, object], reason: str) -> None:
    (said,) = triton.backend.why_not(replace(PROBLEM, **change), H100)  # type: ignore[arg-type]
    assert re.search(reason, said)


@pytest.mark.parametrize("installed", ["3.6.0", "3.7.1", ""])
def test_blocks_lift_where_their_machine_code_was_looked_at(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An assembler that gives registers away says nothing; without one nothing runs, and any plan will do."""

    def version(package: str) -> str:
        if installed and package == "triton":
            return installed
        raise PackageNotFoundError(package)

    monkeypatch.setattr(cost, "version", version)
    monkeypatch.setattr(cost, "is_compiler_known", cost.is_compiler_known.__wrapped__)
    problem = replace(PROBLEM, head_dim=128, head_dim_v=128)
    for kernel in ("queries", "keys"):
        lifting = [shape for shape in cost.shapes(kernel, problem, H100) if shape.lifts]
        assert bool(lifting) == (installed != "3.7.1")


def test_says_why_not_on_other_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "is_interpreting", lambda: False)
    (said,) = triton.backend.why_not(replace(PROBLEM, dtype="float16"), Hardware.named("cpu"))
    assert "needs an NVIDIA or AMD GPU, this is cpu" in said and "TRITON_INTERPRET" in said
    (said,) = triton.backend.why_not(PROBLEM, replace(H100, arch=(7, 5)))
    assert said == "needs sm_80 or newer, this is sm_75"


def test_is_chosen_where_hopper_declines_and_where_gradients_are_needed() -> None:
    a100 = Hardware.named("a100-80gb")
    assert backends.choose(PROBLEM, a100).name == "triton"
    assert backends.choose(replace(PROBLEM, dtype="float32"), H100).name == "triton"
    chosen = backends.choose(PROBLEM, H100, needs_grad=True)
    assert chosen.why_not_gradients(PROBLEM, H100) == () and chosen.name in ("hopper", "triton")
    assert backends.choose(replace(PROBLEM, head_dim=80, head_dim_v=80), H100, needs_grad=True).name == "triton"


def test_refuses_a_tiling_in_a_sentence() -> None:
    tiling = Tiling((4, 4, 5), (2, 4, 12), kv_origin="grid")
    with pytest.raises(Unsupported, match=r'kv_origin must be "free"; .*powers of two; .*got \(80, 96\)'):
        forward_cut(PROBLEM, tiling, H100)


@pytest.mark.parametrize("name", ["h100-sxm", "rtx-4090", "mi300x"])
@settings(max_examples=10)
@given(problem=problems(dtypes=("float16", "float32")))
def test_every_tiling_can_be_cut_and_fits(name: str, problem: Problem) -> None:
    hardware = Hardware.named(name)
    tilings = ranked_tilings(problem, hardware)
    assert len(set(tilings)) == len(tilings) > 0
    for tiling in tilings:
        cut = forward_cut(problem, tiling, hardware)
        assert (cut.rows, cut.columns) == (tiling.q_tile, tiling.kv_tile)
        assert (prod(tiling.q_tile), prod(tiling.kv_tile)) == (cut.shape.rows, cut.shape.columns)
        assert cut.masked == (make_plan(problem, tiling).masked > 0)
    for kernel in ("forward", "queries", "keys"):
        assert smem_bytes(kernel, problem, best_cut(kernel, problem, hardware).shape) <= room_of(hardware)


@settings(max_examples=60)
@given(axis=axes(), rows=st.sampled_from((1, 2, 4, 8, 16)), columns=st.sampled_from((1, 2, 4, 8, 16)))
def test_slots_hold_every_pair_and_count_what_is_met(axis: Axis, rows: int, columns: int) -> None:
    slots, met = slots_of(axis, rows, columns)
    found = {
        (group, query // rows, (key - query // rows * rows - slots.first) // columns)
        for group, members in enumerate(axis.subaxes())
        for query in range(members.length)
        for key in members.window(query)
    }
    assert {slot for *_, slot in found} <= set(range(slots.count))
    assert {0, slots.count - 1} <= {slot for *_, slot in found}
    assert len(found) == met


@settings(max_examples=30)
@given(problem=problems(dtypes=("float16", "float32")), scratch=st.sampled_from((1, 10**5, 10**9)))
def test_scratch_of_bias_gradients_is_bounded(problem: Problem, scratch: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bias, "MOST_SCRATCH", scratch)
        cut = bias.bias_cut.__wrapped__(problem, H100)
    one = cut.boxes * cut.cut.shape.rows * cut.cut.shape.columns
    assert cut.scratch == one * cut.heads * cut.chunks <= max(scratch, one)
    tiles = prod(
        ceil_div(ceil_div(a.length, a.dilation), n) * a.dilation
        for a, n in zip(problem.axes, cut.cut.rows, strict=True)
    )
    assert (cut.chunks - 1) * cut.chunk < tiles * problem.batch <= cut.chunks * cut.chunk


def test_strided_views_are_read_in_place_and_others_copied() -> None:
    fused = torch.zeros(2, 5, 7, 3, 8, 64, dtype=torch.float16)
    view = fused[..., 1, :, :]
    assert readable(view) is view
    row = 3 * 8 * 64 // 8
    assert steps_of(view.shape, view.stride(), 2) == StepArgs(5 * 7 * row, 0, 7 * row, row, 64 // 8)
    unaligned = fused.flatten()[1 : 1 + 5 * 64].view(1, 5, 1, 64)
    for strange in (view.mT, fused[..., 1, :, 4:12], unaligned):
        copied = readable(strange)
        assert copied.is_contiguous() and copied.data_ptr() % 16 == 0 and torch.equal(copied, strange)
    assert steps_of(view.mT.shape, view.mT.stride(), 2) is None


def test_float32_is_multiplied_as_pytorch_is_told() -> None:
    single, a100, amd = replace(PROBLEM, dtype="float32"), Hardware.named("a100-80gb"), Hardware.named("mi300x")
    assert precision_of(single, a100) == "tf32x3" and precision_of(single, amd) == "ieee"
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision_of(single, a100) == precision_of(single, amd) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert precision_of(PROBLEM, a100) == "ieee"
