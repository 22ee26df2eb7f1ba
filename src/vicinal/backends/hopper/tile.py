"""Device nouns: a query tile, the keys it visits, and the mask between them.

Gradients of keys and values walk the inverse: if `V.is_inverse`, queries and keys have changed places in all
that is said here, as in `plan.AxisPlan`.

Everything here answers one question about one tile. `Span` is the device's copy of `plan.Span`: it
is computed from a few integers instead of being read from memory, and a test holds the two equal.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from vicinal.backends.hopper.variant import AxisArgs

load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.9
wait_for_warps = getattr(gl, "barrier", None) or gl.thread_barrier  # likewise
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


class Span(NamedTuple):
    """One query tile along one axis, and the KV boxes that it visits; positions count members of its group.

    A tensor map sees member `m` of dilation group `group` at coordinate `m + shift` of a map that
    begins `residue` tokens after its base, see `launch.tensor_map`.
    """

    first: Any
    members: Any
    origin: Any
    visited: Any
    group: Any
    residue: Any
    shift: Any


class Tile(NamedTuple):
    """The query tile of one block, and the first of its heads."""

    batch: Any
    head: Any
    t: Any
    h: Any
    w: Any


@gluon.jit
def read_again(axes):
    """`axes`, told in a way that the compiler takes for news.

    Otherwise it finds that all warps need the same few sums of what a kernel is told, computes them once before the
    warps part, and has no registers to keep them in until then.
    """
    return (axis_again(axes[0]), axis_again(axes[1]), axis_again(axes[2]))


@gluon.jit
def axis_again(axis):
    return AxisArgs(
        again(axis.length),
        again(axis.kernel_size),
        again(axis.stride),
        again(axis.dilation),
        again(axis.is_causal),
        again(axis.tiles),
    )


@gluon.jit
def again(x):
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def window_start(member, members, axis):
    """First key of a window, as `window.window` defines it."""
    leader = member
    if axis.stride > 1:
        in_group = gl.where(axis.is_causal != 0, axis.stride - 1, axis.stride // 2)
        leader = member - member % axis.stride + in_group
    leader = gl.minimum(leader, members - 1)
    reach = gl.where(axis.is_causal != 0, axis.kernel_size - 1, axis.kernel_size // 2)
    room = gl.where(axis.is_causal != 0, 0, axis.kernel_size)
    return gl.minimum(gl.maximum(leader - reach, 0), members - room)


@gluon.jit
def window_stop(member, members, axis):
    """One past the last key of a window."""
    return gl.where(axis.is_causal != 0, member + 1, window_start(member, members, axis) + axis.kernel_size)


@gluon.jit
def viewers_stop(member, members, axis):
    """One past the last query that sees a key, as `window.viewers` defines it."""
    lead = gl.where(axis.is_causal != 0, axis.stride - 1, axis.stride // 2)
    reach = gl.where(axis.is_causal != 0, axis.kernel_size - 1, axis.kernel_size // 2)
    last = member + reach - lead
    if axis.stride > 1:
        last = last // axis.stride * axis.stride + axis.stride - 1
    return gl.where(member >= members - axis.kernel_size, members, gl.minimum(last + 1, members))


@gluon.jit
def viewers_start(member, members, axis):
    """First query that sees a key."""
    stop = viewers_stop(gl.maximum(member - axis.kernel_size, 0), members, axis)
    return gl.where(axis.is_causal != 0, member, gl.where(member < axis.kernel_size, 0, stop))


@gluon.jit
def seen_start(member, members, axis, IS_INVERSE: gl.constexpr):
    if IS_INVERSE:
        return viewers_start(member, members, axis)
    else:
        return window_start(member, members, axis)


@gluon.jit
def seen_stop(member, members, axis, IS_INVERSE: gl.constexpr):
    if IS_INVERSE:
        return viewers_stop(member, members, axis)
    else:
        return window_stop(member, members, axis)


@gluon.jit
def span_of(index, axis, Q: gl.constexpr, K: gl.constexpr, IS_INVERSE: gl.constexpr = False):
    """The span of query tile `index`, for tiles of `Q` queries and `K` keys.

    Groups that are one member short may have a last tile without queries: it computes, and all that
    it stores is clipped.
    """
    tile = index
    members = axis.length
    group = index * 0
    residue = index * 0
    shift = index * 0
    if axis.dilation > 1:
        group = index // axis.tiles
        tile = index - group * axis.tiles
        long_groups = axis.length % axis.dilation
        members = axis.length // axis.dilation + gl.where(group < long_groups, 1, 0)
        residue = group - long_groups + gl.where(group < long_groups, axis.dilation, 0)
        shift = gl.where((group >= long_groups) & (long_groups > 0), 1, 0)
    first = tile * Q
    last = gl.minimum(first + Q, members) - 1
    origin = seen_start(first, members, axis, IS_INVERSE)
    visited = (seen_stop(last, members, axis, IS_INVERSE) - origin + K - 1) // K
    return Span(first, members, origin, visited, group, residue, shift)


@gluon.jit
def tile_of(axes, slab, heads_per_block, V: gl.constexpr):
    """The tile of this block.

    Blocks of a head sweep the first axis, `slab` tiles of the last axis wide, one slab after another,
    so that what neighboring tiles share is still in the L2 cache when the second of them comes.
    """
    t_tiles = axes[0].tiles * axes[0].dilation
    h_tiles = axes[1].tiles * axes[1].dilation
    w_tiles = axes[2].tiles * axes[2].dilation
    first = gl.program_id(0) // (t_tiles * h_tiles * slab) * slab
    index = gl.program_id(0) - first * t_tiles * h_tiles
    width = gl.minimum(slab, w_tiles - first)
    line = index // width
    t = line // h_tiles
    return Tile(
        gl.program_id(2),
        gl.program_id(1) * heads_per_block,
        span_on(0, t, axes, V),
        span_on(1, line - t * h_tiles, axes, V),
        span_on(2, first + index - line * width, axes, V),
    )


@gluon.jit
def span_on(AXIS: gl.constexpr, index, axes, V: gl.constexpr):
    """The span of query tile `index` of an axis; known beforehand where the grid lacks that axis."""
    if AXIS < 3 - V.rank:
        return Span(0, 1, 0, 1, 0, 0, 0)
    else:
        return span_of(index, axes[AXIS], V.q_tile[AXIS], V.kv_box[AXIS], V.is_inverse)


class Counts(NamedTuple):
    """What a query tile visits: KV boxes inside its windows, then tiles of additional keys, of which `valid` count."""

    boxes: Any
    more_tiles: Any
    valid: Any


@gluon.jit
def counts_of(tile, lengths, additional, V: gl.constexpr):
    boxes = tile.t.visited * tile.h.visited * tile.w.visited
    if V.has_additional:
        valid = additional
        if lengths.to(gl.int64) != 0:
            valid = gl.minimum(gl.maximum(gl.load(lengths + tile.batch), 0), additional)
        return Counts(boxes, (valid + V.keys - 1) // V.keys, valid)
    else:
        return Counts(boxes, boxes * 0, boxes * 0)


@gluon.jit
def valid_from(counts, i, V: gl.constexpr):
    """How many additional keys count from tile `i` on."""
    return counts.valid - (i - counts.boxes) * V.keys


@gluon.jit
def column(tile, head, steps):
    """Where a head and the tile's dilation groups begin, in elements: the innermost coordinate."""
    return head * steps.head + tile.t.residue * steps.t + tile.h.residue * steps.h + tile.w.residue * steps.w


