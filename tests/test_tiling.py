"""A tiling is either valid or does not exist."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vicinal.errors import InvalidProblem
from vicinal.testing.strategies import tilings
from vicinal.tiling import Tiling


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((0, 4), (4, 4)), "q_tile must be a tuple of integers of at least 1, one per axis, got (0, 4)"),
        (((4, 4), (4, -1)), "kv_tile must be a tuple of integers of at least 1, one per axis, got (4, -1)"),
        ((4, (4,)), "q_tile must be a tuple of integers of at least 1, one per axis, got 4"),
        (((), ()), "q_tile must be a tuple of integers of at least 1, one per axis, got ()"),
        (((4,), [4]), "kv_tile must be a tuple of integers of at least 1, one per axis, got [4]"),
        (((4,), (2.0,)), "kv_tile must be a tuple of integers of at least 1, one per axis, got (2.0,)"),
        (((4, 5), (4,)), "q_tile and kv_tile must have one number per axis each, got (4, 5) and (4,)"),
        (((4,), (4,), "centre"), 'kv_origin must be "free" or "grid", got \'centre\''),
    ],
)
def test_a_bad_tiling_is_refused_with_its_numbers(arguments: tuple[Any, ...], message: str):
    with pytest.raises(InvalidProblem, match=re.escape(message)):
        Tiling(*arguments)


def test_a_tiling_prints_itself():
    assert str(Tiling((4, 8), (2, 16), "grid")) == "query tiles 4x8, KV tiles 2x16, grid origin"
    assert str(Tiling((64,), (128,))) == "query tiles 64, KV tiles 128, free origin"


@given(tilings((7, 12, 5)), st.data())
def test_equal_tilings_are_one_key(tiling: Tiling, data: st.DataObject):
    again = Tiling(tiling.q_tile, tiling.kv_tile, tiling.kv_origin)
    assert again == tiling
    assert hash(again) == hash(tiling)
    axis = data.draw(st.integers(0, 2))
    moved = tuple(n + (i == axis) for i, n in enumerate(tiling.kv_tile))
    assert Tiling(tiling.q_tile, moved, tiling.kv_origin) != tiling
