"""The definition against the published rule in three other wordings, and against the worked examples."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vicinal.problem import Axis
from vicinal.testing.strategies import axes
from vicinal.testing.truth import axis_mask
from vicinal.window import window

# Every small axis there is: windows of all parities against strides, dilations and rests of all kinds.
SMALL = [
    Axis(length, kernel_size, stride, dilation, is_causal)
    for length in range(1, 14)
    for dilation in range(1, 5)
    for kernel_size in range(1, length // dilation + 1)
    for stride in range(1, kernel_size + 1)
    for is_causal in (False, True)
]


def members(axis: Axis, query: int) -> tuple[list[int], int]:
    """The tokens of the query's dilation group in order, and the query's place among them."""
    group = [token for token in range(axis.length) if token % axis.dilation == query % axis.dilation]
    return group, group.index(query)


def leader(axis: Axis, group: list[int], place: int) -> int:
    """The place of the leader of the query's stride group, or of the last member where there is none."""
    chunk = [p for p in range(len(group)) if p // axis.stride == place // axis.stride]
    wanted = chunk[0] + (axis.stride - 1 if axis.is_causal else axis.stride // 2)
    return min(wanted, len(group) - 1)


def best_run(axis: Axis, query: int) -> list[int]:
    """Of all runs of `kernel_size` members, the one that starts closest to where the leader wants it."""
    group, place = members(axis, query)
    wanted = leader(axis, group, place) - axis.kernel_size // 2
    start = min(range(len(group) - axis.kernel_size + 1), key=lambda s: abs(s - wanted))
    return group[start : start + axis.kernel_size]


def recent(axis: Axis, query: int) -> list[int]:
    """Causal: members not after the query, and less than `kernel_size` before the leader."""
    group, place = members(axis, query)
    lead = leader(axis, group, place)
    return [token for p, token in enumerate(group) if p <= place and lead - p < axis.kernel_size]


def kernel_arithmetic(axis: Axis, query: int) -> list[int]:
    """As the reference kernels compute the start, without a clamp: the overhang on the right is taken back."""
    group, place = members(axis, query)
    size, w = len(group), axis.kernel_size
    left, right = w // 2, w // 2 + (w % 2 - 1)
    lead = leader(axis, group, place)
    start = max(lead - left, 0) + (lead + right >= size) * (size - right - lead - 1)
    return group[start : start + w]


def test_every_small_window_is_the_closest_run_that_fits():
    for axis in SMALL:
        for query in range(axis.length):
            wanted = recent(axis, query) if axis.is_causal else best_run(axis, query)
            assert list(axis.window(query)) == wanted, (axis, query)


def test_every_small_window_is_what_the_reference_kernels_compute():
    for axis in SMALL:
        if not axis.is_causal:
            for query in range(axis.length):
                assert list(axis.window(query)) == kernel_arithmetic(axis, query), (axis, query)


def test_the_testing_mask_is_the_window_too():
    for axis in SMALL:
        rows = axis_mask(axis, torch.arange(axis.length))
        for query, row in enumerate(rows):
            assert row.nonzero()[:, 0].tolist() == list(axis.window(query)), (axis, query)


@given(axes(most=120), st.data())
def test_drawn_windows_agree_with_all_wordings(axis: Axis, data: st.DataObject):
    query = data.draw(st.integers(0, axis.length - 1))
    keys = list(axis.window(query))
    assert keys == (recent(axis, query) if axis.is_causal else best_run(axis, query))
    assert axis_mask(axis, torch.tensor([query]))[0].nonzero()[:, 0].tolist() == keys


@given(axes(most=120))
def test_a_window_never_shrinks_and_holds_its_query(axis: Axis):
    for query in range(axis.length):
        keys = axis.window(query)
        assert query in keys
        assert 0 <= keys[0] <= keys[-1] < axis.length
        if not axis.is_causal:
            assert len(keys) == axis.kernel_size
        else:
            assert 1 <= len(keys) <= axis.kernel_size
            assert keys[-1] == query


@given(axes(most=120))
def test_both_ends_move_forward_only(axis: Axis):
    """The plan rests on this: the first and the last query of a tile bound its keys."""
    for subaxis in axis.subaxes():
        windows = [subaxis.window(query) for query in range(subaxis.length)]
        for early, late in itertools.pairwise(windows):
            assert early.start <= late.start
            assert early.stop <= late.stop


@given(st.integers(1, 60), st.data())
def test_stride_equal_to_the_window_is_blocked(length: int, data: st.DataObject):
    size = data.draw(st.integers(1, length))
    for query in range(length):
        block = query // size * size
        wanted = range(block, block + size) if block + size <= length else range(length - size, length)
        assert window(query, length, size, stride=size) == wanted


@given(st.integers(1, 60), st.data())
def test_a_causal_window_of_the_whole_axis_is_causal_attention(length: int, data: st.DataObject):
    stride = data.draw(st.integers(1, length))
    for query in range(length):
        assert window(query, length, length, stride=stride, is_causal=True) == range(query + 1)


# Each name says what the example shows; each row is one query's keys, from the first query on.
EXAMPLES = {
    "odd window": (Axis(8, 3), "012 012 123 234 345 456 567 567"),
    "even window leans left": (Axis(8, 4), "0123 0123 0123 1234 2345 3456 4567 4567"),
    "even stride, right member leads": (Axis(8, 4, 2), "0123 0123 1234 1234 3456 3456 4567 4567"),
    "odd window, even stride": (Axis(8, 5, 2), "01234 01234 12345 12345 34567 34567 34567 34567"),
    "stride leaves a rest": (Axis(11, 4, 3), "0123 0123 0123 2345 2345 2345 5678 5678 5678 789a 789a"),
    "blocked, overlapping tail": (Axis(10, 4, 4), "0123 0123 0123 0123 4567 4567 4567 4567 6789 6789"),
    "causal": (Axis(8, 4, is_causal=True), "0 01 012 0123 1234 2345 3456 4567"),
    "causal with stride": (Axis(8, 4, 3, is_causal=True), "0 01 012 23 234 2345 456 4567"),
    "dilation, ragged groups": (Axis(7, 3, 1, 2), "024 135 024 135 246 135 246"),
    "dilation and stride": (Axis(9, 3, 2, 2), "024 135 024 135 468 357 468 357 468"),
    "three groups": (Axis(10, 3, 1, 3), "036 147 258 036 147 258 369 147 258 369"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_worked_example(name: str):
    axis, rows = EXAMPLES[name]
    wanted = [[int(digit, 16) for digit in row] for row in rows.split()]
    assert [list(axis.window(query)) for query in range(axis.length)] == wanted


@given(axis=axes())
def test_viewers_are_the_queries_whose_window_holds_the_key(axis: Axis):
    windows = [axis.window(query) for query in range(axis.length)]
    for key in range(axis.length):
        assert list(axis.viewers(key)) == [query for query, window in enumerate(windows) if key in window]
