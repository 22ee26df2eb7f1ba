"""The gradient of the position bias, in two passes that never add to memory.

    grad_bias[d] = sum over batch rows and queries i of dS[i, i + d],   dS = P * (dO V^T - delta)

A bias knows neither batch rows nor where on the grid a pair lies. So a block holds one box of pairs, a tile of queries
by a box of keys that is a fixed way ahead of it, sums `dS` of all such pairs of its batch rows and tiles in registers,
and writes the sums once (`bias_gradients`). What is left, one small box for each way ahead, is summed along its
diagonals (`diagonal_sums`): what is `d` ahead of the query at place `r` of its tile is the key at place `r + d`.
"""

import triton
import triton.language as tl

from vicinal.backends.triton.tile import (
    LOG2_E,
    entry_of,
    exist,
    load,
    load_rows,
    mask_of,
    places,
    scored,
    seen_stop,
    table_of,
    tile_at,
    tiles_of,
    token_at,
    tokens_in,
    vector_at,
    vectors_in,
    windows_of,
)


@triton.jit
def meets(ahead, span, axis, ROWS: tl.constexpr, COLUMNS: tl.constexpr, V: tl.constexpr):
    """Whether a row of a tile sees one of the columns that begin `ahead` members after its first."""
    last = tl.minimum(span.first + ROWS, span.members) - 1
    start = span.first + ahead
    return (
        (span.first < span.members) & (start + COLUMNS > span.origin) & (start < seen_stop(last, span.members, axis, V))
    )


@triton.jit
def lie_inside(start, place, span):
    """Which members `start + place` of an axis there are."""
    return (start + place >= 0) & (start + place < span.members)


@triton.jit
def entries_of(t_ahead, h_ahead, w_ahead, axes, V: tl.constexpr):
    """Which entry of the table each pair of a tile and a box so far ahead of it has, `[rows, columns]`."""
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    t_row, h_row, w_row = places(ROWS)
    t_column, h_column, w_column = places(COLUMNS)
    t = t_ahead + axes[0].kernel_size - 1 + t_column
    h = h_ahead + axes[1].kernel_size - 1 + h_column
    w = w_ahead + axes[2].kernel_size - 1 + w_column
    return entry_of(t, h, w, axes)[None, :] - entry_of(t_row, h_row, w_row, axes)[:, None]


