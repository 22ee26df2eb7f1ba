"""A problem is either valid or does not exist; a refusal names the argument, the wish, the fact and the way out."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given

from vicinal.errors import InvalidProblem
from vicinal.problem import Axis, Problem
from vicinal.testing.strategies import axes, problems
from vicinal.testing.truth import mask


def refused(message: str) -> Any:
    return pytest.raises(InvalidProblem, match=re.escape(message))


def tensors(**changes: Any) -> dict[str, Any]:
    """Arguments that are fine (a 5x7 grid, 4 heads reading 2), but for the changes."""
    fine = {
        "query": torch.zeros(2, 5, 7, 4, 8),
        "key": torch.zeros(2, 5, 7, 2, 8),
        "value": torch.zeros(2, 5, 7, 2, 6),
        "kernel_size": 3,
    }
    return {**fine, **changes}


def extra(length: int = 3) -> dict[str, Any]:
    return {"additional_keys": torch.zeros(2, length, 2, 8), "additional_values": torch.zeros(2, length, 2, 6)}


def test_tensors_pose_the_problem_that_their_shapes_say():
    problem = Problem.of(**tensors(stride=(1, 2), dilation=(1, 2), is_causal=(True, False), **extra()))
    assert problem == Problem(
        (Axis(5, 3, 1, 1, True), Axis(7, 3, 2, 2, False)),
        batch=2,
        heads=4,
        heads_kv=2,
        head_dim=8,
        head_dim_v=6,
        dtype="float32",
        scale=8**-0.5,
        additional=3,
    )


@given(problems())
def test_of_and_grid_agree(problem: Problem):
    dtype = getattr(torch, problem.dtype)
    lead = (problem.batch, *problem.shape)
    query = torch.empty(*lead, problem.heads, problem.head_dim, dtype=dtype, device="meta")
    key = torch.empty(*lead, problem.heads_kv, problem.head_dim, dtype=dtype, device="meta")
    value = torch.empty(*lead, problem.heads_kv, problem.head_dim_v, dtype=dtype, device="meta")
    more = (problem.batch, problem.additional, problem.heads_kv)
    keys = torch.empty(*more, problem.head_dim, dtype=dtype, device="meta") if problem.additional else None
    values = torch.empty(*more, problem.head_dim_v, dtype=dtype, device="meta") if problem.additional else None
    names = ("kernel_size", "stride", "dilation", "is_causal")
    window = {name: getattr(problem, name) for name in names}
    riding = ("batch", "heads", "heads_kv", "head_dim", "head_dim_v", "dtype", "scale", "additional", "position_bias")
    fields = {name: getattr(problem, name) for name in riding}
    bias = torch.empty(problem.bias_shape, dtype=dtype, device="meta") if problem.position_bias else None
    more = {"additional_keys": keys, "additional_values": values, "position_bias": bias}
    posed = Problem.of(query, key, value, **window, scale=problem.scale, **more)
    assert posed == Problem.grid(problem.shape, **window, **fields) == problem
    assert hash(posed) == hash(problem)


def test_one_value_serves_every_axis():
    many = Problem.grid((8, 9, 10), (3, 3, 3), stride=(2, 2, 2), dilation=(2, 2, 2), is_causal=(True, True, True))
    assert Problem.grid((8, 9, 10), 3, stride=2, dilation=2, is_causal=True) == many
    assert Problem.grid([8, 9, 10], [3, 3, 3], stride=2, dilation=2, is_causal=True) == many  # pyright: ignore


def test_minus_one_is_the_whole_axis():
    assert Problem.grid((8, 9), (-1, 3)).kernel_size == (8, 3)
    assert Problem.grid((8, 9), -1).kernel_size == (8, 9)
    assert all(axis.is_whole for axis in Problem.grid((8, 9), -1).axes)
    assert Problem.grid((9,), -1, dilation=2).kernel_size == (4,)  # the most that fits


def test_a_scale_of_zero_is_a_scale():
    assert Problem.of(**tensors(scale=0.0)).scale == 0.0
    assert Problem.of(**tensors(scale=0)).scale == 0.0
    assert Problem.of(**tensors()).scale == 8**-0.5
    assert Problem.grid((8,), 3, head_dim=16).scale == 0.25
    assert Problem.grid((8,), 3, head_dim=16, scale=0.0).scale == 0.0


def test_what_natten_refuses_is_fine():
    assert Problem.grid((5,), 1).pairs == 5
    assert Problem.of(**tensors(query=torch.zeros(0, 5, 7, 4, 8), key=torch.zeros(0, 5, 7, 2, 8),
                                value=torch.zeros(0, 5, 7, 2, 6))).batch == 0  # fmt: skip


def test_a_problem_cannot_be_changed():
    problem = Problem.grid((8,), 3)
    with pytest.raises(FrozenInstanceError):
        problem.scale = 2.0  # pyright: ignore
    with pytest.raises(FrozenInstanceError):
        problem.axes[0].length = 2  # pyright: ignore


@given(problems())
def test_pairs_counts_the_mask(problem: Problem):
    assert problem.pairs == mask(problem).sum()


@given(axes(most=60))
def test_subaxes_interleave_to_the_axis(axis: Axis):
    for group, subaxis in enumerate(axis.subaxes()):
        for member in range(subaxis.length):
            keys = [group + key * axis.dilation for key in subaxis.window(member)]
            assert keys == list(axis.window(group + member * axis.dilation))
    assert sum(subaxis.length for subaxis in axis.subaxes()) == axis.length


def test_a_problem_prints_what_differs_from_the_plainest():
    assert str(Problem.grid((48, 40), 24)) == "48x40 grid, window 24x24"
    everything = Problem.grid((8, 9), 3, stride=(2, 1), dilation=(1, 2), is_causal=(False, True), additional=4)
    assert str(everything) == ("8x9 grid, window 3x3, stride 2x1, dilation 1x2, causal on axis 1, 4 additional keys")


def test_a_window_that_does_not_fit_names_the_axis_and_the_numbers():
    with refused(
        "axis 1 of 8x16: the window does not fit: kernel_size * dilation = 7 * 3 = 21 > axis length 16; "
        "use a smaller kernel_size or dilation, or -1 for the whole axis"
    ):
        Problem.grid((8, 16), 7, dilation=(1, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 4}, "axis 0 of 8x16: stride must lie in [1, kernel_size] = [1, 3], got 4"),
        ({"stride": (1, 0)}, "axis 1 of 8x16: stride must lie in [1, kernel_size] = [1, 3], got 0"),
        ({"kernel_size": (3, 0)}, "axis 1 of 8x16: kernel_size must be at least 1, or -1 for the whole axis, got 0"),
        ({"kernel_size": -2}, "axis 0 of 8x16: kernel_size must be at least 1, or -1 for the whole axis, got -2"),
        ({"dilation": 0}, "axis 0 of 8x16: dilation must be at least 1, got 0"),
        ({"dilation": 0, "kernel_size": -1}, "axis 0 of 8x16: dilation must be at least 1, got 0"),
        ({"dilation": 9, "kernel_size": (-1, 1)}, "axis 0 of 8x16: the window does not fit"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size needs 2 values, one per spatial axis, got 3: (3, 3, 3)"),
        ({"stride": (1,)}, "stride needs 2 values, one per spatial axis, got 1: (1,)"),
        ({"kernel_size": 3.0}, "kernel_size must be an integer or a tuple of them, one per spatial axis, got 3.0"),
        ({"kernel_size": True}, "kernel_size must be an integer or a tuple of them"),
        ({"kernel_size": "33"}, "kernel_size must be an integer or a tuple of them"),
        ({"dilation": None}, "dilation must be an integer or a tuple of them, one per spatial axis, got None"),
        ({"is_causal": 1}, "is_causal must be a bool or a tuple of them, one per spatial axis, got 1"),
        ({"is_causal": (True,)}, "is_causal needs 2 values, one per spatial axis, got 1: (True,)"),
        ({"scale": float("nan")}, "scale must be a finite number, got nan"),
        ({"scale": float("inf")}, "scale must be a finite number, got inf"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 5, "heads_kv": 2}, "query heads must be a multiple of key/value heads, got 5 and 2"),
        ({"head_dim_v": 0}, "head_dim_v must be at least 1, got 0"),
        ({"batch": -1}, "batch must not be negative, got -1"),
        ({"heads": 2.0}, "heads must be an integer, got 2.0"),
        ({"batch": "1"}, "batch must be an integer, got '1'"),
        ({"head_dim": 0}, "head_dim must be at least 1, got 0"),
        ({"head_dim": "64"}, "head_dim must be an integer, got '64'"),
        ({"scale": "half"}, "scale must be a finite number, got 'half'"),
        ({"additional": -1}, "additional must not be negative, got -1"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, float64, got int8"),
        ({"shape": (8, 0)}, "a spatial axis must hold at least one token, got length 0"),
        ({"shape": (8, 9, 10, 11)}, "a grid has 1, 2 or 3 spatial axes, got 4"),
        ({"shape": ()}, "a grid has 1, 2 or 3 spatial axes, got 0"),
    ],
)
def test_a_bad_number_is_refused(arguments: dict[str, Any], message: str):
    with refused(message):
        Problem.grid(**{"shape": (8, 16), "kernel_size": 3, **arguments})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": [1, 2]}, "query must be a tensor, got list"),
        ({"value": None}, "value must be a tensor, got NoneType"),
        ({"query": torch.zeros(5, 7, 8)}, "[B, *S, H, D]"),
        ({"query": torch.zeros(2, 3, 4, 5, 6, 4, 8)}, "query"),
        ({"key": torch.zeros(2, 5, 7, 8)}, "key"),
        (
            {"key": torch.zeros(2, 7, 5, 2, 8)},
            "key must have query's batch and grid (2, 5, 7), got shape (2, 7, 5, 2, 8)",
        ),
        ({"value": torch.zeros(1, 5, 7, 2, 6)}, "value must have query's batch and grid (2, 5, 7)"),
        (
            {"key": torch.zeros(2, 5, 7, 2, 9)},
            "key must have query's head_dim 8 as its last axis, got shape (2, 5, 7, 2, 9)",
        ),
        ({"value": torch.zeros(2, 5, 7, 1, 6)}, "key and value must have the same heads, got 2 and 1"),
        (
            {"key": torch.zeros(2, 5, 7, 3, 8), "value": torch.zeros(2, 5, 7, 3, 6)},
            "query heads must be a multiple of key/value heads, got 4 and 3",
        ),
        ({"key": torch.zeros(2, 5, 7, 2, 8).half()}, "key and query must share one dtype, got float16 and float32"),
        (
            {"value": torch.zeros(2, 5, 7, 2, 6, device="meta")},
            "value and query must share one device, got meta and cpu",
        ),
        (
            {"query": torch.zeros(2, 5, 7, 4, 8).int()},
            "query must have one of the dtypes float16, bfloat16, float32, float64, got int32",
        ),
        (
            {"query": torch.zeros(2, 5, 7, 4, 8).to_sparse()},
            "query is a sparse tensor; pass a dense one, for example query.to_dense()",
        ),
        ({"key": torch.zeros(2, 5, 7, 2, 8, dtype=torch.complex64)}, "key must have one of the dtypes"),
        ({"scale": float("-inf")}, "scale must be a finite number, got -inf"),
        ({"scale": "half"}, "scale must be a finite number, got 'half'"),
        (
            {"additional_keys": torch.zeros(2, 3, 2, 8)},
            "additional_keys came without additional_values; pass both or neither",
        ),
        (
            {"additional_values": torch.zeros(2, 3, 2, 6)},
            "additional_values came without additional_keys; pass both or neither",
        ),
        (
            {"additional_lengths": torch.tensor([1, 2])},
            "additional_lengths came without additional_keys and additional_values",
        ),
        (
            {**extra(), "additional_values": torch.zeros(2, 4, 2, 6)},
            "additional_values must be [B, M, Hkv, D] = [2, 3, 2, 6], got (2, 4, 2, 6)",
        ),
        (
            {**extra(), "additional_keys": torch.zeros(1, 3, 2, 8)},
            "additional_keys must be [B, M, Hkv, D] = [2, 3, 2, 8], got (1, 3, 2, 8)",
        ),
        ({**extra(), "additional_keys": torch.zeros(2)}, "additional_keys must be [B, M, Hkv, D]"),
        (
            {**extra(), "additional_keys": torch.zeros(2, 3, 2, 8).double()},
            "additional_keys and query must share one dtype",
        ),
        (
            {**extra(), "additional_lengths": torch.tensor([1.0, 2.0])},
            "additional_lengths must be a tensor of integers (int8 to int64, or uint8), got torch.float32",
        ),
        (
            {**extra(), "additional_lengths": torch.tensor([1, 2], dtype=torch.uint32)},
            "additional_lengths must be a tensor of integers (int8 to int64, or uint8), got torch.uint32",
        ),
        ({**extra(), "additional_lengths": [1, 2]}, "additional_lengths must be a tensor of integers"),
        (
            {"query": torch.zeros(2, 5, 7, 4, 0), "key": torch.zeros(2, 5, 7, 2, 0)},
            "head_dim must be at least 1, got 0",
        ),
        ({"kernel_size": torch.tensor([3, 3])}, "kernel_size must be an integer or a tuple of them"),
        ({"scale": 10**400}, "scale must be a finite number, got 1000"),
        (
            {**extra(), "additional_lengths": torch.tensor([1, 2, 3])},
            "additional_lengths must hold one length per batch row, shape (2,), got (3,)",
        ),
        (
            {**extra(), "additional_lengths": torch.tensor([1, 2], device="meta")},
            "additional_lengths and query must share one device, got meta and cpu",
        ),
        ({"kernel_size": (3, 3, 3)}, "kernel_size needs 2 values"),
        ({"kernel_size": (3, 9)}, "axis 1 of 5x7: the window does not fit"),
    ],
)
def test_bad_tensors_are_refused(changes: dict[str, Any], message: str):
    with refused(message):
        Problem.of(**tensors(**changes))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout):
    nested = torch.nested.nested_tensor([torch.zeros(5, 4, 8), torch.zeros(7, 4, 8)], layout=layout)
    with refused("query is a nested tensor; pass a dense one, padded or one grid at a time"):
        Problem.of(nested, nested, nested, 3)


def test_any_array_serves():
    """Only shapes and dtypes are read, so that what has them is a tensor."""
    array = SimpleNamespace(shape=(1, 9, 2, 4), dtype="float16")
    assert Problem.of(array, array, array, 3).dtype == "float16"


def test_replacing_a_field_validates_again():
    with refused("heads must be at least 1"):
        replace(Problem.grid((8,), 3), heads=0)
