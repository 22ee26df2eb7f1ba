"""Forward for small windows: one warpgroup a block, several blocks to a multiprocessor.

The same walk as `forward`, without warp specialisation: the warpgroup starts its own loads, a few
boxes ahead, and the other blocks of the multiprocessor fill the gaps. With few boxes per tile that
beats any overlap inside the block.

Where two heads lie next to each other and a box has room for both, one load serves both, and so does what the
block computes of the mask.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vicinal.backends.hopper.mask import mask_of, place_code
from vicinal.backends.hopper.softmax import (
    FLOOR,
    as_operand,
    exponentiate,
    finish,
    head_of,
    hide,
    keep,
    output_layout,
    partial_sums,
    rescaled,
    row_totals,
    rows_of,
    scores_layout,
    start_scores,
    store_lse,
    tokens_of,
)
from vicinal.backends.hopper.tile import (
    columns_of,
    counts_of,
    load_next,
    load_queries,
    next_box,
    next_columns,
    query_place,
    store_box,
    tile_of,
    valid_from,
    wait_for_warps,
)


class Source(NamedTuple):
    """Where the keys and values of a block come from, and where they go."""

    key: Any
    value: Any
    more_key: Any
    more_value: Any
    tile: Any
    counts: Any
    k_smem: Any
    v_smem: Any
    full: Any


@gluon.jit
def clear(smem, V: gl.constexpr):
    """Fill the slots of a ring with zeros: what is never loaded is multiplied all the same."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // V.columns, V.columns // 8], [4, 1], [1, 0])
    for stage in gl.static_range(gl.constexpr(V.stages)):
        slot = smem.index(stage).reshape([V.keys, V.columns])
        slot.store(gl.full([V.keys, V.columns], 0.0, smem.dtype, layout))


@gluon.jit
def load_both(source, columns, i, t, h, w, slot, V: gl.constexpr):
    """Start to load the `i`-th tile of keys and values of a head into a slot that this warp has read."""
    full = source.full.index(slot)
    k = source.k_smem.index(slot)
    v = source.v_smem.index(slot)
    tile = source.tile
    counts = source.counts
    in_window = True if V.empty == 0 else i < counts.boxes
    mbarrier.expect(full, 4 * (V.keys - V.empty) * V.columns, pred=in_window)
    if V.has_additional and V.empty > 0:
        mbarrier.expect(full, 4 * V.keys * V.columns, pred=i >= counts.boxes)
    wait_for_warps()  # until the other warps have read it too
    load_next(source.key, source.more_key, columns.key, columns.more_key, tile, counts, i, t, h, w, full, k, V)
    load_next(source.value, source.more_value, columns.value, columns.more_value, tile, counts, i, t, h, w, full, v, V)


@gluon.jit
def load_first(source, columns, turn, FROM: gl.constexpr, TO: gl.constexpr, V: gl.constexpr):
    """Start to load tiles `FROM` to `TO` of a head. Its first tile is the `turn`-th of the block."""
    t = turn * 0
    h = turn * 0
    w = turn * 0
    for i in gl.static_range(TO):
        if i >= FROM:
            if i < source.counts.boxes + source.counts.more_tiles:
                load_both(source, columns, i, t, h, w, (turn + i) % V.stages, V)
        t, h, w = next_box(t, h, w, source.tile, V)


class Sums(NamedTuple):
    """What the online softmax keeps of one head: weighted values, the running maximum, the sum of weights."""

    acc: Any
    peak: Any
    total: Any


@gluon.jit
def no_sums(V: gl.constexpr):
    layout: gl.constexpr = scores_layout(V)
    acc = gl.full([64, V.head_dim], 0.0, gl.float32, output_layout(V))
    peak = gl.full([64], FLOOR, gl.float32, gl.SliceLayout(1, layout))
    return Sums(acc, peak, partial_sums(gl.full([64, V.keys], 0.0, gl.float32, layout), V))


@gluon.jit
def attend(sums, q, k, v, mask, code, t, h, w, in_window, valid, scale, V: gl.constexpr, NUMBER: gl.constexpr):
    """`sums` with one tile of keys and values more."""
    scores = start_scores(head_of(q, 64, NUMBER, V), k, mask, code, t, h, w, in_window, V, NUMBER)
    scores = warpgroup_mma_wait(0, deps=[scores])
    scores = hide(scores, mask, t, h, w, in_window, valid, V)
    weights, rescale, peak, total = exponentiate(scores, sums.peak, sums.total, scale, V)
    p = as_operand(weights, q.dtype, V)
    acc = rescaled(sums.acc, rescale, V)
    result = warpgroup_mma(p, head_of(v, V.keys, NUMBER, V), acc, is_async=True)
    return Sums(warpgroup_mma_wait(0, deps=[result]), peak, total)


