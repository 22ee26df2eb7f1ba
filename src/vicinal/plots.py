"""Figures of windows, plans, predictions and benchmarks, as PNG or SVG. Needs matplotlib, the extra `plots`.

Colours are those of Okabe and Ito, which remain apart for colour-blind readers, and differ in lightness.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vicinal._benchmark_chart import draw_times, read
from vicinal._figure import FRAME, legend, save, title
from vicinal._tuples import times
from vicinal.errors import InvalidProblem
from vicinal.plan import AxisPlan, Plan
from vicinal.problem import Axis, Problem
from vicinal.simulate import Estimate

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

FULL, MASKED, EMPTY = "#0072B2", "#E69F00", "#EFEFEF"
QUERY, WINDOW, SHARED = "#D55E00", "#56B4E9", "#F0C9AE"
MOST_ROWS = 160
"""Query tiles that one axis of a plan shows; more would be thinner than a pixel."""


def draw_windows(problem: Problem, path: str | Path, *, queries: Sequence[tuple[int, ...]] | None = None) -> Path:
    """The windows of single queries on the grid: the query, those that share its window, its keys.

    Args:
        problem: gives the windows.
        path: ends in .png or .svg.
        queries: one position per axis each; by default a corner, the middle, and a place between.

    Returns:
        The path. The file is written whole or not at all.

    Raises:
        InvalidProblem: if a query lies outside the grid, or the path has another suffix.
        Unsupported: if matplotlib is not installed.

    Example:
        >>> draw_windows(Problem.grid((12, 20), 5, stride=2), "windows.png").name
        'windows.png'
    """
    chosen = _default_queries(problem.shape) if queries is None else [tuple(query) for query in queries]
    for query in chosen:
        if len(query) != problem.rank or not all(0 <= q < n for q, n in zip(query, problem.shape, strict=True)):
            raise InvalidProblem(f"queries must lie on the grid {problem.shape}, one position per axis, got {query}")
    if not chosen:
        raise InvalidProblem("queries must name at least one query, got none")
    draw = {1: _draw_strips, 2: _draw_fields, 3: _draw_slices}[problem.rank]
    return save(path, partial(draw, problem=problem, queries=chosen))


def draw_plan(plan: Plan, path: str | Path) -> Path:
    """Full, masked and empty tiles: axis by axis, and of all pairs of tiles of the grid.

    The picture of the whole grid lists tiles in row-major order. Where it has more cells than the figure
    has pixels, or KV tiles begin anywhere, each cell averages what it stands for, with sparse cells made
    visible. Of a dilated axis one group is shown.

    Args:
        plan: what to show.
        path: ends in .png or .svg.

    Returns:
        The path. The file is written whole or not at all.

    Raises:
        InvalidProblem, Unsupported: as `draw_windows`.

    Example:
        >>> from vicinal import Tiling, make_plan
        >>> draw_plan(make_plan(Problem.grid((48, 40), 24), Tiling((8, 8), (8, 8))), "plan.svg").name
        'plan.svg'
    """

    def draw(figure: Any) -> None:
        rank = plan.problem.rank
        # On one axis there is no product to show.
        widths = [1.0] * rank + [1.6] * (rank > 1)
        figure.set_size_inches(2.9 * sum(widths) if rank > 1 else 6.5, 4.4)
        panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        for number, (panel, axis) in enumerate(zip(panels, plan.axes, strict=False)):
            _draw_axis(panel, axis, number)
        if rank > 1:
            _draw_product(panels[-1], plan)
        share = 100 * plan.visited / (plan.q_tiles * plan.kv_tiles)
        counts = f"{plan.visited:,} pairs of tiles visited ({share:.3g}%), {plan.masked / plan.visited:.0%} masked"
        title(figure, str(plan.problem), f"{plan.tiling}: {counts}")
        legend(figure, {"full": FULL, "masked": MASKED, "empty": EMPTY})

    return save(path, draw)


def draw_speedups(estimates: Iterable[Estimate], path: str | Path) -> Path:
    """Worst-tile speed-up over dense attention against window and stride, as a heat map.

    Cells of perfectly block-sparse plans have a frame. What `sweep` returns is made for this. If there are
    several estimates of one window and stride, the fastest counts.

    Args:
        estimates: of problems on one grid.
        path: ends in .png or .svg.

    Returns:
        The path. The file is written whole or not at all.

    Raises:
        InvalidProblem: if there are no estimates, or of several grids, or the path has another suffix.
        Unsupported: if matplotlib is not installed.

    Example:
        >>> from vicinal import Hardware, Tiling
        >>> from vicinal.suggest import sweep
        >>> draw_speedups(sweep((64, 96), Hardware.named("h200"), Tiling((8, 8), (8, 8))), "speedups.png").name
        'speedups.png'
    """
    best: dict[tuple[tuple[int, ...], tuple[int, ...]], Estimate] = {}
    for estimate in sorted(estimates, key=lambda estimate: estimate.speedup.worst_tile):
        best[estimate.problem.kernel_size, estimate.problem.stride] = estimate
    grids = {estimate.problem.shape for estimate in best.values()}
    if not best:
        raise InvalidProblem(
            "estimates must hold at least one, got none; a grid of a single tile leaves no window to try"
        )
    if len(grids) != 1:
        raise InvalidProblem(f"estimates must be of problems on one grid, got {len(grids)} grids")
    return save(path, partial(_draw_heat_map, best=best))


def draw_benchmark(table: str | Path, path: str | Path) -> Path:
    """Times of a benchmark CSV: a row per case, a dot per backend, a panel per pass, predictions as bars.

    Of repeated measurements the last in the file counts. A row without a time is named in the title.

    Args:
        table: CSV with the columns case, backend, pass and milliseconds; device, predicted_milliseconds and
            versions are used if they are there.
        path: ends in .png or .svg.

    Returns:
        The path. The file is written whole or not at all.

    Raises:
        InvalidProblem: if the table cannot be read, lacks a column or holds no time.
        Unsupported: if matplotlib is not installed.

    Example:
        >>> _ = Path("times.csv").write_text("case,backend,pass,milliseconds\\n64x64 w13,blocked,forward,1.5\\n")
        >>> draw_benchmark("times.csv", "times.png").name
        'times.png'
    """
    rows = read(Path(table))
    return save(path, partial(draw_times, rows=rows))


def _comma(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


def _default_queries(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    places = [(0, 1), (1, 3), (1, 2)] if len(shape) > 1 else [(i, 8) for i in range(9)]
    return list(dict.fromkeys(tuple(min(n * a // b, n - 1) for n in shape) for a, b in places))


def _marks(axis: Axis, query: int) -> list[tuple[bool, bool, bool]]:
    """For each token of an axis: is it a key, does it share the query's window, is it the query."""
    mine = axis.window(query)
    return [(token in mine, axis.window(token) == mine, token == query) for token in range(axis.length)]