@triton.jit
def bias_gradients(
    query, key, value, bias, grad_out, sums, delta, partial_bias, axes, slots, steps, heads, group, first_head, batches,
    chunk, scale, V: tl.constexpr,
):  # fmt: skip
    """One block: `dS` of one slot of one head, summed over one chunk of the tiles of all batch rows.

    A slot is a box of keys a fixed way ahead of a tile of queries. Tiles whose windows it misses add nothing.

    Args:
        query, key, value, bias, grad_out, sums, delta: as in `backward.key_gradients`.
        partial_bias: `[chunks, heads of this run, slots, rows, columns]`, float32.
        slots: a `SlotArgs` for each axis.
        first_head: of this run.
        batches: batch rows.
        chunk: tiles in a chunk, each counted once for every batch row: of a tile, batch rows follow one another.
        axes, steps, heads, group, scale, V: as in `forward.forward`.
    """
    ROWS: tl.constexpr = V.rows
    COLUMNS: tl.constexpr = V.columns
    R: tl.constexpr = V.row_count
    C: tl.constexpr = V.column_count
    D: tl.constexpr = V.depth
    DV: tl.constexpr = V.depth_v
    all_slots = slots[0].count * slots[1].count * slots[2].count
    head = tl.program_id(0) // all_slots
    slot = tl.program_id(0) - head * all_slots
    head = first_head + head
    line = slot // slots[2].count
    w_ahead = slots[2].first + (slot - line * slots[2].count) * V.columns[2]
    h_ahead = slots[1].first + line % slots[1].count * V.columns[1]
    t_ahead = slots[0].first + line // slots[1].count * V.columns[0]
    entries = entries_of(t_ahead, h_ahead, w_ahead, axes, V)
    table = table_of(bias, head, axes)
    query_offsets = vectors_in(ROWS, axes, steps.query, V)
    grad_offsets = vectors_in(ROWS, axes, steps.grad_out, V)
    key_offsets = vectors_in(COLUMNS, axes, steps.key, V)
    value_offsets = vectors_in(COLUMNS, axes, steps.value, V)
    in_tile = tokens_in(ROWS, axes)
    t_place, h_place, w_place = places(COLUMNS)
    to_next = heads.to(tl.int64) * axes[0].length * axes[1].length * axes[2].length
    # In 32 bits: the host sees to it that a problem has fewer tiles than 2^31, in all batch rows and heads.
    start = tl.program_id(1) * chunk
    stop = start + tl.minimum(chunk, tiles_of(axes) * batches - start)
    acc = tl.zeros([R, C], tl.float32)
    for index in tl.range(start // batches, (stop - 1) // batches + 1):
        passed = index * batches
        batch = tl.maximum(start - passed, 0)
        end = tl.minimum(stop - passed, batches)
        tile = tile_at(index, batch, head, axes, V)
        is_met = meets(w_ahead, tile.w, axes[2], V.rows[2], V.columns[2], V)
        if V.rank > 1:
            is_met = is_met & meets(h_ahead, tile.h, axes[1], V.rows[1], V.columns[1], V)
        if V.rank > 2:
            is_met = is_met & meets(t_ahead, tile.t, axes[0], V.rows[0], V.columns[0], V)
        if is_met:
            t = tile.t.first
            h = tile.h.first
            w = tile.w.first
            windows = windows_of(tile, axes, V)
            keep = mask_of(windows, t + t_ahead - tile.t.origin, h + h_ahead - tile.h.origin,
                           w + w_ahead - tile.w.origin, V)  # fmt: skip
            here = exist(ROWS, t, h, w, tile, V)
            added = tl.load(table + entries, mask=keep & here[:, None], other=float("-inf")) * LOG2_E
            near = lie_inside(t + t_ahead, t_place, tile.t) & lie_inside(h + h_ahead, h_place, tile.h)
            near = near & lie_inside(w + w_ahead, w_place, tile.w)
            query_at = vector_at(query, t, h, w, tile, head, axes, steps.query, V)
            grad_at = vector_at(grad_out, t, h, w, tile, head, axes, steps.grad_out, V)
            t += t_ahead
            h += h_ahead
            w += w_ahead
            key_at = vector_at(key, t, h, w, tile, head // group, axes, steps.key, V)
            value_at = vector_at(value, t, h, w, tile, head // group, axes, steps.value, V)
            place = token_at(batch.to(tl.int64) * heads + head, tile.t.first, tile.h.first, tile.w.first, tile, axes)
            sums_at = sums + place
            delta_at = delta + place
            # Rows that are not there add nothing: what they see has no weight.
            total = tl.load(sums_at + in_tile, mask=here, other=0.0)
            shift = tl.load(delta_at + in_tile, mask=here, other=0.0)
            for number in tl.range(batch, end):
                # Loads that no product wants are not made ahead by the compiler: waiting for them took half the time.
                sums_at += to_next
                delta_at += to_next
                more = here & (number + 1 < end)
                next_total = tl.load(sums_at + in_tile, mask=more, other=0.0)
                next_shift = tl.load(delta_at + in_tile, mask=more, other=0.0)
                q, q_rest = load_rows(query_at, query_offsets, here, V)
                k = load(key_at, key_offsets, near, V.head_dim, D)
                do = load(grad_at, grad_offsets, here, V.head_dim_v, DV)
                v = load(value_at, value_offsets, near, V.head_dim_v, DV)
                scores = scored(q, q_rest, k, key_at, key_offsets, near, None, V)
                p = tl.exp2(scores * scale + (added - total[:, None]))
                acc += p * (tl.dot(do, tl.trans(v), input_precision=V.precision) - shift[:, None])
                query_at += steps.query.batch * V.unit
                key_at += steps.key.batch * V.unit
                grad_at += steps.grad_out.batch * V.unit
                value_at += steps.value.batch * V.unit
                total = next_total
                shift = next_shift
    box = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    inside = tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(partial_bias + box * (R * C) + inside, acc)


@triton.jit
def slot_of(offset, row, slots, COLUMNS: tl.constexpr):
    """Along one axis, the slot and the column in it of the keys `offset` after these rows, and whether there is one."""
    place = row + offset - slots.first
    column = place % COLUMNS
    return place // COLUMNS, column, (place >= 0) & (place < slots.count * COLUMNS)


@triton.jit
def diagonal_sums(
    partial_bias, grad_bias, axes, slots, heads, first_head, chunks, V: tl.constexpr
):  # fmt: skip
    """One block: the gradient of one entry of the position bias, summed in an order that never changes.

    Args:
        partial_bias: `[chunks, heads, slots, rows, columns]`, float32, as `bias_gradients` leaves it.
        grad_bias: `[all heads, entries]`.
        heads, first_head: heads in this run, and the first of them.
        axes, slots, V: as in `bias_gradients`.
    """
    ROWS: tl.constexpr = V.rows
    R: tl.constexpr = V.row_count
    C: tl.constexpr = V.column_count
    CHUNKS: tl.constexpr = 16
    w_entries = 2 * axes[2].kernel_size - 1
    h_entries = 2 * axes[1].kernel_size - 1
    per_head = (2 * axes[0].kernel_size - 1) * h_entries * w_entries
    head = tl.program_id(0) // per_head
    entry = tl.program_id(0) - head * per_head
    t_row, h_row, w_row = places(ROWS)
    t_offset = entry // (w_entries * h_entries) - axes[0].kernel_size + 1
    h_offset = entry // w_entries % h_entries - axes[1].kernel_size + 1
    t_slot, t_column, t_here = slot_of(t_offset, t_row, slots[0], V.columns[0])
    h_slot, h_column, h_here = slot_of(h_offset, h_row, slots[1], V.columns[1])
    w_slot, w_column, w_here = slot_of(entry % w_entries - axes[2].kernel_size + 1, w_row, slots[2], V.columns[2])
    slot = (t_slot * slots[1].count + h_slot) * slots[2].count + w_slot
    column = (t_column * V.columns[1] + h_column) * V.columns[2] + w_column
    all_slots = slots[0].count * slots[1].count * slots[2].count
    at = partial_bias + (head.to(tl.int64) * all_slots + slot) * (R * C) + tl.arange(0, R) * C + column
    here = t_here & h_here & w_here
    to_next = heads.to(tl.int64) * all_slots * (R * C)
    acc = tl.zeros([CHUNKS, R], tl.float32)
    for first in tl.range(0, chunks, CHUNKS):
        number = first + tl.arange(0, CHUNKS)
        mask = (number < chunks)[:, None] & here[None, :]
        acc += tl.load(at[None, :] + number.to(tl.int64)[:, None] * to_next, mask=mask, other=0.0)
    total = tl.sum(tl.sum(acc, 1), 0)
    at = grad_bias + first_head.to(tl.int64) * per_head + tl.program_id(0)
    tl.store(at, total.to(grad_bias.dtype.element_ty))
