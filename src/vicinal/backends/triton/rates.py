"""What tiles there are for each pass, and what they cost: the rates of one H100, see `cost`."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """How many tokens the tiles of a kernel hold, how it runs, and what that costs.

    Args:
        rows, columns: tokens of a tile and of a box.
        warps, stages: warps of a block, and boxes in flight.
        start: microseconds of one multiprocessor per block, whatever it visits.
        pace: per pair of a tile and a box.
        mask: added to the pace by a mask.
        holds: of how many boxes a block holds the bias while it walks batch rows, see `held`. If any, `start` is per
            batch row, and `mask`, once, what a block takes before them.
        registers, lifts: as in `Variant`.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    start: float
    pace: float
    mask: float
    holds: int = 0
    registers: int = 0
    lifts: bool = False


SHAPES: dict[tuple[str, int, int], tuple[Shape, ...]] = {
    # (kernel, bytes of an element, head dim up to). Each was timed on a window without masks, a sliding one and a small
    # one, and start, pace and mask solved for. The last of each kind is for devices with little shared memory.
    ("forward", 2, 64): (
        Shape(64, 64, 4, 3, 1.2, 0.303, 0.152),
        Shape(128, 64, 4, 3, 1.5, 0.689, 0.174),
        Shape(64, 128, 4, 3, 1.4, 0.627, 0.258),
        Shape(64, 32, 4, 3, 0.5, 0.238, 0.141),
    ),
    ("forward", 2, 128): (
        Shape(64, 64, 4, 3, 1.9, 0.515, 0.201),
        Shape(64, 64, 4, 2, 2.4, 0.615, 0.070),
        Shape(128, 64, 8, 3, 4.6, 1.042, 0.376),
        Shape(128, 128, 8, 2, 5.9, 2.422, 0.148),
        Shape(64, 32, 4, 2, 1.0, 0.38, 0.10),
    ),
    ("forward", 2, 256): (
        Shape(128, 64, 8, 2, 9.7, 2.128, 0.0),
        Shape(64, 32, 4, 2, 4.3, 0.684, 0.0),
        Shape(64, 32, 4, 1, 4.9, 0.879, 0.0),
    ),
    ("forward", 4, 64): (
        Shape(64, 32, 4, 3, 0.5, 1.830, 0.198),
        Shape(32, 32, 4, 2, 0.5, 1.166, 0.146),
    ),
    ("forward", 4, 128): (
        Shape(64, 32, 4, 1, 0.5, 5.410, 0.214),
        Shape(128, 32, 8, 1, 0.5, 8.841, 0.0),
        Shape(32, 32, 4, 1, 0.5, 2.423, 1.988),
    ),
    ("forward", 4, 256): (Shape(32, 16, 4, 1, 8.0, 5.0, 0.10),),
    ("queries", 2, 64): (
        Shape(64, 64, 4, 3, 1.8, 0.322, 0.223),
        Shape(64, 64, 4, 2, 1.6, 0.366, 0.315),
        Shape(64, 32, 4, 3, 1.1, 0.211, 0.123),
    ),
    ("queries", 2, 128): (
        Shape(64, 64, 4, 2, 3.9, 0.741, 0.081),
        Shape(128, 64, 8, 3, 5.8, 1.257, 0.630),
        Shape(64, 32, 4, 3, 2.5, 0.367, 0.150),
        Shape(64, 32, 4, 1, 1.5, 0.55, 0.05),
    ),
    ("queries", 2, 256): (Shape(64, 32, 4, 1, 8.6, 1.477, 0.006), Shape(32, 32, 4, 1, 3.0, 1.573, 0.004)),
    ("queries", 4, 64): (Shape(64, 32, 4, 2, 0.5, 2.573, 0.520), Shape(32, 32, 4, 1, 0.5, 1.525, 0.750)),
    ("queries", 4, 128): (Shape(32, 32, 4, 1, 0.5, 3.820, 2.664), Shape(32, 16, 4, 1, 0.5, 2.780, 0.0)),
    ("queries", 4, 256): (Shape(16, 16, 4, 1, 8.0, 4.0, 0.10),),
    ("keys", 2, 64): (
        Shape(64, 64, 4, 3, 2.0, 0.490, 0.178),
        Shape(64, 64, 4, 2, 2.3, 0.574, 0.111),
        Shape(64, 32, 4, 3, 1.9, 0.324, 0.035),
        Shape(64, 32, 4, 2, 2.7, 0.380, 0.041),
    ),
    ("keys", 2, 128): (
        Shape(64, 32, 4, 3, 3.3, 0.510, 0.112),
        Shape(64, 32, 4, 2, 4.8, 0.590, 0.011),
        Shape(64, 16, 4, 3, 1.6, 0.355, 0.163),
        Shape(64, 16, 4, 2, 4.3, 0.481, 0.0),
    ),
    ("keys", 2, 256): (
        Shape(64, 32, 8, 2, 8.3, 2.691, 0.0),
        Shape(32, 32, 4, 1, 1.8, 1.810, 0.0),
        Shape(32, 16, 4, 1, 0.5, 1.360, 0.020),
    ),
    ("keys", 4, 64): (Shape(64, 32, 4, 1, 0.5, 3.500, 0.619), Shape(32, 32, 4, 1, 0.5, 1.831, 0.352)),
    ("keys", 4, 128): (Shape(32, 32, 4, 1, 0.5, 5.094, 0.402), Shape(32, 16, 4, 1, 0.5, 3.397, 0.403)),
    ("keys", 4, 256): (Shape(16, 16, 4, 1, 8.0, 5.0, 0.10),),
}