def _paint(problem: Problem, query: tuple[int, ...]) -> Array:
    """Colours of all tokens of the grid, `[*S, 3]`."""
    import numpy as np
    from matplotlib.colors import to_rgb

    marks = [np.array(_marks(axis, position)).T for axis, position in zip(problem.axes, query, strict=True)]
    picture = np.empty((*problem.shape, 3))
    picture[:] = to_rgb(EMPTY)
    for kind, colour in ((0, WINDOW), (1, SHARED), (2, QUERY)):
        picture[np.ix_(*(axis[kind] for axis in marks))] = to_rgb(colour)
    return picture


def _draw_strips(figure: Any, problem: Problem, queries: list[tuple[int, ...]]) -> None:
    import numpy as np

    panel = figure.subplots()
    figure.set_size_inches(8, 1.5 + 0.28 * len(queries))
    panel.imshow(
        np.concatenate([_paint(problem, query)[None] for query in queries]), aspect="auto", interpolation="none"
    )
    panel.set_yticks(range(len(queries)), [f"query {query[0]}" for query in queries])
    panel.set_yticks([row + 0.5 for row in range(len(queries) - 1)], minor=True)
    _gaps(panel, "y", len(queries))
    if problem.tokens <= 64:
        panel.set_xticks([column + 0.5 for column in range(problem.tokens - 1)], minor=True)
        _gaps(panel, "x", problem.tokens)
    panel.set_xlabel("token")
    _frame_windows(figure, problem)


def _gaps(panel: Any, which: str, cells: int) -> None:
    """White lines between cells, at the minor ticks."""
    panel.grid(which="minor", axis=which, color="white", linewidth=2 if which == "y" else 40 / max(cells, 20))
    panel.tick_params(which="minor", length=0)


def _draw_fields(figure: Any, problem: Problem, queries: list[tuple[int, ...]]) -> None:
    height, width = problem.shape
    side = 3.4 * min(max(width / height, 0.4), 2.5)
    figure.set_size_inches(side * len(queries) + 0.6, 3.4 + 1.1)
    for panel, query in zip(figure.subplots(1, len(queries), squeeze=False)[0], queries, strict=True):
        _field(panel, _paint(problem, query), f"query {_comma(query)}", query)
    _frame_windows(figure, problem)


