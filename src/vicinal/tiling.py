"""How the work is cut."""

from dataclasses import dataclass

from vicinal._tuples import times
from vicinal.errors import InvalidProblem


@dataclass(frozen=True, slots=True)
class Tiling:
    """How to cut the work. Changing it never changes the answer (beyond rounding), only the time.

    Args:
        q_tile: queries per tile, one number per axis.
        kv_tile: keys per tile, one number per axis.
        kv_origin: where KV tiles may begin. `"free"`: each query tile lays its KV tiles from the
            first key that it needs. `"grid"`: at multiples of `kv_tile`, shared by all query tiles.

    Raises:
        InvalidProblem: naming the argument, what was expected and what came.

    Example:
        >>> Tiling((8, 8), (8, 16)).kv_origin
        'free'
    """

    q_tile: tuple[int, ...]
    kv_tile: tuple[int, ...]
    kv_origin: str = "free"

    def __post_init__(self) -> None:
        for name in ("q_tile", "kv_tile"):
            tile = getattr(self, name)
            if not isinstance(tile, tuple) or not tile or not all(isinstance(n, int) and n >= 1 for n in tile):
                raise InvalidProblem(f"{name} must be a tuple of integers of at least 1, one per axis, got {tile!r}")
        if len(self.q_tile) != len(self.kv_tile):
            raise InvalidProblem(
                f"q_tile and kv_tile must have one number per axis each, got {self.q_tile} and {self.kv_tile}"
            )
        if self.kv_origin not in ("free", "grid"):
            raise InvalidProblem(f'kv_origin must be "free" or "grid", got {self.kv_origin!r}')

    def __str__(self) -> str:
        return f"query tiles {times(self.q_tile)}, KV tiles {times(self.kv_tile)}, {self.kv_origin} origin"
