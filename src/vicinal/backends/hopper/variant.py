"""What is compiled: a variant of the kernels, and the shape of what they are told at run time.

Knows neither torch nor triton, so a plan can be priced and a variant named on any machine. The
kernels always see three axes; a grid of lower rank gets leading axes of one token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

from vicinal.errors import Unsupported
from vicinal.plan import Plan
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

ROWS = 64
"""Queries of one warpgroup: the rows of a Hopper matrix instruction."""

SMEM_BYTES = 227 * 1024
"""Shared memory that a block can use."""


class AxisArgs(NamedTuple):
    """One axis, as a kernel is told of it at run time: all that `window` needs, and the tile count."""

    length: Any
    kernel_size: Any
    stride: Any
    dilation: Any
    is_causal: Any
    tiles: Any  # query tiles of one dilation group


class StepArgs(NamedTuple):
    """How far apart things lie in one tensor, in elements: heads, and neighbors on each axis."""

    head: Any
    t: Any
    h: Any
    w: Any


@dataclass(frozen=True)
class Variant:
    """All that a kernel has compiled in. Grid, window, stride and dilation are not among it.

    Args:
        dtype: `"float16"` or `"bfloat16"`.
        head_dim: 32, 64, 128 or 256.
        rank: axes of the grid; those before them hold one token.
        box: queries of one warpgroup along each axis, 64 in all.
        stack: the axis along which the boxes of several warpgroups lie side by side.
        consumers: warpgroups that compute; 1 means no warp specialisation.
        kv_box: keys of one tile along each axis.
        stages: KV tiles in flight.
        mask: `"none"`, `"coded"` (on the tensor core) or `"select"` (on tiles that need one).
        is_causal: whether some axis is causal, so that rows have windows of different lengths.
        has_additional: whether there are additional keys.
        kernel: `"forward"`, or whose gradients it computes: `"queries"`, `"keys"` (and values) or `"additional"`
            keys. For the last two, queries and keys have changed places in all that is said here.
        skips: whether each of two warpgroups passes by boxes that only the other one's rows see.
        abreast: heads that lie side by side in a box, for which one load serves.
    """

    dtype: str
    head_dim: int
    rank: int
    box: tuple[int, int, int]
    stack: int
    consumers: int
    kv_box: tuple[int, int, int]
    stages: int
    mask: str
    is_causal: bool = False
    has_additional: bool = False
    kernel: str = "forward"
    skips: bool = False
    abreast: int = 1

    @property
    def columns(self) -> int:
        """Elements of one token in a box."""
        return self.head_dim * self.abreast

    @property
    def is_inverse(self) -> bool:
        """Whether tiles of keys walk the queries that see them."""
        return self.kernel in ("keys", "additional")

    @property
    def is_uneven(self) -> bool:
        """Whether rows may see different numbers of columns."""
        return self.is_causal or self.is_inverse

    @property
    def keys(self) -> int:
        """Slots for the keys of one tile: what a matrix instruction takes."""
        return slots(prod(self.kv_box))

    @property
    def empty(self) -> int:
        """Slots that a KV box leaves empty. They are always hidden."""
        return self.keys - prod(self.kv_box)

    @property
    def q_tile(self) -> tuple[int, ...]:
        """Queries of one block along each axis."""
        return tuple(n * self.consumers if i == self.stack else n for i, n in enumerate(self.box))

    @property
    def overlaps(self) -> bool:
        """Whether a warpgroup computes scores of one tile while it exponentiates those of another.

        That needs registers for two tiles: three warpgroups have too few, and do not need it,
        because they overlap each other. Two have too few if heads of 256 meet a mask that keeps much.
        """
        keeps_much = self.is_causal or self.has_additional or self.code_is_reduced
        return self.consumers == 2 and not (self.head_dim == 256 and self.mask == "coded" and keeps_much)

    @property
    def takes_two(self) -> bool:
        """Whether two heads may lie side by side in a box, and be computed in turn.

        Additional keys take registers that two of three blocks would have to do without.
        """
        is_small = self.consumers == 1 and self.keys == 64 and self.kernel == "forward"
        return is_small and self.head_dim == 32 and not self.has_additional

    @property
    def shares_heads(self) -> bool:
        """Whether one block may take several heads in turn.

        With heads of 256 it has no registers for the loop; and outputs on their way would lie in empty slots.
        """
        return self.consumers == 1 and self.head_dim < 256 and self.empty == 0 and self.abreast == 1

    @property
    def is_late(self) -> bool:
        """Whether gradients of a box's scores are multiplied while those of the next box are computed.

        Then a warpgroup has a product under way at all times. That takes registers, which a mask of the pass for keys
        leaves too few of.
        """
        has_registers = (self.kernel == "keys" and self.mask == "none") or (
            self.kernel == "queries" and self.keys == 64
        )
        return has_registers and self.head_dim == 128 and self.consumers == 2

    @property
    def registers(self) -> int:
        """Registers per thread of a computing warpgroup; the producer's come on top."""
        return {1: 0, 2: 232 if self.head_dim == 256 else 240, 3: 160}[self.consumers]

    @property
    def producer_registers(self) -> int:
        """Registers per thread of the warp that loads; with heads of 256, in four parts, 24 are too few."""
        return 40 if self.head_dim == 256 else 24

    @property
    def register_caps(self) -> tuple[int, ...]:
        """Caps per thread worth trying, so that more blocks share a multiprocessor; 0 for none.

        Measured: with small tiles, five blocks at 96 registers beat four at 128, and with heads of 32 six at 80 beat
        five at 96 by 3%.
        """
        if self.kernel != "forward":
            if self.consumers > 1:
                return (0,)
            # Of 80, one that computes gets 136 and three blocks fit; of 128, 232 and two. The loading warp has few.
            is_small = self.head_dim < 128 and (self.kernel == "queries" or self.head_dim * self.keys < 64 * 64)
            return (80, 128) if is_small else (128,)
        if self.consumers > 1 or self.head_dim > 64 or self.keys > 64:
            return (0,)
        if self.abreast == 2:
            return (96, 0)  # left to itself, the assembler needs 96 to 104 where a cap of 128 makes it spill
        return (80, 96, 128, 0) if self.head_dim == 32 else (96, 128, 0)

    @property
    def spare_stack(self) -> int:
        """Bytes per thread that a kernel may spill so that one more block fits."""
        return 0 if self.kernel == "forward" else 32

    @property
    def code_width(self) -> int:
        """Columns of the mask's code; a matrix instruction takes 16."""
        return code_width(self.kv_box[-self.rank :])[0]

    @property
    def code_is_reduced(self) -> bool:
        """Whether the last place of each axis shares one column, see `mask.Code`."""
        return code_width(self.kv_box[-self.rank :])[1]

    @property
    def cache_key(self) -> str:
        """Names the compiled kernel on disk: the fields, and what this release makes of them."""
        names = [name for name, value in vars(Variant).items() if isinstance(value, property) and name != "cache_key"]
        return repr(self) + repr([(name, getattr(self, name)) for name in names])


