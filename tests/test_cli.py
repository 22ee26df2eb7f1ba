"""The command line: what it prints, what it writes, and how it says no."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from typer.testing import CliRunner, Result

from vicinal import cli
from vicinal.cli import demo, pictures
from vicinal.denoise import denoise
from vicinal.hardware import Hardware
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.simulate import simulate
from vicinal.tiling import Tiling


def vicinal(*words: object) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words])


def said(*words: object) -> str:
    result = vicinal(*words)
    assert result.exit_code == 0, result.output
    assert not result.stderr
    return result.stdout


def refused(*words: object) -> str:
    """The one line on stderr."""
    result = vicinal(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("vicinal: ")
    return lines[0]


PAPER = ["30x48x80", "--kernel-size", "18x24x24", "--stride", "16x8x8"]
TILES = ["--q-tile", "4x8x8", "--kv-tile", "2x8x8", "--kv-origin", "grid"]


def test_help_names_every_command():
    text = said("--help")
    for command in [
        "demo",
        "denoise",
        "explain",
        "plan",
        "simulate",
        "suggest",
        "check",
        "tune",
        "train",
        "bench",
        "plot",
        "e2e",
        "generate",
        "natten-kernel",
        "doctor",
    ]:
        assert f" {command} " in text
        assert "--help" in said(command, "-h")
    assert said() == text


def test_plan_prints_the_plan():
    problem = Problem.grid((30, 48, 80), (18, 24, 24), stride=(16, 8, 8))
    plan = make_plan(problem, Tiling((4, 8, 8), (2, 8, 8), kv_origin="grid"))
    assert said("plan", *PAPER, *TILES) == f"{plan}\n"
    found = json.loads(said("plan", *PAPER, *TILES, "--json"))
    assert found["visited"] == plan.visited
    assert found["tiling"] == {"q_tile": [4, 8, 8], "kv_tile": [2, 8, 8], "kv_origin": "grid"}
    assert found["problem"]["stride"] == [16, 8, 8]


def test_every_option_reaches_the_problem():
    words = "9x10x11 -k 3 -s 2,1,3 -d 1x2x1 --causal 0,2 --batch 2 --heads 6 --heads-kv 3 --head-dim 32 "
    words += "--head-dim-v 16 --dtype float32 --additional 5"
    found = json.loads(said("plan", *words.split(), "--json"))["problem"]
    wanted = Problem.grid(
        (9, 10, 11),
        3,
        stride=(2, 1, 3),
        dilation=(1, 2, 1),
        is_causal=(True, False, True),
        batch=2,
        heads=6,
        heads_kv=3,
        head_dim=32,
        head_dim_v=16,
        dtype="float32",
        additional=5,
    )
    for name in ("kernel_size", "stride", "dilation", "is_causal"):
        assert tuple(found[name]) == getattr(wanted, name)
    for name in ("batch", "heads", "heads_kv", "head_dim", "head_dim_v", "dtype", "scale", "additional"):
        assert found[name] == getattr(wanted, name)
    assert json.loads(said("plan", "9x10", "-k", "-1x3", "--causal", "all", "--json"))["problem"]["kernel_size"] == [
        9,
        3,
    ]


def test_simulate_prints_the_estimate():
    problem = Problem.grid((30, 48, 80), (18, 24, 24), stride=(16, 8, 8))
    plan = make_plan(problem, Tiling((4, 8, 8), (2, 8, 8), kv_origin="grid"))
    estimate = simulate(plan, Hardware.named("b200"), attention_share=0.6)
    words = ("simulate", *PAPER, *TILES, "--hardware", "b200", "--attention-share", 0.6)
    assert said(*words) == f"{estimate}\n"
    found = json.loads(said(*words, "--json"))
    assert found["speedup"]["worst_tile"] == pytest.approx(11.111, abs=1e-3)
    assert found["end_to_end"]["worst_tile"] == pytest.approx(estimate.end_to_end.worst_tile)  # type: ignore[union-attr]
    assert found["hardware"] == "b200"


def test_suggest_ranks():
    words = ("suggest", "24x32", "--sparsity", 0.75, "--count", 3)
    found = json.loads(said(*words, "--json"))
    assert len(found) == 3
    assert found[0]["sparsity"] == pytest.approx(0.75, abs=0.1)
    text = said(*words)
    assert "x".join(map(str, found[0]["problem"]["kernel_size"])) in text


def test_explain_answers_without_running():
    words = ("explain", "12x13", "-k", 5, "--dtype", "float32", "--hardware", "cpu")
    found = json.loads(said(*words, "--json"))
    assert found["chosen"] in {backend["name"] for backend in found["backends"] if backend["runs"]}
    assert "<- chosen" in said(*words)
    named = json.loads(said(*words, "--backend", "reference", "--json"))
    assert named["chosen"] == "reference"


def test_doctor_knows_the_versions():
    import torch

    found = json.loads(said("doctor", "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["backends"]["blocked"] == []
    assert torch.__version__ in said("doctor")
    assert said("--version").strip() == found["versions"]["vicinal"]


def test_check_says_which_laws_hold(monkeypatch: pytest.MonkeyPatch):
    from vicinal.testing import checks

    law = checks.LAWS[-1]
    monkeypatch.setattr(checks.check_backend, "__kwdefaults__", {**checks.check_backend.__kwdefaults__, "laws": (law,)})
    found = json.loads(said("check", "--backend", "blocked", "--json"))
    assert found[0]["backend"] == "blocked"
    assert found[0]["holds"]
    assert [entry["law"] for entry in found[0]["laws"]] == [law.name]
    assert "every law holds" in said("check", "--backend", "reference")


def test_check_tries_random_problems():
    assert said("check", "--backend", "reference", "--fuzz", 3) == (
        "reference on cpu: 3 random problems, 3 with gradients, 0 wrong\n"
    )
    (found,) = json.loads(said("check", "--backend", "blocked", "--fuzz", 2, "--seed", 50, "--json"))
    assert (found["ran"], found["holds"]) == (2, True)


def test_check_leaves_out_who_does_not_run_here(monkeypatch: pytest.MonkeyPatch):
    from dataclasses import replace

    from vicinal import backends

    class Elsewhere(backends.reference.Reference):
        def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
            odd = ("heads must be even",) if problem.heads % 2 else ()
            return (*odd, "needs another machine")

    elsewhere = replace(Elsewhere(), name="elsewhere")
    monkeypatch.setattr(backends, "ALL", (elsewhere, backends.reference.backend))
    text = said("check", "--fuzz", 1)
    assert text.splitlines()[0] == "elsewhere does not run here: needs another machine"
    assert text.splitlines()[1].startswith("reference on cpu: 1 random problems")
    assert [each["backend"] for each in json.loads(said("check", "--fuzz", 1, "--json"))] == ["reference"]
    assert "backend 'elsewhere' runs nothing on cpu: needs another" in refused("check", "--backend", "elsewhere")


def test_tune_knows_that_it_can_remember_before_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from vicinal import tuned, tuning
    from vicinal.backends import present

    monkeypatch.setattr(tuning, "tune", lambda *_, **__: pytest.fail("measured before refusing"))
    words = ("tune", "14x9", "-k", "5x3", "--dtype", "float32", "--device", "cpu")
    (tmp_path / "file").touch()
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "file"))
    assert "name another in VICINAL_CACHE" in refused(*words)
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "folder"))
    (tmp_path / "folder").mkdir()
    path = tuned.path_of(present(torch.device("cpu")).name)
    path.write_text("junk")
    assert "cannot be read as results of tuning" in refused(*words)
    assert path.read_text() == "junk"


def test_tune_measures_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vicinal import tuned

    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    tuned.forget()
    words = ("tune", "14x9", "-k", "5x3", "--dtype", "float32", "--device", "cpu", "--backend", "blocked")
    found = json.loads(said(*words, "--json"))
    assert Path(found["file"]).parent == tmp_path and Path(found["file"]).exists()
    assert [finding["what"] for finding in found["found"]] == ["forward"]
    text = said(*words)
    assert "blocked forward: " in text and "wrote " in text
    tuned.forget()


def test_check_fails_where_a_law_is_broken(monkeypatch: pytest.MonkeyPatch):
    from vicinal.testing import checks

    def never(trial: Any) -> None:
        """Nothing obeys this."""
        raise AssertionError("of course not")

    broken = checks.Law(never, (Problem.grid((5,), 3),))
    monkeypatch.setattr(
        checks.check_backend, "__kwdefaults__", {**checks.check_backend.__kwdefaults__, "laws": (broken,)}
    )
    result = vicinal("check", "--backend", "blocked")
    assert result.exit_code == 1
    assert "BROKEN" in result.stdout
    assert "of course not" in result.stdout


def test_bench_measures_and_saves(tmp_path: Path):
    words = ("bench", "--suite", "smoke", "--seconds", 0.01, "--backend", "blocked", "--backend", "dense")
    rows = json.loads(said(*words, "--threads", 1, "--save", tmp_path, "--json"))
    assert {row["backend"] for row in rows} == {"blocked", "dense"}
    assert all(row["milliseconds"] > 0 for row in rows)
    assert {"case", "pass", "device", "versions"} <= set(rows[0])
    (table,) = tmp_path.rglob("*.csv")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert "wrote" in said("plot", "benchmark", table, "--out", tmp_path / "times.svg")
    assert (tmp_path / "times.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize(
    "words",
    [
        "windows 13x17 -k 5x7 -s 2 --query 3x4",
        "windows 5x6x7 -k 3 --causal 0",
        "plan 24x33 -k 8x9 --q-tile 4x4 --kv-tile 4x8",
        "speedups 16x24 --q-tile 4x4 --kv-tile 4x4",
    ],
)
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_plot_writes_figures(tmp_path: Path, words: str, kind: str):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    path = tmp_path / f"figure.{kind}"
    assert said("plot", *words.split(), "--out", path) == f"wrote {path}\n"
    start = b"\x89PNG" if kind == "png" else b"<?xml"
    assert path.read_bytes().startswith(start)


def make_picture(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(1)
    clean = 60 + 120 * (np.indices(shape[:2]).sum(axis=0) // 6 % 2)
    noisy = clean.reshape(*clean.shape, *[1] * (len(shape) - 2)) + 15 * rng.standard_normal(shape)
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    Pillow.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("shape", [(21, 26), (21, 26, 3)])
def test_denoise_writes_what_the_function_gives(tmp_path: Path, shape: tuple[int, ...]):
    pixels = make_picture(tmp_path / "in.png", shape)
    words = ("--sigma", 0.06, "--strength", 0.1, "--patch-size", "3x5", "--patch-distance", 4, "--components", 6)
    text = said("denoise", tmp_path / "in.png", tmp_path / "out.png", *words)
    assert "noise 0.06 (given)" in text
    wanted = denoise(
        pixels,
        sigma=0.06,
        h=0.1,
        patch_size=(3, 5),
        patch_distance=4,
        components=6,
        channel_axis=-1 if len(shape) == 3 else None,
    )
    with Pillow.open(tmp_path / "out.png") as file:
        np.testing.assert_array_equal(np.asarray(file), np.rint(wanted * 255).clip(0, 255).astype(np.uint8))


def test_denoise_takes_stacks_and_estimates(tmp_path: Path):
    rng = np.random.default_rng(2)
    stack = np.clip(100 + 20 * rng.standard_normal((4, 15, 18)), 0, 255).astype(np.uint8)
    pages = [Pillow.fromarray(page) for page in stack]
    pages[0].save(tmp_path / "in.tif", save_all=True, append_images=pages[1:])
    found = json.loads(said("denoise", tmp_path / "in.tif", tmp_path / "out.npy", "--json"))
    assert found["sigma"] == pytest.approx(20 / 255, rel=0.15)
    clean = np.load(tmp_path / "out.npy")
    assert clean.shape == stack.shape
    assert clean.std() < 0.3 * stack.std()


def test_demo_compares_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    whole = demo._load("astronaut")
    monkeypatch.setattr(demo, "_load", lambda name: whole[50:130, 160:270])
    monkeypatch.setattr(demo, "PICTURES", {"astronaut": (10, 20)})
    monkeypatch.setattr(demo, "CROP", 50)
    monkeypatch.setattr(demo, "DENSE_CROP", 40)
    found = json.loads(said("demo", "--out", tmp_path / "demo.png", "--json"))
    theirs, whole_patches, ours, untold = found["rows"]
    assert ours["psnr"] >= theirs["psnr"]
    assert untold["psnr"] > found["noisy_psnr"] + 6
    assert whole_patches["strength"] is not None
    assert untold["strength"] is None
    assert found["dense_attention"]["crop_s"] > 0
    assert found["predicted"]["time_s"] > 0
    with Pillow.open(tmp_path / "demo.png") as picture, Pillow.open(tmp_path / "demo-plan.png") as plan:
        assert picture.width > 1000
        assert plan.width > 500
    text = said("demo", "--out", tmp_path / "demo.png")
    assert "scikit-image" in text
    assert "Extrapolated" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("explain 30x40 -k 50", "the window does not fit: kernel_size * dilation = 50 * 1 = 50 > axis length 30"),
        ("explain 30xforty -k 3", "grid must be integers joined by x, such as 30x48x80, got '30xforty'"),
        ("explain 30x40 -k 3 --backend nonsense", "backend must be one of"),
        ("explain 30x40 -k 3 --hardware abacus", "hardware must be one of"),
        ("explain 30x40 -k 3 --causal 2", "causal must name axes from 0 to 1, or be all, got '2'"),
        ("plan 30x40", "Missing option '--kernel-size'"),
        ("plan 30x40 -k 3x3x3", "kernel_size needs 2 values, one per spatial axis, got 3"),
        ("plan 30x40 -k 3 --q-tile 4", "q_tile came without kv_tile"),
        ("plan 30x40 -k 3 --q-tile 4 --kv-tile 4x4x4", "kv_tile needs 2 values"),
        ("simulate 30x40 -k 3 --attention-share 2", "attention_share must lie in [0, 1]"),
        ("simulate 30x40 -k 3 --dense-steps 3 --steps 9", "dense_steps and steps need attention_share"),
        ("plan 30x40 -k 3 --kv-origin grid", "kv_origin 'grid' needs q_tile and kv_tile"),
        ("plot windows 30x40 -k 3 --q-tile 4 --out a.png", "kind windows does not depend on q_tile; leave that out"),
        ("plot plan 30x40 -k 3 --query 3x4 --out a.png", "kind plan does not depend on query"),
        ("plot speedups 30x40 -k 3 -s 2 --out a.png", "kind speedups does not depend on kernel_size or stride"),
        ("plot benchmark in.png --causal all --out a.png", "kind benchmark does not depend on causal"),
        ("suggest 30x40", "give either sparsity"),
        ("check --backend nonsense", "backend must be one of"),
        ("check --fuzz 1 --seed 9223372036854775808", "seed must be below 2**63, got 9223372036854775808"),
        ("check --backend hopper", "backend 'hopper' runs nothing on cpu: needs sm_90"),
        ("check --fuzz -1", "fuzz and seed must be at least 0 and jobs 1, got -1, 0 and 1"),
        ("tune 30x40 -k 50", "the window does not fit"),
        ("tune 30x40 -k 3 --device nonsense", "device must be one that this machine has"),
        ("check --device nonsense", "device must be one that this machine has, such as cpu, got 'nonsense'"),
        ("bench --suite nonsense", "suite must be one of"),
        ("bench --seconds 0", "seconds must be above 0"),
        ("bench --seconds nan", "seconds must be above 0 and finite, threads at least 1, got nan and 2"),
        ("bench --save in.png", "save must be a folder, got the file 'in.png'"),
        ("check --device meta", "device must be one that this machine has, such as cpu, got 'meta'"),
        ("explain 30x40 -k 3 --head-dim 0", "head_dim must be at least 1, got 0"),
        ("suggest 30x99999999999999999999 --sparsity 0.9", "grid must hold at most 16,777,216 tokens per axis"),
        ("simulate 99999999999999999999 -k 3", "grid must hold at most 16,777,216 tokens per axis"),
        ("plot speedups 1 --out a.png", "a grid of a single tile leaves no window to try"),
        ("plot plan 30x40 -k 3 --out ..", "path must end in .png or .svg"),
        ("plot steps in.png --out a.png", "in.png cannot be read as a table of whole models"),
        ("plot steps empty.png --out a.png", "empty.png cannot be read as a table of whole models: it has no rows"),
        ("e2e flux --csv in.png", "in.png is no table; name another file"),
        ("e2e flux --csv no/a.csv", "the table must be a file in a folder that exists, got 'no/a.csv'"),
        ("e2e flux --out a.pdf", "path must end in .png or .svg, got a.pdf"),
        ("generate . --prompt x -k 3 --steps 0", "steps must be at least 1, got 0"),
        ("generate . --prompt x -k 3 --size 0x9", "size must be ROWSxCOLUMNS or FRAMESxROWSxCOLUMNS"),
        (
            "plot nonsense 3x4 --out a.png",
            "kind must be one of windows, plan, speedups, benchmark, steps, got 'nonsense'",
        ),
        ("plot plan 30x40 --out a.png", "needs --kernel-size"),
        ("plot plan 30x40 -k 3 --out a.txt", "must end in .png or .svg"),
        ("plot benchmark missing.csv --out a.png", "missing.csv cannot be read"),
        ("demo --picture nobody --out a.png", "picture must be one of astronaut"),
        ("demo --sigma 0", "sigma must be above 0"),
        ("demo --sigma 1e300", "sigma must be above 0 and at most 1e6"),
        ("demo --seed -1", "seed must not be negative, got -1"),
        ("demo --out a.txt", "out must end in .png"),
        ("denoise missing.png out.png", "input must exist, got 'missing.png'"),
        ("denoise in.png no/out.png", "output must lie in a folder that exists, got 'no/out.png'"),
        ("denoise in.png out.gif", "output must end in one of"),
        ("denoise empty.png out.png", "input must hold a picture, got the empty file 'empty.png'"),
        ("denoise in.png out.png --patch-size 4", "patch_size must be odd"),
        ("denoise in.png out.png --memory 0", "memory must be a finite number of GiB above 0, got 0.0"),
        ("denoise in.png out.png --memory nan", "memory must be a finite number of GiB above 0, got nan"),
        ("denoise in.png out.png --memory 1e-9", "memory_bytes must hold at least"),
        ("denoise in.png out.png --sigma 0", "strength must be given where sigma is 0"),
        ("denoise in.png out.png --strength 0", "strength must be a finite number above 0, got 0.0"),
        ("denoise in.png out.png --sigma 1e-30", "h must be at least a billionth of the image's range"),
        ("denoise in.png out.png --sigma many", "Invalid value for '--sigma'"),
        ("denoise in.png", "Missing argument 'OUT'"),
        ("nonsense", "No such command 'nonsense'"),
        ("--nonsense", "No such option: --nonsense"),
    ],
)
def test_refusals_are_one_line(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    make_picture(tmp_path / "in.png", (40, 12))
    (tmp_path / "empty.png").touch()
    assert message in refused(*words.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "in.png"], "nothing was written"


def test_a_table_of_whole_models_has_its_columns(tmp_path: Path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,4\n")
    assert "it has no column 'simulated_attention_speedup'" in refused(
        "plot", "steps", tmp_path / "a.csv", "-o", "a.png"
    )
    assert "holds other columns" in refused("e2e", "flux", "--csv", tmp_path / "a.csv")


def test_figures_are_no_folders(tmp_path: Path):
    (tmp_path / "a.png").mkdir()
    assert "path must be a file, got the folder" in refused("plot", "plan", "9x8", "-k", 3, "-o", tmp_path / "a.png")


def test_the_variable_that_names_no_backend_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("VICINAL_BACKEND", "fast")
    assert "VICINAL_BACKEND must be one of" in refused("explain", "9x8", "-k", 3)


def test_no_suggestion_is_said_to_pass_its_bound():
    """Where dense attention pads its tiles more than windows do, tiles alone would say 10.67x of 10.00x."""
    pairs = re.findall(r"([\d.]+)x +([\d.]+)x +[\d.]+ [mu]?s", said("suggest", "30x48x80", "--sparsity", 0.9))
    assert len(pairs) == 10
    assert all(float(reached) <= float(bound) for reached, bound in pairs)


def test_refusals_are_known_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vicinal import denoise as module

    np.save(tmp_path / "stack.npy", np.zeros((4, 9, 9), np.float32))
    monkeypatch.setattr(module, "denoise", lambda *_, **__: pytest.fail("computed before refusing"))
    assert "to hold a stack of 4" in refused("denoise", tmp_path / "stack.npy", tmp_path / "out.png")


def test_an_interrupt_is_not_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from vicinal import denoise as module

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    make_picture(tmp_path / "in.png", (20, 12))
    monkeypatch.setattr(module, "denoise", interrupted)
    result = vicinal("denoise", tmp_path / "in.png", tmp_path / "out.png")
    assert result.exit_code == cli.INTERRUPTED
    assert result.stderr == "vicinal: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["in.png"]


def test_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "progress", lambda *_: 1 / 0)
    result = vicinal("demo")
    assert isinstance(result.exception, ZeroDivisionError)


def test_the_module_runs_and_help_is_light():
    code = (
        "import sys, runpy\n"
        "sys.argv = ['vicinal', '--help']\n"
        "try: runpy.run_module('vicinal', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'triton', 'matplotlib', 'PIL', 'skimage', 'numpy.testing'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "simulate" in found.stdout
