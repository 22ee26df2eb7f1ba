"""Problems as columns of a table of times, and back."""

from __future__ import annotations

from collections.abc import Mapping

from vicinal._tuples import times
from vicinal.problem import Problem


def columns_of(problem: Problem) -> dict[str, str | int]:
    """A problem with equal heads of queries, keys and values, in 16 bits.

    Example:
        >>> columns_of(Problem.grid((30, 48), (5, 7), heads=4, head_dim=64))["window"]
        '5x7'
    """
    return {
        "grid": times(problem.shape),
        "window": times(problem.kernel_size),
        "stride": times(problem.stride),
        "dilation": times(problem.dilation),
        "causal": times(tuple(map(int, problem.is_causal))),
        "batch": problem.batch,
        "heads": problem.heads,
        "head_dim": problem.head_dim,
    }


def problem_of(row: Mapping[str, str]) -> Problem:
    """The problem of such columns; tables of other problems have more: `head_dim_v`, `dtype`, `position_bias`."""
    return Problem.grid(
        numbers(row["grid"]), numbers(row["window"]), stride=numbers(row["stride"]), dilation=numbers(row["dilation"]),
        is_causal=tuple(map(bool, numbers(row["causal"]))) if "causal" in row else False,
        batch=int(row["batch"]), heads=int(row["heads"]), head_dim=int(row["head_dim"]),
        head_dim_v=int(row.get("head_dim_v", row["head_dim"])), dtype=row.get("dtype", "bfloat16"),
        position_bias=row.get("position_bias") == "1",
    )  # fmt: skip


def numbers(words: str) -> tuple[int, ...]:
    """The sizes that `times` has written.

    Example:
        >>> numbers("30x48x80")
        (30, 48, 80)
    """
    return tuple(map(int, words.split("x")))
