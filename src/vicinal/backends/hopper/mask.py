"""The mask between a query tile and a KV box, on the tensor core or by selects."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from vicinal.backends.hopper.tile import row_places, seen_start, seen_stop

NEVER = gl.constexpr(-(2.0**100))
"""What hides a score: far below any other, and a power of two, so that sums of a few cancel exactly."""


@gluon.jit
def row_window(row, span, axis, V: gl.constexpr):
    """Window of row `row` of a query tile, relative to the span's origin: start and length."""
    member = gl.minimum(span.first + row, span.members - 1)
    start = seen_start(member, span.members, axis, V.is_inverse)
    if V.is_uneven:
        return start - span.origin, seen_stop(member, span.members, axis, V.is_inverse) - start
    else:
        return start - span.origin, axis.kernel_size  # of all rows, which saves registers


@gluon.jit
def row_windows(rows, tile, axes, V: gl.constexpr, consumer: gl.constexpr):
    """Windows of the rows of one warpgroup: start and length on each axis."""
    t, h, w = row_places(rows, V, consumer)
    t_start, t_size = row_window(t, tile.t, axes[0], V)
    h_start, h_size = row_window(h, tile.h, axes[1], V)
    w_start, w_size = row_window(w, tile.w, axes[2], V)
    return t_start, t_size, h_start, h_size, w_start, w_size


@gluon.jit
def sees(place, size):
    """0 <= place < size, in one comparison."""
    return place.to(gl.uint32, bitcast=True) < size.to(gl.uint32, bitcast=True)


class Code(NamedTuple):
    """The mask on the tensor core: scores + P @ E hides what a row must not see.

    A key at place (t, h, w) of its box is hidden from a row if it is outside the row's window on
    some axis. That is a sum over axes of functions of one place, so it is a product of two thin
    matrices: `E [code, keys]` marks each key's places with ones, and is the same for every box;
    `P [rows, code]` holds 0 for places inside the row's window and `NEVER` for those outside.
    One extra matrix instruction takes the place of dozens of selects per thread, and what it adds
    to a visible score is exactly zero.

    The reduced code drops the last place of every axis: one constant column carries their sum, and
    the other columns the differences to it.

    `place` and `last` are a column's place, and the last place of its axis, relative to the start
    of the row's window; `size` is the length of that window. The `*_last` are `last` by axis.
    """

    place: Any
    last: Any
    size: Any
    t_last: Any
    t_size: Any
    h_last: Any
    h_size: Any
    w_last: Any
    w_size: Any


@gluon.jit
def code_columns(columns, V: gl.constexpr):
    """Of each column of the code: whether it is the first axis', the middle one's, the last one's; and its place.

    The plain code gives each axis an even number of columns, so that the two neighbors that a thread
    holds belong to one axis. What they share is then computed and kept once: `place` is that of the
    first of the two, and the last result is 1 for the second.
    """
    first = columns
    if not V.code_is_reduced:
        first = columns // 2 * 2
    t0: gl.constexpr = code_offset(V, 0)
    h0: gl.constexpr = code_offset(V, 1)
    w0: gl.constexpr = code_offset(V, 2)
    is_t = (first >= t0) & (first < t0 + code_places(V, 0))
    is_h = (first >= h0) & (first < h0 + code_places(V, 1))
    is_w = (first >= w0) & (first < w0 + code_places(V, 2))
    return is_t, is_h, is_w, first - gl.where(is_w, w0, gl.where(is_h, h0, t0)), columns - first


@gluon.constexpr_function
def code_places(V, axis):
    """Columns of one axis; an axis that the grid lacks hides nothing."""
    n = V.kv_box[axis] if axis >= 3 - V.rank else 0
    if n == 0:
        return 0
    return n - 1 if V.code_is_reduced else n + n % 2


