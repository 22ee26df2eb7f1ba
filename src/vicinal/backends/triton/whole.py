"""The backward pass where a tile and its one box are a whole dilation group, in one kernel: windows as large as their
group, as in half of DiNAT's layers, with a position bias that a block holds while it walks batch rows, see `held`.

Nobody outside the block sees its keys, so one meeting of queries and keys gives every gradient: five products where the
passes for queries and for keys take seven, each tensor read once, and nothing left in memory by one for the other.
"""

import triton
import triton.language as tl

from vicinal.backends.triton.held import biased, held_bias, store_sums, tile_of_batch
from vicinal.backends.triton.tile import (
    LN2,
    LOG2_E,
    columns_exist,
    exist,
    load,
    store,
    token_at,
    tokens_in,
    vector_at,
    vectors_in,
)


@triton.jit
def whole_gradients(
    query, key, value, out, bias, grad_out, grad_query, grad_key, grad_value, lse, grad_lse, partial_bias,
    axes, steps, heads, batches, chunk, has_grad_lse, scale, V: tl.constexpr,
):  # fmt: skip
    """One block: all gradients of one dilation group of one head, in `chunk` batch rows.

    Arguments as in `held.query_gradients_held` and `held.key_gradients_held`; every head has keys of its own.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    C: tl.constexpr = V.column_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    DTYPE: tl.constexpr = query.dtype.element_ty
    tile, stop = tile_of_batch(axes, heads, batches, chunk, V)
    blocks = held_bias(bias, tile, axes, V)
    t = tile.t.first
    h = tile.h.first
    w = tile.w.first
    here = exist(ROWS, t, h, w, tile, V)
    query_at = vector_at(query, t, h, w, tile, tile.head, axes, steps.query, V)
    grad_at = vector_at(grad_out, t, h, w, tile, tile.head, axes, steps.grad_out, V)
    out_at = vector_at(out, t, h, w, tile, tile.head, axes, steps.out, V)
    dq_at = vector_at(grad_query, t, h, w, tile, tile.head, axes, steps.grad_query, V)
    by_token = token_at(tile.batch, t, h, w, tile, axes) * heads + tile.head
    t = tile.t.origin
    h = tile.h.origin
    w = tile.w.origin
    near = columns_exist(0, 0, 0, tile, V)
    key_at = vector_at(key, t, h, w, tile, tile.head, axes, steps.key, V)
    value_at = vector_at(value, t, h, w, tile, tile.head, axes, steps.value, V)
    dk_at = vector_at(grad_key, t, h, w, tile, tile.head, axes, steps.grad_key, V)
    dv_at = vector_at(grad_value, t, h, w, tile, tile.head, axes, steps.grad_value, V)
    query_offsets = vectors_in(ROWS, axes, steps.query, V)
    grad_offsets = vectors_in(ROWS, axes, steps.grad_out, V)
    out_offsets = vectors_in(ROWS, axes, steps.out, V)
    dq_offsets = vectors_in(ROWS, axes, steps.grad_query, V)
    key_offsets = vectors_in(COLUMNS, axes, steps.key, V)
    value_offsets = vectors_in(COLUMNS, axes, steps.value, V)
    dk_offsets = vectors_in(COLUMNS, axes, steps.grad_key, V)
    dv_offsets = vectors_in(COLUMNS, axes, steps.grad_value, V)
    lse_offsets = tokens_in(ROWS, axes) * heads
    to_next = heads.to(tl.int64) * axes[0].length * axes[1].length * axes[2].length
    acc = tl.zeros([R, C], tl.float32)
    for _ in tl.range(tile.batch, stop):
        q = load(query_at, query_offsets, here, V.head_dim, D)
        k = load(key_at, key_offsets, near, V.head_dim, D)
        v = load(value_at, value_offsets, near, V.head_dim_v, DV)
        do = load(grad_at, grad_offsets, here, V.head_dim_v, DV)
        o = load(out_at, out_offsets, here, V.head_dim_v, DV)
        shift = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        shift -= tl.load(grad_lse + by_token + lse_offsets, mask=here & (has_grad_lse != 0), other=0.0)
        # Rows that are not there weigh nothing, whatever the bias is that they are given.
        total = tl.load(lse + by_token + lse_offsets, mask=here, other=float("inf")) * LOG2_E
        p = tl.exp2(biased(tl.dot(q, tl.trans(k)), scale, blocks, 0, 0, V) - total[:, None])
        dv = tl.dot(tl.trans(p.to(DTYPE)), do)
        store(dv_at, dv_offsets, near, dv, V.head_dim_v, DV)
        ds = p * (tl.dot(do, tl.trans(v)) - shift[:, None])
        acc += ds
        weights = ds.to(DTYPE)
        dq = tl.dot(weights, k)
        dk = tl.dot(tl.trans(weights), q)
        store(dq_at, dq_offsets, here, dq * (scale * LN2), V.head_dim, D)
        store(dk_at, dk_offsets, near, dk * (scale * LN2), V.head_dim, D)
        query_at += steps.query.batch * V.unit
        key_at += steps.key.batch * V.unit
        value_at += steps.value.batch * V.unit
        grad_at += steps.grad_out.batch * V.unit
        out_at += steps.out.batch * V.unit
        dq_at += steps.grad_query.batch * V.unit
        dk_at += steps.grad_key.batch * V.unit
        dv_at += steps.grad_value.batch * V.unit
        by_token += to_next
    store_sums(partial_bias, acc, tile, heads, axes, V)
