"""`vicinal e2e` on tiny models: what it says is what it measured, and what the simulator and Amdahl make of it."""

from __future__ import annotations

import csv
import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from vicinal import InvalidProblem, Problem, Tiling, make_plan, simulate
from vicinal.bench import e2e
from vicinal.bench.e2e_result import EndToEnd, Pass, load, save
from vicinal.bench.parts import GRID, OTHER, PARTS, PRODUCTS, REST, Stopwatch
from vicinal.cli import app
from vicinal.hardware import Hardware
from vicinal.simulate import end_to_end

CPU = torch.device("cpu")


def vicinal(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_kernel_folder_is_written_by_a_command(tmp_path):
    result = vicinal("natten-kernel", tmp_path / "natten")
    assert result.exit_code == 0
    assert result.stdout.strip() == f"export LOCAL_KERNELS=shi-labs/natten={(tmp_path / 'natten').resolve()}"
    assert (tmp_path / "natten/build/torch-universal/__init__.py").is_file()
    spaced = vicinal("natten-kernel", tmp_path / "a b")
    assert shlex.split(spaced.stdout) == ["export", f"LOCAL_KERNELS=shi-labs/natten={(tmp_path / 'a b').resolve()}"]
    again = vicinal("natten-kernel", Path(__file__).parent)
    assert again.exit_code == 2 and "vicinal: DIR must be a new or empty folder" in again.stderr


def test_a_stopwatch_tells_attention_over_the_grid_from_the_rest():
    x = torch.randn(1, 2, 64, 16)
    short = torch.randn(1, 2, 5, 16)
    watch = Stopwatch(60, CPU)
    with torch.no_grad(), watch:
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
        torch.nn.functional.scaled_dot_product_attention(x, short, short)
        torch.nn.functional.scaled_dot_product_attention(short, x, x)
        torch.ops.vicinal.attention(*(x.transpose(1, 2),) * 3, *[None] * 4, [3], [1], [1], [False], 1.0, "", [], False)
        x.flatten(0, 2) @ x.flatten(0, 2).T
        x + 1
    assert {part: len(watch._marks.get(part, ())) for part in PARTS} == {GRID: 3, OTHER: 1, PRODUCTS: 1, REST: 0}
    assert sum(watch.parts.values()) == pytest.approx(watch.seconds)
    assert all(seconds > 0 for seconds in watch.parts.values())


def fake(**changes: Any) -> EndToEnd:
    dense = Pass("dense", 10.0, 0.02, {GRID: 6.0, OTHER: 1.0, PRODUCTS: 2.0, REST: 1.0}, 3 * 2**30)
    found = EndToEnd(
        model="flux",
        grid=(256, 256),
        text=512,
        window="kernel size 80x80",
        dtype="bfloat16",
        where={"date": "2026-01-01", "device": "a card", "driver": "1", "versions": "python 3"},
        layers=57,
        layers_in_all=57,
        dense=dense,
        sparse=replace(dense, name="windows", seconds=5.0, parts={**dense.parts, GRID: 1.0}),
        attention=6.0,
        dense_steps=9,
        steps=28,
    )
    return replace(found, **changes)


def test_speedups_are_ratios_and_amdahls_law():
    found = fake()
    assert found.speedup == 2.0
    assert found.predicted == end_to_end(0.6, 6.0) == 2.0
    assert found.of_a_run == pytest.approx(28 / (9 + 19 / 2))
    text = str(found)
    for words in ("speed-up of a step: 2.00x", "grid: 6.00x", "predicted:          2.00x", "28 steps, 9 of them dense"):
        assert words in text
    assert "nothing is said about quality" in text
    short = str(fake(layers=19))
    assert "57 layers (built 19; times are scaled up from them)" in short


def test_running_out_of_memory_is_a_result():
    found = fake(dense=Pass("flex", None, 0.0, {}, 0), attention=None)
    assert found.speedup is None and found.predicted is None and found.of_a_run is None
    assert "out of memory" in str(found)
    assert found.rows()[0]["seconds"] is None


def test_tables_grow_and_are_never_mixed(tmp_path):
    path = tmp_path / "table.csv"
    save(path, [fake()])
    save(path, [fake(model="wan-14b")])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["way"]) for row in rows] == [
        ("flux", "dense"),
        ("flux", "windows"),
        ("wan-14b", "dense"),
        ("wan-14b", "windows"),
    ]
    assert float(rows[1]["speedup"]) == 2.0 and not rows[0]["speedup"]
    assert load(path) == [fake(dense_steps=0, steps=1), fake(model="wan-14b", dense_steps=0, steps=1)]
    lost = fake(dense=Pass("flex", None, 0.0, {}, 0), attention=None, dense_steps=0, steps=1)
    save(tmp_path / "lost.csv", [lost])
    assert load(tmp_path / "lost.csv") == [lost]
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(InvalidProblem, match="holds other columns"):
        save(other, [fake()])
    assert other.read_text() == "a,b\n1,2\n"
    with pytest.raises(InvalidProblem, match="cannot be read as a table of whole models"):
        load(other)


