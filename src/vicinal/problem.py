"""What is asked: a grid, a window on each of its axes, and the shapes that ride on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vicinal._tensors import FLOATS, check_additional, check_bias, check_shapes, check_tensor, dtype_of
from vicinal._tuples import canonical, ceil_div, is_integer, times
from vicinal.errors import InvalidProblem
from vicinal.window import viewers, window

WHOLE = -1
"""As a kernel size: the whole axis, however long it is."""

_SIZES = ("heads", "heads_kv", "head_dim", "head_dim_v")


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of the grid and the window on it.

    Args:
        length: tokens.
        kernel_size, stride, dilation, is_causal: as in `vicinal.window.window`.

    Raises:
        InvalidProblem: if a number is out of range, or the window does not fit.

    Example:
        >>> Axis(length=8, kernel_size=3).window(0)
        range(0, 3)
    """

    length: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1
    is_causal: bool = False

    def __post_init__(self) -> None:
        if self.length < 1:
            raise InvalidProblem(f"a spatial axis must hold at least one token, got length {self.length}")
        if self.kernel_size < 1:
            raise InvalidProblem(
                f"kernel_size must be at least 1, or {WHOLE} for the whole axis, got {self.kernel_size}"
            )
        if self.dilation < 1:
            raise InvalidProblem(f"dilation must be at least 1, got {self.dilation}")
        if not 1 <= self.stride <= self.kernel_size:
            raise InvalidProblem(
                f"stride must lie in [1, kernel_size] = [1, {self.kernel_size}], got {self.stride}; "
                f"queries that share a window must fit into it"
            )
        if self.kernel_size * self.dilation > self.length:
            raise InvalidProblem(
                f"the window does not fit: kernel_size * dilation = {self.kernel_size} * {self.dilation} "
                f"= {self.kernel_size * self.dilation} > axis length {self.length}; "
                f"use a smaller kernel_size or dilation, or {WHOLE} for the whole axis"
            )

    def window(self, query: int) -> range:
        """Keys that `query` attends to along this axis."""
        return window(
            query,
            self.length,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
        )

    def viewers(self, key: int) -> range:
        """Queries that attend to `key` along this axis."""
        return viewers(
            key,
            self.length,
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            is_causal=self.is_causal,
        )

    def subaxes(self) -> tuple[Axis, ...]:
        """The `dilation` independent, undilated axes that this one interleaves."""
        lengths = (ceil_div(self.length - group, self.dilation) for group in range(self.dilation))
        return tuple(Axis(length, self.kernel_size, self.stride, 1, self.is_causal) for length in lengths)

    @property
    def is_whole(self) -> bool:
        """Whether every query sees every key."""
        return self.kernel_size == self.length and not self.is_causal

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs inside windows."""
        if not self.is_causal:
            return self.length * self.kernel_size
        return sum(len(self.window(query)) for query in range(self.length))


@dataclass(frozen=True)
class Problem:
    """A neighborhood attention problem: all that can change the numbers, and nothing else.

        out[i] = sum_j softmax_j(scale * query[i] . key[j] + bias[j - i]) value[j],   j in the window of i

    where the window of `i` is the product of one window per axis, joined with all (valid)
    additional keys; the bias, if there is one, is a number for each head and offset. Make one with
    `Problem.of(tensors)` or `Problem.grid(shape)`.

    Args:
        axes: the grid, slowest axis first.
        batch, heads, heads_kv: counts; query head `h` reads key head `h // (heads // heads_kv)`.
        head_dim, head_dim_v: elements per head of query and key, and of value.
        dtype: one of float16, bfloat16, float32, float64.
        scale: multiplies the scores.
        additional: number of additional keys that every query sees.
        position_bias: whether a table of `bias_shape` is added to the scores.

    Raises:
        InvalidProblem: naming the field, what was expected and what came.
    """

    axes: tuple[Axis, ...]
    batch: int = 1
    heads: int = 1
    heads_kv: int = 1
    head_dim: int = 64
    head_dim_v: int = 64
    dtype: str = "bfloat16"
    scale: float = 0.125
    additional: int = 0
    position_bias: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 3:
            raise InvalidProblem(f"a grid has 1, 2 or 3 spatial axes, got {self.rank}")
        for name in ("batch", "additional", *_SIZES):
            if not is_integer(getattr(self, name)):
                raise InvalidProblem(f"{name} must be an integer, got {getattr(self, name)!r}")
        for name in ("batch", "additional"):
            if getattr(self, name) < 0:
                raise InvalidProblem(f"{name} must not be negative, got {getattr(self, name)}")
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise InvalidProblem(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.heads % self.heads_kv:
            raise InvalidProblem(
                f"query heads must be a multiple of key/value heads, got {self.heads} and {self.heads_kv}"
            )
        if self.dtype not in FLOATS:
            raise InvalidProblem(f"dtype must be one of {', '.join(FLOATS)}, got {self.dtype}")
        if not math.isfinite(_number("scale", self.scale)):
            raise InvalidProblem(f"scale must be a finite number, got {self.scale}")

    @classmethod
    def grid(cls, shape: tuple[int, ...], kernel_size: Any, **fields: Any) -> Problem:
        """A problem without tensors, for planning and predicting.

        Args:
            shape: tokens per axis, slowest first.
            kernel_size, stride, dilation, is_causal: one value, or one per axis.
            fields: the other fields of `Problem`. `scale` defaults to `head_dim ** -0.5`,
                `heads_kv` to `heads`, `head_dim_v` to `head_dim`.

        Raises:
            InvalidProblem: if the window does not fit the grid, or a value is out of range.

        Example:
            >>> Problem.grid((48, 40), kernel_size=24, stride=(8, 1)).pairs
            1105920
        """
        axes = make_axes(
            tuple(shape),
            kernel_size,
            fields.pop("stride", 1),
            fields.pop("dilation", 1),
            fields.pop("is_causal", False),
        )
        head_dim = fields.get("head_dim", 64)
        fields.setdefault("heads_kv", fields.get("heads", 1))
        fields.setdefault("head_dim_v", head_dim)
        if fields.get("scale") is None:
            fields["scale"] = _default_scale(head_dim)
        return cls(axes, **fields)

    @classmethod
    def of(
        cls,
        query: Any,
        key: Any,
        value: Any,
        kernel_size: Any,
        *,
        stride: Any = 1,
        dilation: Any = 1,
        is_causal: Any = False,
        scale: float | None = None,
        additional_keys: Any = None,
        additional_values: Any = None,
        additional_lengths: Any = None,
        position_bias: Any = None,
    ) -> Problem:
        """The problem that these tensors pose. Reads shapes, dtypes and devices, never values.

        Args:
            query: `[B, *S, H, D]`.
            key: `[B, *S, Hkv, D]`.
            value: `[B, *S, Hkv, Dv]`.
            kernel_size, stride, dilation, is_causal: one value, or one per axis; `-1` as a kernel
                size means the whole axis.
            scale: multiplies the scores; `None` means `D ** -0.5`.
            additional_keys, additional_values: `[B, M, Hkv, D]` and `[B, M, Hkv, Dv]`, or `None`.
            additional_lengths: integers `[B]`; how many of the `M` are valid in each batch row.
            position_bias: `[H, 2 * k - 1, ...]` with the kernel size `k` of each axis, or `None`.

        Raises:
            InvalidProblem: naming the argument, what was expected and what came.
        """
        named = {"query": query, "key": key, "value": value}
        if (additional_keys is None) != (additional_values is None):
            given, missing = ("keys", "values") if additional_values is None else ("values", "keys")
            raise InvalidProblem(f"additional_{given} came without additional_{missing}; pass both or neither")
        if additional_keys is not None:
            named |= {"additional_keys": additional_keys, "additional_values": additional_values}
        elif additional_lengths is not None:
            raise InvalidProblem("additional_lengths came without additional_keys and additional_values")
        for name, tensor in named.items():
            check_tensor(name, tensor, query)
        check_shapes(query, key, value)
        if additional_keys is not None:
            check_additional(query, key, value, additional_keys, additional_values, additional_lengths)
        batch, *shape, heads, head_dim = query.shape
        problem = cls(
            make_axes(tuple(shape), kernel_size, stride, dilation, is_causal),
            batch=batch,
            heads=heads,
            heads_kv=key.shape[-2],
            head_dim=head_dim,
            head_dim_v=value.shape[-1],
            dtype=dtype_of(query),
            scale=_default_scale(head_dim) if scale is None else _number("scale", scale),
            additional=0 if additional_keys is None else additional_keys.shape[1],
            position_bias=position_bias is not None,
        )
        if position_bias is not None:
            check_bias(query, position_bias, problem.bias_shape)
        return problem

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens per axis."""
        return tuple(axis.length for axis in self.axes)

    @property
    def tokens(self) -> int:
        return math.prod(self.shape)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        return tuple(axis.kernel_size for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        return tuple(axis.stride for axis in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        return tuple(axis.dilation for axis in self.axes)

    @property
    def is_causal(self) -> tuple[bool, ...]:
        return tuple(axis.is_causal for axis in self.axes)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of a table of position bias, `[H, 2 * k - 1, ...]`: one entry per head and offset of a key."""
        return (self.heads, *(2 * size - 1 for size in self.kernel_size))

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return FLOATS[self.dtype]

    @property
    def pairs(self) -> int:
        """(query, key) pairs inside windows, per batch row and head, additional keys not counted."""
        return math.prod(axis.pairs for axis in self.axes)

    def __str__(self) -> str:
        parts = [f"{times(self.shape)} grid, window {times(self.kernel_size)}"]
        if set(self.stride) != {1}:
            parts.append(f"stride {times(self.stride)}")
        if set(self.dilation) != {1}:
            parts.append(f"dilation {times(self.dilation)}")
        if any(self.is_causal):
            parts.append("causal on axis " + " and ".join(str(i) for i, c in enumerate(self.is_causal) if c))
        if self.additional:
            parts.append(f"{self.additional} additional keys")
        if self.position_bias:
            parts.append("position bias")
        return ", ".join(parts)


@lru_cache(maxsize=4096)
def _axes(
    shape: tuple[int, ...],
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    is_causal: tuple[bool, ...],
) -> tuple[Axis, ...]:
    axes: list[Axis] = []
    for i, length in enumerate(shape):
        longest = max(length // max(dilation[i], 1), 1)
        size = longest if kernel_size[i] == WHOLE else kernel_size[i]
        try:
            axes.append(Axis(length, size, stride[i], dilation[i], is_causal[i]))
        except InvalidProblem as error:
            raise InvalidProblem(f"axis {i} of {times(shape)}: {error}") from None
    return tuple(axes)


def make_axes(shape: tuple[int, ...], kernel_size: Any, stride: Any, dilation: Any, is_causal: Any) -> tuple[Axis, ...]:
    """Canonical axes from one value per argument, or one per axis. `-1` becomes the longest window that fits."""
    rank = len(shape)
    return _axes(
        canonical(shape, rank, "shape"),
        canonical(kernel_size, rank, "kernel_size"),
        canonical(stride, rank, "stride"),
        canonical(dilation, rank, "dilation"),
        canonical(is_causal, rank, "is_causal", bool),
    )


def recorded_axes(
    shape: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    is_causal: Sequence[int],
) -> tuple[Axis, ...]:
    """The same from lists as operators take them, with flags as integers: `torch.jit.trace` knows no lists of bools."""
    return make_axes(tuple(shape), list(kernel_size), list(stride), list(dilation), list(map(bool, is_causal)))


def _default_scale(head_dim: Any) -> float:
    """What `None` stands for; any number where heads are empty, or no integers, as `Problem` will say."""
    return head_dim**-0.5 if is_integer(head_dim) and head_dim > 0 else 1.0


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidProblem(f"{name} must be a finite number, got {value!r}") from None