MOST_HELD = 4
"""Boxes of which a block can hold the bias: so many registers there are."""

HELD: dict[str, tuple[Shape, ...]] = {
    "forward": (
        Shape(64, 64, 4, 3, 0.31, 0.375, 2.2, holds=MOST_HELD),
        Shape(64, 64, 4, 2, 0.31, 0.440, 2.2, holds=MOST_HELD),
        Shape(64, 64, 4, 2, 0.31, 0.315, 1.5, holds=1),
    ),
    "queries": (Shape(64, 64, 4, 2, 1.10, 0.335, 1.9, holds=MOST_HELD),),
    "keys": (Shape(64, 64, 4, 2, 0.78, 0.445, 1.9, holds=MOST_HELD),),
}
"""Of passes with a position bias and heads of up to 32 in 16 bits, whose blocks may hold it. Solved for from times of
DiNAT's layers."""

MOST_CHUNK = 64
"""Batch rows of a block, at most: what it takes once is little by then."""

RESIDENT = 2
"""Blocks that hold a bias and run on one multiprocessor at a time: its registers are enough for no more."""

RESIDENT_SINGLE = 4
"""Blocks of a forward pass that hold that of one box: they take half the registers."""

# Of sm_90, beside the others; what has registers of its own stands for its like among them.
HOPPER_SHAPES: dict[tuple[str, int, int], tuple[Shape, ...]] = {
    # Where products read float32 from registers, as they do elsewhere, these have too few.
    ("forward", 4, 64): (Shape(64, 64, 4, 2, 0.5, 2.978, 0.592),),
    # As many blocks on a multiprocessor as shared memory has room for; the assembler would take a few registers more.
    ("forward", 2, 64): (
        Shape(64, 64, 4, 3, 1.1, 0.300, 0.151, registers=168),
        Shape(64, 32, 4, 3, 0.5, 0.186, 0.099, registers=128),
    ),
    ("queries", 2, 64): (
        Shape(64, 64, 4, 3, 1.6, 0.318, 0.142, registers=168),
        Shape(64, 32, 4, 3, 2.0, 0.169, 0.011, registers=128),
    ),
    # A block's own queries or keys lie in registers: shared memory, which bounds these passes, is read less.
    ("queries", 2, 128): (Shape(64, 64, 4, 3, 3.7, 0.578, 0.209, lifts=True),),
    ("keys", 2, 128): (Shape(64, 32, 4, 3, 3.2, 0.465, 0.209, lifts=True),),
}
