"""Variants become kernels here: compiled for any target, which needs no GPU, or left to Triton's interpreter."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any
from unittest import mock

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction

from vicinal.backends import cuda
from vicinal.backends.triton.backward import additional_gradients, key_gradients, query_gradients
from vicinal.backends.triton.backward_bias import bias_gradients, diagonal_sums
from vicinal.backends.triton.forward import forward
from vicinal.backends.triton.held import forward_held, key_gradients_held, query_gradients_held
from vicinal.backends.triton.variant import AxisArgs, SlotArgs, StepArgs, Steps, Variant
from vicinal.backends.triton.whole import whole_gradients

KERNELS = {
    "forward": forward,
    "queries": query_gradients,
    "keys": key_gradients,
    "forward_held": forward_held,
    "queries_held": query_gradients_held,
    "whole": whole_gradients,
    "keys_held": key_gradients_held,
    "additional": additional_gradients,
    "bias": bias_gradients,
    "diagonals": diagonal_sums,
}

ELEMENT = {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32"}

KINDS: dict[str, Any] = {
    **dict.fromkeys(("lse", "grad_lse", "facts", "sums", "delta", "bias", "grad_bias"), "*fp32"),
    **dict.fromkeys(("partial_key", "partial_value", "partial_bias"), "*fp32"),
    "lengths": "*i32",
    "axes": (AxisArgs(*["i32"] * 6),) * 3,
    "slots": (SlotArgs("i32", "i32"),) * 3,
    "steps": Steps(*[StepArgs("i64", *["i32"] * 4)] * 10),
    **dict.fromkeys(("heads", "group", "additional", "chunk", "chunks", "first_head", "batches"), "i32"),
    "has_grad_lse": "i32",
    "scale": "fp32",
    "V": "constexpr",
}
"""Types of the kernels' arguments; all others point to elements."""

IS_INTERPRETED = isinstance(forward, InterpretedFunction)


def interpret(variant: Variant, grid: tuple[int, int, int], arguments: Sequence[Any]) -> None:
    """Run a kernel in Triton's interpreter, with two repairs.

    It patches the language again in every call of one device function by another, which takes all its
    time; once is enough. And it makes integers of the bounds of loops, which it holds as arrays
    of one element, in a way that NumPy 2.4 has given up.
    """
    patch, scopes = interpreter._patch_lang, dict[bool, Any]()

    def patch_once(function: Any) -> Any:
        # The library's own functions see the language under another name.
        is_ours = "tl" in function.__globals__
        if is_ours not in scopes:
            scopes[is_ours] = patch(function)
            scopes[is_ours].set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        return scopes[is_ours]

    with mock.patch.object(interpreter, "_patch_lang", patch_once):
        KERNELS[variant.kernel][grid](*arguments)


def compiled(variant: Variant, target: GPUTarget) -> Any:
    """The kernel of `variant` for `target`. Triton keeps the result on disk."""
    kernel = KERNELS[variant.kernel]
    names = kernel.arg_names
    signature = {name: KINDS.get(name, ELEMENT[variant.dtype]) for name in names}
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, kind in enumerate(signature.values()) if str(kind).startswith("*")}
    source = ASTSource(kernel, signature, {"V": variant}, attrs)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "maxnreg": variant.registers or None}
    return triton.compile(source, target=target, options=options)


@lru_cache(maxsize=1024)
def loaded(variant: Variant, device: int) -> Any:
    """The same for the present device, number `device`: every device loads its own."""
    return compiled(variant, triton.runtime.driver.active.get_current_target())


Start = Callable[[Sequence[Any], int], None]
"""Starts a kernel, given its addresses (tensors, for the interpreter) and a stream."""


def starter(variant: Variant, grid: tuple[int, int, int], device: int, numbers: Sequence[Any]) -> Start:
    """What starts a kernel on `device`, which must be the current one, or runs it in Triton's interpreter.

    Args:
        variant: the kernel.
        grid: blocks.
        device: its number.
        numbers: the kernel's arguments after the addresses.
    """
    if IS_INTERPRETED:
        return lambda tensors, _: interpret(variant, grid, (*tensors, *numbers))
    kernel = loaded(variant, device)
    theirs = kernel[grid]

    def by_triton(addresses: Sequence[int], stream: int) -> None:
        theirs(*addresses, *numbers, stream=stream)

    names, facts = KERNELS[variant.kernel].arg_names, kernel.metadata
    pointers = len(names) - len(numbers)
    fixed = [n for name, value in zip(names[pointers:], numbers, strict=True) for n in as_c(KINDS[name], value)]
    if not takes(kernel, pointers + len(fixed)):
        return by_triton
    # Triton's launcher makes C numbers of up to eighty Python ones at each call, and tells hooks that nobody has set.
    function = cuda.Function(kernel.function, 32 * facts.num_warps, facts.shared, device)
    call, hooks = cuda.Call(function, grid, pointers, fixed), triton.knobs.runtime

    def start(addresses: Sequence[int], stream: int) -> None:
        is_watched = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        (by_triton if is_watched else call.start)(addresses, stream)

    return start


def takes(kernel: Any, arguments: int) -> bool:
    """Whether a compiled kernel takes so many arguments, two unused pointers to scratch memory, and nothing else.

    It does, on NVIDIA's GPUs and by the Triton that we know: where not, its own launcher knows more.
    """
    scratch = [getattr(kernel.metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    if "ptx" not in kernel.asm or any(scratch) or kernel.metadata.num_ctas != 1:
        return False
    entry = kernel.asm["ptx"].partition(".entry")[2]
    return entry.partition("{")[0].count(".param") == arguments + 2


C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


def as_c(kind: Any, value: Any) -> list[Any]:
    """An argument as compiled kernels take it: members of tuples one after another, constants not at all."""
    if isinstance(kind, tuple):
        return [number for kinds, values in zip(kind, value, strict=True) for number in as_c(kinds, values)]
    return [] if kind == "constexpr" else [C_TYPES[kind](value)]