class Sums(NamedTuple):
    """What the kernel that prepares the backward has compiled in."""

    dtype: str
    head_dim: int
    rows: int


def code_width(kv_box: tuple[int, ...]) -> tuple[int, bool]:
    """Columns that code a key's place in a box, in whole matrix instructions, and whether they are the reduced ones.

    The plain code has one column per place of each axis, and one more if they are odd. If a box leaves slots
    empty, a column that marks no place hides them. Its columns are dependent (those of an
    axis sum to one), so two fewer suffice, one of them constant; that costs more arithmetic and is
    used only where it saves an instruction.

    Example:
        >>> code_width((2, 4, 8)), code_width((2, 8, 8)), code_width((2, 4, 16))
        ((16, False), (16, True), (32, False))
    """
    plain = sum(n + n % 2 for n in kv_box)
    reduced = sum(n - 1 for n in kv_box) + 1
    if prod(kv_box) < slots(prod(kv_box)):
        return (16 if plain + 2 * all(n % 2 == 0 for n in kv_box) <= 16 else 64), False
    if plain > 16 >= reduced or plain > 32 >= reduced:
        return (16 if reduced <= 16 else 32), True
    return (16 if plain <= 16 else 32 if plain <= 32 else 64), False


def three(values: tuple[int, ...]) -> tuple[int, int, int]:
    """`(5,) -> (1, 1, 5)`: leading axes of one token."""
    a, b, c = (1,) * (3 - len(values)) + values
    return a, b, c


