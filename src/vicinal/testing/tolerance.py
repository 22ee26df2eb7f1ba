"""How far off an answer may be: derived from what plain PyTorch loses, never typed."""

from __future__ import annotations

import torch
from torch import Tensor


def allowance(
    eager: Tensor, truth: Tensor, dtype: torch.dtype, *, slack: float = 2.0, summed: Tensor | None = None
) -> float:
    """The largest error that an answer in `dtype` may have.

        slack * max|eager - truth| + eps(dtype) * max|truth| + eps(at least float32) * max|summed|

    Args:
        eager: what plain PyTorch computes in that dtype.
        truth: the same in float64.
        dtype: that of the answer; the second term is one rounding of it to this dtype.
        slack: how many times plain PyTorch's own error is allowed.
        summed: the values that the answer averages or adds up, if they may cancel: where plain PyTorch
            happens to be exact (equal weights, one key), another order of summation need not be.
    """
    if not truth.numel():
        return 0.0
    own = (eager.double() - truth.double()).abs().max().item()
    allowed = slack * own + torch.finfo(dtype).eps * truth.double().abs().max().item()
    if summed is not None and summed.numel():
        low, high = (bound.double() for bound in summed.aminmax())  # no copy: these may be gigabytes
        allowed += torch.finfo(torch.promote_types(dtype, torch.float32)).eps * torch.maximum(-low, high).item()
    return allowed


def error(actual: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; NaN if anything is NaN."""
    return (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def assert_as_good_as_eager(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    *,
    slack: float = 2.0,
    summed: Tensor | None = None,
    what: str = "the answer",
) -> None:
    """`actual` may be at most `slack` times as far from `truth` as plain PyTorch, plus one rounding of itself.

    Args:
        actual, eager, truth: one shape; the tested answer, plain PyTorch's in the same dtype, float64's.
        slack: how many times plain PyTorch's own error is allowed.
        summed: what the answer adds up, see `allowance`.
        what: named in the message.

    Raises:
        AssertionError: if the shapes differ, or it is further off, or holds a NaN or an infinity.

    Source: the rule that FlashAttention's tests use, without their absolute constants.

    Example:
        >>> truth = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> assert_as_good_as_eager(truth.float(), truth.float(), truth)
        >>> assert_as_good_as_eager(truth.float() + 0.1, truth.float(), truth)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: the answer is off by 1.000e-01 where ... is allowed ...
    """
    if actual.shape != truth.shape or eager.shape != truth.shape:
        raise AssertionError(f"{what} has shape {tuple(actual.shape)}, expected {tuple(truth.shape)}")
    worst = error(actual, truth)
    allowed = allowance(eager, truth, actual.dtype, slack=slack, summed=summed)
    if not worst <= allowed:  # written so that NaN fails
        bad = int((~actual.isfinite()).sum())
        extra = f"; {bad} of {actual.numel()} elements are not finite" if bad else ""
        times = f" ({worst / allowed:.1f} times)" if allowed else ""
        raise AssertionError(f"{what} is off by {worst:.3e} where {allowed:.3e} is allowed{times}{extra}")
