"""`plot`: figures of windows, plans, speed-ups and benchmarks."""

from pathlib import Path
from typing import Annotated

import typer

from vicinal.cli._console import progress, say
from vicinal.cli._options import SHAPE, Device, KVOrigin, KVTile, QTile, grid_of, numbers, problem_of, tiling_of
from vicinal.errors import InvalidProblem

_WINDOW, _TILES = ("kernel_size", "stride", "dilation", "causal"), ("q_tile", "kv_tile", "kv_origin")
KINDS = {
    "windows": (*_WINDOW, "query"),
    "plan": (*_WINDOW, *_TILES),
    "speedups": (*_TILES, "hardware"),
    "benchmark": (),
    "steps": (),
}
"""Kinds of figures, and the options that each of them heeds."""


def plot(
    kind: Annotated[str, typer.Argument(metavar="|".join(KINDS), help="What to draw.")],
    subject: Annotated[str, typer.Argument(metavar="GRID|CSV", help="Tokens per axis, or a benchmark's table.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG or SVG to write.")],
    kernel_size: Annotated[str | None, typer.Option("--kernel-size", "-k", metavar=SHAPE, help="Window.")] = None,
    stride: Annotated[str, typer.Option("--stride", "-s", metavar=SHAPE, help="Queries that share a window.")] = "1",
    dilation: Annotated[str, typer.Option("--dilation", "-d", metavar=SHAPE, help="Distance between keys.")] = "1",
    causal: Annotated[str, typer.Option(metavar="AXES", help="Causal axes: 0, or 0,2, or all.")] = "",
    query: Annotated[
        list[str] | None, typer.Option(metavar=SHAPE, help="For windows: position of a query; may be repeated.")
    ] = None,
    q_tile: QTile = None,
    kv_tile: KVTile = None,
    kv_origin: KVOrigin = "free",
    hardware: Device = "h100-sxm",
) -> None:
    """Draw the windows of single queries, a plan, speed-ups against window and stride, or a table of times."""
    from vicinal import plots
    from vicinal.hardware import Hardware
    from vicinal.plan import make_plan
    from vicinal.problem import Problem
    from vicinal.suggest import sweep

    _check(
        kind,
        kernel_size=kernel_size is not None,
        stride=stride != "1",
        dilation=dilation != "1",
        causal=bool(causal),
        query=bool(query),
        q_tile=q_tile is not None,
        kv_tile=kv_tile is not None,
        kv_origin=kv_origin != "free",
        hardware=hardware != "h100-sxm",
    )
    if kind in ("windows", "plan") and kernel_size is None:
        raise InvalidProblem(f"a figure of kind {kind} needs --kernel-size, such as --kernel-size 7")
    with progress(f"drawing {kind}"):
        if kind == "benchmark":
            written = plots.draw_benchmark(subject, out)
        elif kind == "steps":
            from vicinal.bench.e2e_chart import draw
            from vicinal.bench.e2e_result import load

            written = draw(load(subject), out)
        elif kind == "speedups":
            device, grid = Hardware.named(hardware or "h100-sxm"), grid_of(subject)
            tiling = tiling_of(Problem.grid(grid, -1), q_tile, kv_tile, kv_origin, device)
            written = plots.draw_speedups(sweep(grid, device, tiling), out)
        else:
            problem = problem_of(subject, kernel_size or "", stride, dilation, causal)
            if kind == "windows":
                queries = None if not query else [numbers(text, "query") for text in query]
                written = plots.draw_windows(problem, out, queries=queries)
            else:
                written = plots.draw_plan(make_plan(problem, tiling_of(problem, q_tile, kv_tile, kv_origin, None)), out)
    say(f"wrote {written}")


def _check(kind: str, **given: bool) -> None:
    """Whether there is such a figure, and it heeds the options that were given."""
    if kind not in KINDS:
        raise InvalidProblem(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    stray = [name for name, is_given in given.items() if is_given and name not in KINDS[kind]]
    if stray:
        raise InvalidProblem(f"a figure of kind {kind} does not depend on {' or '.join(stray)}; leave that out")
