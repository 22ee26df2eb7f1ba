"""The public surface fits on one screen, its examples run, and its version is one."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import vicinal

ROOT = Path(__file__).parents[1]

# Examples there need what a plain installation lacks, or a device.
WITHOUT_EXAMPLES = ("vicinal.backends.hopper", "vicinal.__main__")

MODULES = [
    name for _, name, _ in pkgutil.walk_packages(vicinal.__path__, "vicinal.") if not name.startswith(WITHOUT_EXAMPLES)
]


def test_surface():
    assert set(vicinal.__all__) == {
        "Hardware",
        "InvalidProblem",
        "Plan",
        "Problem",
        "Tiling",
        "Unsupported",
        "attention_with_lse",
        "explain",
        "make_plan",
        "merge_attentions",
        "na1d",
        "na2d",
        "na3d",
        "neighborhood_aggregate",
        "neighborhood_attention",
        "neighborhood_attention_packed",
        "neighborhood_scores",
        "simulate",
        "suggest",
    }
    assert all(hasattr(vicinal, name) for name in vicinal.__all__)


@pytest.mark.parametrize("name", ["vicinal", *MODULES])
def test_examples_run(name, tmp_path, monkeypatch):
    if name.startswith("vicinal.integrations.diffusers"):
        pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")
    if name == "vicinal.train.loop":
        pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -r requirements-models.txt")
    monkeypatch.chdir(tmp_path)  # some examples write pictures
    failed, _ = doctest.testmod(importlib.import_module(name), extraglobs={"torch": torch})
    assert failed == 0


def test_version_is_that_of_the_package():
    from importlib.metadata import version

    assert version("vicinal") == vicinal.__version__
    assert f"## {vicinal.__version__}" in (ROOT / "CHANGELOG.md").read_text()
