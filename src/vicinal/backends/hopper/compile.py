"""Variants become kernels here: the only module on the host side that imports triton."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from vicinal.backends.hopper.backward_keys import additional_gradients, key_gradients
from vicinal.backends.hopper.backward_queries import query_gradients
from vicinal.backends.hopper.backward_sums import sums
from vicinal.backends.hopper.forward import forward
from vicinal.backends.hopper.forward_small import forward_small
from vicinal.backends.hopper.variant import AxisArgs, StepArgs, Sums, Variant

HOPPER = GPUTarget("cuda", 90, 32)

ELEMENT = {"float16": "fp16", "bfloat16": "bf16"}


def box_type(variant: Variant, box: tuple[int, ...]) -> str:
    """A tensor map whose boxes hold `box` tokens of one head, as triton spells its type."""
    swizzle = min(128, 2 * variant.columns)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=16, rank=5)
    sides = ",".join(str(n) for n in (1, *box, variant.columns))
    return f"tensordesc<{ELEMENT[variant.dtype]}[{sides}],{layout!r}>"


def kernel_of(variant: Variant) -> Any:
    """The function that `variant` is compiled from."""
    if variant.kernel == "forward":
        return forward_small if variant.consumers == 1 else forward
    return {"queries": query_gradients, "keys": key_gradients, "additional": additional_gradients}[variant.kernel]


def signature(variant: Variant) -> dict[str, Any]:
    """Types of a kernel's arguments, in their order."""
    maps = tensor_maps(variant)
    names = kernel_of(variant).arg_names
    types = {
        **maps,
        "axes": (AxisArgs(*["i32"] * 6),) * 3,
        "steps": (StepArgs(*["i32"] * 4),) * len(maps),
        "lengths": "*i32",
        "scale": "fp32",
        "grad_scale": "fp32",
        "V": "constexpr",
        **dict.fromkeys(("lse", "delta", "partial_key", "partial_value"), "*fp32"),
    }
    return {name: types.get(name, "i32") for name in names}


def tensor_maps(variant: Variant) -> dict[str, str]:
    """Types of the tensor maps that a kernel takes, in their order."""
    rows, more = box_type(variant, variant.box), box_type(variant, (1, 1, variant.keys))
    columns = more if variant.empty else box_type(variant, variant.kv_box)  # triton takes powers of two only
    if variant.kernel == "forward":
        maps = {"query": rows, "key": columns, "value": columns, "out": rows}
    elif variant.kernel == "queries":
        maps = {"query": rows, "grad_out": rows, "key": columns, "value": columns, "grad_query": rows}
    else:
        maps = {"query": columns, "grad_out": columns, "key": rows, "value": rows}
        return maps | ({"grad_key": rows, "grad_value": rows} if variant.kernel == "keys" else {})
    return maps | {"more_key": more, "more_value": more}


def compiled_sums(variant: Sums) -> Any:
    """The kernel that prepares the backward, compiled for sm_90a."""
    pointers = ["out", "grad_out", "lse", "grad_lse", "lse_by_head", "delta_by_head"]
    kinds = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(pointers[:2], "*" + ELEMENT[variant.dtype])
    kinds |= {"axes": ("i32",) * 3, "step": StepArgs(*["i32"] * 4), "D": "constexpr", "ROWS": "constexpr"}
    types = {name: kinds.get(name, "i32") for name in sums.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    source = ASTSource(sums, types, {"D": variant.head_dim, "ROWS": variant.rows}, aligned)
    return triton.compile(source, target=HOPPER, options={"num_warps": 4})


def source_of(variant: Variant) -> Any:
    """What is compiled for `variant`."""
    return GluonASTSource(kernel_of(variant), signature(variant), {"V": variant})


@lru_cache(maxsize=256)
def compiled(variant: Variant | Sums) -> Any:
    """The kernel of `variant`, compiled for sm_90a with the tightest register cap that `spare_stack` allows.

    Needs no GPU. Triton keeps the result on disk.
    """
    if isinstance(variant, Sums):
        return compiled_sums(variant)
    source = source_of(variant)
    for cap in variant.register_caps:
        options = {"num_warps": 4, "maxnreg": cap} if cap else {"num_warps": 4}
        kernel = triton.compile(source, target=HOPPER, options=options)
        if stack_bytes(kernel.asm["cubin"]) <= variant.spare_stack:
            break
    return kernel


NV_INFO = 0x70000000
"""Type of an ELF section that describes kernels; a record is a format, a kind and a size or a value."""

SIZED, FRAME_SIZE = 4, 0x11
"""Format of a record with a payload; kind of the one that tells a stack frame, as symbol and bytes."""


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory per thread: 0 if no register was spilled."""
    frames = [size for info in sections(cubin, NV_INFO) for size in frame_sizes(info)]
    if not frames:
        raise RuntimeError("this cubin does not tell its stack frames; the toolchain is one that vicinal does not know")
    return max(frames)


def sections(elf: bytes, kind: int) -> Iterator[bytes]:
    """The contents of the sections of that type."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    for start in range(table, table + size * count, size):
        if struct.unpack_from("<I", elf, start + 4)[0] == kind:
            offset, length = struct.unpack_from("<QQ", elf, start + 24)
            yield elf[offset : offset + length]


def frame_sizes(info: bytes) -> Iterator[int]:
    """Stack frames that a section of records tells of."""
    at = 0
    while at + 4 <= len(info):
        form, kind, size = struct.unpack_from("<BBH", info, at)
        if (form, kind) == (SIZED, FRAME_SIZE):
            yield struct.unpack_from("<I", info, at + 8)[0]
        at += 4 + (size if form == SIZED else 0)
