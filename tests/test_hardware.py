"""Every record is complete, plausible against its vendor's other numbers, and says where it is from."""

import pytest

from vicinal.errors import InvalidProblem
from vicinal.hardware import KNOWN, Hardware

RECORDS = list(KNOWN.values())


@pytest.mark.parametrize("hardware", RECORDS, ids=lambda hardware: hardware.name)
def test_records_are_complete(hardware):
    assert Hardware.named(hardware.name) is hardware
    assert hash(hardware) == hash(KNOWN[hardware.name])
    assert len(hardware.source) > 80
    assert hardware.units > 0
    assert 0 < hardware.smem_bytes <= hardware.l2_bytes < hardware.memory_bytes
    assert {"bfloat16", "float32", "float64"} <= {dtype for dtype, _ in hardware.flops_per_s}
    assert hardware.peak("bfloat16") > hardware.peak("float32") >= hardware.peak("float64")


def test_the_devices_that_the_paper_and_its_readers_own_are_known():
    assert {"h100-sxm", "h100-pcie", "h200", "b200", "a100-80gb", "rtx-4090", "mi300x", "cpu"} <= set(KNOWN)


# Tensor core products per unit and cycle (fused multiply-adds, dense, 16 bits, float32 accumulation) and the
# clock in Hz at which the vendor states its peak: 2 * units * products * clock is the rate, another way round.
@pytest.mark.parametrize(
    ("name", "products", "clock"),
    [
        ("h100-sxm", 2048, 1.83e9),
        ("h100-pcie", 2048, 1.62e9),
        ("h200", 2048, 1.83e9),
        ("a100-80gb", 1024, 1.41e9),
        ("rtx-4090", 256, 2.52e9),
        ("mi300x", 1024, 2.1e9),
    ],
)
def test_rates_are_dense_and_accumulate_in_float32(name, products, clock):
    hardware = Hardware.named(name)
    assert hardware.peak("float16") == pytest.approx(2 * hardware.units * products * clock, rel=0.005)
    assert hardware.peak("float16") == hardware.peak("bfloat16")


def test_the_cpu_does_not_pretend():
    cpu = Hardware.named("cpu")
    assert "an example, not your CPU" in cpu.source
    with pytest.raises(InvalidProblem, match="no peak rate is known for float16 on cpu; known: bfloat16, float32"):
        cpu.peak("float16")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(InvalidProblem, match=r"hardware must be one of h100-sxm, h100-pcie, .*, got 'h1000'"):
        Hardware.named("h1000")
