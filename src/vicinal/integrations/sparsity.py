"""Which window a layer has at a step, on a grid: what a model is told to do, apart from any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vicinal._tuples import canonical, is_integer, times
from vicinal.errors import InvalidProblem
from vicinal.problem import WHOLE, make_axes

Length = int | float
"""Tokens, or as a float the share of an axis."""


class Setting(NamedTuple):
    """A window on a grid, in tokens: what one call of attention needs. Plain numbers, for compilers to guard."""

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]


@dataclass(frozen=True)
class Window:
    """A window that fits itself to a grid.

    Args:
        kernel_size: one value for all axes, or one per axis. An integer counts tokens, a float is the
            share of the axis, in `(0, 1]`; `-1` is the whole axis.
        stride, dilation: likewise, without `-1`.
        is_causal: per axis.
        base: the grid that integers are meant for; on another grid they grow and shrink with it, each
            axis for itself, and are held inside it. `-1` is an axis to which integers do not adapt.
            Without it they mean themselves on every grid.

    Raises:
        InvalidProblem: at once if a value can be right on no grid, and from `on` if it does not fit one.

    Source: `base` scales as NVIDIA's Cosmos-Predict2 does (cosmos_predict2/module/neighborhood_attn.py).

    Example:
        >>> Window((18, 24, 24), stride=(16, 8, 8)).on((30, 48, 80)).kernel_size
        (18, 24, 24)
        >>> Window((-1, 0.5, 0.25)).on((33, 45, 80)).kernel_size
        (33, 22, 20)
        >>> Window((-1, 12, 24), stride=(1, 4, 8), base=(-1, 44, 80)).on((16, 22, 40)).stride
        (1, 2, 4)
    """

    kernel_size: Length | Sequence[Length]
    stride: Length | Sequence[Length] = 1
    dilation: Length | Sequence[Length] = 1
    is_causal: bool | Sequence[bool] = False
    base: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("kernel_size", "stride", "dilation"):
            values = getattr(self, name)
            for value in values if isinstance(values, Sequence) else (values,):
                _check(name, value)
        known = self.base is None or (
            isinstance(self.base, Sequence)  # pyright: ignore[reportUnnecessaryIsInstance]
            and all(is_integer(length) and (length >= 1 or length == WHOLE) for length in self.base)
        )
        if not known:
            raise InvalidProblem(f"base must be tokens per axis of a grid, -1 where any will do, got {self.base!r}")

    def on(self, grid: tuple[int, ...]) -> Setting | None:
        """This window in tokens, or `None` if every query sees the whole grid anyway.

        Args:
            grid: tokens per axis.

        Raises:
            InvalidProblem: if it has another number of axes, or does not fit.
        """
        rank = len(grid)
        lengths = {name: _each(getattr(self, name), rank, name) for name in ("kernel_size", "stride", "dilation")}
        base = grid if self.base is None else canonical(tuple(self.base), rank, "base")
        if self.base is None and not any(isinstance(value, float) for each in lengths.values() for value in each):
            sizes, strides, dilations = (tuple(int(value) for value in each) for each in lengths.values())
        else:
            fitted = [_fitted(*column) for column in zip(grid, base, *lengths.values(), strict=True)]
            sizes, strides, dilations = (tuple(axis[i] for axis in fitted) for i in range(3))
        causal: tuple[bool, ...] = canonical(self.is_causal, rank, "is_causal", bool)
        axes = make_axes(grid, sizes, strides, dilations, causal)
        if all(axis.is_whole for axis in axes):
            return None
        return Setting(grid, tuple(axis.kernel_size for axis in axes), strides, dilations, causal)

    def __str__(self) -> str:
        parts = [f"window {_text(self.kernel_size)}"]
        parts += [f"{name} {_text(getattr(self, name))}" for name in ("stride", "dilation") if getattr(self, name) != 1]
        if self.base is not None:
            parts.append(f"made for {times('any' if n == WHOLE else n for n in self.base)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Sparsity:
    """Windows for the layers of a model, with layers and steps that stay dense.

    Args:
        windows: one for all layers, or one per layer; `None` is dense attention.
        dense_layers, dense_steps: how many stay dense at the beginning, and at the end.
        steps: of a whole run; needed if steps at the end are to be dense, or `None`.

    Example:
        >>> rule = Sparsity((Window(7),), dense_layers=(1, 0), dense_steps=(2, 0))
        >>> [rule.window(layer, layers=3, step=2) is None for layer in range(3)]
        [True, False, False]
    """

    windows: tuple[Window | None, ...]
    dense_layers: tuple[int, int] = (0, 0)
    dense_steps: tuple[int, int] = (0, 0)
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and (not is_integer(self.steps) or self.steps < 1):
            raise InvalidProblem(f"steps must be an integer of at least 1, got {self.steps!r}")
        if self.dense_steps[1] and self.steps is None:
            raise InvalidProblem(
                f"dense_steps={self.dense_steps} keeps the last {self.dense_steps[1]} steps dense; pass steps= as "
                "well, the number of denoising steps of a run"
            )
        if self.steps is not None and sum(self.dense_steps) > self.steps:
            raise InvalidProblem(f"dense_steps={self.dense_steps} are more than all {self.steps} steps of a run")

    def window(self, layer: int, layers: int, step: int) -> Window | None:
        """Of one layer out of `layers`, at a step, both counted from 0."""
        first, last = self.dense_layers
        early, late = self.dense_steps
        if layer < first or layer >= layers - last or step < early:
            return None
        if late and self.steps is not None and step >= self.steps - late:
            return None
        return self.windows[layer % len(self.windows)]


def first_and_last(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """`3` are the first three, `(3, 1)` also the last one.

    Example:
        >>> first_and_last(3, "dense_steps")
        (3, 0)
    """
    pair = tuple(value) if isinstance(value, Sequence) else (value, 0)
    if len(pair) != 2 or not all(is_integer(number) and number >= 0 for number in pair):
        raise InvalidProblem(f"{name} must be a number of first ones, or (first ones, last ones), got {value!r}")
    return pair[0], pair[1]


def _check(name: str, value: Length) -> None:
    if isinstance(value, float):
        if not 0 < value <= 1:
            raise InvalidProblem(f"{name} as a share of an axis must lie in (0, 1], got {value}")
    elif not is_integer(value):
        raise InvalidProblem(f"{name} must be tokens (integers) or shares of an axis (floats), got {value!r}")
    elif value < 1 and not (name == "kernel_size" and value == WHOLE):
        whole = ", or -1 for a whole axis" if name == "kernel_size" else ""
        raise InvalidProblem(f"{name} must be at least 1{whole}, got {value}")


def _each(values: Length | Sequence[Length], rank: int, name: str) -> tuple[Length, ...]:
    if not isinstance(values, Sequence):
        return (values,) * rank
    if len(values) != rank:
        raise InvalidProblem(f"{name} needs one value for each of the {rank} axes of the grid, got {tuple(values)}")
    return tuple(values)


def _fitted(length: int, base: int, size: Length, stride: Length, dilation: Length) -> tuple[int, int, int]:
    """Kernel size, stride and dilation on one axis in tokens, scaled to it and held inside it."""
    scale = length / (length if base == WHOLE else base)

    def tokens(value: Length, most: int) -> int:
        wanted = value * length if isinstance(value, float) else value * scale
        return min(max(round(wanted), 1), most)

    keys = length if size == WHOLE else tokens(size, length)
    return keys, tokens(stride, keys), tokens(dilation, length // keys)


def _text(values: Length | Sequence[Length]) -> str:
    return times(values) if isinstance(values, Sequence) else str(values)
