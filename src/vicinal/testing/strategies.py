"""Hypothesis strategies for neighborhood attention. The only module that needs hypothesis.

Nothing drawn is ever a square: lengths of a grid are pairwise different, so that swapped axes cannot
hide. Sizes crowd around what breaks code: tile boundaries, windows of one key and of the whole axis,
dilation groups of unequal lengths, strides that leave a rest.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from vicinal.problem import FLOATS, Axis, Problem
from vicinal.tiling import Tiling


@st.composite
def axes(draw: st.DrawFn, *, most: int = 40, length: int | None = None) -> Axis:
    """One axis of at most `most` tokens (or of `length`) and a valid window on it.

    Args:
        most: tokens, at most.
        length: tokens, exactly.

    Example:
        >>> from hypothesis import given
        >>> @given(axes(most=20))
        ... def every_query_sees_itself(axis):
        ...     assert all(query in axis.window(query) for query in range(axis.length))
        >>> every_query_sees_itself()
    """
    if length is None:
        length = draw(near_multiples(most))
    dilation = draw(st.one_of(st.just(1), st.integers(1, min(length, 6))))
    fits = length // dilation
    kernel_size = draw(st.one_of(st.integers(1, min(fits, 9)), st.just(1), st.just(fits), st.integers(1, fits)))
    stride = draw(st.one_of(st.just(1), st.just(kernel_size), st.integers(1, kernel_size)))
    return Axis(length, kernel_size, stride, dilation, draw(st.booleans()))


def near_multiples(most: int) -> st.SearchStrategy[int]:
    """1 to `most`, often one over, on or under a multiple of 4, 8 or 16."""
    close = [tile * n + d for tile in (4, 8, 16) for n in range(1, most // tile + 1) for d in (-1, 0, 1)]
    close = [n for n in close if 1 <= n <= most]
    anything = st.integers(1, most)
    return st.one_of(anything, st.sampled_from(close)) if close else anything


@st.composite
def grids(draw: st.DrawFn, *, rank: int | None = None, most_tokens: int = 400) -> tuple[Axis, ...]:
    """1 to 3 axes with windows, lengths pairwise different, not more tokens than `most_tokens`.

    Args:
        rank: how many axes; drawn, too, by default.
        most_tokens: of the grid.

    Example:
        >>> from hypothesis import given
        >>> @given(grids(rank=2))
        ... def grids_are_no_squares(axes):
        ...     assert axes[0].length != axes[1].length
        >>> grids_are_no_squares()
    """
    if rank is None:
        rank = draw(st.integers(1, 3))
    chosen: list[Axis] = []
    room = most_tokens
    for left in range(rank, 0, -1):
        used = {axis.length for axis in chosen}
        # Later axes need different lengths too: at least `left` tokens each, by the pigeonhole.
        longest = max(int((room / (rank + 1) ** (left - 1)) ** (1 / left) * 1.5), rank + 1)
        length = draw(near_multiples(min(longest, room)).filter(lambda n, used=used: n not in used))
        room = max(room // length, rank + 1)
        chosen.append(draw(axes(length=length)))
    return tuple(draw(st.permutations(chosen)))


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    rank: int | None = None,
    most_tokens: int = 200,
    dtypes: tuple[str, ...] = tuple(FLOATS),
    additional: bool = True,
    position_bias: bool = True,
) -> Problem:
    """Any problem: grouped heads, values of another width, additional keys, position bias, scales of all signs.

    Args:
        rank, most_tokens: as for `grids`.
        dtypes: by name, those to draw from.
        additional, position_bias: whether to draw problems with them, too.

    Example:
        >>> from hypothesis import given
        >>> @given(problems(dtypes=("float32",)))
        ... def windows_hold_what_they_should(problem):
        ...     assert problem.pairs <= problem.tokens**2
        >>> windows_hold_what_they_should()
    """
    heads_kv = draw(st.integers(1, 3))
    head_dim, head_dim_v = draw(st.lists(st.integers(1, 20), min_size=2, max_size=2))
    return Problem(
        draw(grids(rank=rank, most_tokens=most_tokens)),
        batch=draw(st.integers(1, 3)),
        heads=heads_kv * draw(st.integers(1, 3)),
        heads_kv=heads_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=draw(st.sampled_from(dtypes)),
        scale=draw(st.one_of(st.just(head_dim**-0.5), st.sampled_from((0.0, -0.3, 1.0)))),
        additional=draw(st.one_of(st.just(0), st.integers(1, 20))) if additional else 0,
        position_bias=draw(st.booleans()) if position_bias else False,
    )


@st.composite
def tilings(draw: st.DrawFn, shape: tuple[int, ...], *, smallest: int = 1) -> Tiling:
    """Any tiling of a grid of that shape, tiles larger than the grid among them.

    Args:
        shape: tokens per axis.
        smallest: tokens of a tile's side, at least.

    Example:
        >>> from hypothesis import given
        >>> @given(tilings((9, 14)))
        ... def tilings_are_of_the_same_rank(tiling):
        ...     assert len(tiling.q_tile) == len(tiling.kv_tile) == 2
        >>> tilings_are_of_the_same_rank()
    """

    def tile(length: int) -> Any:
        usual = st.sampled_from([n for n in (1, 2, 3, 4, 8, 16, length, length + 3) if n >= smallest])
        return draw(st.one_of(usual, st.integers(smallest, max(length, smallest) + 1)))

    q_tile, kv_tile = (tuple(tile(length) for length in shape) for _ in range(2))
    return Tiling(q_tile, kv_tile, draw(st.sampled_from(("free", "grid"))))


def seeds() -> st.SearchStrategy[int]:
    """For `vicinal.testing.cases.make_inputs`; odd ones come with additional lengths."""
    return st.integers(0, 2**20)
