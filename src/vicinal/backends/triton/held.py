"""All three passes over windows of few boxes, with a position bias, which is what small windows over many images are.

Every batch row adds the same bias. So a block walks the batch rows of one tile and head, and holds in registers what
is added to the scores of all its boxes, -inf where a row sees no column: reading a table for each score, and finding
out who sees whom, took most of the time. In the backward pass, whose products need registers, too, two boxes of more
than two share theirs, 16 bits each: weights are rounded to no more than that before they are multiplied.

    x = scale Q K^T + bias,   P = exp(x - lse)
"""

import triton
import triton.language as tl

from vicinal.backends.triton.backward import FACTS, add_key_gradients, facts_in, facts_of, score_gradients
from vicinal.backends.triton.forward import FLOOR, attend
from vicinal.backends.triton.tile import (
    LN2,
    LOG2_E,
    bias_in,
    columns_exist,
    exist,
    load,
    mask_of,
    moved,
    row_entries,
    store,
    table_of,
    tile_at,
    tiles_of,
    token_at,
    tokens_in,
    tokens_on,
    vector_at,
    vectors_in,
    windows_of,
)


@triton.jit
def tile_of_batch(axes, heads, batches, chunk, V: tl.constexpr):
    """The tile of this block in the first of its batch rows, and one past the last of them."""
    tiles = tiles_of(axes)
    number = tl.program_id(0) // tiles
    turn = number // heads
    first = turn * chunk
    tile = tile_at(tl.program_id(0) - number * tiles, first, number - turn * heads, axes, V)
    return tile, tl.minimum(first + chunk, batches)


@triton.jit
def store_sums(partial_bias, sums, tile, heads, axes, V: tl.constexpr):
    """Leave a block's sums of `dS` where `backward_bias.diagonal_sums` looks for them: one slot, a chunk a block."""
    R: tl.constexpr = V.row_count
    C: tl.constexpr = V.column_count
    tiles = tiles_of(axes)
    turn = tl.program_id(0) // (tiles * heads)
    box = (turn * tiles + tl.program_id(0) % tiles) * heads + tile.head
    inside = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(partial_bias + box.to(tl.int64) * (R * C) + inside, sums)


@triton.jit
def box_at(number: tl.constexpr, V: tl.constexpr):
    """Where a box begins, counted from the origins, the last axis fastest."""
    w = number % V.held[2] * V.columns[2]
    h = number // V.held[2] % V.held[1] * V.columns[1]
    t = number // (V.held[2] * V.held[1]) * V.columns[0]
    return t, h, w


@triton.jit
def bias_of(number: tl.constexpr, table, tile, axes, V: tl.constexpr):
    """What is added to the scores of a box, in the layout of products: what one begins with has that."""
    R: tl.constexpr = V.row_count
    C: tl.constexpr = V.column_count
    t, h, w = box_at(number, V)
    keep = mask_of(windows_of(tile, axes, V), t, h, w, V)
    added = bias_in(table, row_entries(tile, axes, V), keep, t, h, w, axes, V)
    nothing = tl.zeros([R, 16], tl.float16)
    return tl.dot(nothing, tl.zeros([16, C], tl.float16), added)


@triton.jit
def as_bits(added):
    """Numbers in float16, none infinite that was not, as integers of 32 bits.

    No more times log2(e), so that those of a table in 16 bits are what they were.
    """
    added = added * LN2
    near = tl.where(added == float("-inf"), added, tl.minimum(tl.maximum(added, -65504.0), 65504.0))
    return near.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def held_bias(bias, tile, axes, V: tl.constexpr):
    """What is added to the scores of all boxes; if `V.is_packed`, of two boxes to a block."""
    BOXES: tl.constexpr = V.held[0] * V.held[1] * V.held[2]
    table = table_of(bias, tile.head, axes)
    blocks = ()
    if V.is_packed:
        for number in tl.static_range(0, BOXES, 2):
            pair = as_bits(bias_of(number, table, tile, axes, V))
            if number + 1 < BOXES:
                pair = pair | (as_bits(bias_of(number + 1, table, tile, axes, V)) << 16)
            blocks = blocks + (pair,)
    else:
        for number in tl.static_range(BOXES):
            blocks = blocks + (bias_of(number, table, tile, axes, V),)
    return blocks


