"""Figures show what the plan says, are written whole or not at all, and refuse in sentences."""

import builtins
import csv
import subprocess
import sys
import xml.etree.ElementTree as ET
from math import prod

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from vicinal import _benchmark_chart, _figure, plots
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import make_plan
from vicinal.plots import draw_benchmark, draw_plan, draw_speedups, draw_windows
from vicinal.problem import Problem
from vicinal.suggest import suggest, sweep
from vicinal.tiling import Tiling

H100 = Hardware.named("h100-sxm")
PROBLEM = Problem.grid((12, 18), (5, 7), stride=(2, 3))
PLAN = make_plan(PROBLEM, Tiling((4, 6), (2, 3)))
COLUMNS = (
    "date", "device", "driver", "versions", "case", "backend", "pass", "milliseconds", "useful_tflops_per_s",
    "predicted_milliseconds", "error",
)  # fmt: skip


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def table(tmp_path):
    row = {"device": "two cores", "case": "12x18", "backend": "blocked", "pass": "forward", "milliseconds": "3.5"}
    rows = [
        row | {"predicted_milliseconds": "2.5"},
        row | {"backend": "dense", "milliseconds": "40"},
        row | {"case": "other", "backend": "flex", "milliseconds": "", "error": "out of memory"},
        row | {"pass": "backward", "milliseconds": "11"},
    ]
    return write_table(tmp_path / "table.csv", rows)


def text_of(draw, *arguments):
    """All text of a figure, without writing it."""
    figure = Figure()
    draw(figure, *arguments)
    return "\n".join(text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")))


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".svg"])
def test_pictures_open(tmp_path, suffix, table):
    made = [
        draw_windows(PROBLEM, tmp_path / f"windows{suffix}"),
        draw_plan(PLAN, str(tmp_path / f"plan{suffix}")),
        draw_speedups(suggest((12, 18), H100, sparsity=0.8, count=4), tmp_path / f"speedups{suffix}"),
        draw_benchmark(table, tmp_path / f"times{suffix}"),
    ]
    for path in made:
        if suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            with Image.open(path) as image:
                image.load()
                assert min(image.size) > 200
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in made} | {"table.csv"}


@pytest.mark.parametrize(
    "problem",
    [
        Problem.grid((40,), 9, stride=4),
        Problem.grid((300,), 1),
        Problem.grid((1,), 1),
        Problem.grid((1, 7), (1, 3)),
        Problem.grid((70, 90), (9, 11), dilation=(1, 3)),
        Problem.grid((6, 7, 9), (3, 2, 5), is_causal=(True, False, True)),
        Problem.grid((2, 70, 9), (1, 30, 5)),
    ],
    ids=str,
)
def test_windows_and_plans_of_every_rank(tmp_path, problem):
    tiling = Tiling((4, 8, 4)[: problem.rank], (2, 3, 4)[: problem.rank])
    assert draw_windows(problem, tmp_path / "windows.png").stat().st_size > 1000
    assert draw_plan(make_plan(problem, tiling), tmp_path / "plan.png").stat().st_size > 1000


def test_painted_tokens_are_the_window():
    problem = Problem.grid((9, 16), (4, 5), stride=(2, 1), dilation=(1, 2), is_causal=(True, False))
    query = (5, 6)
    picture = plots._paint(problem, query)
    inside = np.zeros(problem.shape, bool)
    inside[np.ix_(*(list(axis.window(at)) for axis, at in zip(problem.axes, query, strict=True)))] = True
    assert ((picture != to_rgb(plots.EMPTY)).any(-1) == inside).all()
    assert (picture[query] == to_rgb(plots.QUERY)).all()
    assert ((picture == to_rgb(plots.QUERY)).all(-1)).sum() == 1


def test_queries_that_share_a_window_are_marked():
    picture = plots._paint(Problem.grid((11,), 4, stride=3), (4,))
    assert [tuple(token) == to_rgb(plots.SHARED) for token in picture] == [i in (3, 5) for i in range(11)]


@pytest.mark.parametrize("kv_origin", ["grid", "free"])
def test_states_of_an_axis_count_to_the_plan(kv_origin):
    plan = make_plan(Problem.grid((24,), 8, stride=2), Tiling((4,), (4,), kv_origin))
    visited, full = plots._axis_states(plan.axes[0])
    assert full.sum() == 4 * plan.full
    assert (full <= visited).all()
    if kv_origin == "grid":
        assert visited.sum() == 4 * plan.visited


def test_shrinking_keeps_the_mean():
    array = np.arange(60.0).reshape(6, 10)
    assert plots._shrink(array, (3, 5)).mean() == array.mean()
    assert plots._shrink(array, (6, 10)).tolist() == array.tolist()
    assert plots._shrink(array, (4, 7)).shape == (4, 7)


def test_a_plan_of_millions_of_pairs_is_drawn(tmp_path):
    plan = make_plan(Problem.grid((121, 272, 480), 11), Tiling((2, 8, 8), (2, 8, 8)))
    with Image.open(draw_plan(plan, tmp_path / "plan.png")) as image:
        assert image.size[0] < 4000


def test_equal_figures_are_equal_files(tmp_path):
    first, second = (draw_plan(PLAN, tmp_path / name).read_bytes() for name in ("a.svg", "b.svg"))
    assert first == second


