"""The Hopper kernels on a machine without a GPU: they compile for sm_90a, fit, and spill nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from vicinal.backends.hopper.cost import RATES
from vicinal.backends.hopper.variant import SMEM_BYTES, Variant

pytest.importorskip("triton", reason="compiling kernels needs triton, which is not installed")

# Per kind of kernel (head_dim, warpgroups, keys): a box of queries, and boxes of keys whose code is plain and reduced.
Q_BOX = {1: (4, 4, 4), 2: (1, 8, 8), 3: (2, 8, 4)}
KV_BOXES = {64: ((2, 8, 4), (1, 8, 8)), 128: ((4, 4, 8), (2, 8, 8))}


def variants() -> list[Variant]:
    found = []
    for head_dim, consumers, keys in RATES:
        stages = 3 if consumers == 3 else 2
        common = ("bfloat16", head_dim, 3, Q_BOX[consumers], 0, consumers)
        plain, reduced = KV_BOXES[keys]
        found += [
            Variant(*common, plain, stages, "none"),
            Variant(*common, plain, stages, "coded"),
            Variant(*common, plain, stages, "coded", is_causal=True),
            Variant(*common, reduced, stages, "coded", is_causal=True, has_additional=True),
        ]
        if (consumers, keys) == (1, 64):
            found.append(Variant(*common, (3, 3, 7), stages, "coded"))
            found.append(Variant(*common, (3, 5, 4), stages, "coded", is_causal=True, has_additional=True))
        line = (1, 1, 64), 2, consumers, (1, 1, keys), stages
        found.append(Variant("float16", head_dim, 1, *line, "select", has_additional=True))
    return found + [replace(variant, abreast=2) for variant in found if variant.takes_two]


@pytest.mark.parametrize("variant", variants(), ids=repr)
def test_compiles_without_spills(variant: Variant, record_property: pytest.RecordProperty) -> None:
    from vicinal.backends.hopper.compile import compiled, stack_bytes

    kernel = compiled(variant)
    cubin = kernel.asm["cubin"]
    record_property("shared_bytes", kernel.metadata.shared)
    record_property("stack_bytes", stack_bytes(cubin))
    assert "sm_90a" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SMEM_BYTES
    # The launcher passes no scratch memory.
    assert kernel.metadata.global_scratch_size == kernel.metadata.profile_scratch_size == 0
    assert stack_bytes(cubin) == 0


TIMED = [v for v in variants() if not (v.is_causal or v.has_additional or v.head_dim == 256)]


@pytest.mark.parametrize("variant", TIMED, ids=repr)
def test_matrix_instructions_overlap(variant: Variant) -> None:
    """Where registers are short, the assembler waits for each matrix instruction before the next, and says so.

    Under the tightest cap, that is: it is what lets most blocks share a multiprocessor.
    """
    from vicinal.backends.hopper.compile import compiled

    assert compiled(variant).metadata.maxnreg in (variant.register_caps[0] or None, None)
    said = assembler_says(variant)
    used = re.search(r"Used (\d+) registers", said)
    assert used and int(used[1]) <= (variant.register_caps[0] or 512)
    assert "serialized" not in said


def test_serialized_instructions_would_be_seen() -> None:
    variant = Variant("bfloat16", 64, 3, (2, 8, 4), 0, 1, (2, 8, 4), 2, "coded")
    assert "serialized" in assembler_says(variant, maxnreg=80)


def assembler_says(variant: Variant, **options: int) -> str:
    from vicinal.backends.hopper.compile import HOPPER, compiled, source_of, triton

    kernel = compiled(variant)
    if options:
        kernel = triton.compile(source_of(variant), target=HOPPER, options={"num_warps": 4, **options})
    command = [triton.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-o", "/dev/null", "-"]
    return subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr


def test_a_spill_would_be_seen() -> None:
    from vicinal.backends.hopper.compile import HOPPER, source_of, stack_bytes, triton

    variant = Variant("bfloat16", 64, 3, (2, 8, 4), 0, 1, (2, 8, 4), 2, "coded")
    kernel = triton.compile(source_of(variant), target=HOPPER, options={"num_warps": 4, "maxnreg": 80})
    assert stack_bytes(kernel.asm["cubin"]) > 0


def test_parameters_are_as_the_launcher_lays_them_out() -> None:
    from vicinal.backends.hopper.compile import compiled

    ptx = compiled(variants()[0]).asm["ptx"]
    entry = ptx[ptx.index(".entry") :]
    parameters = [line for line in entry[: entry.index("{")].splitlines() if ".param" in line]
    kinds = ["map" if "[128]" in line else line.split()[1].lstrip(".") for line in parameters]
    one_map = ["map", *["u32"] * 5, *["u64"] * 5]
    assert kinds == [*one_map * 6, "u64", "u64", *["u32"] * (18 + 24 + 5), "f32", "u64", "u64"]


def test_a_kernel_that_only_hands_over_has_a_table_and_no_more() -> None:
    """What racecheck finds in it is Triton's: nothing else is in shared memory."""
    from hand_over import compiled

    assert 0 < compiled("hand_over").metadata.shared <= 16


def test_what_is_handed_over_is_waited_for() -> None:
    """What racecheck finds there although each warp waits, it finds in vain."""
    from hand_over import compiled

    copies = "cp.async.mbarrier.arrive.noinc"
    for name, arrival, waits in (
        ("through_a_barrier", "mbarrier.arrive", 2), ("of_copies", copies, 2), ("of_copies_again", copies, 3)
    ):  # fmt: skip
        ptx = compiled(name).asm["ptx"]
        assert ptx.count(arrival) == 1
        assert ptx.count("mbarrier.try_wait") == waits


def test_import_is_light() -> None:
    code = "import sys, vicinal.backends.hopper; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_barriers_expect_the_bytes_that_come() -> None:
    """Of a box that leaves slots empty fewer come than of a tile of additional keys."""
    from vicinal.backends.hopper.compile import compiled

    variant = Variant("bfloat16", 64, 3, (4, 4, 4), 0, 1, (3, 3, 7), 2, "coded")
    queries, box, tile = 64 * 64 * 2, 2 * 63 * 64 * 2, 2 * 64 * 64 * 2
    for has_additional, expected in ((False, {queries, box}), (True, {queries, box, tile})):
        ptx = compiled(replace(variant, has_additional=has_additional)).asm["ptx"]
        assert {int(n) for n in re.findall(r"expect_tx\S* _, \[\S+\], (\d+);", ptx)} == expected
