"""Forward for large windows: a producer warp loads boxes, warpgroups of 64 queries each compute.

    out = softmax(scale * Q K^T + mask) V      over the KV boxes that the tile visits

Every warpgroup holds its scores and its output in registers and walks the same boxes; K and V pass
through a ring of slots in shared memory. Loads, matrix products and exponentials of different
tiles overlap: with two warpgroups each also starts the scores of the next box before it
exponentiates those of this one; three are enough to fill each other's gaps.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vicinal.backends.hopper.mask import mask_of, place_code
from vicinal.backends.hopper.softmax import (
    FLOOR,
    as_operand,
    exponentiate,
    finish,
    hide,
    output_layout,
    partial_sums,
    rescaled,
    rows_of,
    scores_layout,
    start_scores,
    tokens_of,
)
from vicinal.backends.hopper.tile import (
    columns_of,
    counts_of,
    load_next,
    load_queries,
    next_box,
    next_slot,
    query_place,
    read_again,
    tile_of,
    valid_from,
)


class Ring(NamedTuple):
    """Slots of shared memory for the boxes of one tensor, with a barrier for "full" and one for "free" each."""

    slots: Any
    full: Any
    free: Any


class Block(NamedTuple):
    """What the warps of one block share."""

    q_smem: Any
    q_full: Any
    k_ring: Any
    v_ring: Any
    code: Any
    tile: Any
    columns: Any
    counts: Any


@gluon.jit
def make_ring(desc, SLOTS: gl.constexpr, READERS: gl.constexpr):
    slots = gl.allocate_shared_memory(desc.dtype, [SLOTS] + desc.block_type.shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(free.index(i), READERS)
    return Ring(slots, full, free)


@gluon.jit
def producer(block, query, key, value, more_key, more_value, V: gl.constexpr):
    """Load the queries, then every box of K and V in the order in which they are used."""
    keys = block.k_ring
    values = block.v_ring
    tile = block.tile
    counts = block.counts
    columns = block.columns
    slot = 0
    phase = 0
    t = 0
    h = 0
    w = 0
    for i in range(counts.boxes + counts.more_tiles):
        mbarrier.wait(keys.free.index(slot), phase ^ 1)
        full = keys.full.index(slot)
        mbarrier.expect(full, key.block_type.nbytes)
        smem = keys.slots.index(slot)
        load_next(key, more_key, columns.key, columns.more_key, tile, counts, i, t, h, w, full, smem, V)
        if i == 0:
            for number in gl.static_range(gl.constexpr(V.consumers)):
                q_full = block.q_full.index(number)
                load_queries(query, columns.query, tile, q_full, block.q_smem.index(number), V, number)
        mbarrier.wait(values.free.index(slot), phase ^ 1)
        full = values.full.index(slot)
        mbarrier.expect(full, value.block_type.nbytes)
        smem = values.slots.index(slot)
        load_next(value, more_value, columns.value, columns.more_value, tile, counts, i, t, h, w, full, smem, V)
        t, h, w = next_box(t, h, w, tile, V)
        slot, phase = next_slot(slot, phase, V.stages)


@gluon.jit
def walk_overlapped(q, mask, block, scale, V: gl.constexpr):
    """Attention of one warpgroup, the scores of the next box under way while this one's are exponentiated.

    Needs two slots at least: it asks for the next keys before it is done with this box's values.
    """
    keys = block.k_ring
    values = block.v_ring
    tile = block.tile
    counts = block.counts
    n = counts.boxes + counts.more_tiles
    dtype: gl.constexpr = values.slots.dtype
    layout: gl.constexpr = scores_layout(V)
    acc = gl.full([64, V.head_dim], 0.0, gl.float32, output_layout(V))
    peak = gl.full([64], FLOOR, gl.float32, gl.SliceLayout(1, layout))
    total = partial_sums(gl.full([64, V.keys], 0.0, gl.float32, layout), V)
    t = 0
    h = 0
    w = 0
    k_slot = 0
    k_phase = 0
    v_slot = 0
    v_phase = 0
    mbarrier.wait(keys.full.index(0), 0)
    scores = start_scores(q, keys.slots.index(0), mask, block.code, t, h, w, True, V)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(keys.free.index(0))
    scores = hide(scores, mask, t, h, w, True, 0, V)
    weights, rescale, peak, total = exponentiate(scores, peak, total, scale, V)
    p = as_operand(weights, dtype, V)
    k_slot, k_phase = next_slot(k_slot, k_phase, V.stages)
    mbarrier.wait(keys.full.index(k_slot), k_phase, pred=n > 1)
    for i in range(1, n):
        t, h, w = next_box(t, h, w, tile, V)
        in_window = i < counts.boxes
        scores = start_scores(q, keys.slots.index(k_slot), mask, block.code, t, h, w, in_window, V)
        mbarrier.wait(values.full.index(v_slot), v_phase)
        out = warpgroup_mma(p, values.slots.index(v_slot).reshape([V.keys, V.head_dim]), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(keys.free.index(k_slot))
        scores = hide(scores, mask, t, h, w, in_window, valid_from(counts, i, V), V)
        weights, rescale, peak, total = exponentiate(scores, peak, total, scale, V)
        next_p = as_operand(weights, dtype, V)
        k_slot, k_phase = next_slot(k_slot, k_phase, V.stages)
        # Waiting for the next keys here, and not where they are used, keeps the assembler from
        # moving the wait for `P V` up in front of the exponentials that it should overlap.
        mbarrier.wait(keys.full.index(k_slot), k_phase, pred=i + 1 < n)
        acc, p = warpgroup_mma_wait(0, deps=[out, next_p])
        mbarrier.arrive(values.free.index(v_slot))
        acc = rescaled(acc, rescale, V)
        v_slot, v_phase = next_slot(v_slot, v_phase, V.stages)
    mbarrier.wait(values.full.index(v_slot), v_phase)
    out = warpgroup_mma(p, values.slots.index(v_slot).reshape([V.keys, V.head_dim]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[out])
    return acc, peak, total


@gluon.jit
def walk(q, mask, block, scale, V: gl.constexpr):
    """Attention of one warpgroup, one box after another; other warpgroups fill the gaps."""
    keys = block.k_ring
    values = block.v_ring
    tile = block.tile
    counts = block.counts
    dtype: gl.constexpr = values.slots.dtype
    layout: gl.constexpr = scores_layout(V)
    acc = gl.full([64, V.head_dim], 0.0, gl.float32, output_layout(V))
    peak = gl.full([64], FLOOR, gl.float32, gl.SliceLayout(1, layout))
    total = partial_sums(gl.full([64, V.keys], 0.0, gl.float32, layout), V)
    t = 0
    h = 0
    w = 0
    slot = 0
    phase = 0
    for i in range(counts.boxes + counts.more_tiles):
        in_window = i < counts.boxes
        mbarrier.wait(keys.full.index(slot), phase)
        scores = start_scores(q, keys.slots.index(slot), mask, block.code, t, h, w, in_window, V)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(keys.free.index(slot))
        scores = hide(scores, mask, t, h, w, in_window, valid_from(counts, i, V), V)
        weights, rescale, peak, total = exponentiate(scores, peak, total, scale, V)
        p = as_operand(weights, dtype, V)
        acc = rescaled(acc, rescale, V)
        mbarrier.wait(values.full.index(slot), phase)
        out = warpgroup_mma(p, values.slots.index(slot).reshape([V.keys, V.head_dim]), acc, is_async=True)
        t, h, w = next_box(t, h, w, tile, V)
        acc = warpgroup_mma_wait(0, deps=[out])
        mbarrier.arrive(values.free.index(slot))
        slot, phase = next_slot(slot, phase, V.stages)
    return acc, peak, total


@gluon.jit
def consumer(number: gl.constexpr, block, out, lse, axes, heads, scale, V: gl.constexpr):
    """Attention of warpgroup `number`, from its queries to its outputs."""
    axes = read_again(axes)
    mask = mask_of(block.tile, axes, scores_layout(V), V, number)
    tokens = tokens_of(block.tile, axes, V, number)
    smem = block.q_smem.index(number)
    q = smem.reshape([64, V.head_dim])
    mbarrier.wait(block.q_full.index(number), 0)
    if V.overlaps:
        acc, peak, total = walk_overlapped(q, mask, block, scale, V)
    else:
        acc, peak, total = walk(q, mask, block, scale, V)
    place = query_place(block.tile, block.columns.out, V, number)
    finish(acc, peak, total, out, lse, smem, place, rows_of(tokens, axes), block.tile.head, heads, V)


@gluon.jit(do_not_specialize=["heads", "heads_per_key", "heads_per_block", "additional", "slab", "scale"])
def forward(
    query, key, value, out, more_key, more_value, lse, lengths, axes, steps,
    heads, heads_per_key, heads_per_block, additional, slab, scale, V: gl.constexpr,
):  # fmt: skip
    """One block: one tile of queries of one head.

    Args:
        query, key, value, out: tensor maps, boxes `[1, t, h, w, D]`.
        more_key, more_value: tensor maps of the additional keys and values, boxes `[1, 1, 1, keys, D]`.
        lse: `[B, *S, H]`.
        lengths: how many additional keys count, `[B]`, or null for all.
        axes: an `AxisArgs` each.
        steps: a `StepArgs` for each of query, key, value, out, more_key and more_value.
        heads, heads_per_key, heads_per_block, additional: counts; here a block has one head.
        slab: query tiles of the last axis that are swept together, see `tile_of`.
        scale: multiplies the scores, times log2(e).
        V: the `Variant`.
    """
    tile = tile_of(axes, slab, heads_per_block, V)
    counts = counts_of(tile, lengths, additional, V)
    columns = columns_of(tile, tile.head, steps, heads_per_key)
    q_smem = gl.allocate_shared_memory(query.dtype, [V.consumers] + query.block_type.shape, query.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [V.consumers, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(gl.constexpr(V.consumers)):
        mbarrier.init(q_full.index(i), 1)
    keys = make_ring(key, V.stages, V.consumers)
    values = make_ring(value, V.stages, V.consumers)
    code = place_code(V, 4) if V.mask == "coded" else 0
    fence_async_shared()
    block = Block(q_smem, q_full, keys, values, code, tile, columns, counts)
    if V.consumers == 2:
        gl.warp_specialize(
            [
                (consumer, (0, block, out, lse, axes, heads, scale, V)),
                (consumer, (1, block, out, lse, axes, heads, scale, V)),
                (producer, (block, query, key, value, more_key, more_value, V)),
            ],
            [4, 1],
            [V.registers, V.producer_registers],
        )
    else:
        gl.warp_specialize(
            [
                (consumer, (0, block, out, lse, axes, heads, scale, V)),
                (consumer, (1, block, out, lse, axes, heads, scale, V)),
                (consumer, (2, block, out, lse, axes, heads, scale, V)),
                (producer, (block, query, key, value, more_key, more_value, V)),
            ],
            [4, 4, 1],
            [V.registers, V.registers, V.producer_registers],
        )
