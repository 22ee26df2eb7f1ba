"""The forward pass: a tile of queries walks the boxes of keys that its windows meet, with an online softmax."""

import triton
import triton.language as tl

from vicinal.backends.triton.tile import (
    LN2,
    additional_at,
    bias_in,
    boxes_of,
    columns_exist,
    exist,
    is_full,
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
    valid_additional,
    vector_at,
    vectors_in,
    windows_of,
)

FLOOR = tl.constexpr(-1e20)
"""Lower bound of the running maximum, so that a row whose keys are all hidden so far stays finite."""


@triton.jit
def attend(scores, values, acc, peak, total, scale, V: tl.constexpr):
    """One step of the online softmax, in powers of two."""
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_peak[:, None])
    rescale = tl.exp2(peak - new_peak)
    acc = acc * rescale[:, None]
    acc = tl.dot(weights.to(values.dtype), values, acc, input_precision=V.precision)
    return acc, new_peak, total * rescale + tl.sum(weights, 1)


@triton.jit
def forward(
    query, key, value, out, more_key, more_value, bias, lse, lengths, axes, steps, heads, group, additional, scale,
    V: tl.constexpr,
):  # fmt: skip
    """One block: one tile of queries of one head.

    Args:
        query, key, value, out: `[B, *S, H, D]`.
        more_key, more_value: additional keys and values, `[B, M, Hkv, D]`.
        bias: `[H, 2 * k - 1, ...]`, float32.
        lse: `[B, *S, H]`.
        lengths: how many additional keys count, `[B]`.
        axes: an `AxisArgs` each.
        steps: a `StepArgs` for each tensor.
        heads, group, additional: query heads, query heads that read one key head, additional keys.
        scale: multiplies the scores, times log2(e).
        V: the `Variant`.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    tile = tile_of(axes, heads, V)
    head_kv = tile.head // group
    here = exist(ROWS, tile.t.first, tile.h.first, tile.w.first, tile, V)
    at = vector_at(query, tile.t.first, tile.h.first, tile.w.first, tile, tile.head, axes, steps.query, V)
    offsets = vectors_in(ROWS, axes, steps.query, V)
    q, q_rest = load_rows(at, offsets, here, V)
    if V.is_signed:
        # Peaks need a positive scale, so its sign, or its absence, goes to the queries.
        sign = tl.where(scale < 0, -1.0, tl.where(scale > 0, 1.0, 0.0))
        q = (q.to(tl.float32) * sign).to(q.dtype)
        q_rest = (q_rest.to(tl.float32) * sign).to(q.dtype)
        scale = tl.maximum(tl.abs(scale), 1e-24)
    windows = windows_of(tile, axes, V)
    key_at = vector_at(key, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.key, V)
    value_at = vector_at(value, tile.t.origin, tile.h.origin, tile.w.origin, tile, head_kv, axes, steps.value, V)
    key_offsets = vectors_in(COLUMNS, axes, steps.key, V)
    value_offsets = vectors_in(COLUMNS, axes, steps.value, V)
    acc = tl.zeros([R, DV], tl.float32)
    peak = tl.full([R], FLOOR, tl.float32)
    total = tl.zeros([R], tl.float32)
    unit = scale
    if V.has_bias:
        table = table_of(bias, tile.head, axes)
        entries = row_entries(tile, axes, V)
        unit = 1.0 if V.adds_late else scale
    t = 0
    h = 0
    w = 0
    for _ in tl.range(0, boxes_of(tile, V)):
        near = columns_exist(t, h, w, tile, V)
        k_at = moved(key_at, t, h, w, axes, steps.key, V)
        k = load(k_at, key_offsets, near, V.head_dim, D)
        if V.has_bias:
            # What the product begins with has the product's layout, in which a row's maximum is found by few threads.
            added = bias_in(table, entries, mask_of(windows, t, h, w, V), t, h, w, axes, V)
            if V.adds_late:
                scores = scored(q, q_rest, k, k_at, key_offsets, near, None, V) * scale + added
            else:
                scores = scored(q, q_rest, k, k_at, key_offsets, near, added * (1.0 / scale), V)
        else:
            scores = scored(q, q_rest, k, k_at, key_offsets, near, None, V)
        if V.masked and not V.has_bias:
            if not is_full(t, h, w, tile, V):
                scores = tl.where(mask_of(windows, t, h, w, V), scores, float("-inf"))
        v = load(moved(value_at, t, h, w, axes, steps.value, V), value_offsets, near, V.head_dim_v, DV)
        acc, peak, total = attend(scores, v, acc, peak, total, unit, V)
        t, h, w = next_box(t, h, w, tile, V)
    if V.has_additional:
        valid = valid_additional(lengths, tile.batch, additional)
        key_at = additional_at(more_key, tile.batch, head_kv, steps.more_key, V)
        value_at = additional_at(more_value, tile.batch, head_kv, steps.more_value, V)
        number = tl.arange(0, V.column_count)
        for start in tl.range(0, valid, V.column_count):
            near = start + number < valid
            to_key = (start + number).to(tl.int64) * steps.more_key.w * V.unit
            k = load(key_at, to_key, near, V.head_dim, D)
            scores = scored(q, q_rest, k, key_at, to_key, near, None, V)
            scores = tl.where(near[None, :], scores, float("-inf"))
            v = load(value_at, (start + number).to(tl.int64) * steps.more_value.w * V.unit, near, V.head_dim_v, DV)
            acc, peak, total = attend(scores, v, acc, peak, total, scale, V)
    at = vector_at(out, tile.t.first, tile.h.first, tile.w.first, tile, tile.head, axes, steps.out, V)
    store(at, vectors_in(ROWS, axes, steps.out, V), here, acc / total[:, None], V.head_dim_v, DV)
    token = token_at(tile.batch, tile.t.first, tile.h.first, tile.w.first, tile, axes)
    place = (token + tokens_in(ROWS, axes)) * heads + tile.head
    tl.store(lse + place, (peak + tl.log2(total)) * LN2, mask=here)
