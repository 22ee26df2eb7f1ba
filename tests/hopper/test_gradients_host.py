"""The host side of the Hopper backward, on any machine: how it cuts, and what its tests on a card meet."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import draw, kind_of_cut

from vicinal.backends import cuda, hopper
from vicinal.backends.base import Inputs, Output
from vicinal.backends.cuda import Function
from vicinal.backends.hopper import backward
from vicinal.backends.hopper.backward import contiguous
from vicinal.backends.hopper.cost_backward import HEAD_DIMS, RATES, additional_variant, ranked_cuts
from vicinal.backends.hopper.launch import LOG2_E, Layout
from vicinal.backends.hopper.variant import ROWS, SMEM_BYTES, Sums, Variant
from vicinal.hardware import Hardware
from vicinal.problem import Problem

H100 = Hardware.named("h100-sxm")
PASSES = ("keys", "queries")
GRIDS = [((64,), 9), ((40, 72), (7, 12)), ((9, 24, 40), (3, 5, 8))]


def problem_of(shape: tuple[int, ...], window: object, head_dim: int) -> Problem:
    return Problem.grid(shape, window, heads=4, heads_kv=2, head_dim=head_dim)  # type: ignore[arg-type]


def bytes_in_flight(variant: Variant) -> int:
    """Shared memory of tiles, boxes, the mask's code, and of the queries' sums."""
    rows = 2 * 2 * variant.head_dim * ROWS * variant.consumers
    columns = 2 * 2 * variant.head_dim * variant.keys * variant.stages
    code = 2 * variant.code_width * variant.keys if variant.mask == "coded" else 0
    return rows + columns + code + 2 * 4 * variant.stages * variant.keys


@pytest.mark.parametrize("kernel", ["keys", "queries"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(("shape", "window"), GRIDS)
def test_every_cut_fits(kernel: str, head_dim: int, shape: tuple[int, ...], window: object) -> None:
    cuts = ranked_cuts(kernel, problem_of(shape, window, head_dim), 10_000)
    for cut in cuts:
        variant = cut.variant
        assert prod(variant.box) == ROWS
        assert (kernel, head_dim, variant.consumers, variant.keys) in RATES
        assert variant.keys == prod(variant.kv_box)
        assert bytes_in_flight(variant) + 1024 <= SMEM_BYTES
        assert variant.is_inverse == (kernel == "keys")
    assert cuts[0].milliseconds == pytest.approx(min(cut.milliseconds for cut in cuts), rel=1e-3)


def test_no_mask_where_none_is_needed() -> None:
    """Windows that tile the grid: both passes find boxes that every row sees whole."""
    problem = Problem.grid((32, 64), (16, 16), stride=16, heads=2, head_dim=128)
    assert {ranked_cuts(kernel, problem)[0].variant.mask for kernel in ("keys", "queries")} == {"none"}
    sliding = Problem.grid((32, 64), (16, 16), heads=2, head_dim=128)
    assert {ranked_cuts(kernel, sliding)[0].variant.mask for kernel in ("keys", "queries")} == {"coded"}


def test_keys_cost_what_their_query_heads_do() -> None:
    """A block of keys walks the queries of all heads that read them."""
    problem = replace(problem_of((160, 144), 7, 64), batch=8)
    wide = replace(problem, heads_kv=4)
    grouped, plain = (ranked_cuts("keys", p)[0].milliseconds for p in (problem, wide))
    assert plain / 2 < grouped < plain


def test_additional_keys_are_walked_over_the_whole_grid() -> None:
    variant = additional_variant(Problem.grid((5, 30, 50), 3, heads=2, head_dim=64, additional=77))
    assert variant.kernel == "additional"
    assert variant.mask == "none"
    padded = prod(-(-n // side) * side for n, side in zip((5, 30, 50), variant.kv_box, strict=True))
    assert padded <= 1.15 * 5 * 30 * 50


def test_says_which_heads_have_gradients() -> None:
    problem = problem_of((64,), 9, 128)
    assert hopper.backend.why_not_gradients(problem, H100) == ()
    (said,) = hopper.backend.why_not_gradients(replace(problem, head_dim=256, head_dim_v=256), H100)
    assert said == "computes gradients where head_dim is one of (32, 64, 128), got 256"


def test_contiguous_strides() -> None:
    layout = Layout((2, 1, 5, 7, 3, 64), (99, 0, 8, 8, 8, 1))
    assert contiguous(layout).strides == (5 * 7 * 3 * 64, 5 * 7 * 3 * 64, 7 * 3 * 64, 3 * 64, 64, 1)


def test_random_problems_meet_everything() -> None:
    """Those that the tests on a card draw: each feature is among them, and with it each line that it takes."""
    drawn = {seed: draw(seed) for seed in range(40)}
    cases = {seed: case for seed, case in drawn.items() if case.problem.head_dim in HEAD_DIMS}
    cuts = [
        kind_of_cut(seed, kernel, case.problem)[0] for kernel in ("keys", "queries") for seed, case in cases.items()
    ]
    variants = [cut.variant for cut in cuts]
    problems = [case.problem for case in cases.values()]
    features = {
        "grouped heads": any(p.heads > p.heads_kv for p in problems),
        "a negative scale": any(p.scale < 0 for p in problems),
        "a scale of zero": any(p.scale == 0 for p in problems),
        "additional keys": any(
            p.additional and not case.has_lengths for p, case in zip(problems, cases.values(), strict=True)
        ),
        "lengths": any(case.has_lengths for case in cases.values()),
        "dilation that does not divide": any(a.length % a.dilation for p in problems for a in p.axes),
        "stride": any(a.stride > 1 for p in problems for a in p.axes),
        "strided batch rows": any(
            p.batch > 1 and case.layout == "padded" for p, case in zip(problems, cases.values(), strict=True)
        ),
        "causal and strided": any(
            a.is_causal and a.stride > 2 and a.length > 2 * a.kernel_size for p in problems for a in p.axes
        ),
        **{f"rank {n}": any(p.rank == n for p in problems) for n in (1, 2, 3)},
        **{f"heads of {n}": any(p.head_dim == n for p in problems) for n in HEAD_DIMS},
        **{f"mask {name}": any(v.mask == name for v in variants) for name in ("none", "coded", "select")},
        **{f"{n} warpgroups": any(v.consumers == n for v in variants) for n in (1, 2)},
        **{f"boxes passed by for {name}": any(v.skips and v.kernel == name for v in variants) for name in PASSES},
        "late products": any(v.is_late for v in variants),  # for keys: test_two_warpgroups
    }
    assert [name for name, is_met in features.items() if not is_met] == []


class Driver:
    """Takes what the CUDA driver is given: each launch as its grid, pointers, integers and floats."""

    def __init__(self) -> None:
        self.launches: list[tuple[tuple[int, ...], list[int], list[int], list[float]]] = []
        self.kinds: list[tuple[int, int, int, int]] = []

    def cuTensorMapEncodeTiled(self, *_: object) -> int:
        return 0

    cuTensorMapReplaceAddress = cuTensorMapEncodeTiled  # noqa: N815

    def cuLaunchKernel(self, kind: int, *rest: Any) -> int:
        maps, pointers, integers, floats = self.kinds[kind]
        places = list(rest[8])[11 * maps :]

        def read(count: int, number: Any) -> list[Any]:
            return [number.from_address(places.pop(0)).value for _ in range(count)]

        found = read(pointers, ctypes.c_uint64), read(integers, ctypes.c_int32), read(floats, ctypes.c_float)
        assert len(places) == 2  # scratch memory
        self.launches.append((rest[:3], *found))
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Generator[Driver, None, None]:
    """A card that does nothing: everything up to the driver is as it is."""
    fake = Driver()
    counts = {"keys": (6, 2, 18 + 24 + 3, 2), "queries": (7, 3, 18 + 28 + 4, 2), "additional": (4, 4, 18 + 16 + 4, 2)}

    def function(variant: Variant | Sums, device: int) -> Function:
        fake.kinds.append((0, 6, 9, 0) if isinstance(variant, Sums) else counts[variant.kernel])
        return Function(len(fake.kinds) - 1, 128, 0, 0)

    monkeypatch.setattr(cuda, "driver", lambda: fake)
    monkeypatch.setattr(backward, "function", function)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, raising=False)
    backward.forget()
    yield fake
    backward.forget()


def test_a_thread_without_a_context_is_given_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd's threads are before their first call of the runtime."""
    told: list[object] = []

    class Bare:
        context: Any = None

        def cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> int:
            told.append(("retain", device))
            context._obj.value = 77
            return 0

        def cuCtxSetCurrent(self, context: Any) -> int:
            self.context = context.value
            return 0

        def cuLaunchKernel(self, *_: object) -> int:
            told.append(("launch", self.context))
            return 0 if self.context else cuda.NO_CONTEXT

    bare = Bare()
    monkeypatch.setattr(cuda, "driver", lambda: bare)
    cuda.context_of.cache_clear()
    try:
        call = cuda.Call(Function(0, 128, 0, device=3), (1, 1, 1), 0, [])
        for _ in range(2):
            call.start((), 7)
    finally:
        cuda.context_of.cache_clear()
    assert told == [("launch", None), ("retain", 3), ("launch", 77), ("launch", 77)]