def test_speedups_show_each_window_and_stride_once():
    found = sweep((24, 40), H100, Tiling((4, 8), (4, 8)), kernel_sizes=[(8, 16), 16], strides=[1, (4, 8)])
    best = {(estimate.problem.kernel_size, estimate.problem.stride): estimate for estimate in found}
    text = text_of(plots._draw_heat_map, best)
    assert "8x16" in text
    assert "16x16" in text
    assert "4x8" in text
    for estimate in found:
        assert f"{estimate.speedup.worst_tile:.3g}x" in text


def test_sweep_leaves_out_strides_that_do_not_fit():
    found = sweep((24, 40), H100, Tiling((4, 8), (4, 8)), heads=3)
    assert all(a <= b for e in found for a, b in zip(e.problem.stride, e.problem.kernel_size, strict=True))
    assert {estimate.problem.heads for estimate in found} == {3}
    assert all(prod(estimate.problem.kernel_size) < 24 * 40 for estimate in found)


def test_sweep_refuses_a_tiling_of_another_rank():
    with pytest.raises(InvalidProblem, match="tiling must have one number per axis of the grid"):
        sweep((24, 40), H100, Tiling((4,), (4,)))


def test_times_name_what_has_none(table):
    text = text_of(plots.draw_times, plots.read(table))
    assert "two cores" in text
    assert "no time: flex on other, forward" in text
    assert {"forward", "backward", "12x18", "blocked", "dense", "predicted"} <= set(text.split("\n"))


def test_the_last_of_repeated_measurements_counts(tmp_path):
    row = {"case": "a", "backend": "b", "pass": "forward", "device": "x"}
    times = [row | {"milliseconds": "3"}, row | {"milliseconds": "5"}]
    rows = plots.read(write_table(tmp_path / "t.csv", times))
    assert [row["milliseconds"] for row in rows] == ["5"]


def test_a_failing_figure_leaves_nothing_and_spares_the_old(tmp_path, monkeypatch):
    path = tmp_path / "plan.png"
    path.write_bytes(b"old")

    def fail(self, file, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        draw_plan(PLAN, path)
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.png"]


@pytest.mark.parametrize("name", ["plan.jpg", "plan", "plan.svg.gz"])
def test_another_suffix_is_refused(tmp_path, name):
    with pytest.raises(InvalidProblem, match=r"path must end in .png or .svg, got .*plan"):
        draw_plan(PLAN, tmp_path / name)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InvalidProblem, match="path must lie in a folder that exists"):
        draw_plan(PLAN, tmp_path / "nowhere" / "plan.png")


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([(12, 0)], r"queries must lie on the grid \(12, 18\), one position per axis, got \(12, 0\)"),
        ([(0, -1)], r"got \(0, -1\)"),
        ([(3,)], r"got \(3,\)"),
        ([], "queries must name at least one query, got none"),
    ],
)
def test_queries_off_the_grid_are_refused(tmp_path, queries, message):
    with pytest.raises(InvalidProblem, match=message):
        draw_windows(PROBLEM, tmp_path / "w.png", queries=queries)


def test_speedups_of_several_grids_are_refused(tmp_path):
    mixed = [*suggest((12, 18), H100, sparsity=0.5, count=1), *suggest((12, 20), H100, sparsity=0.5, count=1)]
    with pytest.raises(InvalidProblem, match="estimates must be of problems on one grid, got 2 grids"):
        draw_speedups(mixed, tmp_path / "s.png")
    with pytest.raises(InvalidProblem, match="estimates must hold at least one, got none"):
        draw_speedups([], tmp_path / "s.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read as CSV"),
        (b"", "must have rows with the columns case, backend, pass, milliseconds"),
        (b"case,backend\na,b\n", r"missing: \['pass', 'milliseconds'\]"),
        (b"case,backend,pass,milliseconds\na,b,forward,\n", "must hold at least one time, got 1 rows"),
        (b"case,backend,pass,milliseconds\na,b,forward,nan\n", "must hold at least one time"),
        (b"\xff\xfe\x00case", "cannot be read as CSV"),
    ],
)
def test_a_bad_table_is_refused(tmp_path, content, message):
    table = tmp_path / "t.csv"
    if content is not None:
        table.write_bytes(content)
    with pytest.raises(InvalidProblem, match=message):
        draw_benchmark(table, tmp_path / "t.png")
    assert not (tmp_path / "t.png").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **keywords):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(Unsupported, match=r"figures need matplotlib; install it, for example as pip install"):
        _figure.save(tmp_path / "a.png", lambda figure: None)


def test_importing_the_module_imports_no_matplotlib():
    code = "import sys, vicinal.plots; assert not {'matplotlib', 'numpy'} & set(sys.modules) - before"
    subprocess.run([sys.executable, "-c", f"import sys, vicinal; before = set(sys.modules); {code}"], check=True)


@pytest.mark.parametrize("names", [["dense", "flex", "ours"], ["x", "hopper", "y"], list(_benchmark_chart.KNOWN)])
def test_everybody_looks_the_same_in_every_chart_and_like_nobody_else(names):
    found = _benchmark_chart.looks(names)
    assert len(set(found.values())) == len(names)
    alone = {name: _benchmark_chart.looks([name])[name] for name in names if name in _benchmark_chart.KNOWN}
    assert alone.items() <= found.items()
