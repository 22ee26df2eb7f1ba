"""Grey and white matter of a brain: nilearn's template, slabs of it held out, and two U-shaped networks of one size.

The template is symmetric from left to right, so that slabs are cut from back to front: the mirror image of what is
held out must not be learnt from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vicinal._tuples import times
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.images import read_image
from vicinal.models.unet import UNet, UShape

CLASSES = ("neither", "grey", "white")
SLAB = 24
"""Layers of a slab from back to front."""

HELD = 4
"""Every so many slabs one is held out, the third of each four."""

FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted"
"""nilearn's names of the files, with t1, gm or wm."""

DINAT = UShape(
    in_chans=1,
    out_chans=len(CLASSES),
    patch=(2, 2, 2),
    halved=(2, 2, 2),
    embed_dim=48,
    depths=(2, 2, 2),
    head_dim=16,
    mlp_ratio=2.0,
    kernel_size=(5, 5, 5),
    dilations=(1, 2),
)
"""Windows of 5x5x5 tokens of 2x2x2 voxels, every other one dilated."""

CONVOLUTIONS = replace(DINAT, embed_dim=21, mixer="convolutions")
"""As many parameters, within 3%."""

MODELS: dict[str, Callable[[], nn.Module]] = {
    "dinat": partial(UNet, DINAT),
    "convolutions": partial(UNet, CONVOLUTIONS),
}
"""Networks by name."""


