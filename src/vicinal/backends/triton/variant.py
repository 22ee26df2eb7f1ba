"""What is compiled: a variant of a kernel, and the shape of what it is told at run time.

Knows neither torch nor triton, so a plan can be priced and a variant named on any machine. The
kernels always see three axes; a grid of lower rank gets leading axes of one token.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from vicinal.problem import Axis

Box = tuple[int, int, int]

FACTS = 4
"""Numbers that the pass for queries leaves of each query to that for keys, see `backward.facts_of`."""


class AxisArgs(NamedTuple):
    """One axis, as a kernel is told of it at run time: all that `window` needs, and the tile count."""

    length: Any
    kernel_size: Any
    stride: Any
    dilation: Any
    is_causal: Any
    tiles: Any  # of rows, in one dilation group


class SlotArgs(NamedTuple):
    """Along one axis, the slots in which the gradient of a position bias is summed, see `backward_bias`."""

    first: Any  # how many members after a tile's first row the first slot begins
    count: Any


class StepArgs(NamedTuple):
    """How far apart things lie in one tensor, in vectors of 16 bytes: batch rows, neighbors on each axis, heads."""

    batch: Any
    t: Any
    h: Any
    w: Any
    head: Any


class Steps(NamedTuple):
    """A `StepArgs` for each tensor; neighbors on axis `w` of additional ones are the next of them."""

    query: Any
    key: Any
    value: Any
    out: Any
    more_key: Any
    more_value: Any
    grad_out: Any
    grad_query: Any
    grad_key: Any
    grad_value: Any


@dataclass(frozen=True)
class Variant:
    """All that a kernel has compiled in. Grid, window, stride and dilation are not among it.

    A block of a kernel owns a tile of *rows* and walks over boxes of *columns*: rows are queries and
    columns keys, but in the pass for the gradients of keys and values, where it is the other way round.

    Args:
        kernel: `"forward"`, `"queries"` (their gradient), `"keys"` (that of keys and values),
            `"additional"` (that of additional keys and values), `"bias"` (that of the position bias) or
            `"diagonals"` (its second half); the first three with `"_held"` are those of `held`, `"whole"` is that
            of `whole`.
        dtype: of the tensors.
        head_dim, head_dim_v: elements of a query or key, and of a value.
        rank: axes of the grid; those before them hold one token.
        rows, columns: tokens of a tile along each axis, powers of two.
        masked: whether some tile needs a mask.
        has_additional: whether there are additional keys.
        has_bias: whether there is a position bias.
        is_signed: whether the scale is zero or negative, which the forward pass must know, and where bias is added.
        precision: how float32 is multiplied, in Triton's words.
        is_wide: whether offsets inside a box need 64 bits.
        is_inside: whether no box ends beyond the grid.
        lifts: whether a block holds its own queries (keys) in registers, see `tile.lifted`.
        held: boxes of a tile along each axis, all of whose bias a block holds.
        sums: whether a block of the pass for queries sums what the gradient of the position bias is made of; one of
            `"whole"` always does.
        registers: of a thread at most, on NVIDIA's; 0 leaves them to the assembler.
        warps, stages: warps of a block, and boxes in flight.
    """

    kernel: str
    dtype: str
    head_dim: int
    head_dim_v: int
    rank: int
    rows: Box
    columns: Box
    masked: bool = True
    has_additional: bool = False
    has_bias: bool = False
    is_signed: bool = False
    precision: str = "ieee"
    is_wide: bool = False
    is_inside: bool = False
    lifts: bool = False
    warps: int = 4
    stages: int = 2
    held: Box = (0, 0, 0)
    sums: bool = False
    registers: int = 0

    @property
    def row_count(self) -> int:
        return prod(self.rows)

    @property
    def column_count(self) -> int:
        return prod(self.columns)

    @property
    def is_packed(self) -> bool:
        """Whether a block holds what it adds to scores in 16 bits: in the forward pass registers are enough for 32."""
        return prod(self.held) > 2 and self.kernel != "forward_held"

    @property
    def is_halved(self) -> bool:
        """Whether scores are the sum of two products, of half the elements each."""
        return self.dtype == "float32" and self.depth > 128

    @property
    def depth_at_once(self) -> int:
        """Columns of a query or key that one product takes."""
        return self.depth // 2 if self.is_halved else self.depth

    @property
    def dim_at_once(self) -> int:
        """Of these, those that are elements."""
        return min(self.head_dim, self.depth_at_once)

    @property
    def adds_late(self) -> bool:
        """Whether a position bias is added to scaled scores, rather than being what a product begins with."""
        return self.dtype == "float32"

    @property
    def are_keys(self) -> bool:
        """Whether rows are keys."""
        return self.kernel.startswith("keys")

    @property
    def unit(self) -> int:
        """Elements in 16 bytes."""
        return 4 if self.dtype == "float32" else 8

    @property
    def depth(self) -> int:
        """Columns of a query or key as the kernel holds it."""
        return padded(self.head_dim)

    @property
    def depth_v(self) -> int:
        """Columns of a value."""
        return padded(self.head_dim_v)


def padded(head_dim: int) -> int:
    """The power of two that holds a head: blocks have no other sizes, and a matrix instruction takes 16.

    Example:
        >>> padded(8), padded(40), padded(128)
        (16, 64, 128)
    """
    return max(1 << (head_dim - 1).bit_length(), 16)


def three(values: tuple[int, ...]) -> Box:
    """`(5,) -> (1, 1, 5)`: leading axes of one token."""
    a, b, c = (1,) * (3 - len(values)) + values
    return a, b, c


def three_axes(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return (Axis(1, 1),) * (3 - len(axes)) + axes
