"""Windows on a model, and their removal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from vicinal._tuples import canonical, times
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.integrations.diffusers.families import Family, family_of
from vicinal.integrations.diffusers.processors import SparseProcessor
from vicinal.integrations.sparsity import Setting, Window

Rule = Callable[[int, int], Window | None]
"""The window of a layer at a step, both counted from 0; `None` is dense attention."""


class Sparsified:
    """A model whose layers have windows. Made by `sparsify`; a context manager, or `remove()` it.

    Before each forward pass of the model it reads the grid off the call, asks the rule for every layer's
    window, and checks them all, so that what does not fit is refused before any layer runs.

    Steps are counted by the timestep: while it stays the same (guidance calls a model twice a step) it is
    the same step, where it falls the next one, and where it rises a new run has begun.

    Args:
        model: changed in place, until `remove()`.
        rule: the window of each layer at each step.
        grid: tokens per axis, for calls that do not say it themselves.

    Raises:
        InvalidProblem, Unsupported: as `sparsify`.

    Example:
        >>> from vicinal.integrations.diffusers.zoo import specimen
        >>> flux = specimen("flux")
        >>> model = flux.build(tiny=True)
        >>> handle = Sparsified(model, lambda layer, step: Window(5) if layer else None)
        >>> _ = model(**flux.arguments(model, grid=(9, 14), tiny=True))
        >>> [setting and setting.kernel_size for setting in handle.settings]
        [None, (5, 5), (5, 5), (5, 5)]
        >>> handle.remove()
        >>> print(handle)
        FluxTransformer2DModel, 4 layers with windows, 9x14 tokens at step 0, removed
    """

    def __init__(self, model: nn.Module, rule: Rule, grid: tuple[int, ...] | None = None) -> None:
        self.model = model
        self.step = -1
        """Of the latest forward pass, counted from 0; -1 before the first."""
        self.grid: tuple[int, ...] | None = None
        """Tokens per axis of the latest forward pass."""
        self._family = family_of(model)
        self._rule = rule
        self._given = None if grid is None else canonical(grid, len(grid), "grid")
        self._timestep: float | None = None
        self._layers = _checked(model, self._family)
        if self._given is not None:
            self._settings(self._given, step=0)
        # From here on nothing can fail.
        self._ours = [(attention, self._replace(attention, kind)) for _, attention, kind in self._layers]
        before: Any = torch.compiler.disable(self._before_forward)
        self._hook = model.register_forward_pre_hook(before, with_kwargs=True)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the self-attention layers that have windows, in the order in which they run."""
        return tuple(name for name, _, _ in self._layers)

    @property
    def settings(self) -> list[Setting | None]:
        """Window of each layer in the latest forward pass, in tokens; `None` where it is dense."""
        return [ours.setting for _, ours in self._ours]

    def reset(self) -> None:
        """Let the next forward pass be step 0, whatever its timestep."""
        self.step, self._timestep = -1, None

    def remove(self) -> None:
        """Give every layer its own processor back. A second call does nothing."""
        self._hook.remove()
        for attention, ours in self._ours:
            # Whoever has put another processor there since has the last word.
            if attention.processor is ours:
                attention.processor = ours.own
        self._ours = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __str__(self) -> str:
        where = "not called yet" if self.grid is None else f"{times(self.grid)} tokens at step {self.step}"
        state = "" if self._ours else ", removed"
        return f"{type(self.model).__name__}, {len(self._layers)} layers with windows, {where}{state}"

    def _replace(self, attention: Any, kind: type[SparseProcessor]) -> SparseProcessor:
        attention.processor = ours = kind(attention.processor)
        ours.handle = self
        return ours

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self.model:
            return  # a copy, which took the hook along; it is dense
        arguments = inspect.signature(type(model).forward).bind_partial(model, *args, **kwargs).arguments
        if getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None) is not None:
            raise Unsupported("context parallelism cuts the grid into pieces; windows need it whole")
        grid = self._family.read_grid(model, arguments, self._given)
        step, timestep = self._next_step(arguments.get("timestep"))
        settings = self._settings(grid, step)
        for (_, ours), setting in zip(self._ours, settings, strict=True):
            ours.setting = setting
        self.grid, self.step, self._timestep = grid, step, timestep

    def _next_step(self, timestep: Any) -> tuple[int, float | None]:
        if timestep is None:
            return self.step + 1, None
        # Tokens that condition may have a timestep of their own, 0; those that are denoised have the largest.
        now = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)
        if self._timestep is None or now > self._timestep:
            return 0, now
        return (self.step if now == self._timestep else self.step + 1), now

    def _settings(self, grid: tuple[int, ...], step: int) -> list[Setting | None]:
        settings: list[Setting | None] = []
        for index, name in enumerate(self.layers):
            window: Any = self._rule(index, step)
            if window is not None and not isinstance(window, Window):
                raise InvalidProblem(
                    f"rule must give a Window or None, got {window!r} for layer {index} at step {step}"
                )
            try:
                settings.append(None if window is None else window.on(grid))
            except InvalidProblem as error:
                raise InvalidProblem(f"layer {index} ({name}) at step {step}: {error}") from None
        return settings


def _checked(model: nn.Module, family: Family) -> list[tuple[str, Any, type[SparseProcessor]]]:
    """Every layer with the processor that will stand in for its own. Changes nothing."""
    layers: list[tuple[str, Any, type[SparseProcessor]]] = []
    for name, attention in family.layers(model):
        own = attention.processor
        if isinstance(own, SparseProcessor):
            raise InvalidProblem(
                f"model has windows already (at {name}); remove() those first, or desparsify(model) where their handle "
                "is lost"
            )
        kind = family.processors.get(type(own))
        if kind is None:
            known = " or ".join(processor.__name__ for processor in family.processors)
            raise Unsupported(
                f"{name} runs a {type(own).__name__}, whose attention would be lost; windows know {known}. "
                "Unload what put it there (an IP-Adapter, say) or restore the model's own processors"
            )
        layers.append((name, attention, kind))
    return layers


def remove_from(model: nn.Module) -> None:
    """Remove all windows that the model's layers have, whoever put them there."""
    for _, attention in family_of(model).layers(model):
        if isinstance(attention.processor, SparseProcessor):
            attention.processor.handle.remove()
