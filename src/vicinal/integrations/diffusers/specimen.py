"""A model at its published size and at a tiny one, with random weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from vicinal.errors import InvalidProblem
from vicinal.integrations.diffusers.inputs import Make


@dataclass(frozen=True)
class Specimen:
    """One model, at its published size and at a tiny one.

    Args:
        name: on the command line.
        kind: name of its class in diffusers.
        config: what differs from the class's defaults at full size.
        tiny: configuration for tests on a CPU.
        inputs: `(config, grid, text tokens, make) -> arguments of forward`.
        grid, tiny_grid: tokens per axis, where it is used and for tests.
        text, tiny_text: text tokens.
        window, tiny_window: what `vicinal e2e` puts on it by default, arguments of `sparsify`.
        joint: whether text shares the attention of the grid: its position, or `None`.
    """

    name: str
    kind: str
    config: Mapping[str, Any]
    tiny: Mapping[str, Any]
    inputs: Callable[[Any, tuple[int, ...], int, Make], dict[str, Any]]
    grid: tuple[int, ...]
    tiny_grid: tuple[int, ...]
    text: int
    window: Mapping[str, Any]
    tiny_window: Mapping[str, Any]
    tiny_text: int = 7
    joint: str | None = None

    @property
    def is_decoder(self) -> bool:
        """Whether it decodes in one pass instead of denoising in steps."""
        return self.kind == "LTX2VideoDiffusionDecoderModel"

    def layers(self, *, tiny: bool = False) -> int:
        """Attention layers over the grid, of the whole model."""
        return sum(self._counts(tiny).values())

    def layers_of(self, model: nn.Module) -> int:
        """The same of a model that may have been built shorter."""
        config: Any = model.config
        return sum(_total(config[name]) for name in self._counts(tiny=False))

    def _counts(self, tiny: bool) -> dict[str, int]:
        """Layers by the name of the argument that sets their number, defaults included."""
        names = ("decoder_stage_depths",) if self.is_decoder else ("num_layers", "num_single_layers")
        defaults = inspect.signature(getattr(diffusers, self.kind).__init__).parameters
        given = self.tiny if tiny else self.config
        return {name: _total(given.get(name, defaults[name].default)) for name in names if name in defaults}

    def build(
        self,
        *,
        tiny: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        layers: int | None = None,
    ) -> nn.Module:
        """The model with random weights, drawn on the device itself, in `eval` mode.

        Args:
            tiny, device, dtype: which configuration, where, in what.
            layers: build about so many only, each kind of block in its proportion.
        """
        kind = getattr(diffusers, self.kind)
        config = dict(self.tiny if tiny else self.config)
        if layers is not None:
            counts = self._counts(tiny)
            if self.is_decoder:
                raise InvalidProblem(f"layers must be left out: {self.name} is a decoder, which is built whole")
            if not 1 <= layers <= sum(counts.values()):
                raise InvalidProblem(f"layers must lie in [1, {sum(counts.values())}], got {layers}")
            config |= {name: max(round(n * layers / sum(counts.values())), 1) for name, n in counts.items()}
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                model: nn.Module = kind(**config)
        finally:
            torch.set_default_dtype(before)
        return model.to(device).eval()  # what the model itself has put elsewhere follows

    def arguments(
        self,
        model: nn.Module,
        grid: tuple[int, ...] | None = None,
        *,
        batch: int = 1,
        tiny: bool = False,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Random arguments of the model's forward, for a grid of tokens."""
        like = next(model.parameters())
        numbers = torch.Generator(like.device).manual_seed(seed)

        def make(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, generator=numbers, device=like.device, dtype=like.dtype)

        grid = grid or (self.tiny_grid if tiny else self.grid)
        return self.inputs(model.config, grid, self.tiny_text if tiny else self.text, make)


def _total(count: int | Sequence[int]) -> int:
    return count if isinstance(count, int) else sum(count)
