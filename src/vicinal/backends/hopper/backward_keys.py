"""Gradients of keys and values: a tile of keys stays, the queries that see it pass by.

    dV = sum over queries of P^T dO        P  = exp(scale Q K^T + mask - lse)
    dK = scale sum over queries of dS^T Q  dS = P * (dO V^T - delta)

Everything is computed transposed, keys as rows, so that weights and their gradients are operands of the next
products right where they are: in registers. The sums of a tile stay in registers too, over all query heads that read
its keys; nobody else adds to them, so the same inputs give the same bits.

Queries and keys have changed places in the nouns of `tile` and `mask`: the "query tile" holds keys.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from vicinal.backends.hopper.mask import mask_of, place_code
from vicinal.backends.hopper.softmax import as_operand, hide, output_layout, scores_layout, start_scores
from vicinal.backends.hopper.tile import (
    Span,
    Tile,
    column,
    edge_of,
    hold_order,
    next_box,
    next_slot,
    read_again,
    sees_box,
    store_box,
    tile_of,
)
from vicinal.backends.hopper.tile import load_keys as load_columns
from vicinal.backends.hopper.tile import load_queries as load_rows
from vicinal.backends.hopper.tile import query_place as rows_place


class Walk(NamedTuple):
    """The boxes of queries that a block walks, once for each of its query heads, from number `first` on."""

    first: Any
    boxes: Any
    head: Any  # the first query head
    heads: Any  # how many
    all_heads: Any  # of the problem


class Block(NamedTuple):
    """What the warps of one block share.

    `full` has two barriers per slot: queries with their log-sum-exps, output gradients with their deltas.
    """

    key: Any
    value: Any
    rows_full: Any
    query: Any
    grad_out: Any
    sums: Any
    full: Any
    free: Any
    code: Any
    tile: Any
    walk: Any


@gluon.jit
def copy_sums(source, place, exists, smem, barrier):
    """Start to copy one number per query of a box. The barrier hears of it from each lane."""
    async_copy.async_copy_global_to_shared(smem, source + place, mask=exists)
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@gluon.jit
def first_place(walk, tile, V: gl.constexpr):
    """Place of the box where a walk begins."""
    if V.kernel == "additional":
        line = walk.first // tile.w.visited
        t = line // tile.h.visited
        return t, line - t * tile.h.visited, walk.first - line * tile.w.visited
    else:
        return walk.first, walk.first, walk.first


@gluon.jit
def produce(block, query, grad_out, key, value, lse, delta, axes, steps, row_columns, V: gl.constexpr):
    """Load the keys and values, then every box of queries and what belongs to them."""
    tile = block.tile
    walk = block.walk
    for number in gl.static_range(gl.constexpr(V.consumers)):
        rows_full = block.rows_full.index(number)
        load_rows(key, row_columns[0], tile, rows_full, block.key.index(number), V, number)
        load_rows(value, row_columns[1], tile, rows_full, block.value.index(number), V, number)
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    i = gl.arange(0, V.keys, layout=lanes)
    in_t = tile.t.origin + i // (V.kv_box[1] * V.kv_box[2])
    in_h = tile.h.origin + i // V.kv_box[2] % V.kv_box[1]
    in_w = tile.w.origin + i % V.kv_box[2]
    tokens = axes[0].length * axes[1].length * axes[2].length
    slot = 0
    phase = 0
    for head in range(walk.head, walk.head + walk.heads):
        line = (tile.batch * walk.all_heads + head).to(gl.int64) * tokens
        query_column = column(tile, head, steps[0])
        grad_column = column(tile, head, steps[1])
        t, h, w = first_place(walk, tile, V)
        for _ in range(walk.boxes):
            query_t = in_t + t * V.kv_box[0]
            query_h = in_h + h * V.kv_box[1]
            query_w = in_w + w * V.kv_box[2]
            exists = (query_t < tile.t.members) & (query_h < tile.h.members) & (query_w < tile.w.members)
            place = tile.t.group + query_t * axes[0].dilation
            place = place * axes[1].length + tile.h.group + query_h * axes[1].dilation
            place = place * axes[2].length + tile.w.group + query_w * axes[2].dilation
            mbarrier.wait(block.free.index(slot), phase ^ 1)
            full = block.full.index(2 * slot)
            mbarrier.expect(full, query.block_type.nbytes)
            load_columns(query, query_column, tile, t, h, w, full, block.query.index(slot), V)
            copy_sums(lse + line, place, exists, block.sums.index(2 * slot), full)
            full = block.full.index(2 * slot + 1)
            mbarrier.expect(full, grad_out.block_type.nbytes)
            load_columns(grad_out, grad_column, tile, t, h, w, full, block.grad_out.index(slot), V)
            copy_sums(delta + line, place, exists, block.sums.index(2 * slot + 1), full)
            t, h, w = next_box(t, h, w, tile, V)
            slot, phase = next_slot(slot, phase, V.stages)


class Rows(NamedTuple):
    """What one warpgroup knows of its keys."""

    key: Any
    value: Any
    mask: Any
    edge: Any


@gluon.jit
def own_rows(number: gl.constexpr, block, axes, V: gl.constexpr):
    """The keys of one warpgroup."""
    k = block.key.index(number).reshape([64, V.head_dim])
    v = block.value.index(number).reshape([64, V.head_dim])
    if V.mask != "none":
        told = read_again(axes)
        edge = edge_of(block.tile, told, V, number) if V.skips else 0
        return Rows(k, v, mask_of(block.tile, told, scores_layout(V), V, number), edge)
    else:
        return Rows(k, v, 0, 0)


@gluon.jit
def start_box(rows, block, slot, phase, t, h, w, V: gl.constexpr):
    """Start the scores of a box, whose queries have arrived, and their gradients `dP`."""
    nothing = gl.full([64, V.keys], 0.0, gl.float32, scores_layout(V))
    scores = start_scores(rows.key, block.query.index(slot), rows.mask, block.code, t, h, w, True, V)
    mbarrier.wait(block.full.index(2 * slot + 1), phase)
    do = block.grad_out.index(slot).reshape([V.keys, V.head_dim])
    return scores, warpgroup_mma(rows.value, do.permute([1, 0]), nothing, use_acc=False, is_async=True)


@gluon.jit
def sums_of(number, block, V: gl.constexpr):
    """One number of each query of a box, spread over the keys."""
    return gl.expand_dims(block.sums.index(number).load(gl.SliceLayout(0, scores_layout(V))), 0)


@gluon.jit
def weigh(scores, lse, rows, t, h, w, scale, V: gl.constexpr):
    """The weights of a box."""
    return gl.exp2(hide(scores, rows.mask, t, h, w, True, 0, V) * scale - lse)


@gluon.jit
def multiply(weights, columns, slot, total, V: gl.constexpr):
    """Start `total + weights^T columns`, the columns being queries or output gradients."""
    return warpgroup_mma(weights, columns.index(slot).reshape([V.keys, V.head_dim]), total, is_async=True)


@gluon.jit
def add_box(dk, dv, rows, block, slot, phase, t, h, w, scale, V: gl.constexpr):
    """What a box adds to `dK` and `dV`. Its queries have arrived."""
    scores, dp = start_box(rows, block, slot, phase, t, h, w, V)
    lse = sums_of(2 * slot, block, V)
    scores = warpgroup_mma_wait(1, deps=[scores])
    weights = weigh(scores, lse, rows, t, h, w, scale, V)
    p = as_operand(weights, block.query.dtype, V)
    next_dv = multiply(p, block.grad_out, slot, dv, V)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = as_operand(weights * (dp - sums_of(2 * slot + 1, block, V)), block.query.dtype, V)
    next_dk = multiply(ds, block.query, slot, dk, V)
    dv, p, dk, ds = warpgroup_mma_wait(0, deps=[next_dv, p, next_dk, ds])
    return dk, dv


@gluon.jit
def add_box_late(dk, dv, ds, before, rows, block, slot, phase, t, h, w, scale, V: gl.constexpr):
    """What a box adds to `dV`, and its `dS`; and what the box in slot `before`, which is released, adds to `dK`."""
    has_before = before >= 0
    before = gl.where(has_before, before, slot)  # the first box has none before it, and a `dS` of zeros
    scores, dp = start_box(rows, block, slot, phase, t, h, w, V)
    next_dk = multiply(ds, block.query, before, dk, V)
    lse = sums_of(2 * slot, block, V)
    scores = warpgroup_mma_wait(2, deps=[scores])
    weights = weigh(scores, lse, rows, t, h, w, scale, V)
    p = as_operand(weights, block.query.dtype, V)
    next_dv = multiply(p, block.grad_out, slot, dv, V)
    dp, dk, ds = warpgroup_mma_wait(1, deps=[dp, next_dk, ds])
    mbarrier.arrive(block.free.index(before), pred=has_before)
    ds = as_operand(weights * (dp - sums_of(2 * slot + 1, block, V)), block.query.dtype, V)
    hold_order(block)
    dv, p = warpgroup_mma_wait(0, deps=[next_dv, p])
    return dk, dv, ds


@gluon.jit
def accumulate(number: gl.constexpr, block, axes, scale, V: gl.constexpr):
    """`dK` (short of its scale) and `dV` of the rows of one warpgroup.

    If `V.is_late`, the `dS` of a box meets its queries, in slot `before`, together with the first products of the next
    box, so that a product is under way while exponentials are computed.
    """
    rows = own_rows(number, block, axes, V)
    walk = block.walk
    dk = gl.full([64, V.head_dim], 0.0, gl.float32, output_layout(V))
    dv = gl.full([64, V.head_dim], 0.0, gl.float32, output_layout(V))
    ds = as_operand(gl.full([64, V.keys], 0.0, gl.float32, scores_layout(V)), block.query.dtype, V)
    before = -1
    slot = 0
    phase = 0
    mbarrier.wait(block.rows_full.index(number), 0)
    for _ in range(walk.heads):
        t, h, w = first_place(walk, block.tile, V)
        for _ in range(walk.boxes):
            mbarrier.wait(block.full.index(2 * slot), phase)
            if V.is_late:
                dk, dv, ds = add_box_late(dk, dv, ds, before, rows, block, slot, phase, t, h, w, scale, V)
                before = slot
            else:
                sees = sees_box(t, h, w, rows.edge, V, number) if V.skips else True
                if sees:
                    dk, dv = add_box(dk, dv, rows, block, slot, phase, t, h, w, scale, V)
                else:
                    mbarrier.wait(block.full.index(2 * slot + 1), phase)
                mbarrier.arrive(block.free.index(slot))
            t, h, w = next_box(t, h, w, block.tile, V)
            slot, phase = next_slot(slot, phase, V.stages)
    if V.is_late:
        if before >= 0:
            dk = warpgroup_mma_wait(0, deps=[multiply(ds, block.query, before, dk, V)])
    return dk, dv


@gluon.jit
def consume(
    number: gl.constexpr, block, grad_key, grad_value, axes, row_columns, scale, grad_scale, V: gl.constexpr
):  # fmt: skip
    """Gradients of one warpgroup's keys and values, written where their own were."""
    dk, dv = accumulate(number, block, axes, scale, V)
    tile = block.tile
    k = block.key.index(number)
    k.reshape([64, V.head_dim]).store((dk * grad_scale).to(grad_key.dtype))
    v = block.value.index(number)
    v.reshape([64, V.head_dim]).store(dv.to(grad_value.dtype))
    fence_async_shared()
    store_box(grad_key, rows_place(tile, row_columns[2], V, number), k)
    store_box(grad_value, rows_place(tile, row_columns[3], V, number), v)
    tma.store_wait(0)


