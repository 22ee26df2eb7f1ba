"""The Hopper kernels run by NumPy: what can be known of them without a GPU.

`device()` gives the functions of the kernels as plain Python functions on arrays: their source as it stands, with the
language replaced by what it means. Loads and stores go by the tensor maps that the launcher lays out, with the same
clipping; barriers count arrivals and bytes, and a wait that would never end is an error. Numbers are float32 or better,
and nothing is known of registers, layouts and fences.
"""

from __future__ import annotations

import builtins
import threading
import types
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from triton.runtime.jit import JITFunction

from vicinal.backends.hopper import forward, forward_small, mask, softmax, tile
from vicinal.backends.hopper.launch import Geometry

PATIENCE = 20.0
"""Seconds until a wait is taken for one without end."""


class Array(np.ndarray):
    """An array with the methods of Triton's tensors that are needed."""

    type = types.SimpleNamespace(layout=None)

    def __floordiv__(self, other: Any) -> Array:
        """Integers are cut towards zero, as the device cuts them, where NumPy rounds down."""
        quotient = np.trunc(np.true_divide(np.asarray(self), np.asarray(other)))
        return array(quotient.astype(np.result_type(self, other)))

    def __mod__(self, other: Any) -> Array:
        return array(np.asarray(self) - np.asarray(other) * np.asarray(self // other))

    def __iadd__(self, other: Any) -> Array:
        if np.broadcast_shapes(self.shape, np.shape(other)) != self.shape:
            return array(np.asarray(self) + np.asarray(other))
        return super().__iadd__(other)

    def to(self, dtype: Any, bitcast: bool = False) -> Array:
        return self.view(dtype) if bitcast else self.astype(dtype).view(Array)

    def broadcast_to(self, shape: Sequence[int]) -> Array:
        return array(np.broadcast_to(self, shape))


def array(x: Any) -> Array:
    """A number as `[1, 1]`, an array as it is; integers of 32 bits."""
    found = np.asarray(x)
    found = found.astype(np.int32) if found.dtype == np.int64 else found
    return np.atleast_2d(found).view(Array) if found.ndim < 1 else found.view(Array)


def number(x: Any) -> int:
    return int(np.asarray(x).item())


class Shared:
    """A piece of shared memory."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory = memory
        self.dtype = memory.dtype

    def index(self, i: Any) -> Any:
        found = self.memory[number(i)]
        return found if isinstance(found, Barrier) else Shared(found)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.memory.reshape(shape))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(np.moveaxis(np.moveaxis(self.memory, dim, 0)[start : start + length], 0, dim))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.memory.transpose(order))

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
        return Shared(self.memory.reshape(-1)[: prod(shape)].reshape(shape))

    def store(self, value: np.ndarray) -> None:
        self.memory[...] = np.asarray(value).reshape(self.memory.shape)

    def load(self, layout: Any = None) -> Array:
        return self.memory.copy().view(Array)


class Barrier:
    """A barrier in shared memory: a phase ends when all have arrived, and all bytes that were announced."""

    def __init__(self) -> None:
        self.changed = threading.Condition()

    def init(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = self.phase = 0

    def note(self, arrivals: int, nbytes: int) -> None:
        with self.changed:
            self.missing -= arrivals
            self.bytes += nbytes
            assert self.missing >= 0, "more arrivals than the barrier was told of"
            if self.missing == 0 and self.bytes == 0:
                self.phase ^= 1
                self.missing = self.count
                self.changed.notify_all()

    def wait(self, phase: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.phase != phase, PATIENCE):
                raise AssertionError(f"waited in vain: {self.missing} arrivals and {self.bytes} bytes are missing")


def _wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
    if np.all(pred):
        barrier.wait(number(phase) & 1)


MBARRIER = types.SimpleNamespace(
    init=lambda barrier, count: barrier.init(count),
    expect=lambda barrier, nbytes, pred=True: barrier.note(1, number(nbytes)) if np.all(pred) else None,
    arrive=lambda barrier, pred=True: barrier.note(1, 0) if np.all(pred) else None,
    wait=_wait,
    MBarrierLayout=lambda: "barriers",
)


class Map:
    """A tensor map: a box of a tensor that lies in `memory`, which begins `room` bytes before it."""

    layout = None

    def __init__(self, memory: np.ndarray, geometry: Geometry, box: Sequence[int], head_dim: int, slots: int) -> None:
        self.memory, self.geometry, self.box = memory, geometry, (*box, head_dim)
        self.dtype = memory.dtype
        shape = [1, *box, head_dim] if slots == prod(box) else [1, 1, 1, slots, head_dim]
        self.block_type = types.SimpleNamespace(shape=shape, nbytes=2 * slots * head_dim)

    def _places(self, place: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Where each element of the box lies, and whether it is inside the tensor."""
        axes = np.ix_(*(number(n) + np.arange(side) for n, side in zip(place, (1, *self.box), strict=True)))
        sizes, steps = self.geometry.sizes[::-1], (*(n // 2 for n in self.geometry.strides[::-1]), 1)
        inside = np.ones([1, *self.box], dtype=bool)
        for axis, size in zip(axes, sizes, strict=True):
            inside = inside & (axis >= 0) & (axis < size)
        return sum(axis * step for axis, step in zip(axes, steps, strict=True)), inside  # type: ignore[return-value]

    def load(self, place: Sequence[Any], barrier: Barrier, smem: Shared) -> None:
        where, inside = self._places(place)
        box = np.where(inside, self.memory[np.where(inside, where, 0)], 0)
        rows = smem.memory.reshape(-1, self.box[-1])  # a view
        rows[: prod(self.box[:-1])] = box.reshape(-1, self.box[-1])
        barrier.note(0, -2 * box.size)

    def store(self, place: Sequence[Any], smem: Shared) -> None:
        where, inside = self._places(place)
        self.memory[where[inside]] = smem.memory.reshape(where.shape)[inside]


class Pointer:
    """A pointer to the first element of an array, or null."""

    def __init__(self, memory: np.ndarray | None, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def to(self, _: Any) -> int:
        return 0 if self.memory is None else 1


def _load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Array:
    assert pointer.memory is not None
    found = np.where(mask, pointer.memory[np.where(mask, np.asarray(pointer.offset), 0)], other)
    found = found.astype(pointer.memory.dtype)
    return array(found.ravel() if found.size > 1 else found)


def _expand_dims(x: np.ndarray, axis: int) -> Array:
    """Of a row, which sums of rows and numbers are here, as of what it stands for."""
    return array(np.expand_dims(x.ravel() if x.ndim == 2 and x.shape[0] == 1 else x, axis))


def _copy(smem: Shared, pointer: Pointer, mask: Any) -> None:
    assert pointer.memory is not None
    found = np.where(mask, pointer.memory[np.where(mask, np.asarray(pointer.offset), 0)], 0)
    smem.store(found)


ASYNC_COPY = types.SimpleNamespace(
    async_copy_global_to_shared=_copy,
    mbarrier_arrive=lambda barrier, increment_count: barrier.note(32, 0),  # every lane
)


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    assert pointer.memory is not None
    where, value, mask = np.broadcast_arrays(np.asarray(pointer.offset), value, mask)
    pointer.memory[where[mask]] = value[mask]


def _allocate(dtype: Any, shape: Sequence[int], layout: Any, value: Any = None) -> Shared:
    if layout == "barriers":
        memory = np.empty(shape[0], dtype=object)
        memory[:] = [Barrier() for _ in range(shape[0])]
        return Shared(memory)
    memory = np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else -7, dtype=dtype)
    shared = Shared(memory)
    if value is not None:
        shared.store(value)
    return shared


def _assembly(code: str, constraints: str, args: list[Any], **_: Any) -> Any:
    if code.startswith("mov"):
        return args[0]
    if code.startswith("lg2"):
        return array(np.log2(args[0]))
    assert "mul.f32" in code and "vote" in code
    return array(args[0] * args[1])


def _product(a: Any, b: Shared, c: Any, use_acc: bool = True, is_async: bool = False) -> Array:
    found = np.asarray(a.memory if isinstance(a, Shared) else a) @ b.memory
    return array(found + (np.asarray(c) if use_acc else 0))


def _specialize(parts: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    """Run the partitions at the same time, and raise what one of them raises."""
    errors: list[BaseException] = []
    ids, grid = _block.ids, getattr(_block, "grid", None)

    def run(function: Any, args: tuple[Any, ...]) -> None:
        _block.ids, _block.grid = ids, grid
        try:
            function(*args)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


_block = threading.local()


def be_block(*ids: int) -> None:
    """From now on this thread runs the block with these numbers on the three axes of the launch."""
    _block.ids = ids


def _nothing(*_: Any, **__: Any) -> None:
    """Layouts and fences mean nothing here."""


LANGUAGE = types.SimpleNamespace(
    constexpr=lambda x: x,
    program_id=lambda axis: array(_block.ids[axis]),
    static_range=lambda *bounds: builtins.range(*bounds),
    where=lambda c, a, b: array(np.where(c, a, b)),
    minimum=lambda a, b: array(np.minimum(a, b)),
    maximum=lambda a, b: array(np.maximum(a, b)),
    max=lambda x, axis: array(np.max(x, axis)),
    sum=lambda x, axis: array(np.sum(x, axis)),
    exp2=lambda x: array(np.exp2(x)),
    full=lambda shape, value, dtype, layout=None: array(np.full(shape, value, dtype)),
    arange=lambda start, stop, layout=None: array(np.arange(start, stop, dtype=np.int32)),
    expand_dims=_expand_dims,
    num_programs=lambda axis: array(_block.grid[axis]),
    cdiv=lambda a, b: (a + b - 1) // b,
    convert_layout=lambda x, layout: x,
    load=_load,
    store=_store,
    inline_asm_elementwise=_assembly,
    allocate_shared_memory=_allocate,
    warp_specialize=_specialize,
    SliceLayout=_nothing, BlockedLayout=_nothing, DotOperandLayout=_nothing, NVMMASharedLayout=_nothing,
    SwizzledSharedLayout=_nothing,
    uint32=np.uint32, int32=np.int32, int64=np.int64, float32=np.float32, bfloat16=np.float32,
)  # fmt: skip


def device(*modules: types.ModuleType) -> types.SimpleNamespace:
    """The functions of these modules of kernels, or of the forward ones."""
    names: dict[str, Any] = {}
    for module in (tile, mask, softmax, *(modules or (forward_small, forward))):
        names |= {key: value for key, value in vars(module).items() if not key.startswith("__")}
    if not modules:
        names |= {"forward": forward.forward, "forward_small": forward_small.forward_small}
    for name, value in list(names.items()):
        if isinstance(value, JITFunction):
            names[name] = types.FunctionType(value.fn.__code__, names, name, value.fn.__defaults__)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    names |= {
        "__builtins__": builtins,
        "gl": LANGUAGE,
        "mbarrier": MBARRIER,
        "async_copy": ASYNC_COPY,
        "tma": types.SimpleNamespace(store_wait=_nothing),
        "range": lambda *bounds: builtins.range(*map(number, bounds)),
        "load_box": lambda desc, place, barrier, smem: desc.load(place, barrier, smem),
        "store_box": lambda desc, place, smem: desc.store(place, smem),
        "warpgroup_mma": _product,
        "warpgroup_mma_wait": lambda left, deps: deps[0] if len(deps) == 1 else tuple(deps),
        "wait_for_warps": _nothing,
        "fence_async_shared": _nothing,
        "scores_layout": _nothing,
        "output_layout": _nothing,
    }
    return types.SimpleNamespace(**names)


def launch(kernel: Any, grid: Sequence[int], *args: Any) -> None:
    """Run every block of a grid, one after another."""
    _block.grid = tuple(grid)
    for ids in np.ndindex(*grid):
        _block.ids = ids
        kernel(*args)
