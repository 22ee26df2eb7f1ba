"""The yardstick itself: it lets rounding pass and nothing else."""

from __future__ import annotations

import pytest
import torch

from vicinal.testing.tolerance import allowance, assert_as_good_as_eager

TRUTH = torch.linspace(-1, 2, 7, dtype=torch.float64)
OFF = TRUTH + 1e-3


def test_twice_eagers_error_passes_and_more_does_not():
    assert_as_good_as_eager((TRUTH + 1.9e-3).float(), OFF, TRUTH)
    with pytest.raises(AssertionError, match=r"the answer is off by 2\.1\d+e-03 where 2\.000e-03 is allowed"):
        assert_as_good_as_eager((TRUTH + 2.1e-3).float(), OFF, TRUTH)
    assert_as_good_as_eager((TRUTH + 2.1e-3).float(), OFF, TRUTH, slack=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_where_eager_is_exact_one_rounding_is_left(dtype: torch.dtype):
    eps = torch.finfo(dtype).eps
    assert allowance(TRUTH, TRUTH, dtype) == 2 * eps
    assert_as_good_as_eager((TRUTH / 3).to(dtype), TRUTH / 3, TRUTH / 3)
    with pytest.raises(AssertionError, match="is off by"):
        assert_as_good_as_eager((TRUTH * (1 + 4 * eps)).to(dtype), TRUTH, TRUTH)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_single_nan_or_infinity_fails(bad: float):
    actual = TRUTH.float()
    actual[3] = bad
    with pytest.raises(AssertionError, match="1 of 7 elements are not finite"):
        assert_as_good_as_eager(actual, OFF, TRUTH, slack=1e30)


def test_a_nan_of_eager_is_no_licence():
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(TRUTH.float(), TRUTH * torch.nan, TRUTH)


def test_shapes_must_agree_rather_than_broadcast():
    with pytest.raises(AssertionError, match=r"out has shape \(1, 7\), expected \(7,\)"):
        assert_as_good_as_eager(TRUTH.float()[None], TRUTH, TRUTH, what="out")


def test_what_cancels_may_err_by_a_rounding_of_what_was_summed():
    zero = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(zero.float() + 1e-6, zero, zero)
    assert_as_good_as_eager(zero.float() + 1e-6, zero, zero, summed=torch.tensor([10.0]))


def test_nothing_at_all_is_right():
    assert_as_good_as_eager(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.float64))
