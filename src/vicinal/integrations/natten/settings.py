"""NATTEN's global settings: kept and told again, and without effect, since they choose among its own kernels.

What they would buy is there anyway: gradients are the same in every run and use no atomics, so that there is nothing to
split over keys, no memory to prefer, and no compiled FlexAttention to allow.
"""

from __future__ import annotations

from typing import Any

from vicinal.errors import InvalidProblem

PREFERENCES = ("default", "strict", "unrestricted")

_set: dict[str, Any] = {"deterministic": False, "kv": True, "memory": "default", "flex": False, "flex_backprop": False}


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Gradients are the same in every run, whatever this is set to."""
    _set["deterministic"] = mode


def are_deterministic_algorithms_enabled() -> bool:
    """What `use_deterministic_algorithms` was set to."""
    return _set["deterministic"]


def use_kv_parallelism_in_fused_na(mode: bool = True) -> None:
    """No effect: no gradient is split over keys and added up."""
    _set["kv"] = mode


def is_kv_parallelism_in_fused_na_enabled() -> bool:
    """What `use_kv_parallelism_in_fused_na` was set to."""
    return _set["kv"]


def set_memory_usage_preference(pref: str = "default") -> None:
    """No effect: it bounds the splits over keys, of which there are none.

    Raises:
        InvalidProblem: if that is none of NATTEN's preferences.
    """
    if pref not in PREFERENCES:
        raise InvalidProblem(f"pref must be one of {', '.join(PREFERENCES)}, got {pref!r}")
    _set["memory"] = pref


def is_memory_usage_default() -> bool:
    """Whether `set_memory_usage_preference` was set to that."""
    return _set["memory"] == "default"


def is_memory_usage_strict() -> bool:
    """Whether `set_memory_usage_preference` was set to that."""
    return _set["memory"] == "strict"


def is_memory_usage_unrestricted() -> bool:
    """Whether `set_memory_usage_preference` was set to that."""
    return _set["memory"] == "unrestricted"


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """No effect: FlexAttention is not used."""
    _set["flex"], _set["flex_backprop"] = mode, mode and backprop


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """No effect: FlexAttention is not used."""
    allow_flex_compile(_set["flex"], mode)


def disable_flex_compile() -> None:
    """No effect: FlexAttention is not used."""
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    """No effect: FlexAttention is not used."""
    allow_flex_compile_backprop(False)


def is_flex_compile_allowed() -> bool:
    """What `allow_flex_compile` was set to."""
    return _set["flex"]


def is_flex_compile_backprop_allowed() -> bool:
    """What `allow_flex_compile_backprop` was set to."""
    return _set["flex_backprop"]


__all__ = [
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "set_memory_usage_preference",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]
