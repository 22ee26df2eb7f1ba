"""The host side of the Hopper backward, on any machine: how it cuts, and what its tests on a card meet."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
from problems import draw

from vicinal.backends import hopper
from vicinal.backends.hopper.backward import contiguous
from vicinal.backends.hopper.cost_backward import HEAD_DIMS, RATES, additional_variant, ranked_cuts
from vicinal.backends.hopper.launch import Layout
from vicinal.backends.hopper.variant import ROWS, SMEM_BYTES, Variant
from vicinal.hardware import Hardware
from vicinal.problem import Problem

H100 = Hardware.named("h100-sxm")
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
    cases = [case for case in map(draw, range(40)) if case.problem.head_dim in HEAD_DIMS]
    problems = [case.problem for case in cases]
    variants = [ranked_cuts(kernel, problem)[0].variant for kernel in ("keys", "queries") for problem in problems]
    features = {
        "grouped heads": any(p.heads > p.heads_kv for p in problems),
        "a negative scale": any(p.scale < 0 for p in problems),
        "a scale of zero": any(p.scale == 0 for p in problems),
        "additional keys": any(p.additional and not case.has_lengths for p, case in zip(problems, cases, strict=True)),
        "lengths": any(case.has_lengths for case in cases),
        "dilation that does not divide": any(a.length % a.dilation for p in problems for a in p.axes),
        "stride": any(a.stride > 1 for p in problems for a in p.axes),
        "strided batch rows": any(
            p.batch > 1 and case.layout == "padded" for p, case in zip(problems, cases, strict=True)
        ),
        "causal and strided": any(
            a.is_causal and a.stride > 2 and a.length > 2 * a.kernel_size for p in problems for a in p.axes
        ),
        **{f"rank {n}": any(p.rank == n for p in problems) for n in (1, 2, 3)},
        **{f"heads of {n}": any(p.head_dim == n for p in problems) for n in HEAD_DIMS},
        **{f"mask {name}": any(v.mask == name for v in variants) for name in ("none", "coded", "select")},
        **{f"{n} warpgroups": any(v.consumers == n for v in variants) for n in (1, 2)},
    }
    assert [name for name, is_met in features.items() if not is_met] == []
