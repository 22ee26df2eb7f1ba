"""The portable kernels on a machine without a GPU: they compile for every target, fit its shared memory, and what
they spill is bounded."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from vicinal.backends.triton.bias import bias_cut
from vicinal.backends.triton.cost import (
    MOST_STAGES,
    Cut,
    best_cut,
    cuts,
    is_miscompiled,
    room_of,
    shapes,
    smem_bytes,
    variant_of,
)
from vicinal.backends.triton.rates import HOPPER_SHAPES, MOST_HELD, Shape
from vicinal.hardware import Hardware
from vicinal.problem import Problem

pytest.importorskip("triton", reason="compiling kernels needs triton, which is not installed")

SMEM = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
"""KiB of shared memory that a block can use."""

SPILLS = {"forward": 16, "queries": 16, "keys": 320, "additional": 48, "bias": 480, "diagonals": 0}
"""Bytes per thread, at most. The pass for keys holds two sums in registers, and keeps what it needs once elsewhere."""

MOST_SPILLS = 384

IN_LOOP = {"forward": 4, "queries": 4, "keys": 16, "bias": 5}
"""Accesses to what was spilled, per thread and box, at most: only these cost time. A box takes 400 instructions."""

IN_BOX = {"forward": 400, "queries": 330, "keys": 300}
"""Instructions per thread and box without a mask, at most. Boxes hold 64 tokens, in the pass for keys 32."""

IN_HELD_BOX = 440
"""The same with a position bias that a block holds, mask and all; a table read in every box takes 800."""

HALF = Problem.grid((18, 34, 60), (3, 7, 7), heads=4, head_dim=64, dtype="bfloat16", additional=5)
SINGLE = Problem.grid((64, 64), 13, heads=4, head_dim=64, dtype="float32")
BIASED = replace(HALF, position_bias=True)
LONG = Problem.grid((30, 48, 80), (18, 24, 24), heads=24, head_dim=128, dtype="bfloat16")
BLOCKS = replace(LONG, axes=Problem.grid((32, 32, 32), 16, stride=16).axes)
ROWS = replace(LONG, axes=Problem.grid((4096,), 512).axes)
IMAGES = Problem.grid((56, 56), 7, batch=128, heads=2, head_dim=32, dtype="bfloat16", position_bias=True)
WIDE = Problem.grid((64, 64), 13, heads=4, head_dim=256, dtype="bfloat16")


def hardware_of(arch: int | str) -> Hardware:
    number = (0, 0) if isinstance(arch, str) else divmod(arch, 10)
    return replace(Hardware.named("h100-sxm"), name=str(arch), arch=number, smem_bytes=SMEM[arch] * 1024)


def compiled(kernel: str, problem: Problem, arch: int | str) -> Any:
    hardware = hardware_of(arch)
    if kernel in ("bias", "diagonals"):
        cut = bias_cut(problem, hardware).cut
    else:
        cut = best_cut("keys" if kernel == "additional" else kernel, problem, hardware)
    return made_as(kernel, problem, cut, arch)


def made_as(kernel: str, problem: Problem, cut: Cut, arch: int | str) -> Any:
    from triton.backends.compiler import GPUTarget

    from vicinal.backends.triton.compile import compiled

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


def machine_code(kernel: Any, folder: Path) -> list[tuple[int, str]]:
    """Addresses and instructions."""
    from triton import knobs

    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-sass", str(cubin)]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)]


def reads_of_nothing(kernel: Any, folder: Path) -> list[str]:
    """Instructions that read a uniform register which none before them writes, loops walked once."""
    written: set[int] = set()
    found: list[str] = []
    for _, line in machine_code(kernel, folder):
        name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ")
        target = re.match(r"\s*UR(\d+)\s*,", operands)
        sources = operands[target.end() :] if target else operands
        # Descriptors in brackets may take four registers of which only some count.
        read = {int(n) for n in re.findall(r"(?<![\w\[])UR(\d+)", sources)}
        found += [line] if read - written else []
        if target:
            first, many = int(target[1]), 2 if ".64" in name or "WIDE" in name else 4 if ".128" in name else 1
            written |= set(range(first, first + many))
    return found


def loops_of(kernel: Any, folder: Path) -> list[list[str]]:
    """Instructions of the innermost loops that hold matrix products."""
    lines = machine_code(kernel, folder)
    jumps = [(int(m[1], 16), at) for at, line in lines if (m := re.search(r"BRA.*?0x([0-9a-f]+)", line))]
    loops = {(to, at): [line for place, line in lines if to <= place <= at] for to, at in jumps if to <= at}
    with_products = {loop: body for loop, body in loops.items() if any(re.search(r"MMA\b", line) for line in body)}
    assert with_products
    return [
        body
        for (first, last), body in with_products.items()
        if not any(first <= to and at <= last for to, at in with_products if (to, at) != (first, last))
    ]


def accesses_in_loop(kernel: Any, folder: Path) -> int:
    """Accesses to local memory in a loop over boxes."""
    return max(sum(bool(re.search(r"\b(LDL|STL)\b", line)) for line in body) for body in loops_of(kernel, folder))


@pytest.mark.parametrize("kernel", IN_BOX)
def test_a_box_takes_few_instructions(kernel: str, tmp_path: Path) -> None:
    made = compiled(kernel, BLOCKS, 90)
    assert max(map(len, loops_of(made, tmp_path))) <= IN_BOX[kernel]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
@pytest.mark.parametrize("shape", [(4099,), (130, 200), (30, 48, 80)], ids=len)
def test_boxes_are_loaded_ahead(shape: tuple[int, ...], kernel: str, arch: int, tmp_path: Path) -> None:
    problem = Problem.grid(shape, 25, heads=4, head_dim=128, dtype="bfloat16")
    ahead = [cut for cut in cuts(kernel, problem, hardware_of(arch), most=1000) if cut.shape.stages > 2]
    (loop,) = loops_of(made_as(kernel, problem, ahead[0], arch), tmp_path)
    waits = [line for line in loop if "DEPBAR.LE SB0" in line]
    assert ahead[0].masked and waits
    # Waiting for all but none that are on their way is waiting for the box that was asked for last.
    assert not any(line.rstrip().endswith(" 0x0") for line in waits)


def given_away(loop: list[str]) -> list[str]:
    """Products of a loop whose operand in registers an earlier product has read, too, though the loop writes it.

    What a product finds in registers is written for it in every turn, or never in the loop.
    """
    ever, fresh, found = set[int]().union(*map(written_by, loop)), set[int](), list[str]()
    for turn in range(2):
        for line in loop:
            operand = re.match(r"\s*HGMMA\S*\s+R\d+,\s*R(\d+),", line)
            read = set(range(int(operand[1]), int(operand[1]) + 4)) if operand else set[int]()
            # Before the loop, something else may have written it.
            found += [line] if turn and (read & ever) - fresh else []
            fresh = (fresh - read) | written_by(line)
    return found


def written_by(line: str) -> set[int]:
    """Registers that an instruction writes."""
    name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", line.strip()).partition(" ")
    target = re.match(r"\s*R(\d+)", operands)
    if target is None or name.startswith(("ST", "LDGSTS", "R2UR", "BAR")):
        return set()
    product = re.match(r"HGMMA\.64x(\d+)x", name)
    many = int(product[1]) // 2 if product else 4 if ".128" in name else 2 if ".64" in name or "WIDE" in name else 1
    return set(range(int(target[1]), int(target[1]) + many))


LIFTING = [(kernel, shape) for (kernel, *_), known in HOPPER_SHAPES.items() for shape in known if shape.lifts]


@pytest.mark.parametrize("problem", [BLOCKS, LONG, ROWS], ids=["blocks", "windows", "rows"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("kernel", "shape"), LIFTING, ids=str)
def test_what_is_lifted_stays_in_its_registers(
    kernel: str, shape: Shape, dtype: str, problem: Problem, tmp_path: Path
) -> None:
    problem = replace(problem, dtype=dtype)
    cut = next(cut for cut in cuts(kernel, problem, hardware_of(90), most=1000) if cut.shape == shape)
    made = made_as(kernel, problem, cut, 90)
    assert not any(given_away(loop) for loop in loops_of(made, tmp_path))
    check(made, 90, SPILLS[kernel], tmp_path)
    assert accesses_in_loop(made, tmp_path) <= IN_LOOP[kernel]
    assert made.metadata.shared <= smem_bytes(kernel, problem, shape)


@pytest.mark.parametrize("kernel", ["queries", "keys"])
def test_what_the_assembler_would_give_away_is_not_lifted(kernel: str, tmp_path: Path) -> None:
    problem, hardware = replace(LONG, head_dim=64, head_dim_v=64), hardware_of(90)
    cut = cuts(kernel, problem, hardware)[0]
    wrong = cut.shape._replace(rows=64, columns=64, warps=4, stages=3, lifts=True)
    cut = cut._replace(rows=(4, 4, 4), columns=(1, 8, 8), shape=wrong)
    assert is_miscompiled(kernel, problem, wrong)
    # Once it gets this right, they may be.
    assert any(given_away(loop) for loop in loops_of(made_as(kernel, problem, cut, 90), tmp_path))


@pytest.mark.parametrize("arch", [80, 86, 90, 120])
@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
def test_long_heads_are_not_read_from_memory_in_every_box(kernel: str, arch: int, tmp_path: Path) -> None:
    made = compiled(kernel, LONG, arch)
    check(made, arch, SPILLS[kernel], tmp_path)
    assert accesses_in_loop(made, tmp_path) <= IN_LOOP[kernel]


def test_what_the_assembler_gets_wrong_is_not_chosen(tmp_path: Path) -> None:
    from triton.backends.compiler import GPUTarget

    from vicinal.backends.triton.compile import compiled

    problem = replace(HALF, dtype="float16", head_dim_v=32, additional=0)
    hardware = hardware_of(90)
    known = shapes("forward", problem, hardware)
    wrong = known[0]._replace(rows=64, columns=128, stages=1)
    assert is_miscompiled("forward", problem, wrong)
    assert not any(is_miscompiled("forward", problem, shape) for shape in known)
    cut = best_cut("forward", problem, hardware)._replace(rows=(4, 4, 4), columns=(1, 8, 16), shape=wrong)
    variant = variant_of("forward", problem, cut, "ieee", False)
    made = compiled(variant, GPUTarget("cuda", 90, 32))
    # Once it gets this right, `is_miscompiled` can go.
    assert reads_of_nothing(made, tmp_path)
    made = compiled(replace(variant, stages=2), GPUTarget("cuda", 90, 32))
    assert not reads_of_nothing(made, tmp_path)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_short_heads_in_float32_do_not_sum_their_position_bias_by_tiles_that_the_assembler_gets_wrong(
    rank: int, tmp_path: Path
) -> None:
    shape = Shape(64, 32, 8, 3, 0.0, 0.0, 0.0)
    boxes_of = {1: ((64,), (32,)), 2: ((4, 16), (4, 8)), 3: ((4, 2, 8), (4, 2, 4))}
    problem = Problem.grid((13, 14, 15)[:rank], 5, heads=2, dtype="float32", head_dim=16, position_bias=True)
    read = {}
    for dims in ((24, 8), (32, 16), (16, 16), (32, 32), (40, 16)):
        short = replace(problem, head_dim=dims[0], head_dim_v=dims[1])
        cut = bias_cut(short, hardware_of(90)).cut
        assert not is_miscompiled("bias", short, cut.shape)
        assert not reads_of_nothing(made_as("bias", short, cut, 90), tmp_path)
        by_hand = cut._replace(rows=boxes_of[rank][0], columns=boxes_of[rank][1], shape=shape)
        read[dims] = bool(reads_of_nothing(made_as("bias", short, by_hand, 90), tmp_path))
        # Once it gets this right, this part of `is_miscompiled` can go.
        assert read[dims] == is_miscompiled("bias", short, shape)
    assert sum(read.values()) == 2


@pytest.mark.parametrize("problem", [BIASED, replace(SINGLE, position_bias=True)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("arch", [80, 90])
def test_sums_of_a_position_bias_stay_in_registers(problem: Problem, arch: int, tmp_path: Path) -> None:
    assert accesses_in_loop(compiled("bias", problem, arch), tmp_path) <= IN_LOOP["bias"]


@pytest.mark.parametrize(
    ("dtype", "dims"), [("bfloat16", (128, 128)), ("bfloat16", (256, 16)), ("float32", (16, 256))], ids=str
)
@pytest.mark.parametrize(("arch", "kernel"), [(90, "forward"), (90, "queries"), (80, "keys"), ("gfx942", "forward")])
def test_shared_memory_with_a_position_bias_is_what_was_reckoned_with(
    arch: int | str, kernel: str, dtype: str, dims: tuple[int, int]
) -> None:
    problem = replace(SINGLE, dtype=dtype, head_dim=dims[0], head_dim_v=dims[1], position_bias=True)
    hardware = hardware_of(arch)
    room = room_of(hardware)
    ways = [
        cut._replace(shape=way)
        for cut in cuts(kernel, problem, hardware)
        for stages in (cut.shape.stages, MOST_STAGES)
        if smem_bytes(kernel, problem, way := cut.shape._replace(stages=stages)) <= room
    ]
    # The one that takes most of the room, and the one with most in flight.
    chosen = {max(ways, key=key).shape: max(ways, key=key) for key in (taken(kernel, problem), in_flight)}
    for cut in chosen.values():
        shared = made_as(kernel, problem, cut, arch).metadata.shared
        assert shared <= smem_bytes(kernel, problem, cut.shape) <= room


def taken(kernel: str, problem: Problem) -> Callable[[Cut], int]:
    return lambda cut: smem_bytes(kernel, problem, cut.shape)


def in_flight(cut: Cut) -> int:
    return cut.shape.stages


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("arch", [80, 86, 90, "gfx942"])
def test_the_gradient_of_a_position_bias_fits_with_long_heads(arch: int | str, dtype: str) -> None:
    for dims in ((128, 128), (256, 256)):
        problem = replace(SINGLE, dtype=dtype, head_dim=dims[0], head_dim_v=dims[1], position_bias=True)
        assert compiled("bias", problem, arch).metadata.shared <= SMEM[arch] * 1024


@pytest.mark.parametrize("problem", [SINGLE, WIDE], ids=["float32", "heads of 256"])
@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
def test_wide_elements_and_wide_heads_fit_the_smallest_too(
    kernel: str, problem: Problem, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check(compiled(kernel, problem, 86), 86, MOST_SPILLS, tmp_path, record_property)


@pytest.mark.parametrize("kernel", ["forward", "keys"])
def test_with_a_position_bias(kernel: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    check(compiled(kernel, BIASED, 90), 90, MOST_SPILLS, tmp_path, record_property)


@pytest.mark.parametrize(("arch", "dtype"), [(80, "float16"), (90, "bfloat16")])
@pytest.mark.parametrize("kernel", ["forward", "queries", "keys"])
def test_a_held_position_bias_stays_in_registers(kernel: str, arch: int, dtype: str, tmp_path: Path) -> None:
    problem = replace(IMAGES, dtype=dtype)
    cut = best_cut(kernel, problem, hardware_of(arch))
    assert prod(cut.held) == MOST_HELD
    made = compiled(kernel, problem, arch)
    check(made, arch, 192, tmp_path)
    assert made.metadata.shared <= smem_bytes(kernel, problem, cut.shape)
    assert accesses_in_loop(made, tmp_path) <= 12 * MOST_HELD
    assert max(map(len, loops_of(made, tmp_path))) <= IN_HELD_BOX * MOST_HELD


@pytest.mark.parametrize(("arch", "most"), [(80, 48), (90, 0)])
def test_sums_in_the_pass_for_queries_spill_little(arch: int, most: int, tmp_path: Path) -> None:
    problem = replace(IMAGES, axes=Problem.grid((56, 56), 7, dilation=8).axes)
    assert best_cut("queries", problem, hardware_of(arch)).sums
    check(compiled("queries", problem, arch), arch, most, tmp_path)


@pytest.mark.parametrize(("arch", "most"), [(80, 256), (90, 96)])
def test_all_gradients_at_once_spill_little(arch: int, most: int, tmp_path: Path) -> None:
    problem, hardware = replace(IMAGES, axes=Problem.grid((56, 56), 7, dilation=8).axes), hardware_of(arch)
    cut = best_cut("queries", problem, hardware)
    assert cut.sums
    made = made_as("whole", problem, cut, arch)
    check(made, arch, most, tmp_path)
    assert made.metadata.shared <= smem_bytes("queries", problem, cut.shape)
    if arch == 90:  # fewer than the passes for queries and keys together, which take 908
        assert accesses_in_loop(made, tmp_path) <= 12
        assert max(map(len, loops_of(made, tmp_path))) <= 700


@pytest.mark.parametrize("arch", SMEM)
@pytest.mark.parametrize("kernel", ["bias", "diagonals"])
def test_gradients_of_a_position_bias(
    kernel: str, arch: int | str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    check(compiled(kernel, BIASED, arch), arch, SPILLS[kernel], tmp_path, record_property)


def check(
    kernel: Any, arch: int | str, most: int, folder: Path, record_property: Callable[[str, object], None] | None = None
) -> None:
    spills = spilled(kernel, folder)
    if record_property is not None:
        record_property("shared_bytes", kernel.metadata.shared)
        record_property("spilled_bytes", spills)
    assert kernel.metadata.shared <= SMEM[arch] * 1024
    assert spills <= most
    if "cubin" in kernel.asm:
        assert not reads_of_nothing(kernel, folder)
    # The launcher passes no scratch memory.
    assert not getattr(kernel.metadata, "global_scratch_size", 0)


def test_import_is_light() -> None:
    code = "import sys, vicinal, vicinal.backends.triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