def three_axes(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
    return (Axis(1, 1),) * (3 - len(axes)) + axes


def slots(keys: int) -> int:
    """Rows of shared memory for that many keys: the next power of two."""
    return 1 << (keys - 1).bit_length()


def is_odd_box(kv_box: tuple[int, ...]) -> bool:
    """Whether the small kernel takes this KV box though some side is no power of two: it must nearly fill 64 slots.

    Example:
        >>> is_odd_box((3, 3, 7)), is_odd_box((3, 5, 4)), is_odd_box((3, 3, 5)), is_odd_box((4, 4, 4))
        (True, True, False, False)
    """
    return 56 <= prod(kv_box) < 64 and code_width(kv_box)[0] == 16


def why_not_tiling(tiling: Tiling, head_dim: int) -> tuple[str, ...]:
    """Every reason why the kernels cannot be cut that way."""
    rows, keys = prod(tiling.q_tile), slots(prod(tiling.kv_tile))
    powers = all(n & (n - 1) == 0 for n in tiling.kv_tile)
    odd = rows == ROWS and is_odd_box(tiling.kv_tile)
    fits = split(tiling.q_tile) is not None
    facts = (
        (tiling.kv_origin == "free", 'kv_origin must be "free"'),
        (rows in (64, 128, 192), f"a query tile must hold 64, 128 or 192 queries, got {rows}"),
        (fits, f"a query tile must be made of boxes of 64 with sides that are powers of two, got {tiling.q_tile}"),
        (powers or odd, f"the sides of a KV tile must be powers of two, but for some, got {tiling.kv_tile}"),
        (keys in (64, 128), f"a KV tile must hold 64 or 128 keys, got {keys}"),
        (head_dim < 256 or keys * 2 + rows <= 256, f"tiles too large for heads of {head_dim}: {rows} x {keys}"),
    )
    return tuple(reason for holds, reason in facts if not holds)


def split(q_tile: tuple[int, ...], stacks: Iterable[int] = range(3)) -> tuple[tuple[int, int, int], int, int] | None:
    """`q_tile` as a box of 64 queries, the axis that boxes are stacked on (the first fitting one), and their number."""
    tile = three(q_tile)
    consumers = prod(tile) // ROWS
    if consumers * ROWS != prod(tile):
        return None
    for stack in stacks:
        box = tuple(n // consumers if i == stack else n for i, n in enumerate(tile))
        if tile[stack] % consumers == 0 and all(n & (n - 1) == 0 for n in box):
            return three(box), stack, consumers
    return None


def variant_of(plan: Plan) -> Variant:
    """The variant that runs `plan`.

    Raises:
        Unsupported: if its tiling is not one that the kernels can be cut into.
    """
    problem, tiling = plan.problem, plan.tiling
    reasons = why_not_tiling(tiling, problem.head_dim)
    if reasons:
        raise Unsupported(f"hopper cannot use this tiling ({tiling}): {'; '.join(reasons)}")
    hides = plan.masked > 0 or is_odd_box(tiling.kv_tile)
    return variant_for(problem, tiling.q_tile, tiling.kv_tile, mask_for(tiling.kv_tile) if hides else "none")


def mask_for(kv_box: tuple[int, ...]) -> str:
    """How boxes of columns are masked where some must be."""
    return "coded" if code_width(kv_box)[0] <= 32 else "select"


def variant_for(
    problem: Problem, row_tile: tuple[int, ...], box: tuple[int, ...], mask: str, kernel: str = "forward",
    *, stack: int | None = None, skips: bool = False,
) -> Variant:  # fmt: skip
    """What is compiled for a pass of `problem` that walks boxes of columns by tiles of rows, stacked where said."""
    parts = split(row_tile, range(3) if stack is None else (stack,))
    assert parts is not None  # whoever chose the tile has looked
    row_box, stack, consumers = parts
    variant = Variant(
        dtype=problem.dtype,
        head_dim=problem.head_dim,
        rank=problem.rank,
        box=row_box,
        stack=stack,
        consumers=consumers,
        kv_box=three(box),
        stages=2,
        mask=mask,
        is_causal=mask != "none" and any(problem.is_causal),
        has_additional=kernel in ("forward", "queries") and problem.additional > 0,
        kernel=kernel,
        skips=skips,
    )
    return replace(variant, stages=stages_of(variant))


def stages_of(variant: Variant) -> int:
    """How many boxes of columns are best in flight; one is kept for as long as the next is worked on if `is_late`."""
    if variant.is_late:
        return 3 if variant.kernel == "keys" else 4
    return 2 if variant.consumers < 3 else 3