@gluon.constexpr_function
def code_offset(V, axis):
    """Columns before those of an axis: the longest comes first, since eight columns of one axis cost no selects."""
    order = sorted(range(3), key=lambda a: (-V.kv_box[a], -a))
    return sum(code_places(V, a) for a in order[: order.index(axis)])


@gluon.constexpr_function
def code_of_nothing(V):
    """The column that marks empty slots: one that marks no place, behind an odd axis or behind all."""
    for axis in range(3 - V.rank, 3):
        if V.kv_box[axis] % 2:
            return code_offset(V, axis) + V.kv_box[axis]
    return sum(code_places(V, axis) for axis in range(3))


@gluon.jit
def code_of(tile, axes, layout: gl.constexpr, V: gl.constexpr, consumer: gl.constexpr):
    """The code `P` of one warpgroup, up to the box's number."""
    rows = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), 1)
    columns = gl.expand_dims(gl.arange(0, V.code_width, layout=gl.SliceLayout(0, layout)), 0)
    t0, tn, h0, hn, w0, wn = row_windows(rows, tile, axes, V, consumer)
    is_t, is_h, is_w, place, _ = code_columns(columns, V)
    start = gl.where(is_w, w0, gl.where(is_h, h0, t0))
    size = gl.where(is_w, wn, gl.where(is_h, hn, tn))
    size = gl.where(is_w | is_h | is_t, size, 0x7FFFFFFF)
    start = gl.where(is_w | is_h | is_t, start, 0)
    last = gl.where(is_w, V.kv_box[2] - 1, gl.where(is_h, V.kv_box[1] - 1, V.kv_box[0] - 1)) - start
    return Code(
        place - start,
        last,
        size,
        V.kv_box[0] - 1 - t0,
        tn,
        V.kv_box[1] - 1 - h0,
        hn,
        V.kv_box[2] - 1 - w0,
        wn,
    )


@gluon.jit
def hidden(place, size):
    """`NEVER` where a place is outside the window, else 0."""
    return gl.where(sees(place, size), 0.0, NEVER)


@gluon.jit
def penalties(code, t, h, w, layout: gl.constexpr, V: gl.constexpr):
    """`P [64, code]` for box `(t, h, w)`."""
    columns = gl.expand_dims(gl.arange(0, V.code_width, layout=gl.SliceLayout(0, layout)), 0)
    is_t, is_h, is_w, _, odd = code_columns(columns, V)
    t_keys = t * V.kv_box[0]
    h_keys = h * V.kv_box[1]
    w_keys = w * V.kv_box[2]
    past = gl.where(is_w, w_keys, gl.where(is_h, h_keys, t_keys))
    p = hidden(code.place + past + odd, code.size)
    if V.code_is_reduced:
        shared = (
            hidden(code.t_last + t_keys, code.t_size)
            + hidden(code.h_last + h_keys, code.h_size)
            + hidden(code.w_last + w_keys, code.w_size)
        )
        p = gl.where(is_w | is_h | is_t, p - hidden(code.last + past, code.size), shared)
    if V.empty > 0:
        p = gl.where(columns == code_of_nothing(V), NEVER, p)
    return p.to(gl.bfloat16)


@gluon.jit
def place_code(V: gl.constexpr, WARPS: gl.constexpr):
    """`E`, in shared memory and transposed: `[keys, code]`, ones where a column is a key's place."""
    WIDTH: gl.constexpr = V.code_width
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    keys = gl.expand_dims(gl.arange(0, V.keys, layout=gl.SliceLayout(1, layout)), 1)
    columns = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout)), 0)
    is_t, is_h, is_w, place, odd = code_columns(columns, V)
    t = keys // (V.kv_box[1] * V.kv_box[2])
    h = keys // V.kv_box[2] % V.kv_box[1]
    w = keys % V.kv_box[2]
    place = place + odd
    marked = (is_w & (place == w)) | (is_h & (place == h)) | (is_t & (place == t))
    if V.code_is_reduced:
        marked = marked | (columns == code_places(V, 0) + code_places(V, 1) + code_places(V, 2))
    if V.empty > 0:
        marked = gl.where(keys < V.keys - V.empty, marked, columns == code_of_nothing(V))
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * WIDTH, element_bitwidth=16, rank=2)
    code = gl.allocate_shared_memory(gl.bfloat16, [V.keys, WIDTH], shared)
    code.store(gl.where(marked, 1.0, 0.0).to(gl.bfloat16))
    return code