@gluon.jit
def finish_both(sums, others, desc, lse, smem, place, rows, head, heads, V: gl.constexpr):
    """`finish` for two heads that lie side by side."""
    totals = row_totals(sums.peak, sums.total)
    other_totals = row_totals(others.peak, others.total)
    keep(sums.acc, totals, smem, V, 0)
    keep(others.acc, other_totals, smem, V, 1)
    fence_async_shared()
    store_box(desc, place, smem)
    store_lse(sums.peak, totals, lse, rows, head, heads)
    store_lse(others.peak, other_totals, lse, rows, head + 1, heads)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["heads", "heads_per_key", "heads_per_block", "additional", "slab", "scale"])
def forward_small(
    query, key, value, out, more_key, more_value, lse, lengths, axes, steps,
    heads, heads_per_key, heads_per_block, additional, slab, scale, V: gl.constexpr,
):  # fmt: skip
    """One block: 64 queries of `heads_per_block` heads, one after another. Arguments as in `forward.forward`.

    What depends on the grid alone is computed once for all heads, and while the outputs of a head are
    written the first boxes of the next one are on their way.
    """
    tile = tile_of(axes, slab, heads_per_block, V)
    counts = counts_of(tile, lengths, additional, V)
    columns = columns_of(tile, tile.head, steps, heads_per_key)
    n = counts.boxes + counts.more_tiles
    q_smem = gl.allocate_shared_memory(query.dtype, query.block_type.shape, query.layout)
    k_smem = gl.allocate_shared_memory(key.dtype, [V.stages] + key.block_type.shape, key.layout)
    v_smem = gl.allocate_shared_memory(value.dtype, [V.stages] + value.block_type.shape, value.layout)
    if V.empty > 0:
        clear(k_smem, V)
        clear(v_smem, V)
    full = gl.allocate_shared_memory(gl.int64, [V.stages + 1, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(gl.constexpr(V.stages + 1)):
        mbarrier.init(full.index(stage), 1)
    fence_async_shared()
    q_full = full.index(V.stages)
    load_queries(query, columns.query, tile, q_full, q_smem, V, 0)
    source = Source(key, value, more_key, more_value, tile, counts, k_smem, v_smem, full)
    load_first(source, columns, n * 0, 0, V.stages, V)

    layout: gl.constexpr = scores_layout(V)
    mask = mask_of(tile, axes, layout, V, 0)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    rows = gl.allocate_shared_memory(gl.int64, [64], flat, rows_of(tokens_of(tile, axes, V, 0), axes))
    code = place_code(V, 4) if V.mask == "coded" else 0
    fence_async_shared()
    rounds = 1
    if V.shares_heads:
        rounds = gl.minimum(heads_per_block, heads - tile.head)
    turn = n * 0
    for number in range(rounds):
        head = tile.head + number
        sums = no_sums(V)
        others = no_sums(V)
        t = 0
        h = 0
        w = 0
        mbarrier.wait(q_full, number & 1)
        for i in range(n):
            in_window = i < counts.boxes
            slot = turn % V.stages  # and not a counter: registers are scarce here
            mbarrier.wait(full.index(slot), turn // V.stages & 1)
            k = k_smem.index(slot)
            v = v_smem.index(slot)
            valid = valid_from(counts, i, V)
            sums = attend(sums, q_smem, k, v, mask, code, t, h, w, in_window, valid, scale, V, 0)
            if V.abreast == 2:
                others = attend(others, q_smem, k, v, mask, code, t, h, w, in_window, valid, scale, V, 1)
            t, h, w = next_box(t, h, w, tile, V)
            if i + V.stages < n:
                next_t, next_h, next_w = t, h, w
                for _ in gl.static_range(gl.constexpr(V.stages - 1)):
                    next_t, next_h, next_w = next_box(next_t, next_h, next_w, tile, V)
                load_both(source, columns, i + V.stages, next_t, next_h, next_w, slot, V)
            turn += 1
        place = query_place(tile, columns.out, V, 0)
        has_next = number + 1 < rounds
        if has_next:
            columns = next_columns(columns, head, steps, heads_per_key)
            wait_for_warps()  # until all have read their queries
            load_queries(query, columns.query, tile, q_full, q_smem, V, 0)
            load_first(source, columns, turn, 0, V.stages - 1, V)
        # The values read last make room for the outputs, so that the next queries need not wait for them.
        last = (turn + V.stages - 1) % V.stages
        out_smem = v_smem.index(last)._reinterpret(out.dtype, out.block_type.shape, out.layout)
        row = rows.load(sums.peak.type.layout)
        if V.abreast == 2:
            finish_both(sums, others, out, lse, out_smem, place, row, head, heads, V)
        else:
            finish(sums.acc, sums.peak, sums.total, out, lse, out_smem, place, row, head, heads, V)
        if has_next:
            load_first(source, columns, turn, V.stages - 1, V.stages, V)