def _field(panel: Any, picture: Any, name: str, query: tuple[int, ...] | None) -> None:
    height, width = picture.shape[:2]
    panel.imshow(picture, interpolation="none")
    for axis in (panel.xaxis, panel.yaxis):
        axis.get_major_locator().set_params(integer=True)
    panel.set_title(name)
    if query is not None and max(height, width) > 64:
        # One token would be a pixel.
        panel.plot(query[1], query[0], "o", color=QUERY, markeredgecolor="white", markersize=6, clip_on=False)
    if max(height, width) <= 48:
        panel.set_xticks([x + 0.5 for x in range(width - 1)], minor=True)
        panel.set_yticks([y + 0.5 for y in range(height - 1)], minor=True)
        panel.grid(which="minor", color="white", linewidth=24 / max(height, width, 24))
    panel.tick_params(which="both", length=0)
    panel.spines[:].set_visible(False)


def _draw_slices(figure: Any, problem: Problem, queries: list[tuple[int, ...]]) -> None:
    """Each query a row, at most five slices along axis 0 its columns, the query's own among them."""
    depth, height, width = problem.shape
    columns = min(depth, 5)
    side = 2.1 * min(max(width / height, 0.5), 2.0)
    figure.set_size_inches(side * columns + 0.8, 2.2 * len(queries) + 1.3)
    panels = figure.subplots(len(queries), columns, squeeze=False, sharex=True, sharey=True)
    for row, query in zip(panels, queries, strict=True):
        picture = _paint(problem, query)
        for panel, index in zip(row, _slices(problem.axes[0], query[0], columns), strict=True):
            is_own = index == query[0]
            name = f"query {_comma(query)}" if is_own else f"slice {index}"
            _field(panel, picture[index], name, query[1:] if is_own else None)
            panel.title.set_color(QUERY if is_own else "#555555")
    _frame_windows(figure, problem)


