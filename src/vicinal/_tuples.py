"""The helpers that every floor shares."""

from collections.abc import Iterable, Sequence
from typing import Any

from vicinal.errors import InvalidProblem


def ceil_div(numerator: int, denominator: int) -> int:
    """Smallest integer not below the quotient."""
    return -(-numerator // denominator)


def times(values: Iterable[object]) -> str:
    """A shape as people write it.

    Example:
        >>> times((30, 48, 80))
        '30x48x80'
    """
    return "x".join(str(value) for value in values)


def canonical(value: Any, rank: int, name: str, kind: type = int) -> tuple[Any, ...]:
    """One value per axis: `7 -> (7, 7)`, `(7, 9) -> (7, 9)`; anything else is an error naming `name`.

    Example:
        >>> canonical(7, 2, "kernel_size")
        (7, 7)
    """
    if _is(value, kind):
        return (kind(value),) * rank
    if not isinstance(value, Sequence) or not all(_is(item, kind) for item in value):
        raise InvalidProblem(f"{name} must be {_KINDS[kind]} or a tuple of them, one per spatial axis, got {value!r}")
    if len(value) != rank:
        raise InvalidProblem(
            f"{name} needs {rank} values, one per spatial axis, got {len(value)}: {tuple(value)!r}; "
            f"pass {rank} values, or a single one for all axes"
        )
    return tuple(kind(item) for item in value)


_KINDS = {int: "an integer", bool: "a bool"}


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, bool) if kind is bool else is_integer(value)


def is_integer(value: Any) -> bool:
    """Whether it counts as an integer.

    Example:
        >>> is_integer(7), is_integer(7.0), is_integer(True)
        (True, False, False)
    """
    # Accept whatever counts as an index (numpy and symbolic integers), but never a bool in disguise, nor an array.
    return hasattr(value, "__index__") and not isinstance(value, bool) and not getattr(value, "ndim", 0)