@gluon.jit
def consume_additional(
    number: gl.constexpr, block, partial_key, partial_value, additional, scale, grad_scale, V: gl.constexpr
):  # fmt: skip
    """What one chunk of queries adds to the gradients of one warpgroup's additional keys and values, in float32."""
    dk, dv = accumulate(number, block, 0, scale, V)  # there is no mask, so axes are not asked for
    layout: gl.constexpr = output_layout(V)
    tile = block.tile
    row = tile.w.first + number * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    heads_kv = block.walk.all_heads // block.walk.heads
    batches = gl.num_programs(2)
    chunk = gl.program_id(0) % (gl.num_programs(0) // gl.cdiv(additional, 64 * V.consumers))
    place = ((chunk * batches + tile.batch).to(gl.int64) * additional + row) * heads_kv + tile.head
    place = gl.expand_dims(place, 1) * V.head_dim
    place += gl.expand_dims(gl.arange(0, V.head_dim, layout=gl.SliceLayout(0, layout)), 0)
    is_row = gl.expand_dims(row < additional, 1).broadcast_to([64, V.head_dim])
    gl.store(partial_key + place, dk * grad_scale, mask=is_row)
    gl.store(partial_value + place, dv, mask=is_row)


@gluon.jit
def make_block(query, grad_out, key, value, tile, walk, V: gl.constexpr):
    k = gl.allocate_shared_memory(key.dtype, [V.consumers] + key.block_type.shape, key.layout)
    v = gl.allocate_shared_memory(value.dtype, [V.consumers] + value.block_type.shape, value.layout)
    q = gl.allocate_shared_memory(query.dtype, [V.stages] + query.block_type.shape, query.layout)
    do = gl.allocate_shared_memory(grad_out.dtype, [V.stages] + grad_out.block_type.shape, grad_out.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    sums = gl.allocate_shared_memory(gl.float32, [2 * V.stages, V.keys], flat)
    rows_full = gl.allocate_shared_memory(gl.int64, [V.consumers, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2 * V.stages, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [V.stages, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(gl.constexpr(V.consumers)):
        mbarrier.init(rows_full.index(i), 2)
    for i in gl.static_range(gl.constexpr(2 * V.stages)):
        mbarrier.init(full.index(i), 33)  # the tensor engine, and every lane that copies sums
    for i in gl.static_range(gl.constexpr(V.stages)):
        mbarrier.init(free.index(i), V.consumers)
    code = place_code(V, 4) if V.mask == "coded" else 0
    fence_async_shared()
    return Block(k, v, rows_full, q, do, sums, full, free, code, tile, walk)


@gluon.jit(do_not_specialize=["heads", "heads_per_key", "slab", "scale", "grad_scale"])
def key_gradients(
    query, grad_out, key, value, grad_key, grad_value, lse, delta, axes, steps,
    heads, heads_per_key, slab, scale, grad_scale, V: gl.constexpr,
):  # fmt: skip
    """One block: one tile of keys of one key head.

    Args:
        query, grad_out: tensor maps, boxes of columns.
        key, value, grad_key, grad_value: tensor maps, boxes of rows.
        lse, delta: as `backward_sums.sums` leaves them, `[B, H, tokens]`.
        axes: an `AxisArgs` each; their tiles are tiles of keys.
        steps: a `StepArgs` for each tensor map.
        heads, heads_per_key: query heads, all of them and those of one key head.
        slab: as in `forward.forward`.
        scale: multiplies the scores, times log2(e).
        grad_scale: multiplies the gradients of keys.
        V: the `Variant`.
    """
    tile = tile_of(axes, slab, 1, V)
    boxes = tile.t.visited * tile.h.visited * tile.w.visited
    walk = Walk(boxes * 0, boxes, tile.head * heads_per_key, heads_per_key, heads)
    block = make_block(query, grad_out, key, value, tile, walk, V)
    row_columns = (
        column(tile, tile.head, steps[2]),
        column(tile, tile.head, steps[3]),
        column(tile, tile.head, steps[4]),
        column(tile, tile.head, steps[5]),
    )
    if V.consumers == 2:
        gl.warp_specialize(
            [
                (consume, (0, block, grad_key, grad_value, axes, row_columns, scale, grad_scale, V)),
                (consume, (1, block, grad_key, grad_value, axes, row_columns, scale, grad_scale, V)),
                (produce, (block, query, grad_out, key, value, lse, delta, axes, steps, row_columns, V)),
            ],
            [4, 1],
            [V.registers, V.producer_registers],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (0, block, grad_key, grad_value, axes, row_columns, scale, grad_scale, V)),
                (produce, (block, query, grad_out, key, value, lse, delta, axes, steps, row_columns, V)),
            ],
            [1],
            [V.producer_registers],
        )


@gluon.jit(do_not_specialize=["heads", "heads_per_key", "additional", "chunk", "scale", "grad_scale"])
def additional_gradients(
    query, grad_out, key, value, partial_key, partial_value, lse, delta, axes, steps,
    heads, heads_per_key, additional, chunk, scale, grad_scale, V: gl.constexpr,
):  # fmt: skip
    """One block: what one chunk of the queries adds to the gradients of one tile of additional keys of one key head.

    Every query sees them all, so the walk is over boxes of the whole grid and needs no mask: what lies past the
    grid's end is zero and adds nothing.

    Args:
        query, grad_out: tensor maps of an undilated grid, boxes of columns.
        key, value: tensor maps of the additional keys and values, boxes `[1, 1, 1, 64, D]`.
        partial_key, partial_value: `[chunks, B, M, Hkv, D]`, float32.
        lse, delta, heads, heads_per_key, scale, grad_scale, V: as in `key_gradients`.
        axes: an `AxisArgs` each, without dilation.
        steps: a `StepArgs` for each tensor map.
        additional: their number.
        chunk: boxes in a chunk.
    """
    tiles = gl.cdiv(additional, 64 * V.consumers)
    chunks = gl.num_programs(0) // tiles
    number = gl.program_id(0) // chunks
    t = gl.cdiv(axes[0].length, V.kv_box[0])
    h = gl.cdiv(axes[1].length, V.kv_box[1])
    w = gl.cdiv(axes[2].length, V.kv_box[2])
    zero = t * 0
    tile = Tile(
        gl.program_id(2),
        gl.program_id(1),
        Span(zero, axes[0].length, zero, t, zero, zero, zero),
        Span(zero, axes[1].length, zero, h, zero, zero, zero),
        Span(number * 64 * V.consumers, axes[2].length, zero, w, zero, zero, zero),
    )
    first = (gl.program_id(0) - number * chunks) * chunk
    boxes = gl.minimum(t * h * w - first, chunk)
    walk = Walk(first, boxes, tile.head * heads_per_key, heads_per_key, heads)
    block = make_block(query, grad_out, key, value, tile, walk, V)
    row_columns = (tile.head * steps[2].head, tile.head * steps[3].head)
    gl.warp_specialize(
        [
            (consume_additional, (0, block, partial_key, partial_value, additional, scale, grad_scale, V)),
            (consume_additional, (1, block, partial_key, partial_value, additional, scale, grad_scale, V)),
            (produce, (block, query, grad_out, key, value, lse, delta, axes, steps, row_columns, V)),
        ],
        [4, 1],
        [V.registers, V.producer_registers],
    )
