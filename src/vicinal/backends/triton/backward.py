"""The backward pass, in passes that never add to memory: the same inputs give the same bits.

    P = exp(scale Q K^T - lse),   dS = P * (dO V^T - delta),   delta = rowsum(dO * O) - dlse
    dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO

`query_gradients` walks the keys of a tile of queries, and leaves delta to the others;
`key_gradients` walks the queries that see a tile of keys; `additional_gradients` walks all queries.
The gradient of a position bias is in `backward_bias`.
"""

import triton
import triton.language as tl

from vicinal.backends.triton import variant
from vicinal.backends.triton.tile import (
    LN2,
    LOG2_E,
    additional_at,
    bias_in,
    boxes_of,
    columns_exist,
    exist,
    is_full,
    lifted,
    load,
    load_rows,
    mask_of,
    moved,
    next_box,
    row_entries,
    scored,
    store,
    table_of,
    tile_of,
    token_at,
    tokens_in,
    tokens_on,
    valid_additional,
    vector_at,
    vectors_in,
    windows_of,
)

FACTS = tl.constexpr(variant.FACTS)


@triton.jit
def biased(rows, rest, columns, at, offsets, here, added, scale, V: tl.constexpr):
    """Scaled scores with the bias that is added to them.

    A product that begins with the bias has it where it wants it; added later, the compiler copies it through shared
    memory, number by number, while boxes are in flight.
    """
    if V.is_signed or V.adds_late:
        return scored(rows, rest, columns, at, offsets, here, None, V) * scale + added
    else:
        return scored(rows, rest, columns, at, offsets, here, added * (1.0 / scale), V) * scale


@triton.jit
def score_gradients(p, do, v, shift, V: tl.constexpr):
    """`dS` from `P`."""
    return p * (tl.dot(do, tl.trans(v), input_precision=V.precision) - shift[:, None])


@triton.jit
def add_key_gradients(p, q, do, v, shift, dk, dv, V: tl.constexpr):
    """What the queries of a box add to the gradients of a tile of keys and values; `p` has keys as rows.

    The product of values begins with `shift`, which is `-delta`: so it takes no registers beside it.
    """
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=V.precision)
    ds = p * tl.dot(v, tl.trans(do), tl.broadcast_to(shift[None, :], p.shape), input_precision=V.precision)
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=V.precision), dv


