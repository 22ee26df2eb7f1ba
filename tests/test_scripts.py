"""Examples and benchmark scripts say in a line what their arguments should have been."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        *(
            (f"examples/{name}.py no-folder", "FOLDER must hold a pipeline's weights and its model_index.json, got")
            for name in ("flux", "wan", "cosmos_predict2", "hunyuan_video", "ltx_video")
        ),
        ("examples/ltx2_decoder.py no-folder", "FOLDER must hold the decoder's weights and its config.json, got"),
        ("benchmarks/training.py", "the following arguments are required: folder, figure"),
        ("benchmarks/training.py no-folder a.png", "there is no folder 'no-folder'"),
        ("benchmarks/vision_rows.py no.csv a.png", "there is no table 'no.csv'"),
        ("benchmarks/end_to_end.py", "the following arguments are required: table"),
        ("benchmarks/end_to_end.py a.csv 60 99", "cases must be numbers from 0 to 10, got [99]"),
        (
            "benchmarks/vision.py a.csv tiny:dinat",
            "cases are such as large-512-inference:dinat,swin, of sizes tiny-224|",
        ),
        ("benchmarks/vision.py a.csv tiny-224-training:dinat --modes fast", "modes must be of eager, graph, "),
        ("benchmarks/tuned_table.py a.json --suite fast --device cpu", "suite must be one of smoke, cpu,"),
        ("benchmarks/tuned_table.py a.json --suite cpu --only w3 --device cpu", "none of the cases has a name"),
        ("benchmarks/rates.py fit no.csv", "there is no table 'no.csv'"),
        ("benchmarks/same_curve.py a.csv --data no.npy --device cpu", "no.npy"),
        ("benchmarks/quality.py run no-folder out", "'no-folder' does not exist"),
        ("benchmarks/quality.py draw no.csv a.png", "'no.csv' does not exist"),
    ],
)
def test_bad_arguments_are_a_line(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")
    script, *arguments = words.split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    # An exit with words prints them once the program ends.
    said = done.value.code if isinstance(done.value.code, str) else capsys.readouterr().err
    assert done.value.code not in (0, None)
    assert message in " ".join(said.split())
    assert not list(tmp_path.iterdir()), "nothing was written"
