"""The least kernels that hand something to other warps: what racecheck says of them, it says of Triton.

    compute-sanitizer --tool racecheck python tests/hopper/hand_over.py through_a_barrier

Each is right beyond doubt, and says so when it ends. `hand_over` only starts its warps, which is done by a table in
shared memory; in `through_a_barrier` they wait for each other besides; in `of_copies` a warp copies numbers that others
wait for and read, and in `of_copies_again` it does so in a loop, to the same place, once they have said that they are
done, as with the sums in the backward kernels. See docs/decisions/008.
"""

from __future__ import annotations

import sys
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

BLOCKS = 132
SOURCE = gl.constexpr(BLOCKS * 3)
"""Where the numbers lie that are copied."""
TURNS = gl.constexpr(4)
"""How often they are copied again: the fifth of them, which is 4."""


@gluon.jit
def note(out, barrier, numbers, number: gl.constexpr):
    gl.store(out + gl.program_id(0) * 3 + number, number + 1)


@gluon.jit
def tell(out, barrier, numbers, number: gl.constexpr):
    mbarrier.arrive(barrier, count=1)
    gl.store(out + gl.program_id(0) * 3 + number, number + 1)


@gluon.jit
def hear(out, barrier, numbers, number: gl.constexpr):
    mbarrier.wait(barrier, 0)
    gl.store(out + gl.program_id(0) * 3 + number, number + 1)


@gluon.jit
def copy(out, barrier, numbers, number: gl.constexpr):
    """Numbers from `out` itself, which holds zeros or what an earlier launch wrote."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    async_copy.async_copy_global_to_shared(numbers, out + SOURCE + gl.arange(0, 32, layout=lanes))
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def add(out, barrier, numbers, number: gl.constexpr):
    """One more than the sum of the numbers that were copied, which is 0, 1, ... 31."""
    mbarrier.wait(barrier, 0)
    lanes: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    gl.store(out + gl.program_id(0) * 3 + number, gl.sum(numbers.load(lanes), 0) - 496 + number + 1)


@gluon.jit
def copy_again(out, barrier, numbers, turns, number: gl.constexpr):
    """As `copy`, again when all have read. `barrier` is two: numbers are there, and they may go."""
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for turn in range(turns):
        mbarrier.wait(barrier.index(1), (turn & 1) ^ 1)
        async_copy.async_copy_global_to_shared(numbers, out + SOURCE + gl.arange(0, 32, layout=lanes))
        async_copy.mbarrier_arrive(barrier.index(0), increment_count=False)


@gluon.jit
def add_again(out, barrier, numbers, turns, number: gl.constexpr):
    """As `add`, of all times."""
    lanes: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
    total = 0
    for turn in range(turns):
        mbarrier.wait(barrier.index(0), turn & 1)
        total += gl.sum(numbers.load(lanes), 0)
        mbarrier.arrive(barrier.index(1), count=1)
    gl.store(out + gl.program_id(0) * 3 + number, total - 496 * turns + number + 1)


@gluon.jit
def hand_over(out):
    gl.warp_specialize([(note, (out, 0, 0, 0)), (note, (out, 0, 0, 1)), (note, (out, 0, 0, 2))], [4, 1], [24, 24])


@gluon.jit
def through_a_barrier(out):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=1)
    fence_async_shared()
    gl.warp_specialize(
        [(tell, (out, barrier, 0, 0)), (hear, (out, barrier, 0, 1)), (hear, (out, barrier, 0, 2))], [4, 1], [24, 24]
    )


@gluon.jit
def of_copies(out):
    barrier = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier, count=32)  # each lane that copies
    fence_async_shared()
    numbers = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    gl.warp_specialize(
        [(add, (out, barrier, numbers, 0)), (add, (out, barrier, numbers, 1)), (copy, (out, barrier, numbers, 2))],
        [4, 1], [24, 24],
    )  # fmt: skip


@gluon.jit
def of_copies_again(out):
    barrier = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(barrier.index(0), count=32)
    mbarrier.init(barrier.index(1), count=2)  # each partition that reads
    fence_async_shared()
    numbers = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    turns = gl.load(out + SOURCE + TURNS)  # not known before: such a loop stays one
    gl.warp_specialize(
        [(add_again, (out, barrier, numbers, turns, 0)), (add_again, (out, barrier, numbers, turns, 1)),
         (copy_again, (out, barrier, numbers, turns, 2))],
        [4, 1], [24, 24],
    )  # fmt: skip


KERNELS = {kernel.__name__: kernel for kernel in (hand_over, through_a_barrier, of_copies, of_copies_again)}


def compiled(name: str) -> Any:
    """For sm_90a; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    source = GluonASTSource(KERNELS[name], {"out": "*i32"}, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def run(name: str) -> list[int]:
    """What every block wrote."""
    import torch

    out = torch.zeros(BLOCKS * 3 + 32, dtype=torch.int32, device="cuda")
    out[BLOCKS * 3 :] = torch.arange(32)
    KERNELS[name][(BLOCKS,)](out, num_warps=4)
    (found,) = out[: BLOCKS * 3].view(BLOCKS, 3).unique(dim=0).tolist()
    return found


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else "hand_over"
    assert run(given) == [1, 2, 0 if given.startswith("of_copies") else 3]
