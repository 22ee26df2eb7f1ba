"""Device nouns: a tile of rows, the boxes of columns that it walks, and the mask between them.

Rows are queries and columns keys, or the other way round (`V.are_keys`): the queries that see a key
are a box around it just as the keys that a query sees are. `Span` is the device's copy of
`plan.Span`: it is computed from a few integers instead of being read from memory, and a test holds the
two equal.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Span(NamedTuple):
    """A tile of rows along one axis, and the boxes of columns that it visits; positions count members of its group.

    `origin` is where the first box begins, `reach` the columns in all boxes; `full_start` and
    `full_stop` bound the columns that every row sees.
    """

    group: Any
    members: Any
    first: Any
    origin: Any
    reach: Any
    full_start: Any
    full_stop: Any


class Tile(NamedTuple):
    """The rows of one block: a batch row, a head, and a span per axis."""

    batch: Any
    head: Any
    t: Any
    h: Any
    w: Any


class Windows(NamedTuple):
    """The columns that each row of a tile sees, per axis: the first, relative to the span's origin, and how many."""

    t_start: Any
    t_size: Any
    h_start: Any
    h_size: Any
    w_start: Any
    w_size: Any


@triton.jit
def window_start(query, members, axis):
    """First key of a query's window, as `window.window` defines it."""
    lead = tl.where(axis.is_causal != 0, axis.stride - 1, axis.stride // 2)
    leader = tl.minimum(query - query % axis.stride + lead, members - 1)
    reach = tl.where(axis.is_causal != 0, axis.kernel_size - 1, axis.kernel_size // 2)
    room = tl.where(axis.is_causal != 0, 0, axis.kernel_size)
    return tl.minimum(tl.maximum(leader - reach, 0), members - room)


@triton.jit
def window_stop(query, members, axis):
    """One past the last key of a query's window."""
    return tl.where(axis.is_causal != 0, query + 1, window_start(query, members, axis) + axis.kernel_size)


@triton.jit
def viewers_stop(key, members, axis):
    """One past the last query that sees a key, as `window.viewers` defines it."""
    lead = tl.where(axis.is_causal != 0, axis.stride - 1, axis.stride // 2)
    reach = tl.where(axis.is_causal != 0, axis.kernel_size - 1, axis.kernel_size // 2)
    group = tl.maximum(key + reach - lead, 0) // axis.stride
    stop = tl.minimum((group + 1) * axis.stride, members)
    return tl.where(key >= members - axis.kernel_size, members, stop)


@triton.jit
def viewers_start(key, members, axis):
    """The first query that sees a key."""
    stop = viewers_stop(tl.maximum(key - axis.kernel_size, 0), members, axis)
    return tl.where(axis.is_causal != 0, key, tl.where(key < axis.kernel_size, 0, stop))


@triton.jit
def seen_start(row, members, axis, V: tl.constexpr):
    """The first column that a row sees."""
    if V.are_keys:
        return viewers_start(row, members, axis)
    else:
        return window_start(row, members, axis)


@triton.jit
def seen_stop(row, members, axis, V: tl.constexpr):
    """One past the last column that a row sees."""
    if V.are_keys:
        return viewers_stop(row, members, axis)
    else:
        return window_stop(row, members, axis)


@triton.jit
def span_of(index, axis, ROWS: tl.constexpr, COLUMNS: tl.constexpr, V: tl.constexpr):
    """The span of tile `index` of an axis, dilation groups one after another.

    Groups that are one member short may have a last tile without rows: it computes, and stores nothing.
    """
    group = index // axis.tiles
    members = (axis.length - group + axis.dilation - 1) // axis.dilation
    first = (index - group * axis.tiles) * ROWS
    last = tl.minimum(first + ROWS, members) - 1
    first_row = tl.minimum(first, members - 1)
    origin = seen_start(first_row, members, axis, V)
    stop = seen_stop(last, members, axis, V)
    reach = (stop - origin + COLUMNS - 1) // COLUMNS * COLUMNS
    full_start = seen_start(last, members, axis, V)
    full_stop = seen_stop(first_row, members, axis, V)
    return Span(group, members, first, origin, reach, full_start - origin, full_stop - origin)


@triton.jit
def tiles_of(axes):
    """How many tiles a head has."""
    return axes[0].tiles * axes[0].dilation * axes[1].tiles * axes[1].dilation * axes[2].tiles * axes[2].dilation


@triton.jit
def tile_at(index, batch, head, axes, V: tl.constexpr):
    """Tile `index` of a head. They sweep the first axis, then the next."""
    t_tiles = axes[0].tiles * axes[0].dilation
    h_tiles = axes[1].tiles * axes[1].dilation
    w = index // (t_tiles * h_tiles)
    index = index - w * (t_tiles * h_tiles)
    h = index // t_tiles
    return Tile(
        batch,
        head,
        span_of(index - h * t_tiles, axes[0], V.rows[0], V.columns[0], V),
        span_of(h, axes[1], V.rows[1], V.columns[1], V),
        span_of(w, axes[2], V.rows[2], V.columns[2], V),
    )


@triton.jit
def tile_of(axes, heads, V: tl.constexpr):
    """The tile of this block, which is one of a head's, which is one of a batch row's."""
    tiles = tiles_of(axes)
    number = tl.program_id(0) // tiles
    batch = number // heads
    return tile_at(tl.program_id(0) - number * tiles, batch, number - batch * heads, axes, V)


@triton.jit
def places(BOX: tl.constexpr):
    """Where the tokens of a box lie in it, row-major."""
    number = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    return number // (BOX[1] * BOX[2]), number // BOX[2] % BOX[1], number % BOX[2]


@triton.jit
def window_of(place, span, axis, V: tl.constexpr):
    """What the rows at these places of a tile see on one axis."""
    row = tl.minimum(span.first + place, span.members - 1)
    start = seen_start(row, span.members, axis, V)
    return start - span.origin, seen_stop(row, span.members, axis, V) - start


@triton.jit
def windows_of(tile, axes, V: tl.constexpr):
    """What the rows of a tile see."""
    ROWS: tl.constexpr = V.rows
    t_place, h_place, w_place = places(ROWS)
    t_start, t_size = window_of(t_place, tile.t, axes[0], V)
    h_start, h_size = window_of(h_place, tile.h, axes[1], V)
    w_start, w_size = window_of(w_place, tile.w, axes[2], V)
    return Windows(t_start, t_size, h_start, h_size, w_start, w_size)


@triton.jit
def next_box(t, h, w, tile, V: tl.constexpr):
    """The box after the one that begins `(t, h, w)` columns after the origin, the last axis fastest."""
    w = w + V.columns[2]
    if V.rank > 1:
        wrap = w >= tile.w.reach
        w = tl.where(wrap, 0, w)
        h = tl.where(wrap, h + V.columns[1], h)
    if V.rank > 2:
        wrap = h >= tile.h.reach
        h = tl.where(wrap, 0, h)
        t = tl.where(wrap, t + V.columns[0], t)
    return t, h, w


@triton.jit
def boxes_of(tile, V: tl.constexpr):
    """How many boxes a tile walks."""
    boxes = tile.w.reach // V.columns[2]
    if V.rank > 1:
        boxes = boxes * (tile.h.reach // V.columns[1])
    if V.rank > 2:
        boxes = boxes * (tile.t.reach // V.columns[0])
    return boxes


@triton.jit
def is_full(t, h, w, tile, V: tl.constexpr):
    """Whether every row sees every column of a box.

    Bounds move, not places: were the sums of `next_box` wanted here, too, the compiler would make them late, once for
    both, and then no box could be loaded ahead.
    """
    full = (w >= tile.w.full_start) & (w <= tile.w.full_stop - V.columns[2])
    if V.rank > 1:
        full = full & (h >= tile.h.full_start) & (h <= tile.h.full_stop - V.columns[1])
    if V.rank > 2:
        full = full & (t >= tile.t.full_start) & (t <= tile.t.full_stop - V.columns[0])
    return full


@triton.jit
def sees(place, start, size):
    """start <= place < start + size, in one comparison; `[rows, columns]`."""
    return (place[None, :] - start[:, None]).to(tl.uint32, bitcast=True) < size[:, None].to(tl.uint32, bitcast=True)


@triton.jit
def mask_of(windows, t, h, w, V: tl.constexpr):
    """Which rows see which columns of a box that begins `(t, h, w)` after the origins, `[rows, columns]`."""
    COLUMNS: tl.constexpr = V.columns
    t_place, h_place, w_place = places(COLUMNS)
    keep = sees(w_place + w, windows.w_start, windows.w_size)
    if V.rank > 1:
        keep = keep & sees(h_place + h, windows.h_start, windows.h_size)
    if V.rank > 2:
        keep = keep & sees(t_place + t, windows.t_start, windows.t_size)
    return keep


@triton.jit
def entry_of(t, h, w, axes):
    """Number of an offset in a table of position bias, and of a place likewise: numbers differ as places do."""
    return (t * (2 * axes[1].kernel_size - 1) + h) * (2 * axes[2].kernel_size - 1) + w


@triton.jit
def row_entries(tile, axes, V: tl.constexpr):
    """Numbers of the rows' places, counted from the origins, with the middle of the table added on the keys' side."""
    ROWS: tl.constexpr = V.rows
    t_place, h_place, w_place = places(ROWS)
    t = tl.minimum(tile.t.first + t_place, tile.t.members - 1) - tile.t.origin
    h = tl.minimum(tile.h.first + h_place, tile.h.members - 1) - tile.h.origin
    w = tl.minimum(tile.w.first + w_place, tile.w.members - 1) - tile.w.origin
    middle = entry_of(axes[0].kernel_size - 1, axes[1].kernel_size - 1, axes[2].kernel_size - 1, axes)
    if V.are_keys:
        return entry_of(t, h, w, axes) + middle
    else:
        return entry_of(t, h, w, axes) - middle


@triton.jit
def bias_in(table, entries, keep, t, h, w, axes, V: tl.constexpr):
    """The position bias of a box, `(t, h, w)` after the origins, times log2(e); -inf where a row sees no column."""
    COLUMNS: tl.constexpr = V.columns
    t_place, h_place, w_place = places(COLUMNS)
    columns = entry_of(t + t_place, h + h_place, w + w_place, axes)
    if V.are_keys:
        entry = entries[:, None] - columns[None, :]
    else:
        entry = columns[None, :] - entries[:, None]
    return tl.load(table + entry, mask=keep, other=float("-inf")) * LOG2_E


@triton.jit
def table_of(bias, head, axes):
    """Pointer to a head's part of the table, `[H, entries]`."""
    t = 2 * axes[0].kernel_size - 1
    return bias + head.to(tl.int64) * t * entry_of(1, 0, 0, axes)


@triton.jit
def exist(BOX: tl.constexpr, t, h, w, tile, V: tl.constexpr):
    """Which tokens of a box that begins at members `(t, h, w)` lie on the grid."""
    t_place, h_place, w_place = places(BOX)
    here = w + w_place < tile.w.members
    if V.rank > 1:
        here = here & (h + h_place < tile.h.members)
    if V.rank > 2:
        here = here & (t + t_place < tile.t.members)
    return here


@triton.jit
def columns_exist(t, h, w, tile, V: tl.constexpr):
    """Which columns of a box, `(t, h, w)` after the origins, lie on the grid: all where no box needs a mask."""
    COLUMNS: tl.constexpr = V.columns
    if V.masked and not V.is_inside:
        return exist(COLUMNS, tile.t.origin + t, tile.h.origin + h, tile.w.origin + w, tile, V)
    else:
        return tl.full([COLUMNS[0] * COLUMNS[1] * COLUMNS[2]], True, tl.int1)


@triton.jit
def token_at(batch, t, h, w, tile, axes):
    """Number of the token at members `(t, h, w)`, counting those of earlier batch rows, in 64 bits."""
    t = batch.to(tl.int64) * axes[0].length + tile.t.group + t * axes[0].dilation
    h = t * axes[1].length + tile.h.group + h * axes[1].dilation
    return h * axes[2].length + tile.w.group + w * axes[2].dilation


@triton.jit
def tokens_on(t, h, w, axes):
    """Tokens between one and another that is `(t, h, w)` members further."""
    return (t * axes[0].dilation * axes[1].length + h * axes[1].dilation) * axes[2].length + w * axes[2].dilation


@triton.jit
def tokens_in(BOX: tl.constexpr, axes):
    """Numbers of the tokens of a box, relative to its first."""
    t, h, w = places(BOX)
    return tokens_on(t, h, w, axes)


@triton.jit
def vector_at(tensor, t, h, w, tile, head, axes, steps, V: tl.constexpr):
    """Pointer to the vector of a head at members `(t, h, w)`."""
    units = tile.batch.to(tl.int64) * steps.batch + head.to(tl.int64) * steps.head
    units += tile.t.group.to(tl.int64) * steps.t + tile.h.group.to(tl.int64) * steps.h
    units += tile.w.group.to(tl.int64) * steps.w
    return moved(tensor + units * V.unit, t, h, w, axes, steps, V)


@triton.jit
def moved(pointer, t, h, w, axes, steps, V: tl.constexpr):
    """The pointer, `(t, h, w)` members further: fewer than 2^31 vectors, as `launch.steps_of` sees to."""
    units = w * (axes[2].dilation * steps.w)
    if V.rank > 1:
        units += h * (axes[1].dilation * steps.h)
    if V.rank > 2:
        units += t * (axes[0].dilation * steps.t)
    return pointer + units.to(tl.int64) * V.unit


@triton.jit
def vectors_in(BOX: tl.constexpr, axes, steps, V: tl.constexpr):
    """Offsets of the vectors of a box, in elements relative to its first."""
    t, h, w = places(BOX)
    units = t * (axes[0].dilation * steps.t) + h * (axes[1].dilation * steps.h) + w * (axes[2].dilation * steps.w)
    if V.is_wide:
        units = units.to(tl.int64)
    elif V.lifts:
        # As `launch.is_wide` has it. Of numbers that cannot be negative the upper half needs no register.
        units = units & 0x3FFFFFF
    return units * V.unit


@triton.jit
def load(start, offsets, here, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """Vectors `[tokens, DEPTH]`, zeros for those that are not there and beyond `DIM`."""
    d = tl.arange(0, DEPTH)
    mask = here[:, None]
    if DIM < DEPTH:
        mask = mask & (d < DIM)[None, :]
    return tl.load(start + (offsets[:, None] + d[None, :]), mask=mask, other=0.0)


@triton.jit
def load_rest(start, offsets, here, V: tl.constexpr):
    """What the vectors of queries or keys hold beyond the elements of one product."""
    return load(start + V.depth_at_once, offsets, here, V.head_dim - V.depth_at_once, V.depth_at_once)


@triton.jit
def load_rows(start, offsets, here, V: tl.constexpr):
    """Rows as `scored` takes them: what one product takes of each, and the rest of it, if there is any."""
    rows = load(start, offsets, here, V.dim_at_once, V.depth_at_once)
    if V.is_halved:
        return rows, load_rest(start, offsets, here, V)
    else:
        return rows, rows


@triton.jit
def scored(rows, rest, columns, at, offsets, here, added, V: tl.constexpr):
    """Scores of rows and columns, one of them queries and the other keys, and what is added to them, or None.

    Tensor cores cut off what a sum does not hold. Of 256 float32 terms that comes to more than PyTorch loses, so there
    each half, which `rows` and `rest` are of rows, is summed by itself; columns are read again, from `at`.
    """
    if V.is_halved:
        first = load(at, offsets, here, V.depth_at_once, V.depth_at_once)
        scores = tl.dot(rows, tl.trans(first), added, input_precision=V.precision)
        # Subtracted, because the compiler makes one sum of a product and what is added to it.
        return scores - tl.dot(-rest, tl.trans(load_rest(at, offsets, here, V)), input_precision=V.precision)
    else:
        return tl.dot(rows, tl.trans(columns), added, input_precision=V.precision)


@triton.jit
def lifted(rows):
    """The same vectors, in registers, where sm_90's tensor cores find the first operand of a product, too.

    What a product is to read lies in shared memory, rows anew for every box: with 64 of them that takes as long as the
    product itself. What a product leaves lies in registers, and with ones on the diagonal it leaves the rows: exactly,
    but for rows with an infinity, all of which becomes NaN, as their weights do anyway.
    """
    number = tl.arange(0, rows.shape[1])
    ones = (number[:, None] == number[None, :]).to(rows.dtype)
    return tl.dot(rows, ones).to(rows.dtype)


@triton.jit
def store(start, offsets, here, vectors, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """The way back."""
    d = tl.arange(0, DEPTH)
    mask = here[:, None]
    if DIM < DEPTH:
        mask = mask & (d < DIM)[None, :]
    tl.store(start + (offsets[:, None] + d[None, :]), vectors.to(start.dtype.element_ty), mask=mask)


@triton.jit
def valid_additional(lengths, batch, additional):
    """How many additional keys count in a batch row."""
    return tl.minimum(tl.maximum(tl.load(lengths + batch), 0), additional)


@triton.jit
def additional_at(tensor, batch, head, steps, V: tl.constexpr):
    """Pointer to the first additional vector of a batch row and head; `w` steps to the next."""
    return tensor + (batch.to(tl.int64) * steps.batch + head.to(tl.int64) * steps.head) * V.unit