class Windows(NamedTuple):
    """The windows of the rows of one warpgroup, to select by; and the keys that every row of the block sees."""

    t_start: Any
    t_size: Any
    h_start: Any
    h_size: Any
    w_start: Any
    w_size: Any
    t_full: Any
    h_full: Any
    w_full: Any


@gluon.jit
def full_keys(span, axis, Q: gl.constexpr, IS_INVERSE: gl.constexpr):
    """Keys that every query of a tile sees, relative to its origin: start and stop."""
    last = gl.minimum(span.first + Q, span.members) - 1
    start = seen_start(last, span.members, axis, IS_INVERSE)
    return start - span.origin, seen_stop(span.first, span.members, axis, IS_INVERSE) - span.origin


@gluon.jit
def windows_of(tile, axes, layout: gl.constexpr, V: gl.constexpr, consumer: gl.constexpr):
    rows = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), 1)
    t0, tn, h0, hn, w0, wn = row_windows(rows, tile, axes, V, consumer)
    t_full = full_keys(tile.t, axes[0], V.q_tile[0], V.is_inverse)
    h_full = full_keys(tile.h, axes[1], V.q_tile[1], V.is_inverse)
    w_full = full_keys(tile.w, axes[2], V.q_tile[2], V.is_inverse)
    return Windows(t0, tn, h0, hn, w0, wn, t_full, h_full, w_full)


@gluon.jit
def contains(full, first, K: gl.constexpr):
    return (full[0] <= first) & (first + K <= full[1])


@gluon.jit
def select(scores, windows, t, h, w, layout: gl.constexpr, V: gl.constexpr):
    """Scores of box `(t, h, w)`, hidden where a key is outside the row's window. Full boxes pass untouched."""
    t = t * V.kv_box[0]
    h = h * V.kv_box[1]
    w = w * V.kv_box[2]
    is_full = contains(windows.t_full, t, V.kv_box[0]) & contains(windows.h_full, h, V.kv_box[1])
    if not (is_full & contains(windows.w_full, w, V.kv_box[2])):
        keys = gl.expand_dims(gl.arange(0, V.keys, layout=gl.SliceLayout(0, layout)), 0)
        keep = sees(w + keys % V.kv_box[2] - windows.w_start, windows.w_size)
        if V.rank > 1:
            keep = keep & sees(h + keys // V.kv_box[2] % V.kv_box[1] - windows.h_start, windows.h_size)
        if V.rank > 2:
            keep = keep & sees(t + keys // (V.kv_box[1] * V.kv_box[2]) - windows.t_start, windows.t_size)
        scores = gl.where(keep, scores, NEVER)
    return scores


@gluon.jit
def select_valid(scores, valid, layout: gl.constexpr, V: gl.constexpr):
    """Scores of a tile of additional keys, of which only `valid` exist."""
    if valid < V.keys:
        keys = gl.expand_dims(gl.arange(0, V.keys, layout=gl.SliceLayout(0, layout)), 0)
        scores = gl.where(keys < valid, scores, NEVER)
    return scores


@gluon.jit
def mask_of(tile, axes, layout: gl.constexpr, V: gl.constexpr, consumer: gl.constexpr):
    """What the mask of one warpgroup needs, in the form that the variant masks by."""
    if V.mask == "coded":
        return code_of(tile, axes, gl.DotOperandLayout(0, layout, 2), V, consumer)
    elif V.mask == "select":
        return windows_of(tile, axes, layout, V, consumer)
    else:
        return 0
