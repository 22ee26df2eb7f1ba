"""Problems that bite, and tensors for them. Seeded, the same on every device; needs nothing but torch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.problem import FLOATS, Problem


def _grid(shape: tuple[int, ...], kernel_size: Any, **fields: Any) -> Problem:
    return Problem.grid(shape, kernel_size, **fields)


GEOMETRIES: tuple[Problem, ...] = (
    # 1-D: one token over and under what tiles divide, whole axes, single keys, ragged dilation groups.
    _grid((300,), 7),
    _grid((257,), 64),
    _grid((200,), 1),
    _grid((129,), -1),
    _grid((131,), 20, stride=3, is_causal=True),
    _grid((157,), 16, dilation=5, additional=37),
    _grid((190,), 9, stride=4, dilation=7, is_causal=True),
    # 2-D, sides that share no factor: a swapped axis cannot hide.
    _grid((17, 29), (5, 9)),
    _grid((32, 17), (8, 16), stride=(8, 4)),
    _grid((11, 37), (11, 6), stride=(2, 3)),
    _grid((13, 32), (4, 5), dilation=(3, 1), is_causal=(False, True)),
    _grid((16, 27), (1, 27), additional=5),
    # 3-D
    _grid((5, 8, 11), (3, 4, 5)),
    _grid((5, 8, 11), (3, 2, 5), stride=(2, 2, 3), is_causal=(True, False, False)),
    _grid((4, 12, 13), (4, 3, 4), stride=(1, 2, 1), dilation=(1, 4, 3)),
    _grid((4, 7, 12), -1, additional=130),
)
"""Grids and windows. What rides on them comes from `RIDERS`."""

SMALL: tuple[Problem, ...] = (
    _grid((67,), 8),
    _grid((90,), 9, stride=5, dilation=4, is_causal=True),
    _grid((11, 17), (4, 7), stride=(3, 1), additional=9),
    _grid((9, 16), (3, 5), dilation=(2, 3)),
    _grid((3, 8, 10), (3, 4, 5), stride=(1, 4, 2)),
    _grid((5, 6, 7), (2, 3, 4), is_causal=(True, False, True)),
)
"""A few small ones, where the law is not about the geometry."""

RIDERS: tuple[dict[str, Any], ...] = (
    {"batch": 2, "heads": 4, "heads_kv": 2, "head_dim": 64, "head_dim_v": 64},
    {"batch": 1, "heads": 3, "heads_kv": 3, "head_dim": 64, "head_dim_v": 64, "position_bias": True},
    {"batch": 3, "heads": 3, "heads_kv": 1, "head_dim": 20, "head_dim_v": 12, "scale": 0.3},
    {"batch": 1, "heads": 3, "heads_kv": 3, "head_dim": 32, "head_dim_v": 32},
    {"batch": 2, "heads": 4, "heads_kv": 2, "head_dim": 32, "head_dim_v": 32, "position_bias": True},
    {"batch": 1, "heads": 2, "heads_kv": 1, "head_dim": 128, "head_dim_v": 128},
    {"batch": 2, "heads": 2, "heads_kv": 2, "head_dim": 16, "head_dim_v": 40, "scale": -0.2},
    {"batch": 3, "heads": 2, "heads_kv": 1, "head_dim": 8, "head_dim_v": 24, "scale": 0.0, "position_bias": True},
    {"batch": 1, "heads": 6, "heads_kv": 2, "head_dim": 7, "head_dim_v": 5, "scale": 0.0},
)
"""Batch, heads and head dims: grouped, odd and even, values of another width, scales of all signs, position bias."""


def riding(problem: Problem, rider: dict[str, Any], dtype: str) -> Problem:
    """That grid and window, with these heads and this dtype."""
    fields = {"scale": rider["head_dim"] ** -0.5, "position_bias": False, **rider}
    return replace(problem, dtype=dtype, **fields)


def variants(problem: Problem) -> Iterator[Problem]:
    """The geometry with every rider in every dtype, dtypes changing fastest."""
    for rider in RIDERS:
        for dtype in FLOATS:
            yield riding(problem, rider, dtype)


def random_axes(rng: random.Random, rank: int, most_tokens: int = 600) -> dict[str, tuple[Any, ...]]:
    """Shape, kernel size, stride, dilation and causality of a random grid; lengths pairwise different."""
    longest = max(int(most_tokens ** (1 / rank) * 1.5), rank + 2)
    while True:
        shape = tuple(rng.sample(range(1, longest + 1), rank))
        if torch.Size(shape).numel() <= most_tokens:
            break
    kernel_size, stride, dilation = [], [], []
    for length in shape:
        step = rng.choice((1, 1, 1, rng.randint(1, min(length, 9))))
        fits = length // step
        size = rng.choice((1, fits, rng.randint(1, fits), rng.randint(1, min(fits, 9))))
        kernel_size.append(size)
        dilation.append(step)
        stride.append(rng.choice((1, size, rng.randint(1, size))))
    causal = tuple(rng.random() < 0.3 for _ in shape)
    return {
        "shape": shape,
        "kernel_size": tuple(kernel_size),
        "stride": tuple(stride),
        "dilation": tuple(dilation),
        "is_causal": causal,
    }


def random_problem(rng: random.Random, *, dtypes: Sequence[str] = tuple(FLOATS), most_tokens: int = 600) -> Problem:
    """Any problem at all: for fuzzing.

    Example:
        >>> random_problem(random.Random(0)).tokens <= 600
        True
    """
    geometry = random_axes(rng, rng.choice((1, 2, 3)), most_tokens)
    problem = Problem.grid(geometry.pop("shape"), **geometry, additional=rng.choice((0, 0, rng.randint(1, 70))))
    return riding(problem, rng.choice(RIDERS), rng.choice(dtypes))


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """On the CPU, so that a seed means the same numbers on every device; or on a device, to be quick there."""
    return torch.Generator(device).manual_seed(seed)


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, numbers: torch.Generator) -> Tensor:
    """Standard normal, rounded to `dtype`."""
    drawn = torch.float32 if numbers.device.type == "cpu" else dtype  # elsewhere billions may be asked for
    return torch.randn(tuple(shape), generator=numbers, device=numbers.device, dtype=drawn).to(device, dtype)


def make_inputs(problem: Problem, device: torch.device, seed: int, *, quickly: bool = False) -> Inputs:
    """Standard normal tensors of the problem's shapes; with additional keys and an odd seed, lengths as well.

    Args:
        problem, device: whose shapes, and where.
        seed: of the numbers, which are the same on every device.
        quickly: draw on the device itself: large tensors in no time, but other numbers than elsewhere.
    """
    numbers, dtype = generator(seed, device if quickly else "cpu"), getattr(torch, problem.dtype)

    def draw(*shape: int) -> Tensor:
        return normal(shape, dtype, device, numbers)

    grid = (problem.batch, *problem.shape)
    query = draw(*grid, problem.heads, problem.head_dim)
    key = draw(*grid, problem.heads_kv, problem.head_dim)
    value = draw(*grid, problem.heads_kv, problem.head_dim_v)
    bias = draw(*problem.bias_shape) if problem.position_bias else None
    if not problem.additional:
        return Inputs(query, key, value, position_bias=bias)
    extra = (problem.batch, problem.additional, problem.heads_kv)
    keys, values = draw(*extra, problem.head_dim), draw(*extra, problem.head_dim_v)
    if seed % 2 == 0:
        return Inputs(query, key, value, keys, values, None, bias)
    # The two extremes, and what lies beyond them, which counts as they do.
    lengths = torch.randint(-1, problem.additional + 2, (problem.batch,), generator=generator(seed))
    extremes = torch.tensor([0, problem.additional]) + torch.tensor([-1, 1]) * (seed // 2 % 2)
    lengths[: min(problem.batch, 2)] = extremes[: problem.batch]
    return Inputs(query, key, value, keys, values, lengths.roll(seed // 2).to(device), bias)


def make_output_gradients(problem: Problem, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Standard normal gradients of `out` and `lse`."""
    numbers, dtype = generator(seed + 1), getattr(torch, problem.dtype)
    grid = (problem.batch, *problem.shape, problem.heads)
    grad_out = normal((*grid, problem.head_dim_v), dtype, device, numbers)
    return grad_out, normal(grid, torch.promote_types(dtype, torch.float32), device, numbers)
