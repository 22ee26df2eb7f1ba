"""What a plan runs on, as numbers. Detection of the present device lives with the backends."""

from __future__ import annotations

from dataclasses import dataclass

from vicinal.errors import InvalidProblem


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Rates are the vendor's peaks: dense (never with structured sparsity), 16-bit products summed in
    float32, and float32 as float32 (never TF32), which is what PyTorch computes by default. A gigabyte of a
    data sheet's memory size is taken as 2**30 bytes, which is within 1 % of what drivers report.

    Args:
        name: as `Hardware.named` knows it.
        kind: PyTorch's device type that it appears as: `"cuda"` (AMD's too), `"cpu"`, ...
        arch: compute capability on NVIDIA, `(0, 0)` elsewhere.
        units: streaming multiprocessors, compute units or cores.
        smem_bytes: fast memory that one block can use: shared memory, local data share, or a core's own cache.
        l2_bytes: last cache before memory.
        memory_bytes: device memory.
        bandwidth_bytes_per_s: of that memory.
        flops_per_s: peak dense matrix rate by dtype, as pairs so that the record can be hashed.
        source: where the numbers are from.
    """

    name: str
    kind: str
    arch: tuple[int, int]
    units: int
    smem_bytes: int
    l2_bytes: int
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: tuple[tuple[str, float], ...]
    source: str

    def peak(self, dtype: str) -> float:
        """Peak dense matrix FLOP/s in `dtype`.

        Raises:
            InvalidProblem: if none is known.
        """
        rates = dict(self.flops_per_s)
        if dtype not in rates:
            raise InvalidProblem(f"no peak rate is known for {dtype} on {self.name}; known: {', '.join(rates)}")
        return rates[dtype]

    @staticmethod
    def named(name: str) -> Hardware:
        """The record of that name.

        Args:
            name: h100-sxm, h100-pcie, h200, b200, a100-80gb, rtx-4090, mi300x or cpu. For others, construct one, or
                change one with `dataclasses.replace`.

        Raises:
            InvalidProblem: if there is none of that name.

        Example:
            >>> Hardware.named("h100-sxm").arch
            (9, 0)
        """
        if name not in KNOWN:
            raise InvalidProblem(f"hardware must be one of {', '.join(KNOWN)}, got {name!r}")
        return KNOWN[name]


def _rates(half: float, single: float, double: float) -> tuple[tuple[str, float], ...]:
    """Peak rates from TFLOP/s; every device here with both runs its two 16-bit formats at one rate."""
    return (
        ("float16", half * 1e12),
        ("bfloat16", half * 1e12),
        ("float32", single * 1e12),
        ("float64", double * 1e12),
    )


_SMEM = "shared memory per block: CUDA C++ Programming Guide, technical specifications per compute capability"

KNOWN: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="h100-sxm",
            kind="cuda",
            arch=(9, 0),
            units=132,
            smem_bytes=227 * 2**10,
            l2_bytes=50 * 2**20,
            memory_bytes=80 * 2**30,
            bandwidth_bytes_per_s=3.35e12,
            flops_per_s=_rates(989.4, 66.9, 66.9),
            source="NVIDIA H100 Tensor Core GPU Architecture white paper, table of SXM5 (rates, float64 on tensor "
            f"cores; SMs; L2); H100 data sheet (memory, bandwidth); {_SMEM} 9.0",
        ),
        Hardware(
            name="h100-pcie",
            kind="cuda",
            arch=(9, 0),
            units=114,
            smem_bytes=227 * 2**10,
            l2_bytes=50 * 2**20,
            memory_bytes=80 * 2**30,
            bandwidth_bytes_per_s=2.0e12,
            flops_per_s=_rates(756.0, 51.0, 51.0),
            source="NVIDIA H100 data sheet, PCIe column (rates: half of the sparse 1,513 in 16 bits, 51 in float32 "
            f"and float64 on tensor cores; memory; 2 TB/s); H100 white paper (SMs, L2); {_SMEM} 9.0",
        ),
        Hardware(
            name="h200",
            kind="cuda",
            arch=(9, 0),
            units=132,
            smem_bytes=227 * 2**10,
            l2_bytes=50 * 2**20,
            memory_bytes=141 * 2**30,
            bandwidth_bytes_per_s=4.8e12,
            flops_per_s=_rates(989.4, 66.9, 66.9),
            source="NVIDIA H200 data sheet, SXM column (memory, bandwidth; rates as the H100 SXM's, whose chip it "
            f"shares: see there for digits, SMs and L2); {_SMEM} 9.0",
        ),
        Hardware(
            name="b200",
            kind="cuda",
            arch=(10, 0),
            units=148,
            smem_bytes=227 * 2**10,
            l2_bytes=126 * 2**20,
            memory_bytes=180 * 2**30,
            bandwidth_bytes_per_s=7.7e12,
            flops_per_s=_rates(2250.0, 75.0, 37.0),
            source="NVIDIA Blackwell data sheet, HGX B200, per GPU (rates: half of the sparse 4.5 PFLOP/s in 16 bits; "
            "180 GB; 7.7 TB/s, where DGX B200 texts say 8); SMs, L2 and a bus of 7,680 bits as the driver reports "
            f"them, github.com/pytorch/ao/pull/4002; {_SMEM} 10.0",
        ),
        Hardware(
            name="a100-80gb",
            kind="cuda",
            arch=(8, 0),
            units=108,
            smem_bytes=163 * 2**10,
            l2_bytes=40 * 2**20,
            memory_bytes=80 * 2**30,
            bandwidth_bytes_per_s=2.039e12,
            flops_per_s=_rates(312.0, 19.5, 19.5),
            source="NVIDIA A100 data sheet, 80GB SXM column (rates, float64 on tensor cores; memory; bandwidth); "
            f"A100 white paper (SMs, L2); {_SMEM} 8.0",
        ),
        Hardware(
            name="rtx-4090",
            kind="cuda",
            arch=(8, 9),
            units=128,
            smem_bytes=99 * 2**10,
            l2_bytes=72 * 2**20,
            memory_bytes=24 * 2**30,
            bandwidth_bytes_per_s=1.008e12,
            flops_per_s=_rates(165.2, 82.6, 1.29),
            source="NVIDIA Ada GPU Architecture white paper, appendix, GeForce RTX 4090 (16 bits with float32 "
            "accumulation, half the rate of float16 accumulation; float64 at 1/64 of float32; SMs; L2; memory; "
            f"bandwidth); {_SMEM} 8.9",
        ),
        Hardware(
            name="mi300x",
            kind="cuda",
            arch=(0, 0),
            units=304,
            smem_bytes=64 * 2**10,
            l2_bytes=256 * 2**20,
            memory_bytes=192 * 2**30,
            bandwidth_bytes_per_s=5.3e12,
            flops_per_s=_rates(1307.4, 163.4, 163.4),
            source="AMD Instinct MI300X data sheet (peak matrix rates, compute units, memory, bandwidth, Infinity "
            "Cache as the last one before memory); ROCm documentation, GPU specifications (local data share)",
        ),
        Hardware(
            name="cpu",
            kind="cpu",
            arch=(0, 0),
            units=2,
            smem_bytes=2**20,
            l2_bytes=32 * 2**20,
            memory_bytes=23 * 2**30,
            bandwidth_bytes_per_s=22.5e9,
            # No float16: this core has no arithmetic in it.
            flops_per_s=(("bfloat16", 332.8e9), ("float32", 166.4e9), ("float64", 83.2e9)),
            source="an example, not your CPU: two cores of an AMD EPYC (Zen 4) virtual machine; rates = 2 cores * 2.6 "
            "GHz (nominal) * 32 float32 operations per cycle (two 256-bit FMA units; AMD Software Optimization Guide "
            "for family 19h), twice that in bfloat16 and half in float64; caches from lscpu; bandwidth measured as "
            "the best of 8 copies of 256 MiB with two threads; for yours, dataclasses.replace() the numbers",
        ),
    )
}