def test_a_chart_is_drawn(tmp_path):
    from vicinal.bench.e2e_chart import draw

    path = draw([fake(), fake(dense=Pass("flex", None, 0.0, {}, 0), attention=None)], tmp_path / "chart.svg")
    text = path.read_text()
    assert all(part in text for part in PARTS)
    assert "2.00x" in text and "out of memory" in text


def test_the_committed_table_is_drawn_and_meets_the_prediction(tmp_path):
    table = Path(__file__).parents[2] / "benchmarks/results/nvidia-h100-80gb-hbm3/generative.csv"
    result = vicinal("plot", "steps", table, "--out", tmp_path / "steps.svg")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "steps.svg").read_text()
    for found in load(table):
        assert found.model in text
        if found.predicted is not None and found.speedup is not None:
            assert found.predicted == pytest.approx(found.speedup, rel=0.1)


needs_diffusers = pytest.mark.usefixtures("diffusers_or_skip")


@pytest.fixture
def diffusers_or_skip() -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")


@needs_diffusers
def test_the_command_measures_a_tiny_model_and_writes_what_it_says(tmp_path):
    words = ["e2e", "hunyuan-video", "--tiny", "--repeats", 1, "-k", "2x3x0.5", "--stride", "1x3x2", "--device", "cpu"]
    result = vicinal(*words, "--csv", tmp_path / "t.csv", "--out", tmp_path / "t.png", "--dense-steps", 1, "--steps", 4)
    assert result.exit_code == 0, result.output
    assert "hunyuan-video, 4x6x7 tokens + 7 of text, 4 layers, float32" in result.stdout
    assert "kernel size 2x3x0.5, stride 1x3x2" in result.stdout
    assert "4 steps, 1 of them dense" in result.stdout
    assert (tmp_path / "t.png").stat().st_size > 10_000
    with (tmp_path / "t.csv").open(newline="") as file:
        dense, windows = csv.DictReader(file)
    for row in (dense, windows):
        parts = [float(row[part.replace(" ", "_") + "_s"]) for part in PARTS]
        assert sum(parts) == pytest.approx(float(row["seconds"]), rel=1e-3)
        assert all(part > 0 for part in parts)
    assert float(windows["speedup"]) == pytest.approx(float(dense["seconds"]) / float(windows["seconds"]), rel=1e-3)


@needs_diffusers
def test_the_prediction_is_the_simulators():
    found = e2e.measure("wan-14b", tiny=True, repeats=1, window={"kernel_size": (2, 3, 5), "dense_layers": 1})
    problem = Problem.grid((4, 6, 7), (2, 3, 5), heads=2, head_dim=16, dtype="float32")
    from vicinal.backends import choose, present

    tiling = next(iter(choose(problem, present(CPU)).tilings(problem, present(CPU))))
    assert isinstance(tiling, Tiling)
    gain = simulate(make_plan(problem, tiling), Hardware.named("cpu")).speedup.mean_tile
    assert found.attention == pytest.approx(3 / (1 + 2 / gain))
    assert found.predicted == end_to_end(found.dense.parts[GRID] / found.dense.seconds, found.attention)


