"""The least kernel that hands partitions to warps: what racecheck says of it, it says of Triton.

    compute-sanitizer --tool racecheck python tests/hopper/hand_over.py

It allocates no shared memory. What it has is the table in which Triton tells each warp its partition, the one that
hazards in the Hopper kernels point at, see docs/decisions/008.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

BLOCKS = 132


@gluon.jit
def note(out, number: gl.constexpr):
    gl.store(out + gl.program_id(0) * 3 + number, number + 1)


@gluon.jit
def hand_over(out):
    gl.warp_specialize([(note, (out, 0)), (note, (out, 1)), (note, (out, 2))], [4, 1], [24, 24])


def compiled() -> Any:
    """For sm_90a; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    source = GluonASTSource(hand_over, {"out": "*i32"}, {})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


if __name__ == "__main__":
    import torch

    notes = torch.zeros(BLOCKS, 3, dtype=torch.int32, device="cuda")
    hand_over[(BLOCKS,)](notes, num_warps=4)
    assert notes.cpu().tolist() == [[1, 2, 3]] * BLOCKS
