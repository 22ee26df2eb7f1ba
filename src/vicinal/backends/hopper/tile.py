"""Device nouns: a query tile, the keys it visits, and the mask between them.

Everything here answers one question about one tile. `Span` is the device's copy of `plan.Span`: it
is computed from a few integers instead of being read from memory, and a test holds the two equal.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.language.core import _aggregate as aggregate

load_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed in Triton 3.9
store_box = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

NEVER = gl.constexpr(-(2.0**100))
"""What hides a score: far below any other, and a power of two, so that sums of a few cancel exactly."""

FLOOR = gl.constexpr(-1e20)
"""Lower bound of the running maximum, so that a row whose keys are all hidden so far stays finite."""

LN2 = gl.constexpr(0.6931471805599453)


# ---- where a tile is -------------------------------------------------------------------------


@aggregate
class Span:
    """One query tile along one axis, and the KV boxes that it visits; positions count members of its group.

    A tensor map sees member `m` of dilation group `group` at coordinate `m + shift` of a map that
    begins `residue` tokens after its base, see `launch.tensor_map`.
    """

    first: gl.tensor
    members: gl.tensor
    origin: gl.tensor
    visited: gl.tensor
    residue: gl.tensor
    shift: gl.tensor

    def __init__(self, first, members, origin, visited, residue, shift):
        self.first = first
        self.members = members
        self.origin = origin
        self.visited = visited
        self.residue = residue
        self.shift = shift


@aggregate
class Tile:
    """The query tile of one block."""

    batch: gl.tensor
    head: gl.tensor
    t: Span
    h: Span
    w: Span

    def __init__(self, batch, head, t, h, w):
        self.batch = batch
        self.head = head
        self.t = t
        self.h = h
        self.w = w

    @gluon.jit
    def boxes(self):
        """KV boxes to visit; 0 if the tile lies past the end of a short dilation group."""
        return self.t.visited * self.h.visited * self.w.visited

    @gluon.jit
    def column(self, head, steps):
        """Where the tile's head and dilation groups begin, in elements: the innermost coordinate."""
        return head * steps.head + self.t.residue * steps.t + self.h.residue * steps.h + self.w.residue * steps.w


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
def span_of(index, axis, Q: gl.constexpr, K: gl.constexpr):
    """The span of query tile `index`, for tiles of `Q` queries and `K` keys."""
    tile = index
    members = axis.length
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
    origin = window_start(first, members, axis)
    visited = (window_stop(last, members, axis) - origin + K - 1) // K
    return Span(first, members, origin, gl.where(first < members, visited, 0), residue, shift)


@gluon.jit
def tile_of(axes, V: gl.constexpr):
    """The tile of this block: the first axis runs fastest, because its neighbors share most keys in the L2 cache."""
    index = gl.program_id(0)
    t_tiles = axes[0].tiles * axes[0].dilation
    w_tiles = axes[2].tiles * axes[2].dilation
    rest = index // t_tiles
    h = rest // w_tiles
    return Tile(
        gl.program_id(2),
        gl.program_id(1),
        span_of(index - rest * t_tiles, axes[0], V.q_tile[0], V.kv_box[0]),
        span_of(h, axes[1], V.q_tile[1], V.kv_box[1]),
        span_of(rest - h * w_tiles, axes[2], V.q_tile[2], V.kv_box[2]),
    )


@gluon.jit
def next_box(t, h, w, tile):
    """The KV box after this one, the last axis fastest."""
    w = w + 1
    wrap = w == tile.w.visited
    w = gl.where(wrap, 0, w)
    h = gl.where(wrap, h + 1, h)
    wrap = h == tile.h.visited
    return gl.where(wrap, t + 1, t), gl.where(wrap, 0, h), w


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    """The slot of a ring after this one; its barriers change phase once a round."""
    slot = slot + 1
    wrap = slot == SLOTS
    return gl.where(wrap, 0, slot), gl.where(wrap, phase ^ 1, phase)


# ---- moving boxes ----------------------------------------------------------------------------


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
    mbarrier.expect(barrier, desc.block_type.nbytes)
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
    mbarrier.expect(barrier, desc.block_type.nbytes)
    flat = smem.reshape([1, 1, 1, V.keys, V.head_dim])
    load_box(desc, [tile.batch, 0, 0, number * V.keys, column], barrier, flat)


# ---- the mask --------------------------------------------------------------------------------


@gluon.jit
def row_window(row, span, axis):
    """Window of row `row` of a query tile, relative to the span's origin: start and length."""
    member = gl.minimum(span.first + row, span.members - 1)
    start = window_start(member, span.members, axis)
    return start - span.origin, window_stop(member, span.members, axis) - start