class Columns(NamedTuple):
    """Innermost coordinates of a query tile in each tensor."""

    query: Any
    key: Any
    value: Any
    more_key: Any
    more_value: Any
    out: Any


@gluon.jit
def columns_of(tile, head, steps, heads_per_key):
    """Those of query head `head`."""
    kv_head = head // heads_per_key
    return Columns(
        column(tile, head, steps[0]),
        column(tile, kv_head, steps[1]),
        column(tile, kv_head, steps[2]),
        kv_head * steps[4].head,
        kv_head * steps[5].head,
        column(tile, head, steps[3]),
    )


@gluon.jit
def next_columns(columns, head, steps, heads_per_key):
    """Those of the head after `head`."""
    kv_heads = 1
    if heads_per_key > 1:
        kv_heads = (head + 1) // heads_per_key - head // heads_per_key
    return Columns(
        columns.query + steps[0].head,
        columns.key + kv_heads * steps[1].head,
        columns.value + kv_heads * steps[2].head,
        columns.more_key + kv_heads * steps[4].head,
        columns.more_value + kv_heads * steps[5].head,
        columns.out + steps[3].head,
    )


@gluon.jit
def row_places(rows, V: gl.constexpr, consumer: gl.constexpr):
    """Where the rows of one warpgroup lie in the tile."""
    t = rows // (V.box[1] * V.box[2]) + (consumer * V.box[0] if V.stack == 0 else 0)
    h = rows // V.box[2] % V.box[1] + (consumer * V.box[1] if V.stack == 1 else 0)
    w = rows % V.box[2] + (consumer * V.box[2] if V.stack == 2 else 0)
    return t, h, w


