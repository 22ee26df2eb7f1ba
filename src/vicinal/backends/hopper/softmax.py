"""What the forward kernels share on the way from scores to outputs: layouts, online softmax, the epilogue."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma

from vicinal.backends.hopper.mask import penalties, select, select_valid
from vicinal.backends.hopper.tile import again, row_places, store_box

FLOOR = gl.constexpr(-1e20)
"""Lower bound of the running maximum, so that a row whose keys are all hidden so far stays finite."""

SLACK = gl.constexpr(8.0)
"""How far, in powers of two, scores may exceed the running maximum before it follows: weights stay below 2^8."""

LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def scores_layout(V):
    """`[64, keys]` in the accumulators of one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V.keys, 16])


@gluon.constexpr_function
def output_layout(V):
    """`[64, D]` in the accumulators of one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, V.head_dim, 16])


@gluon.jit
def head_of(smem, ROWS: gl.constexpr, NUMBER: gl.constexpr, V: gl.constexpr):
    """The columns of one of the heads that lie side by side in a box."""
    rows = smem.reshape([ROWS, V.columns])
    if V.abreast == 1:
        return rows
    else:
        return rows.slice(NUMBER * V.head_dim, V.head_dim, dim=1)


@gluon.jit
def start_scores(q, k, mask, code, t, h, w, in_window, V: gl.constexpr, NUMBER: gl.constexpr = 0):
    """Start `Q K^T` plus the coded mask of box `(t, h, w)`. The mask comes first: its terms cancel to an exact 0."""
    layout: gl.constexpr = scores_layout(V)
    nothing = gl.full([64, V.keys], 0.0, gl.float32, layout)
    keys = head_of(k, V.keys, NUMBER, V).permute([1, 0])
    if V.mask == "coded":
        p = penalties(mask, t, h, w, gl.DotOperandLayout(0, layout, 2), V)
        if V.has_additional:
            p = gl.where(in_window, p, 0.0)
        scores = warpgroup_mma(p, code.permute([1, 0]), nothing, use_acc=False, is_async=True)
        return warpgroup_mma(q, keys, scores, is_async=True)
    else:
        return warpgroup_mma(q, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def hide(scores, mask, t, h, w, in_window, valid, V: gl.constexpr):
    """Masks that are not on the tensor core: windows by selects, and the end of the additional keys."""
    layout: gl.constexpr = scores_layout(V)
    if V.mask == "select":
        if V.has_additional:
            if in_window:
                scores = select(scores, mask, t, h, w, layout, V)
        else:
            scores = select(scores, mask, t, h, w, layout, V)
    if V.has_additional:
        if not in_window:
            scores = select_valid(scores, valid, layout, V)
    return scores


@gluon.jit
def exponentiate(scores, peak, total, scale, V: gl.constexpr):
    """One step of the online softmax, in powers of two.

    Returns the weights, the factor that rescales what was summed before, the new running maximum
    and the new running sum.
    """
    highest = gl.max(scores, 1) * scale
    new_peak = gl.where(highest > peak + SLACK, highest, peak)
    rescale = gl.exp2(peak - new_peak)
    weights = gl.exp2(scores * scale - gl.expand_dims(new_peak, 1))
    return weights, rescale, new_peak, total * spread(rescale, total) + partial_sums(weights, V)


@gluon.constexpr_function
def rescale_assembly(n):
    """Multiply `n` registers by one factor each, unless all factors of the warp are 1. They belong to two rows."""
    lines = [
        ".reg .pred p, q;",
        f"setp.neu.f32 p, ${2 * n}, 0f3F800000;",
        f"setp.neu.f32 q, ${2 * n + 2}, 0f3F800000;",
        "or.pred p, p, q;",
        "vote.sync.any.pred p, p, 0xffffffff;",
        "@!p bra done;",
        *(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)),
        "done:",
    ]
    return "{" + " ".join(lines) + "}"


@gluon.constexpr_function
def rescale_constraints(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescaled(acc, rescale, V: gl.constexpr):
    """`acc * rescale`, skipped by warps in which no maximum moved. After the first boxes that is the rule."""
    PACK: gl.constexpr = min(V.head_dim // 2, 32)
    factors = gl.convert_layout(rescale, gl.SliceLayout(1, output_layout(V)))
    factors = gl.expand_dims(factors, 1).broadcast_to([64, V.head_dim])
    return gl.inline_asm_elementwise(
        rescale_assembly(PACK), rescale_constraints(PACK), [acc, factors], dtype=gl.float32, is_pure=True, pack=PACK
    )


@gluon.jit
def partial_sums(weights, V: gl.constexpr):
    """Sums over the columns that one thread holds, `[64, 4]`: adding up across threads can wait until the end.

    Four threads share a row of accumulators, and of every eight columns each holds two.
    """
    return gl.sum(gl.sum(weights.reshape([64, V.keys // 8, 4, 2]), 3), 1)


@gluon.jit
def spread(x, like):
    """One value per row, spread over the columns of `like`."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, like.type.layout)), 1)