@needs_diffusers
@pytest.mark.parametrize("name", ["flux", "hunyuan-video-1.5", "cosmos-7b", "ltx2"])
def test_every_family_can_be_measured(name):
    found = e2e.measure(name, tiny=True, repeats=1)
    assert found.speedup is not None and found.predicted is not None
    assert found.sparse.parts[GRID] > 0


@needs_diffusers
def test_a_shorter_model_is_scaled_up_and_says_so():
    whole = e2e.measure("flux", tiny=True, repeats=1)
    short = e2e.measure("flux", tiny=True, repeats=1, layers=2)
    assert (whole.layers, whole.layers_in_all) == (4, 4)
    assert (short.layers, short.layers_in_all) == (2, 4)
    assert "built 2" in str(short)
    with pytest.raises(InvalidProblem, match=r"layers must lie in \[1, 4\]"):
        e2e.measure("flux", tiny=True, layers=5)


@needs_diffusers
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_decoder_is_compared_with_its_own_flex_attention():
    found = e2e.measure("ltx2-decoder", tiny=True, repeats=1)
    assert (found.dense.name, found.sparse.name, found.attention) == ("flex", "vicinal", None)
    assert found.speedup is not None and found.speedup > 0
    assert not found.dense.parts and found.sparse.parts[GRID] > 0
    assert "speed-up of a step" in str(found)


@needs_diffusers
def test_masks_of_truth_are_spared_and_others_are_not():
    from vicinal.integrations.diffusers.zoo import specimen

    found = specimen("hunyuan-video")
    model = found.build(tiny=True)
    arguments = found.arguments(model, tiny=True)
    seen = []
    layer = model.single_transformer_blocks[0].attn
    with torch.no_grad():
        layer.register_forward_pre_hook(lambda m, a, kw: seen.append(kw["attention_mask"] is None), with_kwargs=True)
        for _ in range(2):
            with e2e._unmasked(model, arguments):
                # The newest hook runs last: look once more from behind it.
                hook = layer.register_forward_pre_hook(
                    lambda m, a, kw: seen.append(kw["attention_mask"] is None), with_kwargs=True
                )
                model(**arguments)
                hook.remove()
            arguments["encoder_attention_mask"][:, -1] = 0
    assert seen == [False, True, False, False]


@needs_diffusers
@pytest.mark.parametrize(("words", "message"), [
    (["e2e", "stable"], "model must be one of flux, flux2, hunyuan-video, .* got 'stable'"),
    (["e2e", "flux", "--tiny", "-k", "a"], "kernel_size must be tokens or shares joined by x, such as .*, got 'a'"),
    (["e2e", "flux", "--tiny", "-s", "2"], "stride and dilation need --kernel-size"),
    (["e2e", "flux", "--tiny", "-k", "30"], "layer 0 .* axis 0 of 9x14: the window does not fit"),
    (["e2e", "flux", "--tiny", "--preset", "cosmos-7b"], "preset 'cosmos-7b' is made for another model"),
    (["e2e", "flux", "--tiny", "--repeats", "0"], "repeats must be at least 1, got 0"),
    (["e2e", "flux", "--tiny", "--steps", "0"], "steps be at least 1, got 0 of 0"),
    (["e2e", "flux", "--tiny", "--grid", "4"], "grid must hold 2 numbers of tokens, at least 1 each, got 4"),
    (["e2e", "flux", "--tiny", "--grid", "0x4"], "grid must hold 2 numbers of tokens, at least 1 each, got 0x4"),
    (["e2e", "ltx2-decoder", "--tiny", "--layers", "1"], "layers must be left out: ltx2-decoder is a decoder"),
    (["e2e", "flux", "--tiny", "--dense-steps", "2"], r"dense_steps must lie in \[0, steps\] .* got 2 of 1"),
    (["e2e", "flux", "--tiny", "--device", "gpu"], "device must be one that this machine has"),
])  # fmt: skip
def test_bad_words_are_one_line(words, message):
    import re

    result = vicinal(*words)
    assert result.exit_code == 2, result.output
    assert len(result.stderr.splitlines()) == 1
    assert re.search(message, result.stderr)


def test_json_is_the_rows():
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")
    found = json.loads(vicinal("e2e", "wan-14b", "--tiny", "--repeats", 1, "--json").stdout)
    assert [row["way"] for row in found] == ["dense", "windows"]