@triton.jit
def biased(products, scale, blocks, number: tl.constexpr, zero, V: tl.constexpr):
    """Scaled scores of a box with what is added to them, times log2(e).

    `zero` is a zero that compilers do not know of: otherwise they unpack everything once, before the batch rows, into
    more registers than there are.
    """
    if V.is_packed:
        bits = (blocks[number // 2] ^ zero) >> (number % 2 * 16)
        added = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return (products * (scale * LN2) + added) * LOG2_E
    else:
        return products * scale + blocks[number]


@triton.jit
def forward_held(
    query, key, value, out, bias, lse, axes, steps, heads, group, batches, chunk, scale, V: tl.constexpr
):  # fmt: skip
    """One block: one tile of queries of one head, in `chunk` batch rows. Arguments as in `forward.forward`.

    Args:
        batches, chunk: batch rows, and how many of them a block walks.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    tile, stop = tile_of_batch(axes, heads, batches, chunk, V)
    head_kv = tile.head // group
    blocks = held_bias(bias, tile, axes, V)
    t_first = tile.t.first
    h_first = tile.h.first
    w_first = tile.w.first
    here = exist(ROWS, t_first, h_first, w_first, tile, V)
    query_at = vector_at(query, t_first, h_first, w_first, tile, tile.head, axes, steps.query, V)
    out_at = vector_at(out, t_first, h_first, w_first, tile, tile.head, axes, steps.out, V)
    key_at = vector_at(key, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.key, V)
    value_at = vector_at(value, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.value, V)
    lse_at = lse + token_at(tile.batch, t_first, h_first, w_first, tile, axes) * heads + tile.head
    query_offsets = vectors_in(ROWS, axes, steps.query, V)
    out_offsets = vectors_in(ROWS, axes, steps.out, V)
    key_offsets = vectors_in(COLUMNS, axes, steps.key, V)
    value_offsets = vectors_in(COLUMNS, axes, steps.value, V)
    lse_offsets = tokens_in(ROWS, axes) * heads
    to_next = heads.to(tl.int64) * axes[0].length * axes[1].length * axes[2].length
    for batch in tl.range(tile.batch, stop):
        q = load(query_at, query_offsets, here, V.head_dim, D)
        acc = tl.zeros([R, DV], tl.float32)
        peak = tl.full([R], FLOOR, tl.float32)
        total = tl.zeros([R], tl.float32)
        for number in tl.static_range(V.held[0] * V.held[1] * V.held[2]):
            t, h, w = box_at(number, V)
            near = columns_exist(t, h, w, tile, V)
            k = load(moved(key_at, t, h, w, axes, steps.key, V), key_offsets, near, V.head_dim, D)
            v = load(moved(value_at, t, h, w, axes, steps.value, V), value_offsets, near, V.head_dim_v, DV)
            scores = biased(tl.dot(q, tl.trans(k)), scale, blocks, number, tl.minimum(batch, 0), V)
            acc, peak, total = attend(scores, v, acc, peak, total, 1.0, V)
        store(out_at, out_offsets, here, acc / total[:, None], V.head_dim_v, DV)
        tl.store(lse_at + lse_offsets, (peak + tl.log2(total)) * LN2, mask=here)
        query_at += steps.query.batch * V.unit
        key_at += steps.key.batch * V.unit
        value_at += steps.value.batch * V.unit
        out_at += steps.out.batch * V.unit
        lse_at += to_next


@triton.jit
def query_gradients_held(
    query, key, value, out, bias, grad_out, grad_query, lse, grad_lse, facts, sums, delta, partial_bias,
    axes, steps, heads, group, batches, chunk, has_grad_lse, scale, V: tl.constexpr,
):  # fmt: skip
    """One block: the gradients of one tile of queries of one head, in `chunk` batch rows.

    Arguments as in `backward.query_gradients` and `forward_held`.

    Args:
        partial_bias: if `V.sums`, the sums of `dS` as `backward_bias.bias_gradients` leaves them, of one slot.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    C: tl.constexpr = V.column_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    DTYPE: tl.constexpr = query.dtype.element_ty
    tile, stop = tile_of_batch(axes, heads, batches, chunk, V)
    head_kv = tile.head // group
    blocks = held_bias(bias, tile, axes, V)
    t_first = tile.t.first
    h_first = tile.h.first
    w_first = tile.w.first
    here = exist(ROWS, t_first, h_first, w_first, tile, V)
    query_at = vector_at(query, t_first, h_first, w_first, tile, tile.head, axes, steps.query, V)
    grad_at = vector_at(grad_out, t_first, h_first, w_first, tile, tile.head, axes, steps.grad_out, V)
    out_at = vector_at(out, t_first, h_first, w_first, tile, tile.head, axes, steps.out, V)
    dq_at = vector_at(grad_query, t_first, h_first, w_first, tile, tile.head, axes, steps.grad_query, V)
    key_at = vector_at(key, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.key, V)
    value_at = vector_at(value, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.value, V)
    query_offsets = vectors_in(ROWS, axes, steps.query, V)
    grad_offsets = vectors_in(ROWS, axes, steps.grad_out, V)
    out_offsets = vectors_in(ROWS, axes, steps.out, V)
    dq_offsets = vectors_in(ROWS, axes, steps.grad_query, V)
    key_offsets = vectors_in(COLUMNS, axes, steps.key, V)
    value_offsets = vectors_in(COLUMNS, axes, steps.value, V)
    by_token = token_at(tile.batch, t_first, h_first, w_first, tile, axes) * heads + tile.head
    by_head = token_at(tile.batch * heads + tile.head, t_first, h_first, w_first, tile, axes)
    to_next = heads.to(tl.int64) * axes[0].length * axes[1].length * axes[2].length
    if V.sums:
        acc = tl.zeros([R, C], tl.float32)
    for batch in tl.range(tile.batch, stop):
        q = load(query_at, query_offsets, here, V.head_dim, D)
        do = load(grad_at, grad_offsets, here, V.head_dim_v, DV)
        o = load(out_at, out_offsets, here, V.head_dim_v, DV)
        place = by_token + tokens_in(ROWS, axes) * heads
        shift = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        shift -= tl.load(grad_lse + place, mask=here & (has_grad_lse != 0), other=0.0)
        total = tl.load(lse + place, mask=here, other=0.0) * LOG2_E
        place = by_head + tokens_in(ROWS, axes)
        tl.store(facts + place * FACTS, total, mask=here)
        tl.store(facts + (place * FACTS + 1), -shift, mask=here)
        tl.store(delta + place, shift, mask=here)
        tl.store(sums + place, total, mask=here)
        dq = tl.zeros([R, D], tl.float32)
        for number in tl.static_range(V.held[0] * V.held[1] * V.held[2]):
            t, h, w = box_at(number, V)
            near = columns_exist(t, h, w, tile, V)
            k = load(moved(key_at, t, h, w, axes, steps.key, V), key_offsets, near, V.head_dim, D)
            v = load(moved(value_at, t, h, w, axes, steps.value, V), value_offsets, near, V.head_dim_v, DV)
            scores = biased(tl.dot(q, tl.trans(k)), scale, blocks, number, tl.minimum(batch, 0), V)
            p = tl.exp2(scores - total[:, None])
            ds = score_gradients(p, do, v, shift, V)
            if V.sums:
                acc += ds
            dq = tl.dot(ds.to(DTYPE), k, dq)
        store(dq_at, dq_offsets, here, dq * (scale * LN2), V.head_dim, D)
        query_at += steps.query.batch * V.unit
        grad_at += steps.grad_out.batch * V.unit
        out_at += steps.out.batch * V.unit
        dq_at += steps.grad_query.batch * V.unit
        key_at += steps.key.batch * V.unit
        value_at += steps.value.batch * V.unit
        by_token += to_next
        by_head += to_next
    if V.sums:
        store_sums(partial_bias, acc, tile, heads, axes, V)


@triton.jit
def key_gradients_held(
    query, key, value, bias, grad_out, grad_key, grad_value, facts, axes, steps, heads, batches, chunk, scale,
    V: tl.constexpr,
):  # fmt: skip
    """One block: the gradients of one tile of keys and values of one head, in `chunk` batch rows. Rows are keys here.

    Arguments as in `backward.key_gradients` and `forward_held`; every head has keys of its own.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    tile, stop = tile_of_batch(axes, heads, batches, chunk, V)
    blocks = held_bias(bias, tile, axes, V)
    t_first = tile.t.first
    h_first = tile.h.first
    w_first = tile.w.first
    t = tile.t.origin
    h = tile.h.origin
    w = tile.w.origin
    here = exist(ROWS, t_first, h_first, w_first, tile, V)
    key_at = vector_at(key, t_first, h_first, w_first, tile, tile.head, axes, steps.key, V)
    value_at = vector_at(value, t_first, h_first, w_first, tile, tile.head, axes, steps.value, V)
    dk_at = vector_at(grad_key, t_first, h_first, w_first, tile, tile.head, axes, steps.grad_key, V)
    dv_at = vector_at(grad_value, t_first, h_first, w_first, tile, tile.head, axes, steps.grad_value, V)
    query_at = vector_at(query, t, h, w, tile, tile.head, axes, steps.query, V)
    grad_at = vector_at(grad_out, t, h, w, tile, tile.head, axes, steps.grad_out, V)
    fact_at = facts + FACTS * token_at(tile.batch * heads + tile.head, t, h, w, tile, axes)
    key_offsets = vectors_in(ROWS, axes, steps.key, V)
    value_offsets = vectors_in(ROWS, axes, steps.value, V)
    dk_offsets = vectors_in(ROWS, axes, steps.grad_key, V)
    dv_offsets = vectors_in(ROWS, axes, steps.grad_value, V)
    query_offsets = vectors_in(COLUMNS, axes, steps.query, V)
    grad_offsets = vectors_in(COLUMNS, axes, steps.grad_out, V)
    fact_offsets = facts_in(COLUMNS, axes, V)
    to_next = heads.to(tl.int64) * axes[0].length * axes[1].length * axes[2].length * FACTS
    for batch in tl.range(tile.batch, stop):
        k = load(key_at, key_offsets, here, V.head_dim, D)
        v = load(value_at, value_offsets, here, V.head_dim_v, DV)
        dk = tl.zeros([R, D], tl.float32)
        dv = tl.zeros([R, DV], tl.float32)
        for number in tl.static_range(V.held[0] * V.held[1] * V.held[2]):
            t, h, w = box_at(number, V)
            near = columns_exist(t, h, w, tile, V)
            q = load(moved(query_at, t, h, w, axes, steps.query, V), query_offsets, near, V.head_dim, D)
            do = load(moved(grad_at, t, h, w, axes, steps.grad_out, V), grad_offsets, near, V.head_dim_v, DV)
            total, shift = facts_of(fact_at + FACTS * tokens_on(t, h, w, axes).to(tl.int64), fact_offsets, near)
            scores = biased(tl.dot(k, tl.trans(q)), scale, blocks, number, tl.minimum(batch, 0), V)
            p = tl.exp2(scores - total[None, :])
            dk, dv = add_key_gradients(p, q, do, v, shift, dk, dv, V)
        store(dk_at, dk_offsets, here, dk * (scale * LN2), V.head_dim, D)
        store(dv_at, dv_offsets, here, dv, V.head_dim_v, DV)
        key_at += steps.key.batch * V.unit
        value_at += steps.value.batch * V.unit
        dk_at += steps.grad_key.batch * V.unit
        dv_at += steps.grad_value.batch * V.unit
        query_at += steps.query.batch * V.unit
        grad_at += steps.grad_out.batch * V.unit
        fact_at += to_next
