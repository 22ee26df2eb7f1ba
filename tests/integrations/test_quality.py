"""The study of quality on digits: its measures against closed forms, and a run of a few steps."""

from __future__ import annotations

import importlib
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "quality.py"


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return importlib.import_module("quality")
    finally:
        sys.path.pop(0)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """Files laid out as MNIST's, with 40 and 70 random digits."""
    numbers = torch.Generator().manual_seed(3)
    for part, count in (("train", 70), ("t10k", 40)):
        images = torch.randint(256, (count, 28, 28), generator=numbers, dtype=torch.uint8)
        labels = torch.randint(10, (count,), generator=numbers, dtype=torch.uint8)
        head = struct.pack(">4i", 0x803, count, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(head + images.numpy().tobytes())
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, count) + labels.numpy().tobytes()
        )
    return tmp_path


def test_the_frechet_distance_is_that_of_gaussians(quality):
    """With covariances that commute it is the distance of the means and of the standard deviations along each axis."""
    numbers = torch.Generator().manual_seed(0)
    whitened = torch.randn(500, 4, generator=numbers, dtype=torch.float64)
    whitened = whitened - whitened.mean(0)
    whitened = whitened @ torch.linalg.inv(torch.linalg.cholesky(whitened.T.cov())).T
    one, two = torch.tensor([1.0, 2.0, 0.5, 3.0]).double(), torch.tensor([2.0, 2.0, 1.5, 0.5]).double()
    shift = torch.tensor([0.3, -1.0, 2.0, 0.0]).double()
    expected = shift.square().sum() + (one - two).square().sum()
    assert quality.frechet_distance(whitened * one, whitened * two + shift) == pytest.approx(expected.item())
    assert quality.frechet_distance(whitened, whitened) == pytest.approx(0, abs=1e-9)


def test_tokens_are_patches_and_come_back(quality):
    images = torch.randn(3, 1, quality.SIDE, quality.SIDE)
    tokens = quality.to_tokens(images)
    assert torch.equal(quality.to_images(tokens), images)
    row, column = 5, 11
    patch = images[:, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
    assert torch.equal(tokens[:, row * quality.GRID[1] + column], patch.flatten(1))


def test_digits_are_read_in_place_and_scaled(quality, mnist):
    images, labels = quality.read_digits(mnist, "train", torch.device("cpu"))
    raw = (mnist / "train-images-idx3-ubyte").read_bytes()[16:]
    assert images.shape == (70, 1, 32, 32)
    assert labels.shape == (70,)
    assert images[7, 0, 2 + 3, 2 + 20].item() == pytest.approx(raw[7 * 784 + 3 * 28 + 20] / 127.5 - 1)
    assert (images[:, :, :2] == -1).all()


def test_training_is_flow_matching_that_drawing_follows_back(quality):
    """Of one image only, what is drawn from noise comes near it; the average of weights is still on its way there."""
    effort = replace(quality.TINY, batch=4, digits=10, steps=8)
    image = torch.full((1, 1, quality.SIDE, quality.SIDE), -1.0)
    image[..., 8:24, 12:20] = 1.0
    torch.manual_seed(0)
    model = quality.new_model(effort, torch.device("cpu"))
    images, labels = image.expand(10, -1, -1, -1), torch.arange(10)
    average, steps = quality.train(model, images, labels, effort, 150, 1e9, 3e-3)
    assert steps == 150 and average is not model
    found, wanted = quality.drawn(model.eval(), quality.Case(16), effort, torch.device("cpu"))
    assert torch.equal(wanted, labels)
    assert (found - image).square().mean() < 0.2 * image.var()


def test_cases_are_on_the_model_as_they_say(quality):
    model = quality.new_model(quality.TINY, torch.device("cpu"))
    x, label = torch.randn(1, 256, 4), torch.zeros(1, dtype=torch.long)
    seen = []
    with torch.no_grad(), quality.Case(6, 2, dense_steps=1).on(model) as handle:
        for share in (1.0, 0.5):
            quality.velocity(model, x, label, torch.tensor([share]))
            seen.append({setting and (setting.kernel_size, setting.stride) for setting in handle.settings})
    assert seen == [{None}, {((6, 6), (2, 2))}]


def test_a_run_trains_swaps_tunes_and_judges(quality, mnist, tmp_path, monkeypatch):
    chosen = (quality.Case(16), quality.Case(4, 2, dense_steps=1), quality.Case(8, 8, is_tuned=True))
    monkeypatch.setattr(quality, "cases", lambda effort: chosen)
    own, trained_with = quality.train, []

    def train(model, *rest):
        trained_with.append(type(model.transformer_blocks[0].attn.processor).__module__.split(".")[0])
        return own(model, *rest)

    monkeypatch.setattr(quality, "train", train)
    quality.run(mnist, tmp_path / "out", 1e9, tiny=True)
    assert trained_with == ["diffusers", "vicinal"]
    rows, common = sys.modules["quality_rows"].read_rows(tmp_path / "out" / "quality.csv")
    assert [(row.kernel_size, row.stride, row.dense_steps, row.is_tuned) for row in rows] == [
        (16, 1, 0, False),
        (4, 2, 1, False),
        (8, 8, 0, True),
    ]
    assert all(0 <= row.accuracy <= 1 and row.frechet >= 0 for row in rows)
    assert [row.psnr == row.psnr for row in rows] == [False, True, True]  # dense attention is compared with nothing
    assert common["steps"] == "3"


def test_the_committed_figure_can_be_drawn_again(quality, tmp_path):
    tables = sorted((SCRIPT.parent / "results").glob("*/quality.csv"))
    assert tables
    quality.draw(tables[-1], tmp_path / "quality.png")
    assert (tmp_path / "quality.png").stat().st_size > 10_000
