"""Kernels are started by one call of CUDA's driver: arguments are laid out once, later calls only change addresses.

Triton's own launcher converts every argument anew at each call, tensor maps included, which takes longer than the
driver does, and than a small problem runs. A `Call` allocates and synchronises nothing, so it can be captured in a CUDA
graph.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

NO_CONTEXT = 201  # of the driver's errors (cuda.h)


@lru_cache(maxsize=1)
def driver() -> Any:
    """CUDA's driver."""
    cuda = ctypes.CDLL("libcuda.so.1")
    pointer, word, size = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
    cuda.cuLaunchKernel.argtypes = [pointer, *[word] * 7, pointer, pointer, pointer]
    cuda.cuTensorMapReplaceAddress.argtypes = [pointer, pointer]
    cuda.cuTensorMapEncodeTiled.argtypes = [pointer, size, word, *[pointer] * 5, *[size] * 4]
    cuda.cuModuleLoadData.argtypes = [pointer, ctypes.c_char_p]
    cuda.cuModuleGetFunction.argtypes = [pointer, pointer, ctypes.c_char_p]
    cuda.cuFuncSetAttribute.argtypes = [pointer, size, size]
    cuda.cuGetErrorString.argtypes = [size, pointer]
    cuda.cuDevicePrimaryCtxRetain.argtypes = [pointer, size]
    cuda.cuCtxSetCurrent.argtypes = [pointer]
    return cuda


def check(code: int) -> None:
    """Raise what the driver returned, if that is an error."""
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"CUDA driver error {code}: {(text.value or b'unknown').decode()}")


@lru_cache(maxsize=64)
def context_of(device: int) -> Any:
    """The context that PyTorch works in on `device`, kept for as long as the process lives."""
    context = ctypes.c_void_p()
    check(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    return context


def enter_context(device: int) -> None:
    """Give this thread its context. Calls of the runtime do so by themselves, those of the driver do not.

    So a thread of autograd's that begins with a kernel of ours has none.
    """
    check(driver().cuCtxSetCurrent(context_of(device)))


class Function(NamedTuple):
    """A kernel, loaded on one device."""

    handle: int
    threads: int
    shared: int
    device: int


class Call:
    """One kernel with its arguments, for tensors of given shapes and strides; only addresses change.

    Safe to call from several threads and streams: the driver copies the arguments when it is called.

    Args:
        function: the kernel.
        grid: blocks.
        pointers: how many addresses it takes.
        numbers: what it takes after them, as numbers of `ctypes`.
        first: where what it takes before them lies, one address each.
    """

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        pointers: int,
        numbers: Sequence[Any],
        first: Sequence[int] = (),
    ) -> None:
        self._numbers, self._pointers = tuple(numbers), (ctypes.c_uint64 * pointers)()
        # Compiled kernels take two pointers to scratch memory at last, which ours do not use.
        self._nothing = ctypes.c_uint64(0)
        at = ctypes.addressof(self._pointers)
        places = [*first, *(at + 8 * i for i in range(pointers)), *map(ctypes.addressof, self._numbers)]
        places += [ctypes.addressof(self._nothing)] * 2
        self._parameters = (ctypes.c_void_p * len(places))(*places)
        self._function = function
        self._shape = function.handle, *grid, function.threads, 1, 1, function.shared
        self._launch = driver().cuLaunchKernel
        self._lock = threading.Lock()

    def start(self, pointers: Sequence[int], stream: int) -> None:
        """Start the kernel.

        Args:
            pointers: its addresses, all of them.
            stream: a CUDA stream handle.
        """
        with self._lock:
            self._start(pointers, stream)

    def _start(self, pointers: Sequence[int], stream: int) -> None:
        self._pointers[:] = pointers  # an error if they are too few or too many
        code = self._launch(*self._shape, stream, self._parameters, None)
        if code == NO_CONTEXT:
            enter_context(self._function.device)
            code = self._launch(*self._shape, stream, self._parameters, None)
        if code:
            check(code)
