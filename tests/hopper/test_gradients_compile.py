"""The kernels of the Hopper backward on a machine without a GPU: they compile for sm_90a, fit, and hardly spill."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from vicinal.backends.hopper.cost_backward import HEAD_DIMS, RATES, additional_variant, ranked_cuts
from vicinal.backends.hopper.variant import SMEM_BYTES, Sums, Variant, stages_of
from vicinal.problem import Problem

triton = pytest.importorskip("triton", reason="compiling kernels needs triton, which is not installed")

Q_BOX = {1: (4, 4, 4), 2: (1, 8, 8)}
KV_BOX = {32: (2, 4, 4), 64: (2, 4, 8), 128: (4, 4, 8)}


def variants() -> list[Variant]:
    found: list[Variant] = []
    for kernel, head_dim, consumers, columns in RATES:
        common = ("bfloat16", head_dim, 3, Q_BOX[consumers], 0, consumers, KV_BOX[columns], 2)
        found.append(Variant(*common, "coded", kernel=kernel))
        line = ("float16", head_dim, 1, (1, 1, 64), 2, consumers, (1, 1, columns), 2)
        found.append(Variant(*line, "select", is_causal=True, has_additional=kernel == "queries", kernel=kernel))
        if consumers == 2:
            found.append(replace(found[-2], skips=True))
            found.append(replace(found[-2], skips=True, has_additional=False))
            found += [replace(variant, mask="none", is_causal=False) for variant in found[-4:-2]]
    found += [additional_variant(Problem.grid((64, 64), 8, head_dim=n, additional=9)) for n in HEAD_DIMS]
    return [replace(variant, stages=stages_of(variant)) for variant in found]


MOST_STACK = 128
"""Bytes per thread. The kernels for keys keep two sums of 64 x D in registers, and have few left for masks."""


@pytest.mark.parametrize("variant", variants(), ids=repr)
def test_compiles_with_few_spills(variant: Variant, record_property: pytest.RecordProperty, tmp_path: Path) -> None:
    from vicinal.backends.hopper.compile import compiled, stack_bytes

    kernel = compiled(variant)
    stack = stack_bytes(kernel.asm["cubin"])
    record_property("shared_bytes", kernel.metadata.shared)
    record_property("stack_bytes", stack)
    assert kernel.metadata.shared <= SMEM_BYTES
    # The launcher passes no scratch memory.
    assert kernel.metadata.global_scratch_size == kernel.metadata.profile_scratch_size == 0
    assert stack <= MOST_STACK
    assert serialized(kernel.asm["ptx"], tmp_path) == []


def serialized(ptx: str, folder: Path) -> list[str]:
    """What the assembler says where matrix instructions cannot overlap what they should."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [os.environ.get("TRITON_PTXAS_PATH", str(assembler)), "-v", "-arch=sm_90a", str(source), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return re.findall(r"C75\d\d.*", said)


def test_parameters_are_as_the_launcher_lays_them_out() -> None:
    from vicinal.backends.hopper.compile import compiled

    one_map = ["map", *["u32"] * 5, *["u64"] * 5]
    problem = Problem.grid((8, 12, 14), (3, 5, 7), heads=2, head_dim=64, additional=9)
    keys, queries = (ranked_cuts(kernel, problem)[0].variant for kernel in ("keys", "queries"))
    assert parameters(compiled(keys)) == [
        *one_map * 6,
        *["u64"] * 2,
        *["u32"] * (18 + 24 + 3),
        *["f32"] * 2,
        *["u64"] * 2,
    ]
    assert parameters(compiled(queries)) == [
        *one_map * 7, *["u64"] * 3, *["u32"] * (18 + 28 + 4), *["f32"] * 2, *["u64"] * 2
    ]  # fmt: skip
    more = additional_variant(problem)
    assert parameters(compiled(more)) == [
        *one_map * 4,
        *["u64"] * 4,
        *["u32"] * (18 + 16 + 4),
        *["f32"] * 2,
        *["u64"] * 2,
    ]
    assert parameters(compiled(Sums("float16", 64, 64))) == [*["u64"] * 6, *["u32"] * 9, *["u64"] * 2]


def parameters(kernel: object) -> list[str]:
    ptx = kernel.asm["ptx"]  # type: ignore[attr-defined]
    entry = ptx[ptx.index(".entry") :]
    lines = [line for line in entry[: entry.index("{")].splitlines() if ".param" in line]
    return ["map" if "[128]" in line else line.split()[1].lstrip(".") for line in lines]
