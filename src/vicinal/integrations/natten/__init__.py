"""`import natten` finds this package: NATTEN's names, today's and those of before 0.20, on every device.

Code written for either runs unchanged after `vicinal.integrations.natten.install()`, and nothing is compiled.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from vicinal.errors import InvalidProblem

VERSION = "0.21.7"
"""What we say when asked for the version: the release whose names are offered, next to the old ones."""


def _modules() -> dict[str, dict[str, Any]]:
    """Names by module. Made at first import of `natten`, not before."""
    from vicinal.integrations.natten import functional, modules, settings

    functions = {name: getattr(functional, name) for name in functional.__all__}
    layers = {name: getattr(modules, name) for name in modules.__all__}
    context = {name: getattr(settings, name) for name in settings.__all__}
    return {
        "natten": {**functions, **layers, **context, "__version__": VERSION, "HAS_LIBNATTEN": False, "__path__": []},
        "natten.functional": functions,
        "natten.modules": layers,
        "natten.context": context,
    }


class _Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` is told: libraries ask it, not the module, whether there is a NATTEN."""

    def read_text(self, filename: str) -> str | None:
        return f"Metadata-Version: 2.1\nName: natten\nVersion: {VERSION}\n" if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{path}: this NATTEN is vicinal's, it has no files")


class _Finder(MetaPathFinder, Loader):
    """Finds `natten` and its modules, and loads them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        known = ("natten", "natten.functional", "natten.modules", "natten.context")
        return ModuleSpec(fullname, self, is_package=fullname == "natten") if fullname in known else None

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        if context is None or context.name in (None, "natten"):
            yield _Distribution()

    def exec_module(self, module: ModuleType) -> None:
        names = _modules()[module.__name__]
        vars(module).update(names)

        def missing(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            offered = ", ".join(sorted(each for each in names if not each.startswith("__")))
            raise AttributeError(f"vicinal's {module.__name__} has no {name!r}; it has {offered}")

        vars(module)["__getattr__"] = missing
        if module.__name__ == "natten":  # whose modules are there as soon as it is
            for name in ("functional", "modules", "context"):
                vars(module)[name] = importlib.import_module(f"natten.{name}")


_FINDER = _Finder()


def install(*, replace: bool = False) -> None:
    """Let `import natten` find us, from now on in this process.

    Call it before libraries that look for NATTEN are imported: some look once. Offered are

    * today's `na1d`, `na2d`, `na3d`, `neighborhood_attention_generic`, `attention`, `merge_attentions` and
      `NeighborhoodAttention1D/2D/3D`;
    * its global settings (`use_deterministic_algorithms`, `use_kv_parallelism_in_fused_na`, ...), without effect;
    * the old `na1d_qk`, `na1d_av`, `natten1dqkrpb`, `natten1dqk`, `natten1dav`, and those of 2-D and 3-D, with
      position bias, heads first; and the arguments `rpb` and `rel_pos_bias`.

    Where both have a name, arguments are today's: `na2d(q, k, v, 7, 2)` is a stride of 2, which up to 0.17 was a
    dilation; pass `dilation=` by name. With `rpb`, or a layer's `rel_pos_bias`, which only old releases had, the
    old order holds.

    Args:
        replace: whether to stand in for a NATTEN that is installed or imported already.

    Raises:
        InvalidProblem: if there is another NATTEN and `replace` is not given.

    Example:
        >>> install()
        >>> import natten
        >>> natten.functional.na1d_qk(torch.ones(1, 2, 6, 4), torch.ones(1, 2, 6, 4), 3).shape
        torch.Size([1, 2, 6, 3])
        >>> uninstall()
    """
    if _FINDER in sys.meta_path:
        return
    imported = sys.modules.get("natten")
    found = imported is not None or importlib.util.find_spec("natten") is not None
    if found and not replace:
        raise InvalidProblem("install: another natten is there already; uninstall it, or pass replace=True")
    _forget()
    sys.meta_path.insert(0, _FINDER)


def uninstall() -> None:
    """Undo `install`. Code that has imported our names keeps them.

    Example:
        >>> install()
        >>> uninstall()
        >>> importlib.util.find_spec("natten") is None
        True
    """
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
        _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name == "natten" or name.startswith("natten.")]:
        del sys.modules[name]
