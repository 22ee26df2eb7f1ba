"""The portable kernels on a machine without a GPU: they compile for every target, fit its shared memory, and what
they spill is bounded."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vicinal.backends.triton.cost import best_cut, variant_of
from vicinal.hardware import Hardware
from vicinal.problem import Problem

pytest.importorskip("triton", reason="compiling kernels needs triton, which is not installed")

SMEM = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
"""KiB of shared memory that a block can use."""

SPILLS = {"forward": 16, "queries": 16, "keys": 256, "additional": 48}
"""Bytes per thread, at most. The pass for keys holds two sums in registers, and keeps what it needs once elsewhere."""

MOST_SPILLS = 384

IN_LOOP = {"forward": 4, "queries": 4, "keys": 6}
"""Accesses to what was spilled, per thread and box, at most: only these cost time."""

HALF = Problem.grid((18, 34, 60), (3, 7, 7), heads=4, head_dim=64, dtype="bfloat16", additional=5)
SINGLE = Problem.grid((64, 64), 13, heads=4, head_dim=64, dtype="float32")
BIASED = replace(HALF, position_bias=True)
LONG = Problem.grid((30, 48, 80), (18, 24, 24), heads=24, head_dim=128, dtype="bfloat16")
WIDE = Problem.grid((64, 64), 13, heads=4, head_dim=256, dtype="bfloat16")


def hardware_of(arch: int | str) -> Hardware:
    number = (0, 0) if isinstance(arch, str) else divmod(arch, 10)
    return replace(Hardware.named("h100-sxm"), name=str(arch), arch=number, smem_bytes=SMEM[arch] * 1024)


def compiled(kernel: str, problem: Problem, arch: int | str) -> Any:
    from triton.backends.compiler import GPUTarget

    from vicinal.backends.triton.compile import compiled

    cut = best_cut("keys" if kernel in ("additional", "bias") else kernel, problem, hardware_of(arch))
    precision = "tf32x3" if problem.dtype == "float32" and not isinstance(arch, str) else "ieee"
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return compiled(variant_of(kernel, problem, cut, precision, False), target)


def spilled(kernel: Any, folder: Path) -> int:
    """Bytes of local memory per thread: all that a kernel without arrays has of it are spills."""
    if "amdgcn" in kernel.asm:
        (size,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"])
        return int(size)
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return max(int(size) for size in re.findall(r"STACK:(\d+)", text))


@pytest.mark.parametrize(
    ("arch", "kernel"),
    [(arch, kernel) for arch in SMEM for kernel in ("forward", "keys")]
    + [(arch, kernel) for arch in (90,) for kernel in ("queries", "additional")],
)
def test_fits_and_bounds_its_spills(
    arch: int | str, kernel: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check(compiled(kernel, HALF, arch), arch, SPILLS[kernel], tmp_path, record_property)


def accesses_in_loop(kernel: Any, folder: Path) -> int:
    """Accesses to local memory in the innermost loops that hold matrix products."""
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    lines = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]
    jumps = [(int(m[1], 16), at) for at, line in lines if (m := re.search(r"BRA.*?0x([0-9a-f]+)", line))]
    loops = {(to, at): [line for place, line in lines if to <= place <= at] for to, at in jumps if to <= at}
    with_products = {loop: body for loop, body in loops.items() if any(re.search(r"MMA\b", line) for line in body)}
    assert with_products
    innermost = [
        body
        for (first, last), body in with_products.items()
        if not any(first <= to and at <= last for to, at in with_products if (to, at) != (first, last))
    ]
    return max(sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body) for body in innermost)


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
def test_long_heads_are_not_read_from_memory_in_every_box(kernel: str, arch: int, tmp_path: Path) -> None:
    made = compiled(kernel, LONG, arch)
    check(made, arch, SPILLS[kernel], tmp_path)
    assert accesses_in_loop(made, tmp_path) <= IN_LOOP[kernel]


@pytest.mark.parametrize("problem", [SINGLE, WIDE], ids=["float32", "heads of 256"])
@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
def test_wide_elements_and_wide_heads_fit_the_smallest_too(
    kernel: str, problem: Problem, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check(compiled(kernel, problem, 86), 86, MOST_SPILLS, tmp_path, record_property)


@pytest.mark.parametrize("kernel", ["forward", "keys", "bias"])
def test_with_a_position_bias(kernel: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check(compiled(kernel, BIASED, 90), 90, MOST_SPILLS, tmp_path, record_property)


def check(
    kernel: Any, arch: int | str, most: int, folder: Path, record_property: Callable[[str, object], None] | None = None
) -> None:
    spills = spilled(kernel, folder)
    if record_property is not None:
        record_property("shared_bytes", kernel.metadata.shared)
        record_property("spilled_bytes", spills)
    assert kernel.metadata.shared <= SMEM[arch] * 1024
    assert spills <= most
    # The launcher passes no scratch memory.
    assert not getattr(kernel.metadata, "global_scratch_size", 0)


def test_import_is_light() -> None:
    code = "import sys, vicinal, vicinal.backends.triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