@gluon.jit
def row_windows(rows, tile, axes, V: gl.constexpr, consumer: gl.constexpr):
    """Windows of the rows of one warpgroup: start and length on each axis."""
    t = rows // (V.box[1] * V.box[2]) + (consumer * V.box[0] if V.stack == 0 else 0)
    h = rows // V.box[2] % V.box[1] + (consumer * V.box[1] if V.stack == 1 else 0)
    w = rows % V.box[2] + (consumer * V.box[2] if V.stack == 2 else 0)
    t_start, t_size = row_window(t, tile.t, axes[0])
    h_start, h_size = row_window(h, tile.h, axes[1])
    w_start, w_size = row_window(w, tile.w, axes[2])
    return t_start, t_size, h_start, h_size, w_start, w_size


@gluon.jit
def sees(place, size):
    """0 <= place < size, in one comparison."""
    return place.to(gl.uint32, bitcast=True) < size.to(gl.uint32, bitcast=True)


@aggregate
class Code:
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

    place: gl.tensor
    last: gl.tensor
    size: gl.tensor
    t_last: gl.tensor
    t_size: gl.tensor
    h_last: gl.tensor
    h_size: gl.tensor
    w_last: gl.tensor
    w_size: gl.tensor

    def __init__(self, place, last, size, t_last, t_size, h_last, h_size, w_last, w_size):
        self.place = place
        self.last = last
        self.size = size
        self.t_last = t_last
        self.t_size = t_size
        self.h_last = h_last
        self.h_size = h_size
        self.w_last = w_last
        self.w_size = w_size


@gluon.jit
def code_columns(columns, V: gl.constexpr):
    """Of each column of the code: whether it is the last axis', the middle one's, the first one's; and its place."""
    W: gl.constexpr = code_places(V, 2)
    H: gl.constexpr = code_places(V, 1)
    T: gl.constexpr = code_places(V, 0)
    is_w = columns < W
    is_h = (columns >= W) & (columns < W + H)
    is_t = (columns >= W + H) & (columns < W + H + T)
    place = columns - gl.where(is_w, 0, gl.where(is_h, W, W + H))
    return is_t, is_h, is_w, place


@gluon.constexpr_function
def code_places(V, axis):
    """Columns of one axis; an axis that the grid lacks hides nothing."""
    n = V.kv_box[axis] if axis >= 3 - V.rank else 0
    if n == 0:
        return 0
    return n - 1 if V.code_is_reduced else n


@gluon.jit
def code_of(tile, axes, layout: gl.constexpr, V: gl.constexpr, consumer: gl.constexpr):
    """The code `P` of one warpgroup, up to the box's number."""
    rows = gl.expand_dims(gl.arange(0, 64, layout=gl.SliceLayout(1, layout)), 1)
    columns = gl.expand_dims(gl.arange(0, V.code_width, layout=gl.SliceLayout(0, layout)), 0)
    t0, tn, h0, hn, w0, wn = row_windows(rows, tile, axes, V, consumer)
    is_t, is_h, is_w, place = code_columns(columns, V)
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
    is_t, is_h, is_w, _ = code_columns(columns, V)
    t_keys = t * V.kv_box[0]
    h_keys = h * V.kv_box[1]
    w_keys = w * V.kv_box[2]
    past = gl.where(is_w, w_keys, gl.where(is_h, h_keys, t_keys))
    p = hidden(code.place + past, code.size)
    if V.code_is_reduced:
        shared = (
            hidden(code.t_last + t_keys, code.t_size)
            + hidden(code.h_last + h_keys, code.h_size)
            + hidden(code.w_last + w_keys, code.w_size)
        )
        p = gl.where(is_w | is_h | is_t, p - hidden(code.last + past, code.size), shared)
    return p.to(gl.bfloat16)


@gluon.jit
def place_code(V: gl.constexpr, WARPS: gl.constexpr):
    """`E`, in shared memory and transposed: `[keys, code]`, ones where a column is a key's place."""
    WIDTH: gl.constexpr = V.code_width
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [WARPS, 1], [1, 0])
    keys = gl.expand_dims(gl.arange(0, V.keys, layout=gl.SliceLayout(1, layout)), 1)
    columns = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout)), 0)
    is_t, is_h, is_w, place = code_columns(columns, V)
    t = keys // (V.kv_box[1] * V.kv_box[2])
    h = keys // V.kv_box[2] % V.kv_box[1]
    w = keys % V.kv_box[2]
    marked = (is_w & (place == w)) | (is_h & (place == h)) | (is_t & (place == t))
    if V.code_is_reduced:
        marked = marked | (columns == code_places(V, 0) + code_places(V, 1) + code_places(V, 2))
    shared: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=2 * WIDTH, element_bitwidth=16, rank=2)
    code = gl.allocate_shared_memory(gl.bfloat16, [V.keys, WIDTH], shared)
    code.store(gl.where(marked, 1.0, 0.0).to(gl.bfloat16))
    return code