@gluon.jit
def as_operand(weights, dtype: gl.constexpr, V: gl.constexpr):
    """Weights as the left operand of `P V`: the same registers, rounded."""
    return gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, output_layout(V), 2))


@gluon.jit
def per_row(x, V: gl.constexpr):
    """One value per row, spread over the output."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, output_layout(V))), 1)


@gluon.jit
def tokens_of(tile, axes, V: gl.constexpr, consumer: gl.constexpr):
    """Number of each row's token in its batch row, or -1 for rows past the grid's end.

    Computed ahead of the walk, so that the walk need not keep the tile's spans in registers.
    """
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, scores_layout(V)))
    t, h, w = row_places(rows, V, consumer)
    t = tile.t.first + t
    h = tile.h.first + h
    w = tile.w.first + w
    exists = (t < tile.t.members) & (h < tile.h.members) & (w < tile.w.members)
    token = tile.t.group + t * axes[0].dilation
    token = token * axes[1].length + tile.h.group + h * axes[1].dilation
    token = token * axes[2].length + tile.w.group + w * axes[2].dilation
    return gl.where(exists, token, -1)


@gluon.jit
def rows_of(tokens, axes):
    """Number of each row's token in the whole batch, or something negative for rows past the grid's end."""
    grid = axes[0].length.to(gl.int64) * axes[1].length * axes[2].length
    return gl.where(tokens < 0, -1, gl.program_id(2) * grid + tokens)


@gluon.jit
def log2(x):
    """As the hardware has it, within 2^-22. The library's own also treats denormals; sums of weights are none."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def row_totals(peak, total):
    """Sums of the weights of each row, across threads."""
    return gl.convert_layout(gl.sum(total, 1), peak.type.layout)


@gluon.jit
def keep(acc, totals, smem, V: gl.constexpr, NUMBER: gl.constexpr = 0):
    """Put the outputs of one head where a box of them is stored from."""
    head_of(smem, 64, NUMBER, V).store((acc * per_row(1.0 / totals, V)).to(smem.dtype))


@gluon.jit
def store_lse(peak, totals, lse, rows, head, heads):
    """Write the log-sum-exps of one head."""
    gl.store(lse + rows * again(heads) + again(head), (peak + log2(totals)) * LN2, mask=rows >= 0)


@gluon.jit
def finish(acc, peak, total, desc, lse, smem, place, rows, head, heads, V: gl.constexpr):
    """Write the outputs, through shared memory, and the log-sum-exps of one warpgroup."""
    totals = row_totals(peak, total)
    keep(acc, totals, smem, V)
    fence_async_shared()
    store_box(desc, place, smem)
    store_lse(peak, totals, lse, rows, head, heads)
    tma.store_wait(0)
