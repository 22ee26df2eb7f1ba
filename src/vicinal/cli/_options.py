"""Options that several commands share, and the objects that they make.

Annotations are evaluated here (no `from __future__ import annotations`), since typer reads them.
"""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vicinal.errors import InvalidProblem

if TYPE_CHECKING:
    from vicinal.hardware import Hardware
    from vicinal.problem import Problem
    from vicinal.tiling import Tiling

SHAPE = "AxBxC"

LONGEST = 2**24
"""Tokens of an axis; plans of longer ones would be counted for minutes."""


def numbers(text: str, name: str) -> tuple[int, ...]:
    """`30x48x80` and `30,48,80` are three integers, `7` is one.

    Example:
        >>> numbers("30x48x80", "grid")
        (30, 48, 80)
    """
    try:
        return tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError:
        raise InvalidProblem(f"{name} must be integers joined by x, such as 30x48x80, got {text!r}") from None


def grid_of(text: str) -> tuple[int, ...]:
    """Tokens per axis, no more than can be planned in seconds.

    Example:
        >>> grid_of("30x48x80")
        (30, 48, 80)
    """
    grid = numbers(text, "grid")
    if max(grid) > LONGEST:
        raise InvalidProblem(f"grid must hold at most {LONGEST:,} tokens per axis, got {text!r}")
    return grid


def each(text: str, name: str) -> int | tuple[int, ...]:
    """One integer for all axes, or one per axis."""
    values = numbers(text, name)
    return values[0] if len(values) == 1 else values


def problem_of(
    grid: Annotated[str, typer.Argument(metavar="GRID", help="Tokens per axis, such as 30x48x80.")],
    kernel_size: Annotated[
        str, typer.Option("--kernel-size", "-k", metavar=SHAPE, help="Window; one number for all axes; -1: whole axis.")
    ],
    stride: Annotated[
        str, typer.Option("--stride", "-s", metavar=SHAPE, help="Queries that share a window, per axis.")
    ] = "1",
    dilation: Annotated[
        str, typer.Option("--dilation", "-d", metavar=SHAPE, help="Distance between keys, per axis.")
    ] = "1",
    causal: Annotated[str, typer.Option(metavar="AXES", help="Causal axes: 0, or 0,2, or all.")] = "",
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 1,
    heads_kv: Annotated[int | None, typer.Option(help="Key and value heads, if fewer.")] = None,
    head_dim: Annotated[int, typer.Option(help="Elements per head.")] = 64,
    head_dim_v: Annotated[int | None, typer.Option(help="Elements per value head, if other.")] = None,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "bfloat16",
    additional: Annotated[int, typer.Option(help="Additional keys that every query sees.")] = 0,
    position_bias: Annotated[bool, typer.Option("--position-bias", help="A table is added to the scores.")] = False,
) -> "Problem":
    """A problem from the words of the command line."""
    from vicinal.problem import Problem

    shape = grid_of(grid)
    everywhere = range(len(shape)) if causal == "all" else numbers(causal, "causal") if causal else ()
    if not all(0 <= axis < len(shape) for axis in everywhere):
        raise InvalidProblem(f"causal must name axes from 0 to {len(shape) - 1}, or be all, got {causal!r}")
    return Problem.grid(
        shape,
        each(kernel_size, "kernel_size"),
        stride=each(stride, "stride"),
        dilation=each(dilation, "dilation"),
        is_causal=tuple(axis in everywhere for axis in range(len(shape))),
        batch=batch,
        heads=heads,
        heads_kv=heads if heads_kv is None else heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim if head_dim_v is None else head_dim_v,
        dtype=dtype,
        additional=additional,
        position_bias=position_bias,
    )


def takes_problem(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `problem_of`; it receives the `problem` that they make."""
    shared = inspect.signature(problem_of).parameters
    own = [p for name, p in inspect.signature(command).parameters.items() if name != "problem"]

    def with_problem(**options: Any) -> None:
        command(problem_of(**{name: options.pop(name) for name in shared}), **options)

    # typer reads options off the signature, their types off the annotations, and the help off the rest.
    options = [option.replace(kind=option.KEYWORD_ONLY) for option in (*shared.values(), *own)]
    vars(with_problem)["__signature__"] = inspect.Signature(options)
    with_problem.__annotations__ = {option.name: option.annotation for option in options}
    with_problem.__name__, with_problem.__doc__ = command.__name__, command.__doc__
    return with_problem


Grid = Annotated[str, typer.Argument(metavar="GRID", help="Tokens per axis, such as 30x48x80.")]
QTile = Annotated[str | None, typer.Option(metavar=SHAPE, help="Queries per tile; by default the backend's.")]
KVTile = Annotated[str | None, typer.Option(metavar=SHAPE, help="Keys per tile; by default the backend's.")]
KVOrigin = Annotated[str, typer.Option(metavar="free|grid", help="Whether KV tiles begin anywhere, or on a grid.")]
Backend = Annotated[str | None, typer.Option("--backend", "-b", help="A backend by name.")]
Device = Annotated[str | None, typer.Option("--hardware", "-w", help="Known hardware by name; see doctor.")]


def tiling_of(
    problem: "Problem", q_tile: str | None, kv_tile: str | None, kv_origin: str, hardware: "Hardware | None"
) -> "Tiling":
    """The tiling that was asked for, or the one that the backend which would run the problem uses."""
    from vicinal._tuples import canonical
    from vicinal.tiling import Tiling

    if q_tile is not None and kv_tile is not None:
        tiles = {"q_tile": each(q_tile, "q_tile"), "kv_tile": each(kv_tile, "kv_tile")}
        return Tiling(
            **{name: canonical(tile, problem.rank, name) for name, tile in tiles.items()}, kv_origin=kv_origin
        )
    if q_tile is not None or kv_tile is not None:
        given, missing = ("q_tile", "kv_tile") if kv_tile is None else ("kv_tile", "q_tile")
        raise InvalidProblem(f"{given} came without {missing}; give both, or neither for the backend's own")
    if kv_origin != "free":
        raise InvalidProblem(
            f"kv_origin {kv_origin!r} needs q_tile and kv_tile; a backend's own tiles have their origin"
        )
    from vicinal.backends import choose

    return next(iter(choose(problem, hardware or here()).tilings(problem, hardware or here())))


def here() -> "Hardware":
    """This machine's accelerator, or its processor."""
    import torch

    from vicinal.backends import present

    return present(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
