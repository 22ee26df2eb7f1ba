"""Variants become kernels here: the only module on the host side that imports triton."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from vicinal.backends.hopper.forward import forward
from vicinal.backends.hopper.forward_small import forward_small
from vicinal.backends.hopper.variant import AxisArgs, StepArgs, Variant

HOPPER = GPUTarget("cuda", 90, 32)

ELEMENT = {"float16": "fp16", "bfloat16": "bf16"}


def box_type(variant: Variant, box: tuple[int, ...]) -> str:
    """A tensor map whose boxes hold `box` tokens of one head, as triton spells its type."""
    swizzle = min(128, 2 * variant.head_dim)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=5)
    sides = ",".join(str(n) for n in (1, *box, variant.head_dim))
    return f"tensordesc<{ELEMENT[variant.dtype]}[{sides}],{layout!r}>"


def signature(variant: Variant) -> dict[str, Any]:
    """Types of the kernels' arguments, in their order."""
    queries, keys = box_type(variant, variant.box), box_type(variant, variant.kv_box)
    more = box_type(variant, (1, 1, variant.keys))
    return {
        "query": queries,
        "key": keys,
        "value": keys,
        "out": queries,
        "more_key": more,
        "more_value": more,
        "lse": "*fp32",
        "lengths": "*i32",
        "axes": (AxisArgs(*["i32"] * 6),) * 3,
        "steps": (StepArgs(*["i32"] * 4),) * 6,
        "heads": "i32",
        "heads_per_key": "i32",
        "additional": "i32",
        "slab": "i32",
        "scale": "fp32",
        "V": "constexpr",
    }


@lru_cache(maxsize=256)
def compiled(variant: Variant) -> Any:
    """The kernel of `variant`, compiled for sm_90a with the tightest register cap under which nothing spills.

    Needs no GPU. Triton keeps the result on disk.
    """
    source = GluonASTSource(forward_small if variant.consumers == 1 else forward, signature(variant), {"V": variant})
    for cap in variant.register_caps:
        options = {"num_warps": 4, "maxnreg": cap} if cap else {"num_warps": 4}
        kernel = triton.compile(source, target=HOPPER, options=options)
        if stack_bytes(kernel.asm["cubin"]) == 0:
            break
    return kernel


FRAME_SIZE = struct.pack("<BBH", 4, 0x11, 8)
"""Begins the record of a function's stack frame in a cubin: sized, EIATTR_FRAME_SIZE, 8 bytes (symbol, size)."""


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory per thread: 0 if no register was spilled."""
    frames, start = [], cubin.find(FRAME_SIZE)
    while start >= 0:
        frames.append(struct.unpack_from("<I", cubin, start + len(FRAME_SIZE) + 4)[0])
        start = cubin.find(FRAME_SIZE, start + 1)
    if not frames:
        raise RuntimeError("this cubin does not tell its stack frames; the toolchain is one that vicinal does not know")
    return max(frames)