@gluon.jit
def edge_of(tile, axes, V: gl.constexpr, consumer: gl.constexpr):
    """Number of a box along the axis that two warpgroups are stacked on, see `sees_box`.

    Two tiles side by side walk the boxes that either sees. The first ends early and the second begins late: this is
    one past the last box that a row of the first sees, or the first box that a row of the second sees.
    """
    SIDE: gl.constexpr = V.box[V.stack]
    BOX: gl.constexpr = V.kv_box[V.stack]
    span = (tile.t, tile.h, tile.w)[V.stack]
    axis = axes[V.stack]
    if consumer == 0:
        last = gl.minimum(span.first + SIDE, span.members) - 1
        return (seen_stop(last, span.members, axis, V.is_inverse) - span.origin + BOX - 1) // BOX
    else:
        first = span.first + SIDE
        start = seen_start(gl.minimum(first, span.members - 1), span.members, axis, V.is_inverse)
        return gl.where(first < span.members, (start - span.origin) // BOX, 0x7FFFFFFF)


@gluon.jit
def sees_box(t, h, w, edge, V: gl.constexpr, consumer: gl.constexpr):
    """Whether some row of this warpgroup sees box `(t, h, w)` of those that its block walks."""
    place = (t, h, w)[V.stack]
    if consumer == 0:
        return place < edge
    else:
        return place >= edge


@gluon.jit
def hold_order(block):
    """Waits for nothing, but ends a basic block: the assembler would move exponentials behind the wait that follows."""
    mbarrier.wait(block.rows_full.index(0), 0)


@gluon.jit
def next_box(t, h, w, tile, V: gl.constexpr):
    """The KV box after this one, the last axis fastest."""
    w = w + 1
    if V.rank > 1:
        wrap = w == tile.w.visited
        w = gl.where(wrap, 0, w)
        h = gl.where(wrap, h + 1, h)
    if V.rank > 2:
        wrap = h == tile.h.visited
        h = gl.where(wrap, 0, h)
        t = gl.where(wrap, t + 1, t)
    return t, h, w


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot of a ring after this one; its barriers change phase once a round."""
    slot = slot + 1
    wrap = slot == SLOTS
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def load_queries(desc, column, tile, barrier, smem, V: gl.constexpr, consumer: gl.constexpr):
    """Start to load the queries of one warpgroup."""
    mbarrier.expect(barrier, desc.block_type.nbytes)
    load_box(desc, query_place(tile, column, V, consumer), barrier, smem)


@gluon.jit
def query_place(tile, column, V: gl.constexpr, consumer: gl.constexpr):
    """Where the queries (and outputs) of one warpgroup lie."""
    return [
        tile.batch,
        tile.t.first + tile.t.shift + (consumer * V.box[0] if V.stack == 0 else 0),
        tile.h.first + tile.h.shift + (consumer * V.box[1] if V.stack == 1 else 0),
        tile.w.first + tile.w.shift + (consumer * V.box[2] if V.stack == 2 else 0),
        column,
    ]


@gluon.jit
def load_keys(desc, column, tile, t, h, w, barrier, smem, V: gl.constexpr):
    """Start to load box `(t, h, w)` of keys or values. Keys past the grid's end arrive as zeros."""
    place = [
        tile.batch,
        tile.t.origin + tile.t.shift + t * V.kv_box[0],
        tile.h.origin + tile.h.shift + h * V.kv_box[1],
        tile.w.origin + tile.w.shift + w * V.kv_box[2],
        column,
    ]
    load_box(desc, place, barrier, smem)


@gluon.jit
def load_additional(desc, column, tile, number, barrier, smem, V: gl.constexpr):
    """Start to load the `number`-th tile of additional keys or values."""
    flat = smem.reshape([1, 1, 1, V.keys, V.columns])
    load_box(desc, [tile.batch, 0, 0, number * V.keys, column], barrier, flat)


@gluon.jit
def load_next(desc, more, column, more_column, tile, counts, i, t, h, w, barrier, smem, V: gl.constexpr):
    """Start to load the `i`-th tile of keys or values: box `(t, h, w)`, or additional ones after the last box.

    The caller has told the barrier what to expect.
    """
    if V.has_additional:
        if i < counts.boxes:
            load_keys(desc, column, tile, t, h, w, barrier, smem, V)
        else:
            load_additional(more, more_column, tile, i - counts.boxes, barrier, smem, V)
    else:
        load_keys(desc, column, tile, t, h, w, barrier, smem, V)
