"""Forward for large windows: a producer warp loads boxes, warpgroups of 64 queries each compute.

    out = softmax(scale * Q K^T + mask) V      over the KV boxes that the tile visits

Every warpgroup holds its scores and its output in registers and walks the same boxes; K and V pass
through a ring of slots in shared memory. Loads, matrix products and exponentials of different
tiles overlap: with two warpgroups each also starts the scores of the next box before it
exponentiates those of this one; three are enough to fill each other's gaps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from vicinal.backends.hopper.softmax import Softmax, accumulator_layout, finish, probabilities_layout, scores_layout
from vicinal.backends.hopper.tile import (
    code_of,
    load_additional,
    load_keys,
    load_queries,
    next_box,
    next_slot,
    penalties,
    place_code,
    query_place,
    store_box,
    tile_of,
)


@aggregate
class Ring:
    """Slots of shared memory for the boxes of one tensor, with a barrier for "full" and one for "free" each."""

    slots: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor

    def __init__(self, slots, full, free):
        self.slots = slots
        self.full = full
        self.free = free


@gluon.jit
def make_ring(desc, SLOTS: gl.constexpr, READERS: gl.constexpr):
    slots = gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(free.index(i), READERS)
    return Ring(slots, full, free)
