"""What a plan runs on, as numbers. Detection of the present device lives with the backends."""

from __future__ import annotations

from dataclasses import dataclass

from vicinal.errors import InvalidProblem


@dataclass(frozen=True, slots=True)
class Hardware:
    """One device.

    Args:
        name: as `Hardware.named` knows it.
        kind: PyTorch's device type that it appears as: `"cuda"` (AMD's too), `"cpu"`, ...
        arch: compute capability on NVIDIA, `(0, 0)` elsewhere.
        units: streaming multiprocessors, compute units or cores.
        smem_bytes: shared memory that one block can use.
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
        """Peak dense matrix FLOP/s in `dtype`."""
        rates = dict(self.flops_per_s)
        if dtype not in rates:
            raise InvalidProblem(f"no peak rate is known for {dtype} on {self.name}; known: {', '.join(rates)}")
        return rates[dtype]

    @staticmethod
    def named(name: str) -> Hardware:
        """The record of that name.

        Example:
            >>> Hardware.named("h100-sxm").arch
            (9, 0)
        """
        if name not in KNOWN:
            raise InvalidProblem(f"hardware must be one of {', '.join(KNOWN)}, got {name!r}")
        return KNOWN[name]


KNOWN: dict[str, Hardware] = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="h100-sxm",
            kind="cuda",
            arch=(9, 0),
            units=132,
            smem_bytes=227 * 1024,
            l2_bytes=50 * 2**20,
            memory_bytes=80 * 2**30,
            bandwidth_bytes_per_s=3.35e12,
            flops_per_s=(("float16", 989.4e12), ("bfloat16", 989.4e12), ("float32", 66.9e12), ("float64", 66.9e12)),
            source="NVIDIA H100 Tensor Core GPU data sheet (SXM5)",
        ),
    )
}