def _slices(axis: Axis, query: int, count: int) -> list[int]:
    """The query's slice, the window's first and last, one outside on either side, its middle; then any."""
    window = axis.window(query)
    wanted = [query, window[0], window[-1], window[0] - axis.dilation, window[-1] + axis.dilation]
    wanted.append(window[len(window) // 2])
    found = dict.fromkeys(index for index in (*wanted, *range(axis.length)) if 0 <= index < axis.length)
    return sorted(list(found)[:count])


def _frame_windows(figure: Any, problem: Problem) -> None:
    title(figure, str(problem))
    legend(figure, {"query": QUERY, "shares its window": SHARED, "its keys": WINDOW, "other tokens": EMPTY})


def _draw_axis(panel: Any, axis: AxisPlan, number: int) -> None:
    """Rows are query tiles, columns are keys; free origins are drawn where they are."""
    spans = [span for span in axis.spans if span.group == 0]
    length = axis.axis.subaxes()[0].length
    step = math.ceil(len(spans) / MOST_ROWS)
    shown = spans[::step]
    panel.set_facecolor(EMPTY)
    has_few_tiles = sum(span.visited for span in shown) <= 600
    for row, span in enumerate(shown):
        starts = [span.origin + tile * axis.kv_tile for tile in range(span.visited)]
        panel.broken_barh(
            [(start, min(axis.kv_tile, length - start)) for start in starts],
            (row - 0.45, 0.9) if has_few_tiles else (row - 0.5, 1.0),
            facecolors=[FULL if tile in span.full_tiles else MASKED for tile in range(span.visited)],
            edgecolor="white",
            linewidth=0.8 if has_few_tiles else 0,
        )
    panel.set_xlim(0, length)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_ylim(len(shown) - 0.5, -0.5)
    panel.set_yticks([])
    title = f"axis {number}: {axis.axis.length} tokens"
    panel.set_title(title if axis.axis.dilation == 1 else f"{title}, one of {axis.axis.dilation} groups")
    panel.set_xlabel("key")
    panel.set_ylabel(f"query tile (every {step}.)" if step > 1 else "query tile")
    panel.spines[:].set_visible(False)


def _draw_product(panel: Any, plan: Plan, most: int = 600) -> None:
    import numpy as np
    from matplotlib.colors import to_rgb

    # Per axis, which (query tile, key) pairs are visited and which are full; products over axes, and averages of
    # products are products of averages, so the grid is never built at more than `most` cells a side.
    rows = [sum(span.group == 0 for span in axis.spans) for axis in plan.axes]
    columns = [math.ceil(axis.axis.subaxes()[0].length / axis.kv_tile) for axis in plan.axes]
    row_scale, column_scale = (min(1.0, (most / math.prod(n)) ** (1 / len(n))) for n in (rows, columns))
    visited, full = np.ones((1, 1)), np.ones((1, 1))
    for axis, height, width in zip(plan.axes, rows, columns, strict=True):
        shape = max(int(height * row_scale), 1), max(int(width * column_scale), 1)
        seen, whole = _axis_states(axis)
        visited, full = np.kron(visited, _shrink(seen, shape)), np.kron(full, _shrink(whole, shape))
    if min(row_scale, column_scale) < 1:
        # A thousandth of a cell would be invisible: its cube root is not.
        boost = np.cbrt(visited) / np.maximum(visited, 1e-300)
        visited, full = visited * boost, full * boost
    shares = np.stack([full, visited - full, 1 - visited], axis=-1)
    panel.imshow(
        np.clip(shares @ np.array([to_rgb(colour) for colour in (FULL, MASKED, EMPTY)]), 0, 1),
        aspect="auto",
        interpolation="none",
    )
    is_binned = plan.tiling.kv_origin == "free"
    notes = ["binned by KV tile"] * is_binned + ["sparse parts made visible"] * (min(row_scale, column_scale) < 1)
    panel.set_title(", ".join(["all axes", *notes]))
    panel.set_xlabel(f"{math.prod(columns):,} KV tiles")
    panel.set_ylabel(f"{math.prod(rows):,} query tiles")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def _axis_states(axis: AxisPlan) -> tuple[Array, Array]:
    """Visited and full, `[query tiles, keys]`, of the axis's first dilation group."""
    import numpy as np

    spans = [span for span in axis.spans if span.group == 0]
    length = axis.axis.subaxes()[0].length
    visited, full = np.zeros((2, len(spans), length))
    for row, span in enumerate(spans):
        visited[row, span.origin : span.origin + span.visited * axis.kv_tile] = 1
        start, stop = (span.origin + tile * axis.kv_tile for tile in (span.full_tiles.start, span.full_tiles.stop))
        full[row, start:stop] = 1
    # Up to whole tiles, so that the coarser raster's cells are tiles.
    beyond = ((0, 0), (0, -length % axis.kv_tile))
    return np.pad(visited, beyond, mode="edge"), np.pad(full, beyond, mode="edge")


def _shrink(array: Array, shape: tuple[int, int]) -> Array:
    """Means over a coarser raster whose cells differ in size by one at most."""
    import numpy as np

    result = array
    for axis, size in enumerate(shape):
        edges = np.array([array.shape[axis] * i // size for i in range(size + 1)])
        counts = np.diff(edges).reshape((-1, 1) if axis == 0 else (1, -1))
        result = np.add.reduceat(result, edges[:-1], axis=axis) / counts
    return result


def _draw_heat_map(figure: Any, best: dict[tuple[tuple[int, ...], tuple[int, ...]], Estimate]) -> None:
    import numpy as np

    windows = sorted({window for window, _ in best}, key=lambda window: (math.prod(window), window))
    strides = sorted({stride for _, stride in best}, key=lambda stride: (math.prod(stride), stride))
    values = np.full((len(windows), len(strides)), np.nan)
    for (window, stride), estimate in best.items():
        values[windows.index(window), strides.index(stride)] = estimate.speedup.worst_tile
    logs = np.log(values)
    figure.set_size_inches(2.2 + 0.85 * len(strides), 1.9 + 0.36 * len(windows))
    panel = figure.subplots()
    image = panel.imshow(logs, cmap="cividis", aspect="auto", vmin=0, vmax=max(float(np.nanmax(logs)), 0.01))
    panel.set_facecolor(EMPTY)
    for (window, stride), estimate in best.items():
        row, column = windows.index(window), strides.index(stride)
        is_dark = image.norm(logs[row, column]) < 0.55
        text = f"{values[row, column]:.3g}x" if values[row, column] < 99.5 else f"{values[row, column]:.0f}x"
        panel.text(column, row, text, ha="center", va="center", color="white" if is_dark else "black")
        if estimate.is_perfect:
            frame = {"fill": False, "edgecolor": FRAME, "linewidth": 2}
            panel.add_patch(_rectangle((column - 0.46, row - 0.43), 0.92, 0.86, **frame))
    panel.set_xticks(range(len(strides)), [times(stride) for stride in strides])
    panel.set_yticks(range(len(windows)), [times(window) for window in windows])
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    panel.set_xlabel("stride")
    panel.set_ylabel("window")
    grid, tilings = next(iter(best.values())).problem.shape, {str(estimate.plan.tiling) for estimate in best.values()}
    title(figure, f"speed-up over dense attention, {'x'.join(map(str, grid))} grid", *sorted(tilings)[:1])
    legend(figure, {"perfectly block-sparse": None})


def _rectangle(corner: tuple[float, float], width: float, height: float, **style: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, **style)
