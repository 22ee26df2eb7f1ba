"""Forward for small windows: one warpgroup a block, several blocks to a multiprocessor.

The same walk as `forward`, without warp specialisation: the warpgroup starts its own loads, a few
boxes ahead, and the other blocks of the multiprocessor fill the gaps. With few boxes per tile that
beats any overlap inside the block.
"""

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
    per_row,
    scores_layout,
    start_scores,
)
from vicinal.backends.hopper.tile import (
    columns_of,
    counts_of,
    load_next,
    load_queries,
    next_box,
    next_slot,
    tile_of,
)


@gluon.jit(do_not_specialize=["heads", "heads_per_key", "additional", "scale"])
def forward_small(
    query, key, value, out, more_key, more_value, lse, lengths, axes, steps, heads, heads_per_key, additional, scale,
    V: gl.constexpr,
):  # fmt: skip
    """One block: 64 queries of one head. Arguments as in `forward.forward`."""
    tile = tile_of(axes, V)
    counts = counts_of(tile, lengths, additional, V)
    columns = columns_of(tile, steps, heads_per_key, V)
    n = counts[0] + counts[1]
    q_smem = gl.allocate_shared_memory(query.dtype, query.block_type.shape, query.layout)
    k_smem = gl.allocate_shared_memory(key.dtype, [V.stages] + key.block_type.shape, key.layout)
    v_smem = gl.allocate_shared_memory(value.dtype, [V.stages] + value.block_type.shape, value.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [V.stages, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [V.stages, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full.index(0), 1)
    for i in gl.static_range(gl.constexpr(V.stages)):
        mbarrier.init(k_full.index(i), 1)
        mbarrier.init(v_full.index(i), 1)
    fence_async_shared()
    load_queries(query, columns[0], tile, q_full.index(0), q_smem, V, 0)
    next_t = 0
    next_h = 0
    next_w = 0
    for i in gl.static_range(gl.constexpr(V.stages)):
        if i < n:
            load_next(key, more_key, columns[1], columns[3], tile, counts[0], i, next_t, next_h, next_w, k_full.index(i), k_smem.index(i), V)
            load_next(value, more_value, columns[2], columns[4], tile, counts[0], i, next_t, next_h, next_w, v_full.index(i), v_smem.index(i), V)
        next_t, next_h, next_w = next_box(next_t, next_h, next_w, tile)

    layout: gl.constexpr = scores_layout(V)
    mask = mask_of(tile, axes, layout, V, 0)
    code = place_code(V, 4) if V.mask == "coded" else 0
    fence_async_shared()
    q = q_smem.reshape([64, V.head_dim])
    acc = gl.full([64, V.head_dim], 0.0, gl.float32, output_layout(V))
    peak = gl.full([64], FLOOR, gl.float32, gl.SliceLayout(1, layout))
    total = gl.full([64], 0.0, gl.float32, gl.SliceLayout(1, layout))
    t = 0
    h = 0
    w = 0
    slot = 0
    phase = 0
    mbarrier.wait(q_full.index(0), 0)
    for i in range(n):
        in_window = i < counts[0]
        mbarrier.wait(k_full.index(slot), phase)
        scores = start_scores(q, k_smem.index(slot), mask, code, t, h, w, in_window, V)
        scores = warpgroup_mma_wait(0, deps=[scores])
        if i + V.stages < n:
            gl.thread_barrier()  # all four warps have read the slot
            load_next(key, more_key, columns[1], columns[3], tile, counts[0], i + V.stages, next_t, next_h, next_w, k_full.index(slot), k_smem.index(slot), V)
        scores = hide(scores, mask, t, h, w, in_window, counts[2] - (i - counts[0]) * V.keys, V)
        weights, rescale, peak, total = exponentiate(scores, peak, total, scale)
        p = as_operand(weights, query.dtype, V)
        acc = acc * per_row(rescale, V)
        mbarrier.wait(v_full.index(slot), phase)
        result = warpgroup_mma(p, v_smem.index(slot).reshape([V.keys, V.head_dim]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[result])
        if i + V.stages < n:
            gl.thread_barrier()
            load_next(value, more_value, columns[2], columns[4], tile, counts[0], i + V.stages, next_t, next_h, next_w, v_full.index(slot), v_smem.index(slot), V)
        next_t, next_h, next_w = next_box(next_t, next_h, next_w, tile)
        t, h, w = next_box(t, h, w, tile)
        slot, phase = next_slot(slot, phase, V.stages)
    finish(acc, peak, total, out, lse, q_smem, tile, axes, columns[5], heads, V, 0)
