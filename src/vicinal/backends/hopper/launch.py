"""From shapes and strides to tensor maps and numbers, laid out once; later calls only change addresses, see `cuda`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

from vicinal._tuples import ceil_div
from vicinal.backends import cuda
from vicinal.backends.cuda import Function, check
from vicinal.backends.hopper.variant import AxisArgs, StepArgs, Sums, Variant, three_axes
from vicinal.backends.remembered import ALIGNMENT
from vicinal.errors import Unsupported
from vicinal.plan import Plan
from vicinal.problem import Axis, Problem

RANK = 5  # of a tensor map: batch, three axes, and heads with their elements
MAP_BYTES, MAP_ALIGNMENT = 128, 64
LARGEST_COLUMN = 2**31 - 1  # coordinates are 32-bit
LARGEST_STRIDE = 2**40  # bytes
SHARED_L2_BYTES = (
    16 * 2**20
)  # of an H100's 50 MB: each half may keep its own copy, and queries and outputs pass through
MULTIPROCESSORS, BLOCKS_PER_MULTIPROCESSOR = 132, 5

# Values of the driver's enumerations (cuda.h).
DATA_TYPE = {"float16": 6, "bfloat16": 9}
SWIZZLE = {64: 2, 128: 3}
L2_PROMOTION_128B = 2
MAX_DYNAMIC_SHARED, PREFERRED_CARVEOUT = 8, 9


@lru_cache(maxsize=256)
def function(variant: Variant | Sums, device: int) -> Function:
    """Compile `variant` and load it on `device`, which must be the current one."""
    from vicinal.backends.hopper.compile import compiled

    kernel = compiled(variant)
    loader, module, handle = cuda.driver(), ctypes.c_void_p(), ctypes.c_void_p()
    cuda.enter_context(device)
    check(loader.cuModuleLoadData(ctypes.byref(module), kernel.asm["cubin"]))
    check(loader.cuModuleGetFunction(ctypes.byref(handle), module, kernel.metadata.name.encode()))
    check(loader.cuFuncSetAttribute(handle, MAX_DYNAMIC_SHARED, kernel.metadata.shared))
    check(loader.cuFuncSetAttribute(handle, PREFERRED_CARVEOUT, 100))
    assert handle.value is not None
    return Function(handle.value, 32 * kernel.metadata.num_warps, kernel.metadata.shared, device)


class Layout(NamedTuple):
    """How a tensor `[B, t, h, w, H, D]` lies in memory, in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]


def layouts_of(problem: Problem, strides: Sequence[tuple[int, ...]]) -> list[Layout]:
    """Of query, key, value, out and the additional keys and values, leading axes of one token added."""
    queries, keys = (problem.heads, problem.head_dim), (problem.heads_kv, problem.head_dim)
    grid, more = problem.shape, (problem.additional,)
    shapes = [(*grid, *queries), (*grid, *keys), (*grid, *keys), (*grid, *queries), (*more, *keys), (*more, *keys)]
    return [layout_of((problem.batch, *shape), step) for shape, step in zip(shapes, strides, strict=False)]