def test_what_the_kernels_are_told(driver: Driver) -> None:
    shape, scale = (5, 6, 7), -0.25
    problem = Problem.grid(
        shape, 3, dilation=(1, 2, 1), heads=6, heads_kv=2, head_dim=64, batch=2, additional=70, scale=scale
    )  # fmt: skip
    fused = torch.zeros(2, *shape, 6 + 2 + 2, 64, dtype=torch.bfloat16)
    query, key, value = fused.split((6, 2, 2), -2)
    more = [torch.zeros(2, 70, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    lengths = torch.tensor([70, 0])
    out, grad_out = torch.zeros(2, 2, *shape, 6, 64, dtype=torch.bfloat16)
    lse = torch.zeros(2, *shape, 6)
    inputs = Inputs(query, key, value, *more, lengths)
    found = backward.gradients(problem, inputs, Output(out, lse), grad_out.expand_as(out), None)
    for given, gradient in zip(inputs[:5], found[:5], strict=True):
        assert given is not None
        assert gradient is not None
        assert gradient.shape == given.shape
        assert gradient.is_contiguous()
        assert gradient.dtype == given.dtype
    sums, keys, queries, additional = driver.launches
    token, row = 10 * 64, 7 * 10 * 64  # steps of the fused tensor
    own = 6 * 64  # and of one with six heads
    assert sums[0] == (-(-5 * 6 * 7 // 64), 6, 2)
    assert sums[1][0] == out.data_ptr()
    assert sums[1][2:4] == [lse.data_ptr(), 0]
    assert sums[2] == [5, 6, 7, *(n // 8 for n in (64, 42 * own, 7 * own, own)), 6, 210 * own // 8]
    by_head = sums[1][4:]
    assert by_head[1] - by_head[0] == 4 * 2 * 6 * 210
    assert keys[1] == queries[1][:2] == additional[1][2:] == by_head
    axes = [5, 3, 1, 1, 0], [6, 3, 1, 2, 0], [7, 3, 1, 1, 0]
    for told in (keys[2], queries[2]):
        assert [told[6 * i : 6 * i + 5] for i in range(3)] == [*axes]
    strided, plain, narrow = [64, 6 * row, row, token], [64, 42 * own, 7 * own, own], [64, 42 * 128, 7 * 128, 128]
    assert keys[2][18:42] == plain * 2 + strided * 2 + narrow * 2  # a negative scale has copied the queries
    assert keys[2][42:44] == [6, 3]
    assert keys[0][1:] == (2, 2)
    assert queries[2][18:38] == plain * 2 + strided * 2 + plain
    assert queries[2][46:49] == [6, 3, 70]
    assert queries[0][1:] == (6, 2)
    base_2 = abs(scale) * LOG2_E
    assert keys[3] == pytest.approx([base_2, 0.25])  # whose queries have changed sign
    assert queries[3] == pytest.approx([base_2, -0.25])
    tiles, chunks, chunk = 1, additional[0][0], additional[2][-1]
    assert additional[0][1:] == (2, 2)
    boxes = prod(-(-n // side) for n, side in zip(shape, additional_variant(problem).kv_box, strict=True))
    assert tiles * chunks * chunk >= boxes > (chunks - 1) * chunk
    assert additional[2][34:37] == [6, 3, 70]
    assert additional[1][1] - additional[1][0] == 4 * chunks * 2 * 70 * 2 * 64


@pytest.mark.parametrize("dilation", [1, 2])
def test_gradients_are_written_where_they_are_wanted(driver: Driver, dilation: int) -> None:
    """At once, or, where dilation does not divide an axis and maps begin before their tensors, by a copy."""
    problem = Problem.grid((9, 12), 3, dilation=(dilation, 1), heads=2, head_dim=32)
    tensor, lse = torch.zeros(1, 9, 12, 2, 32, dtype=torch.bfloat16), torch.zeros(1, 9, 12, 2)
    whole = torch.full((1, 9, 12, 3, 2, 32), torch.nan, dtype=torch.bfloat16)
    into = whole.unbind(-3)
    found = backward.gradients(problem, Inputs(tensor, tensor, tensor), Output(tensor, lse), tensor, lse, into)
    assert all(gradient is wanted for gradient, wanted in zip(found, into, strict=False))
    _, keys, queries = driver.launches
    step = 1 if dilation == 2 else 3
    places = [32, 8, step * 12 * 64, step * 64]  # 8 along the axis that is not there
    assert keys[2][18 + 16 : 18 + 24] == places * 2
    assert queries[2][18 + 16 : 18 + 20] == places


def test_chunks_of_queries_cover_the_grid(driver: Driver) -> None:
    """Additional keys of few blocks: the queries are cut into chunks, the last one shorter than the others."""
    shape = (11, 34, 47)
    problem = Problem.grid(shape, 3, heads=3, heads_kv=3, head_dim=32, additional=9)
    tensor, lse = torch.zeros(1, *shape, 3, 32, dtype=torch.bfloat16), torch.zeros(1, *shape, 3)
    more = torch.zeros(1, 9, 3, 32, dtype=torch.bfloat16)
    inputs = Inputs(tensor, tensor, tensor, more, more)
    backward.gradients(problem, inputs, Output(tensor, lse), tensor, lse)
    grid, pointers, integers, _ = driver.launches[-1]
    boxes = prod(-(-n // side) for n, side in zip(shape, additional_variant(problem).kv_box, strict=True))
    chunks, chunk = grid[0], integers[-1]
    assert chunk > 1
    assert boxes % chunk
    assert chunks == -(-boxes // chunk)
    assert pointers[1] - pointers[0] == 4 * chunks * more.numel()


def test_launches_are_found_again(driver: Driver) -> None:
    problem = Problem.grid((9, 12), 3, heads=2, head_dim=32)
    tensor, lse = torch.zeros(1, 9, 12, 2, 32, dtype=torch.bfloat16), torch.zeros(1, 9, 12, 2)
    for count in (3, 3):
        backward.gradients(problem, Inputs(tensor, tensor, tensor), Output(tensor, lse), tensor, lse)
        assert len(driver.kinds) == count
    assert [kind for kind in driver.launches[0][1] if kind == lse.data_ptr()] == [lse.data_ptr()] * 2  # both of them
    assert len(driver.launches) == 6


def test_what_cannot_be_read_in_place_is_copied(driver: Driver) -> None:
    """A gradient that `sum` sends back has strides of zero; one of odd address cannot be mapped either."""
    problem = Problem.grid((9, 13), 3, dilation=(1, 4), heads=2, head_dim=32)
    tensor, lse = torch.zeros(1, 9, 13, 2, 32, dtype=torch.bfloat16), torch.zeros(1, 9, 13, 2)
    ones = torch.ones((), dtype=torch.bfloat16).expand_as(tensor)
    found = backward.gradients(problem, Inputs(tensor, tensor, tensor), Output(tensor, lse), ones, lse)
    for gradient in found[:3]:  # the map of a ragged dilation begins three tokens before its tensor
        assert gradient.storage_offset() == 3 * 2 * 32
    assert driver.launches[0][1][1] != ones.data_ptr()
    assert driver.launches[0][1][1] % 16 == 0


def test_sums_are_right_in_the_interpreter() -> None:
    """Deltas and log-sum-exps by head, of strided gradients, with and without a gradient of the log-sum-exp."""
    pytest.importorskip("triton", reason="interpreting kernels needs triton, which is not installed")
    command = [sys.executable, str(Path(__file__).with_name("interpreted_sums.py"))]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "all equal\n"