@dataclass(frozen=True)
class Brain:
    """Telling voxels apart: cross-entropy on cubes of the slabs that are not held out.

    Args:
        scan: `[X, Y, Z]`, between 0 and 1.
        tissue: `[X, Y, Z]`, the number of the class in `CLASSES`.
        crop: voxels of a cube, per axis.
        examples: cubes of an epoch.
        noise: standard deviation of what is added, to what is held out too: without it two thresholds would do.
            In training, contrast changes by up to 10%.
    """

    scan: Tensor
    tissue: Tensor
    crop: tuple[int, int, int] = (48, 48, 48)
    examples: int = 64
    noise: float = 0.1

    def __post_init__(self) -> None:
        if self.scan.ndim != 3 or self.scan.shape != self.tissue.shape or not all(self.starts()):
            raise InvalidProblem(
                "scan and tissue must be volumes of one shape, and crop fit between the slabs held out, got "
                f"{times(self.scan.shape)}, {times(self.tissue.shape)} and {times(self.crop)}"
            )

    def __len__(self) -> int:
        return self.examples

    def facts(self) -> dict[str, Any]:
        return {
            "name": "brain",
            "examples": self.examples,
            "crop": times(self.crop),
            "noise": self.noise,
            "held_out": [list(slab) for slab in self.slabs(held=True)],
        }

    def slabs(self, *, held: bool) -> list[tuple[int, int]]:
        """Where slabs begin and end, those held out or the others; neighbors are joined."""
        found: list[tuple[int, int]] = []
        for start in range(0, self.scan.shape[1], SLAB):
            if (start // SLAB % HELD == 2) != held:
                continue
            stop = min(start + SLAB, self.scan.shape[1])
            found = [*found[:-1], (found[-1][0], stop)] if found and found[-1][1] == start else [*found, (start, stop)]
        return found

    def to(self, device: torch.device) -> Brain:
        return replace(self, scan=self.scan.to(device), tissue=self.tissue.to(device))

    def starts(self) -> list[list[int]]:
        """Where cubes may begin, per axis: they hold nothing of what is held out."""
        starts = [list(range(n - part + 1)) for n, part in zip(self.scan.shape, self.crop, strict=True)]
        starts[1] = [y for start, stop in self.slabs(held=False) for y in range(start, stop - self.crop[1] + 1)]
        return starts

    def loss(self, model: nn.Module, picked: Tensor, numbers: torch.Generator) -> Tensor:
        choices, boxes = self.starts(), list[tuple[slice, ...]]()
        for shares in torch.rand(len(picked), 3, generator=numbers).tolist():
            corner = [each[int(share * len(each))] for each, share in zip(choices, shares, strict=True)]
            boxes.append(tuple(slice(n, n + part) for n, part in zip(corner, self.crop, strict=True)))
        scan = torch.stack([self.scan[box] for box in boxes]).unsqueeze(1)
        tissue = torch.stack([self.tissue[box] for box in boxes])
        contrast = (0.9 + 0.2 * torch.rand(len(picked), 1, 1, 1, 1, generator=numbers)).to(scan)
        noisy = self.noisy(scan * contrast, int(torch.randint(2**31, (1,), generator=numbers)))
        return functional.cross_entropy(model(noisy).float(), tissue)

    def noisy(self, scan: Tensor, seed: int) -> Tensor:
        """With noise, the same for the same seed."""
        numbers = torch.Generator(scan.device).manual_seed(seed)
        return scan + self.noise * torch.randn(scan.shape, generator=numbers, device=scan.device)

    def seen(self, slab: tuple[int, int]) -> Tensor:
        """A slab with noise that is always the same."""
        return self.noisy(self.scan[:, slice(*slab)], slab[0])

    def predict(self, model: nn.Module, slab: tuple[int, int]) -> Tensor:
        """The class of each voxel of a slab, which is all that the model sees."""
        return model(self.seen(slab)[None, None]).argmax(1)[0]

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Dice of grey and white matter over all slabs held out: twice what both have over what each has."""
        both, each = torch.zeros(2, len(CLASSES), device=self.scan.device)
        for slab in self.slabs(held=True):
            found, truth = self.predict(model, slab), self.tissue[:, slice(*slab)]
            both += torch.bincount(truth[found == truth], minlength=len(CLASSES))
            each += sum(torch.bincount(volume.flatten(), minlength=len(CLASSES)) for volume in (found, truth))
        dice = (2 * both / each).tolist()
        return {f"dice_{name}": dice[i] for i, name in enumerate(CLASSES) if i}


def template(folder: str | Path | None = None, **more: Any) -> Brain:
    """The brain that the package nilearn ships: a T1 scan, 197x233x189 mm, and maps of grey and white matter.

    A voxel is of the tissue whose map says more than a half.

    Args:
        folder: where the three files lie, as .nii.gz (which needs nibabel) or .npy; nilearn's own by default.
        more: as for `Brain`.

    Raises:
        InvalidProblem: if a file is missing or damaged.
        Unsupported: if neither a folder nor nilearn is there, or nibabel is missing.
    """
    if folder is None:
        spec = find_spec("nilearn")
        if spec is None or spec.origin is None:
            raise Unsupported(
                "training on a brain needs data: pip install nilearn, which ships it, or pass --data FOLDER "
                f"with {FILE.format('t1')}.nii.gz and those of gm and wm"
            )
        folder = Path(spec.origin).parent / "datasets" / "data"
    scan, grey, white = (_volume(Path(folder), FILE.format(kind)) for kind in ("t1", "gm", "wm"))
    tissue = torch.where(grey > 127, 1, torch.where(white > 127, 2, 0))
    return Brain(scan / 255, tissue, **more)


def _volume(folder: Path, name: str) -> Tensor:
    paths = [folder / f"{name}{suffix}" for suffix in (".nii.gz", ".npy")]
    for path in paths:
        if path.is_file():
            return torch.from_numpy(read_image(path).pixels).float()
    raise InvalidProblem(f"data must be a folder with nilearn's files, got {folder}, which has no {paths[0].name}")


@torch.no_grad()
def picture(task: Brain, model: nn.Module, path: Path) -> None:
    """A slice through the first slab held out: the scan, what is there, what was found, and where they differ."""
    from vicinal._figure import save

    slab = max(task.slabs(held=True), key=lambda slab: int((task.tissue[:, slice(*slab)] > 0).sum()))
    middle = (slab[1] - slab[0]) // 2
    truth = task.tissue[:, slab[0] + middle].cpu()
    found = task.predict(model, slab)[:, middle].cpu()
    panels = {
        "scan": (task.seen(slab)[:, middle].cpu(), "gray"),
        "grey and white matter": (truth, "viridis"),
        "found": (found, "viridis"),
        "where they differ": (found != truth, "gray"),
    }

    def draw(figure: Any) -> None:
        figure.set_size_inches(11, 3.2)
        for (name, (values, colours)), axes in zip(panels.items(), figure.subplots(1, len(panels)), strict=True):
            axes.imshow(values.T.numpy(), origin="lower", cmap=colours, interpolation="nearest")
            axes.set(title=name, xticks=[], yticks=[])

    save(path, draw)


def threshold_dice(task: Brain) -> dict[str, float]:
    """What two thresholds on the scan reach, which are chosen on what is not held out: the least to be expected."""

    def counts(slabs: list[tuple[int, int]]) -> Tensor:
        """How many voxels of each class there are at each of 256 levels."""
        table = torch.zeros(256, len(CLASSES))
        for slab in slabs:
            levels = (task.seen(slab).cpu() * 255).round().clamp(0, 255).long()
            bins = levels * len(CLASSES) + task.tissue[:, slice(*slab)].cpu()
            table += torch.bincount(bins.flatten(), minlength=256 * len(CLASSES)).view(256, -1)
        return table

    def dice(table: Tensor, low: int, high: int) -> list[float]:
        found = table[low:high], table[high:]
        return [float(2 * rows[:, i].sum() / (rows.sum() + table[:, i].sum())) for i, rows in enumerate(found, start=1)]

    known = counts(task.slabs(held=False))
    cuts = [(low, high) for low in range(8, 248, 4) for high in range(low + 4, 252, 4)]
    best = max(cuts, key=lambda cut: sum(dice(known, *cut)))
    names = [f"dice_{name}" for name in CLASSES[1:]]
    return dict(zip(names, dice(counts(task.slabs(held=True)), *best), strict=True))