def layout_of(shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """Of a tensor `[B, *S, H, D]`, leading axes of one token added."""
    missing = 6 - len(shape)
    return Layout((shape[0], *(1,) * missing, *shape[1:]), (strides[0], *(0,) * missing, *strides[1:]))


def can_map(layout: Layout) -> bool:
    """Whether the tensor engine can read a tensor that lies like this, if its address is aligned."""
    *outer, inner = layout.strides
    steps = [2 * step for step, size in zip(outer, layout.shape[:-1], strict=True) if size > 1]
    return inner == 1 and all(0 < step < LARGEST_STRIDE and step % ALIGNMENT == 0 for step in steps)


def is_mappable(tensor: Any) -> bool:
    """Whether the tensor engine can read `tensor` where it lies; otherwise it is copied first."""
    return tensor.data_ptr() % ALIGNMENT == 0 and can_map(Layout(tuple(tensor.shape), tensor.stride()))


class Geometry(NamedTuple):
    """A tensor map short of its address, and what the kernel must know to find its way in it."""

    sizes: tuple[int, ...]  # innermost first
    strides: tuple[int, ...]  # in bytes, of all but the innermost
    room: int  # bytes that the map begins before the tensor
    steps: StepArgs


def geometry(layout: Layout, axes: Sequence[Axis]) -> Geometry:
    """Lay a tensor out as `[B, t, h, w, column]`, dilation groups folded into the columns.

    A token `group + member * dilation` is `member` steps of `dilation` tokens along an axis, from
    an origin that depends on the group. The origin becomes part of the innermost coordinate, so that
    groups need neither a permutation nor a map each. With `length % dilation = long` groups one member
    longer than the others, the map begins `dilation - long` tokens before the tensor: the
    long groups then begin in row 0 of the map and the short ones in row 1, and all end in its
    last row. So the tensor engine clips at the true end of every group, and neither reads nor writes
    past it. Windows begin inside the tensor, so no box begins before it; but the engine faults if the
    map itself begins in memory that is not there, so a tensor needs that much `room` before it.
    """
    (batch, *_, heads, head_dim), (batch_step, *axis_steps, head_step, _) = layout
    axis_steps = [step if axis.length > 1 else 8 for step, axis in zip(axis_steps, axes, strict=True)]
    head_step = head_step if heads > 1 else 8
    batch_step = batch_step if batch > 1 else 8
    before = sum(step * (-axis.length % axis.dilation) for step, axis in zip(axis_steps, axes, strict=True))
    columns = head_dim + (heads - 1) * head_step
    columns += sum(step * (axis.dilation - 1) for step, axis in zip(axis_steps, axes, strict=True))
    if columns > LARGEST_COLUMN:
        raise Unsupported(
            f"hopper addresses at most {LARGEST_COLUMN} elements across the heads and dilation groups of a token, "
            f"these tensors spread them over {columns}; use a contiguous tensor, a smaller dilation, or another backend"
        )
    lengths = [ceil_div(axis.length, axis.dilation) for axis in axes]
    strides = [2 * step * axis.dilation for step, axis in zip(axis_steps, axes, strict=True)]
    return Geometry(
        (columns, *reversed(lengths), batch),
        (*reversed(strides), 2 * batch_step),
        2 * before,
        StepArgs(head_step, *axis_steps),
    )


class TensorMap:
    """The tensor engine's description of one tensor, in memory that the launch hands to the kernel."""

    def __init__(self, geometry: Geometry, dtype: str, box: tuple[int, ...], head_dim: int) -> None:
        self._memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
        self.pointer = ceil_div(ctypes.addressof(self._memory), MAP_ALIGNMENT) * MAP_ALIGNMENT
        self._room = geometry.room
        self.address: int | None = None
        self._encoding = (geometry, dtype, box, head_dim)

    def point_to(self, address: int) -> None:
        """Make this the map of the tensor at `address`."""
        if self.address is None:
            self._encode(address - self._room)
        else:
            check(cuda.driver().cuTensorMapReplaceAddress(self.pointer, address - self._room))
        self.address = address

    def _encode(self, base: int) -> None:
        geometry, dtype, box, head_dim = self._encoding
        swizzle = min(2 * head_dim, 128)
        sizes = (ctypes.c_uint64 * RANK)(*geometry.sizes)
        strides = (ctypes.c_uint64 * (RANK - 1))(*geometry.strides)
        sides = (ctypes.c_uint32 * RANK)(swizzle // 2, *reversed(box), 1)
        ones = (ctypes.c_uint32 * RANK)(*[1] * RANK)
        check(
            cuda.driver().cuTensorMapEncodeTiled(
                self.pointer,
                DATA_TYPE[dtype],
                RANK,
                base,
                sizes,
                strides,
                sides,
                ones,
                0,
                SWIZZLE[swizzle],
                L2_PROMOTION_128B,
                0,
            )
        )


class Call(cuda.Call):
    """One kernel with its arguments, tensor maps first, for tensors of given shapes and strides."""

    def __init__(
        self, function: Function, grid: tuple[int, int, int], maps: Sequence[TensorMap], pointers: int,
        integers: Sequence[int], floats: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self._maps, self._unread = tuple(dict.fromkeys(maps)), ctypes.c_uint64(0)
        # Each tensor map is followed by its shape and strides, which our kernels do not read.
        places = [n for m in maps for n in (m.pointer, *[ctypes.addressof(self._unread)] * (2 * RANK))]
        super().__init__(
            function, grid, pointers, [*map(ctypes.c_int32, integers), *map(ctypes.c_float, floats)], places
        )

    def start_on(self, addresses: Sequence[int], pointers: Sequence[int], stream: int) -> None:
        """Start the kernel.

        Args:
            addresses: of the tensors that have maps, each once.
            pointers: the kernel's other addresses.
            stream: a CUDA stream handle.
        """
        with self._lock:
            for tensor_map, address in zip(self._maps, addresses, strict=True):
                if address != tensor_map.address:
                    tensor_map.point_to(address)
            self._start(pointers, stream)


def tiles_of(axes: Sequence[Axis], variant: Variant) -> tuple[list[int], int]:
    """Tiles of a dilation group on each axis, and of the whole grid."""
    tiles = [ceil_div(ceil_div(a.length, a.dilation), q) for a, q in zip(axes, variant.q_tile, strict=True)]
    return tiles, prod(count * axis.dilation for axis, count in zip(axes, tiles, strict=True))


class Launch(Call):
    """The forward kernel.

    `rooms` are the bytes of the same allocation that each input needs before it; `needs_room` says whether any does.
    The output needs `copy_room`, and no copy of an input more: it is contiguous and has no fewer heads.
    `lse_shape` is what it sounds like, a plain tuple.
    """

    def __init__(self, plan: Plan, variant: Variant, layouts: Sequence[Layout], device: int) -> None:
        problem = plan.problem
        axes = three_axes(problem.axes)
        single = (Axis(1, 1), Axis(1, 1), Axis(max(problem.additional, 1), 1))
        geometries = [geometry(layout, single if i >= 4 else axes) for i, layout in enumerate(layouts)]
        variant = replace(variant, abreast=heads_abreast(problem, variant, geometries))
        boxes = [variant.box, variant.kv_box, variant.kv_box, variant.box, *[(1, 1, variant.keys)] * 2]
        self.rooms = [geometry.room for i, geometry in enumerate(geometries) if i != 3]
        self.needs_room = any(self.rooms)
        self.copy_room = geometries[3].room
        self.lse_shape = (problem.batch, *problem.shape, problem.heads)
        maps = [
            TensorMap(geometry, variant.dtype, box, variant.columns)
            for geometry, box in zip(geometries, boxes, strict=False)
        ]
        tiles, blocks = tiles_of(axes, variant)
        together = heads_per_block(problem, variant, blocks, plan.visited)
        steps = [geometry.steps for geometry in geometries]
        steps += [StepArgs(0, 0, 0, 0)] * (6 - len(steps))
        integers = [n for axis, count in zip(axes, tiles, strict=True) for n in axis_args(axis, count)]
        integers += [n for step in steps for n in step]
        integers += [problem.heads, problem.heads // problem.heads_kv, together, problem.additional]
        integers += [slab(axes, variant, together)]
        grid = (blocks, ceil_div(problem.heads, together), problem.batch)
        maps += [maps[0]] * (6 - len(maps))
        super().__init__(function(variant, device), grid, maps, 2, integers, [kernel_scale(problem.scale)])

    def __call__(self, addresses: Sequence[int], lse: int, lengths: int, stream: int) -> None:
        """Start the kernel on `stream`.

        Args:
            addresses: of query, key, value, out, and the additional keys and values if there are any.
            lse: address of the log-sum-exps.
            lengths: address of the 32-bit lengths of the additional keys, or 0 if all count.
            stream: a CUDA stream handle.
        """
        self.start_on(addresses, (lse, lengths), stream)


def axis_args(axis: Axis, tiles: int) -> AxisArgs:
    """What the kernel is told of an axis that has `tiles` query tiles in each dilation group."""
    return AxisArgs(axis.length, axis.kernel_size, axis.stride, axis.dilation, int(axis.is_causal), tiles)


WAVES = 4
"""Blocks that every multiprocessor should have one after another, so that none is idle for long at the end."""

ENOUGH_BOXES = 24
"""KV boxes of a block beside which what it computes once is little."""


def heads_per_block(problem: Problem, variant: Variant, blocks: int, visited: int) -> int:
    """Heads that one block of the small kernel takes in turn, a divisor of their number.

    That spreads what a block computes once over more boxes, and costs neighbors that no longer share keys in the
    cache: measured, it pays for windows of few boxes, as long as every multiprocessor still gets enough blocks.
    """
    if not variant.shares_heads:
        return variant.abreast
    enough = WAVES * MULTIPROCESSORS * BLOCKS_PER_MULTIPROCESSOR
    most = min(blocks * problem.batch * problem.heads // enough, ENOUGH_BOXES * blocks // visited)
    return max(n for n in range(1, max(most, 1) + 1) if problem.heads % n == 0)


def heads_abreast(problem: Problem, variant: Variant, geometries: Sequence[Geometry]) -> int:
    """Heads that share a box of the small kernel: two of 32, if in every tensor they lie next to each other.

    One load then serves both, and so does the mask's code.
    """
    adjacent = all(geometry.steps.head == problem.head_dim for geometry in geometries)
    even = problem.heads == problem.heads_kv and problem.heads % 2 == 0
    return 2 if adjacent and even and variant.takes_two else 1


def slab(axes: Sequence[Axis], variant: Variant, heads: int) -> int:
    """Query tiles of the last axis to sweep together: as many as let the keys that tiles share stay in the L2 cache."""
    kept = axes[0].kernel_size * axes[0].dilation + variant.q_tile[0]
    per_column = 2 * 2 * variant.head_dim * heads * kept * axes[1].length  # bytes of K and V
    halo = (axes[2].kernel_size - 1) * axes[2].dilation
    return max((SHARED_L2_BYTES // per_column - halo) // variant.q_tile[2], 1)


LOG2_E = 1.4426950408889634


def kernel_scale(scale: float) -> float:
    """The factor that turns `q . k` into powers of two.

    Hidden scores are hidden by what they lack *before* scaling, so the scale must stay positive: 0 becomes
    a number so small that every visible weight is exactly 1, and is still large enough to hide.
    """
    return max(abs(scale) * LOG2_E, 2.0**-80)
