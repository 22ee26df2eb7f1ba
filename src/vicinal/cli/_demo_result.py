"""What the demo found, and how it says so."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vicinal._tuples import times
from vicinal.cli._console import say, table
from vicinal.simulate import Estimate

CROP = 160
"""Side of that crop."""

DENSE_CROP = 192
"""Side of the crop on which dense attention is timed: 192^4 pairs of pixels take as long as we may keep you."""

PATCH, REACH, COMPONENTS = 5, 8, 15


@dataclass(frozen=True)
class Row:
    """One way to denoise, at its best setting. `strength` counts in sigmas, `seconds` the whole picture."""

    method: str
    strength: float | None
    told_sigma: float | None
    psnr: float
    seconds: float


@dataclass
class Result:
    """What the demo found."""

    picture: str
    shape: tuple[int, ...]
    sigma: float
    estimated_sigma: float
    noisy_psnr: float
    rows: list[Row] = field(default_factory=list[Row])
    dense_crop_s: float = 0.0
    crop_s: float = 0.0
    estimate: Estimate | None = None
    files: tuple[Path, ...] = ()

    @property
    def dense_s(self) -> float:
        """Dense attention over the whole picture, from the time on the crop: it grows with the square of pixels."""
        return self.dense_crop_s * (math.prod(self.shape[:2]) / DENSE_CROP**2) ** 2

    def facts(self) -> dict[str, Any]:
        """All of it as JSON knows it."""
        assert self.estimate is not None
        return {
            "picture": self.picture,
            "shape": self.shape,
            "sigma": self.sigma,
            "estimated_sigma": self.estimated_sigma,
            "patch_size": PATCH,
            "patch_distance": REACH,
            "threads": 1,
            "noisy_psnr": self.noisy_psnr,
            "rows": [asdict(row) for row in self.rows],
            "dense_attention": {
                "crop": DENSE_CROP,
                "crop_s": self.dense_crop_s,
                "neighborhood_attention_crop_s": self.crop_s,
                "whole_s_extrapolated": self.dense_s,
            },
            "predicted": {
                "hardware": self.estimate.hardware.name,
                "time_s": self.estimate.time_s,
                "speedup": asdict(self.estimate.speedup),
            },
            "files": [str(file) for file in self.files],
        }

    def show(self) -> None:
        """Print it."""
        assert self.estimate is not None
        theirs, ours = self.rows[0], self.rows[-2]
        size = times(self.shape)
        rows = [("(noisy)", "", f"{self.noisy_psnr:.2f}", "", "")]
        rows += [
            (
                row.method,
                f"{row.strength:.2f} sigma" if row.strength is not None else "its own",
                f"{row.psnr:.2f}",
                f"{row.seconds:.2f}",
                f"{theirs.seconds / row.seconds:.1f}x",
            )
            for row in self.rows
        ]
        title = (
            f"{self.picture} ({size}) with noise of {self.sigma:g}, estimated {self.estimated_sigma:.3f}\n"
            f"patches {PATCH}x{PATCH}, search window {2 * REACH + 1}x{2 * REACH + 1}, all on one thread"
        )
        table(title, ("one pass each", "strength", "PSNR, dB", "s", "speed-up"), rows, numbers=(1, 2, 3, 4))
        say(
            f"Every strength but the last is the best of its method on a {CROP}x{CROP} crop. "
            f"scikit-image {'uses sigma, with which it is better' if theirs.told_sigma else 'is better without sigma'}"
            f" (it was tried with and without).\n"
            f"Ours against scikit-image: {ours.psnr - theirs.psnr:+.2f} dB, "
            f"{theirs.seconds / ours.seconds:.1f}x as fast."
        )
        say(
            f"\nDense attention (scaled_dot_product_attention, each pixel against all) on a {DENSE_CROP}x{DENSE_CROP} "
            f"crop: {self.dense_crop_s:.2f} s; neighborhood attention: {self.crop_s:.3f} s "
            f"({self.dense_crop_s / self.crop_s:.0f}x as fast). Measured.\n"
            f"Over the whole picture dense attention would take {self.dense_s:,.0f} s. "
            f"Extrapolated, by the square of the number of pixels."
        )
        say(f"\nWhat the simulator predicts for the whole picture on another device:\n{self.estimate}")
        say("\nwrote " + ", ".join(str(file) for file in self.files))