@triton.jit
def query_gradients(
    query, key, value, out, more_key, more_value, bias, grad_out, grad_query, lse, grad_lse, facts, sums, delta,
    lengths, axes, steps, heads, group, additional, has_grad_lse, scale, V: tl.constexpr,
):  # fmt: skip
    """One block: the gradients of one tile of queries of one head, and what the other passes must know of them.

    Args:
        query, key, value, out, more_key, more_value, bias, lengths: as in `forward.forward`.
        grad_out, grad_query: `[B, *S, H, D]`.
        lse, grad_lse: `[B, *S, H]`; the latter is not read unless `has_grad_lse`.
        facts: written, `[B, H, *S, FACTS]`: the log-sum-exp times log2(e), `-delta`, and what is never looked at.
        sums, delta: written if another pass than that for keys wants them, `[B, H, *S]`: the former, and `delta`.
        axes, steps, heads, group, additional, scale, V: as in `forward.forward`.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    tile = tile_of(axes, heads, V)
    head_kv = tile.head // group
    t = tile.t.first
    h = tile.h.first
    w = tile.w.first
    here = exist(ROWS, t, h, w, tile, V)
    at = vector_at(query, t, h, w, tile, tile.head, axes, steps.query, V)
    offsets = vectors_in(ROWS, axes, steps.query, V)
    q, q_rest = load_rows(at, offsets, here, V)
    if V.lifts:
        q = lifted(q)
    at = vector_at(grad_out, t, h, w, tile, tile.head, axes, steps.grad_out, V)
    do = load(at, vectors_in(ROWS, axes, steps.grad_out, V), here, V.head_dim_v, DV)
    at = vector_at(out, t, h, w, tile, tile.head, axes, steps.out, V)
    o = load(at, vectors_in(ROWS, axes, steps.out, V), here, V.head_dim_v, DV)
    token = token_at(tile.batch, t, h, w, tile, axes)
    place = (token + tokens_in(ROWS, axes)) * heads + tile.head
    shift = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    shift -= tl.load(grad_lse + place, mask=here & (has_grad_lse != 0), other=0.0)
    total = tl.load(lse + place, mask=here, other=0.0) * LOG2_E
    place = token_at(tile.batch * heads + tile.head, t, h, w, tile, axes) + tokens_in(ROWS, axes)
    tl.store(facts + place * FACTS, total, mask=here)
    tl.store(facts + (place * FACTS + 1), -shift, mask=here)
    if V.has_additional or V.has_bias:
        tl.store(delta + place, shift, mask=here)
        tl.store(sums + place, total, mask=here)
    windows = windows_of(tile, axes, V)
    key_at = vector_at(key, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.key, V)
    value_at = vector_at(value, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.value, V)
    key_offsets = vectors_in(COLUMNS, axes, steps.key, V)
    value_offsets = vectors_in(COLUMNS, axes, steps.value, V)
    dq = tl.zeros([R, D], tl.float32)
    if V.has_bias:
        table = table_of(bias, tile.head, axes)
        entries = row_entries(tile, axes, V)
    t = 0
    h = 0
    w = 0
    for _ in tl.range(0, boxes_of(tile, V)):
        near = columns_exist(t, h, w, tile, V)
        k_at = moved(key_at, t, h, w, axes, steps.key, V)
        k = load(k_at, key_offsets, near, V.head_dim, D)
        v = load(moved(value_at, t, h, w, axes, steps.value, V), value_offsets, near, V.head_dim_v, DV)
        if V.has_bias:
            added = bias_in(table, entries, mask_of(windows, t, h, w, V), t, h, w, axes, V)
            p = tl.exp2(biased(q, q_rest, k, k_at, key_offsets, near, added, scale, V) - total[:, None])
        else:
            p = tl.exp2(scored(q, q_rest, k, k_at, key_offsets, near, None, V) * scale - total[:, None])
            if V.masked:
                if not is_full(t, h, w, tile, V):
                    p = tl.where(mask_of(windows, t, h, w, V), p, 0.0)
        ds = score_gradients(p, do, v, shift, V)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=V.precision)
        t, h, w = next_box(t, h, w, tile, V)
    if V.has_additional:
        valid = valid_additional(lengths, tile.batch, additional)
        key_at = additional_at(more_key, tile.batch, head_kv, steps.more_key, V)
        value_at = additional_at(more_value, tile.batch, head_kv, steps.more_value, V)
        for start in tl.range(0, valid, V.column_count):
            number = start + tl.arange(0, V.column_count)
            near = number < valid
            to_key = number.to(tl.int64) * steps.more_key.w * V.unit
            k = load(key_at, to_key, near, V.head_dim, D)
            v = load(value_at, number.to(tl.int64) * steps.more_value.w * V.unit, near, V.head_dim_v, DV)
            scores = scored(q, q_rest, k, key_at, to_key, near, None, V)
            p = tl.where(near[None, :], tl.exp2(scores * scale - total[:, None]), 0.0)
            ds = score_gradients(p, do, v, shift, V)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=V.precision)
    at = vector_at(grad_query, tile.t.first, tile.h.first, tile.w.first, tile, tile.head, axes, steps.grad_query, V)
    store(at, vectors_in(ROWS, axes, steps.grad_query, V), here, dq * (scale * LN2), V.head_dim, D)


@triton.jit
def facts_in(BOX: tl.constexpr, axes, V: tl.constexpr):
    """Offsets of what is known of the queries of a box, relative to its first."""
    numbers = tokens_in(BOX, axes)
    if V.is_wide:
        numbers = numbers.to(tl.int64)
    return numbers * FACTS


@triton.jit
def facts_of(start, offsets, here):
    """Log-sum-exps, times log2(e), and `-delta` of the queries of a box.

    Numbers for each column are dear: in the layout of scores every thread needs a quarter of them, and a load of
    one number a query would be made by every thread for itself, with an address for each. A load as large as
    the block is made once and handed on through shared memory, so a query has four numbers, of which two count.
    """
    record = tl.load(start + (offsets[:, None] + tl.arange(0, FACTS)[None, :]), mask=here[:, None], other=0.0)
    both, _ = tl.split(tl.trans(tl.reshape(record, [offsets.shape[0], 2, 2]), 0, 2, 1))
    return tl.split(both)


@triton.jit
def key_gradients(
    query, key, value, bias, grad_out, grad_key, grad_value, facts, axes, steps, heads, group, scale,
    V: tl.constexpr,
):  # fmt: skip
    """One block: the gradients of one tile of keys and values of one head. Rows are keys here.

    Args:
        query, key, value, bias: as in `forward.forward`.
        grad_out: `[B, *S, H, Dv]`; grad_key, grad_value: `[B, *S, Hkv, D]`.
        facts: `[B, H, *S, FACTS]`, as `query_gradients` leaves them.
        axes, steps, heads, group, scale, V: as in `forward.forward`.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    tile = tile_of(axes, heads // group, V)
    t = tile.t.first
    h = tile.h.first
    w = tile.w.first
    here = exist(ROWS, t, h, w, tile, V)
    at = vector_at(key, t, h, w, tile, tile.head, axes, steps.key, V)
    offsets = vectors_in(ROWS, axes, steps.key, V)
    k, k_rest = load_rows(at, offsets, here, V)
    if V.lifts:
        k = lifted(k)
    at = vector_at(value, t, h, w, tile, tile.head, axes, steps.value, V)
    v = load(at, vectors_in(ROWS, axes, steps.value, V), here, V.head_dim_v, DV)
    query_offsets = vectors_in(COLUMNS, axes, steps.query, V)
    grad_offsets = vectors_in(COLUMNS, axes, steps.grad_out, V)
    fact_offsets = facts_in(COLUMNS, axes, V)
    windows = windows_of(tile, axes, V)
    if V.has_bias:
        entries = row_entries(tile, axes, V)
    dk = tl.zeros([R, D], tl.float32)
    dv = tl.zeros([R, DV], tl.float32)
    for member in tl.range(0, group):
        head = tile.head * group + member
        query_at = vector_at(query, tile.t.origin, tile.h.origin, tile.w.origin, tile, head, axes, steps.query, V)
        grad_at = vector_at(grad_out, tile.t.origin, tile.h.origin, tile.w.origin, tile, head, axes, steps.grad_out, V)
        fact_at = facts + FACTS * token_at(
            tile.batch * heads + head, tile.t.origin, tile.h.origin, tile.w.origin, tile, axes
        )
        t = 0
        h = 0
        w = 0
        for _ in tl.range(0, boxes_of(tile, V)):
            near = columns_exist(t, h, w, tile, V)
            q_at = moved(query_at, t, h, w, axes, steps.query, V)
            q = load(q_at, query_offsets, near, V.head_dim, D)
            do = load(moved(grad_at, t, h, w, axes, steps.grad_out, V), grad_offsets, near, V.head_dim_v, DV)
            total, shift = facts_of(fact_at + FACTS * tokens_on(t, h, w, axes).to(tl.int64), fact_offsets, near)
            if V.has_bias:
                keep = mask_of(windows, t, h, w, V)
                added = bias_in(table_of(bias, head, axes), entries, keep, t, h, w, axes, V)
                p = tl.exp2(biased(k, k_rest, q, q_at, query_offsets, near, added, scale, V) - total[None, :])
            else:
                p = tl.exp2(scored(k, k_rest, q, q_at, query_offsets, near, None, V) * scale - total[None, :])
                if V.masked:
                    if not is_full(t, h, w, tile, V):
                        p = tl.where(mask_of(windows, t, h, w, V), p, 0.0)
            dk, dv = add_key_gradients(p, q, do, v, shift, dk, dv, V)
            t, h, w = next_box(t, h, w, tile, V)
    t = tile.t.first
    h = tile.h.first
    w = tile.w.first
    at = vector_at(grad_key, t, h, w, tile, tile.head, axes, steps.grad_key, V)
    store(at, vectors_in(ROWS, axes, steps.grad_key, V), here, dk * (scale * LN2), V.head_dim, D)
    at = vector_at(grad_value, t, h, w, tile, tile.head, axes, steps.grad_value, V)
    store(at, vectors_in(ROWS, axes, steps.grad_value, V), here, dv, V.head_dim_v, DV)


@triton.jit
def scattered(number, batch, head, axes, steps, V: tl.constexpr):
    """Offsets of the vectors of tokens of any number, in elements from the start of the tensor."""
    units = batch.to(tl.int64) * steps.batch + head.to(tl.int64) * steps.head
    line = number // axes[2].length
    units += (number - line * axes[2].length).to(tl.int64) * steps.w
    plane = line // axes[1].length
    units += (line - plane * axes[1].length).to(tl.int64) * steps.h
    return (units + plane.to(tl.int64) * steps.t) * V.unit


@triton.jit
def additional_gradients(
    query, more_key, more_value, grad_out, sums, delta, partial_key, partial_value, lengths, axes, steps,
    heads, group, additional, chunk, scale, V: tl.constexpr,
):  # fmt: skip
    """One block: what one chunk of the queries adds to the gradients of one tile of additional keys and values.

    Args:
        query, more_key, more_value, grad_out, sums, delta, lengths: as in the other passes.
        partial_key, partial_value: `[chunks, B, M, Hkv, D]`, float32.
        chunk: queries in a chunk.
        axes, steps, heads, group, additional, scale, V: as in `forward.forward`.
    """
    R: tl.constexpr = V.row_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    heads_kv = heads // group
    tiles = tl.cdiv(additional, R)
    index = tl.program_id(0)
    row = index % tiles * R + tl.arange(0, R)
    index = index // tiles
    head_kv = index % heads_kv
    batch = index // heads_kv
    tokens = axes[0].length * axes[1].length * axes[2].length
    stop = tl.minimum((tl.program_id(1) + 1) * chunk, tokens)
    valid = valid_additional(lengths, batch, additional)
    here = row < valid
    at = additional_at(more_key, batch, head_kv, steps.more_key, V)
    offsets = row.to(tl.int64) * steps.more_key.w * V.unit
    k, k_rest = load_rows(at, offsets, here, V)
    at = additional_at(more_value, batch, head_kv, steps.more_value, V)
    v = load(at, row.to(tl.int64) * steps.more_value.w * V.unit, here, V.head_dim_v, DV)
    dk = tl.zeros([R, D], tl.float32)
    dv = tl.zeros([R, DV], tl.float32)
    for member in tl.range(0, group):
        head = head_kv * group + member
        for start in tl.range(tl.program_id(1) * chunk, stop, V.column_count):
            number = start + tl.arange(0, V.column_count)
            near = number < stop
            to_query = scattered(number, batch, head, axes, steps.query, V)
            q = load(query, to_query, near, V.head_dim, D)
            do = load(grad_out, scattered(number, batch, head, axes, steps.grad_out, V), near, V.head_dim_v, DV)
            place = (batch.to(tl.int64) * heads + head) * tokens + number
            # What is beyond the chunk has an infinite sum, hence no weight.
            total = tl.load(sums + place, mask=near, other=float("inf"))
            shift = tl.load(delta + place, mask=near, other=0.0)
            scores = scored(k, k_rest, q, query, to_query, near, None, V)
            p = tl.where(here[:, None], tl.exp2(scores * scale - total[None, :]), 0.0)
            dk, dv = add_key_gradients(p, q, do, v, -shift, dk, dv, V)
    batches = tl.num_programs(0) // (tiles * heads_kv)
    place = ((tl.program_id(1).to(tl.int64) * batches + batch) * additional + row) * heads_kv + head_kv
    is_row = row < additional
    store(partial_key, place * V.head_dim, is_row, dk * (scale * LN2), V.head_dim, D)
    store(partial_value, place * V.head_dim_v, is_row, dv, V.head_dim_v, DV)
