"""Device code as plain Python: its spans and masks are integers and selects, which numpy computes as well.

`load("tile")` and `load("mask")` execute the source of these modules with numpy in the place of the kernel language. So
what a kernel visits and hides can be compared with the definition on a machine without a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

from vicinal.backends.hopper import variant

FOLDER = Path(variant.__file__).parent


class Values(np.ndarray[Any, Any]):
    """An array that can be cast as a block's values can."""

    def to(self, dtype: Any, bitcast: bool = False) -> Values:
        if dtype is np.uint32:
            return np.asarray(self, np.int32).view(np.uint32).view(Values) if bitcast else self.astype(dtype)
        return self  # to 16 bits: the numbers here are zeros, ones and sums of three equal powers of two


def values(x: Any) -> Values:
    return np.asarray(x).view(Values)


class Memory:
    """Shared memory that is written once."""

    def store(self, x: Values) -> None:
        self.content = x


PROGRAM = [0, 0, 0]
"""Which block runs."""

LANGUAGE = SimpleNamespace(
    constexpr=lambda x: x,
    where=lambda a, x, y: values(np.where(a, x, y)),
    minimum=lambda x, y: values(np.minimum(x, y)),
    maximum=lambda x, y: values(np.maximum(x, y)),
    arange=lambda start, stop, layout=None: values(np.arange(start, stop)),
    expand_dims=lambda x, axis: values(np.expand_dims(x, axis)),
    cdiv=lambda x, y: (x + y - 1) // y,
    program_id=lambda axis: values(PROGRAM[axis]),
    inline_asm_elementwise=lambda text, constraints, inputs, **rest: inputs[0],
    allocate_shared_memory=lambda *_: Memory(),
    barrier=True,
    int32=np.int32, int64=np.int64, uint32=np.uint32, bfloat16=np.float32,
    DotOperandLayout=lambda *_: None, SliceLayout=lambda *_: None, BlockedLayout=lambda *_: None,
    NVMMASharedLayout=lambda **_: None,
)  # fmt: skip


def _modules() -> dict[str, Any]:
    gluon = SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f, language=LANGUAGE)
    hopper = SimpleNamespace(mbarrier=None, tma=SimpleNamespace(async_load=True, async_store=True))
    return {
        "triton": SimpleNamespace(),
        "triton.experimental": SimpleNamespace(gluon=gluon),
        "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": LANGUAGE,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
    }


def load(*names: str) -> list[ModuleType]:
    """Modules of the backend, executed as Python, each knowing those before it."""
    package = "vicinal.backends.hopper."
    fakes, found = _modules(), []
    kept = {name: sys.modules.get(name) for name in (*fakes, *(package + name for name in names))}
    try:
        sys.modules.update(fakes)
        for name in names:
            module = ModuleType(package + name)
            sys.modules[package + name] = module
            source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
            exec(compile(source, str(FOLDER / f"{name}.py"), "exec"), module.__dict__)  # our own file
            found.append(module)
    finally:
        for name, module in kept.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
    return found
