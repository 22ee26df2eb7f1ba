"""Compiled FlexAttention, twice: over tokens as they lie, and over tokens sorted into tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicinal._tuples import ceil_div
from vicinal.backends.base import Inputs
from vicinal.bench.contender import Call
from vicinal.bench.specs import FORWARD
from vicinal.plan import make_plan
from vicinal.problem import Axis, Problem
from vicinal.testing.truth import mask
from vicinal.tiling import Tiling

BLOCK = 128
"""Tokens per block of FlexAttention's mask: its own default."""

MOST_TOKENS = 300_000
"""Above, a block mask takes minutes to build: it touches all pairs of tokens."""

MOST_BLOCKS = 20_000
"""Above, a block mask does not fit: it lists all pairs of blocks."""

SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}
"""Its kernel for heads of 64 and less. With PyTorch's own choice an H100 takes up to ten times as long."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attention(problem: Problem, blocks: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention of `[B, H, tokens, D]`, compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    # Each case's mask compiles anew, and after eight PyTorch would silently stop compiling.
    torch.compiler.reset()
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = problem.heads != problem.heads_kv
    options = SMALL if problem.head_dim <= 64 and blocks.kv_indices.is_cuda else None

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return compiled(
            query, key, value, block_mask=blocks, scale=problem.scale, enable_gqa=grouped, kernel_options=options
        )

    return attend


def reasons(problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
    facts = (
        (problem.additional == 0, "leaves additional keys out"),
        (not problem.position_bias, "leaves position bias out"),
        (device.type != "cpu" or what == FORWARD, "has no backward on CPUs"),
    )
    return tuple(reason for holds, reason in facts if not holds)


@dataclass(frozen=True)
class Flex:
    """With the same mask, tokens in row-major order."""

    name: str = "flex"
    is_dense: bool = False

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        too_many = f"its block mask touches {problem.tokens}^2 pairs"
        return reasons(problem, device, what) + ((too_many,) if problem.tokens > MOST_TOKENS else ())

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        flex = attention(problem, block_mask(problem, inputs.query.device))

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (tensor.flatten(1, problem.rank).transpose(1, 2) for tensor in (query, key, value))
            return flex(q, k, v).transpose(1, 2).reshape(*query.shape[:-1], -1)

        return Call(attend)


def block_mask(problem: Problem, device: torch.device) -> Any:
    """The block mask of row-major tokens, a strip of blocks at a time: it never holds all pairs of tokens."""
    tokens, count = problem.tokens, ceil_div(problem.tokens, BLOCK)
    some = torch.zeros(count, count, dtype=torch.bool, device=device)
    every = torch.zeros_like(some)
    for row in range(count):
        strip = mask(problem, torch.arange(row * BLOCK, min((row + 1) * BLOCK, tokens), device=device))
        padded = torch.zeros(len(strip), count * BLOCK, dtype=torch.bool, device=device)
        padded[:, :tokens] = strip
        blocks = padded.unflatten(1, (count, BLOCK))
        some[row] = blocks.any(2).any(0)
        every[row] = blocks.all(2).all(0) & (len(strip) == BLOCK)
    return listed(some, every, mask_mod(problem), tokens)


def listed(some: Tensor, every: Tensor, mod: MaskMod, tokens: int) -> Any:
    """A `BlockMask` from which pairs of blocks see each other somewhere, and which everywhere."""
    from torch.nn.attention.flex_attention import BlockMask

    def lists(which: Tensor) -> tuple[Tensor, Tensor]:
        order = which.int().argsort(dim=1, descending=True, stable=True).int()
        return which.sum(1).int()[None, None], order[None, None]

    return BlockMask.from_kv_blocks(
        *lists(some & ~every), *lists(every), BLOCK_SIZE=BLOCK, mask_mod=mod, seq_lengths=(tokens, tokens)
    )


def mask_mod(problem: Problem) -> MaskMod:
    """The window as FlexAttention wants it: a function of token numbers."""

    def sees(axis: Axis, query: Tensor, key: Tensor) -> Tensor:
        """The rule of `testing.truth.axis_mask`, for single numbers."""
        last = (axis.length - 1 - query % axis.dilation) // axis.dilation
        same = query % axis.dilation == key % axis.dilation
        q, k = query // axis.dilation, key // axis.dilation
        group = q - q % axis.stride
        if axis.is_causal:
            leader = torch.minimum(group + axis.stride - 1, last)
            return same & (k <= q) & (leader - k < axis.kernel_size)
        before = axis.kernel_size // 2
        after = axis.kernel_size - before - 1
        leader = torch.minimum(group + axis.stride // 2, last)
        centre = torch.minimum(torch.clamp(leader, min=before), last - after)
        return same & (centre - k <= before) & (k - centre <= after)

    def mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        stretch = problem.tokens
        seen = query >= 0
        for axis in problem.axes:
            stretch //= axis.length
            seen = seen & sees(axis, query // stretch % axis.length, key // stretch % axis.length)
        return seen

    return mod


@dataclass(frozen=True)
class FlexTiled:
    """Over tokens sorted into tiles of 128, dilation groups apart; sorting them is not timed.

    Neighbors on the grid then share blocks, so that far fewer blocks are visited. Of all tiles with
    sides that are powers of two it gets those that visit the fewest.
    """

    name: str = "flex-tiled"
    is_dense: bool = False

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        blocks = make_plan(problem, tiles(problem)).q_tiles
        too_many = f"its block mask lists {blocks}^2 pairs of blocks"
        return reasons(problem, device, what) + ((too_many,) if blocks > MOST_BLOCKS else ())

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        order = sorted_tokens(problem, tiles(problem), inputs.query.device)
        flex = attention(problem, tiled_block_mask(order))

        def enter(tensor: Tensor) -> Tensor:
            return tensor.flatten(1, problem.rank)[:, order.tokens].transpose(1, 2).contiguous()

        def leave(out: Tensor) -> Tensor:
            return out.transpose(1, 2)[:, order.places].unflatten(1, problem.shape)

        return Call(flex, enter, leave)


def tiles(problem: Problem) -> Tiling:
    """The tiles of 128 tokens, the same for queries and keys, that visit the fewest pairs."""
    sides = [1 << i for i in range(BLOCK.bit_length())]
    boxes = [box for box in product(sides, repeat=problem.rank) if prod(box) == BLOCK]
    return min((Tiling(box, box, "grid") for box in boxes), key=lambda tiling: make_plan(problem, tiling).visited)


class Line(NamedTuple):
    """One axis in sorted order: dilation groups one after another, each padded to whole tiles.

    `tokens [n]` are positions on the axis; `start` and `stop [n]` the places that the token at a place
    sees: a range, since a window's keys are neighbors in their group. Padding repeats the group's last
    token, and no window holds it.
    """

    tile: int
    tokens: Tensor
    start: Tensor
    stop: Tensor


class Order(NamedTuple):
    """`tokens [n]` are flat token numbers in sorted order, `places [tokens]` where each token lies in it."""

    lines: tuple[Line, ...]
    tokens: Tensor
    places: Tensor


def sorted_line(axis: Axis, tile: int, device: torch.device) -> Line:
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    for group, line in enumerate(axis.subaxes()):
        before = len(tokens)
        for place in range(ceil_div(line.length, tile) * tile):
            member = min(place, line.length - 1)
            window = line.window(member)
            tokens.append(group + member * axis.dilation)
            spans.append((before + window.start, before + window.stop))
    start, stop = torch.tensor(spans, dtype=torch.int32, device=device).unbind(1)
    return Line(tile, torch.tensor(tokens, device=device), start.contiguous(), stop.contiguous())


def sorted_tokens(problem: Problem, tiling: Tiling, device: torch.device) -> Order:
    lines = [sorted_line(*cut, device) for cut in zip(problem.axes, tiling.q_tile, strict=True)]
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    for axis, line in zip(problem.axes, lines, strict=True):
        tokens = tokens[..., None] * axis.length + line.tokens
    rank = problem.rank
    for i, line in enumerate(lines):  # [n, m, ...] -> [n / t, t, m / u, u, ...]
        tokens = tokens.unflatten(2 * i, (-1, line.tile))
    tokens = tokens.permute(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)).flatten()
    places = torch.empty(problem.tokens, dtype=torch.int64, device=device)
    places[tokens] = torch.arange(len(tokens), device=device)  # a token's or its copies': the answer is the same
    return Order(tuple(lines), tokens, places)


def tiled_block_mask(order: Order) -> Any:
    """The block mask of sorted tokens. A pair of blocks is a product over axes, and so is what it sees."""
    some = every = torch.ones(1, 1, dtype=torch.bool, device=order.tokens.device)
    for line in order.lines:
        first = torch.arange(0, len(line.tokens), line.tile, device=line.tokens.device)
        start, stop = line.start[:, None], line.stop[:, None]
        touched = (start < first + line.tile) & (stop > first)
        held = (start <= first) & (stop >= first + line.tile)
        some = torch.kron(some, touched.unflatten(0, (-1, line.tile)).any(1))
        every = torch.kron(every, held.unflatten(0, (-1, line.tile)).all(1))
    return listed(some, every, tiled_mask_mod(order), len(order.tokens))


def tiled_mask_mod(order: Order) -> MaskMod:
    """The window as FlexAttention wants it, of sorted tokens."""
    tile = [line.tile for line in order.lines]
    counts = [len(line.tokens) // line.tile for line in order.lines]

    def places(token: Tensor) -> list[Tensor]:
        """Where a token lies on each sorted axis."""
        inside, block = token % BLOCK, token // BLOCK
        found: list[Tensor] = []
        for n, count in zip(reversed(tile), reversed(counts), strict=True):
            found.append(block % count * n + inside % n)
            inside, block = inside // n, block // count
        return found[::-1]

    def mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= 0
        for line, q, k in zip(order.lines, places(query), places(key), strict=True):
            seen = seen & (line.start[q] <= k) & (k < line.stop[q])
        return seen

    return mod
