"""Batched tiles in plain PyTorch, forward and backward: any device PyTorch has, the default on CPUs.

A *unit* is one key/value head of one batch row in one dilation group: an undilated grid of its own.
Axis 0 of a unit is cut into *rows* of query tiles, the other axes into *columns* of them. The keys
that a column needs are gathered once, as `[length of axis 0, keys across, D]`: in that layout the
keys of every row are one run of memory, so matrix products read them in place although the boxes of
neighboring rows overlap. Only the scores of one row by a few columns and units exist at a time, few
enough to stay in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, product
from math import prod

import torch
from torch import Tensor

from vicinal._tuples import ceil_div
from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.hardware import Hardware
from vicinal.plan import AxisPlan, Plan, Span
from vicinal.problem import Axis, Problem
from vicinal.tiling import Tiling

SCORES = 2**18
"""Scores held at a time, if one tile does not have more: 1 MiB in float32, about a core's L2 cache."""

KEYS = 2**22
"""Elements of gathered keys and values held at a time, likewise: about the last-level cache."""

LN2 = math.log(2)

Slices = tuple[slice, ...]
Pattern = tuple[tuple[int, int], ...]
"""The run of keys that each query of a tile sees, counted from the tile's first key."""


# ---- where tiles lie ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """A query tile along one axis, the run of keys it visits, and which of them each query sees."""

    queries: slice
    keys: slice
    pattern: Pattern

    @staticmethod
    def of(axis: Axis, span: Span, box: int) -> Tile:
        """The tile of `span`, its run of keys lengthened to `box` so that tiles can be batched."""
        start = min(span.start, axis.length - box)
        windows = (axis.window(query) for query in range(span.first, span.last))
        pattern = tuple((window.start - start, window.stop - start) for window in windows)
        return Tile(slice(span.first, span.last), slice(start, start + box), pattern)


@dataclass(frozen=True)
class Column:
    """A query tile across the axes after the first."""

    tiles: tuple[Tile, ...]

    @property
    def queries(self) -> Slices:
        return tuple(tile.queries for tile in self.tiles)

    @property
    def keys(self) -> Slices:
        return tuple(tile.keys for tile in self.tiles)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(length(tile.queries) for tile in self.tiles)


@dataclass(frozen=True)
class Part:
    """All dilation groups that have the same lengths: grids of their own, cut in the same way."""

    lengths: tuple[int, ...]
    residues: tuple[range, ...]
    rows: tuple[Tile, ...]
    columns: tuple[Column, ...]


@lru_cache(maxsize=64)
def parts(axes: tuple[AxisPlan, ...]) -> tuple[Part, ...]:
    """The plan, by groups of equal lengths. Groups of one axis differ in length by one at most."""
    choices: list[list[range]] = []
    for along in axes:
        longer = along.axis.length % along.axis.dilation or along.axis.dilation
        choices.append([group for group in (range(longer), range(longer, along.axis.dilation)) if group])
    found: list[Part] = []
    for residues in product(*choices):
        lengths: list[int] = []
        tiles: list[list[Tile]] = []
        for i, (along, groups) in enumerate(zip(axes, residues, strict=True)):
            axis = along.axis.subaxes()[groups[0]]
            spans = [span for span in along.spans if span.group == groups[0]]
            # Rows are visited one at a time and may differ; columns are batched, so theirs are equally long.
            longest = max(span.stop - span.start for span in spans)
            tiles.append([Tile.of(axis, span, longest if i else span.stop - span.start) for span in spans])
            lengths.append(axis.length)
        columns = sorted((Column(tile) for tile in product(*tiles[1:])), key=lambda column: column.shape)
        found.append(Part(tuple(lengths), residues, tuple(tiles[0]), tuple(columns)))
    return tuple(found)


def length(piece: slice) -> int:
    return piece.stop - piece.start


# ---- views of the user's tensors, and copies of what a chunk needs -----------------------------------


def by_group(tensor: Tensor, part: Part, dilation: Sequence[int]) -> Tensor:
    """View `[B, *S, .., D]` as `[B, *groups, .., *S of one group, D]`."""
    for i, (residues, step, size) in enumerate(zip(part.residues, dilation, part.lengths, strict=True)):
        at = 2 * i + 1
        stride = tensor.stride(at)
        tensor = tensor.as_strided(
            (*tensor.shape[:at], len(residues), size, *tensor.shape[at + 1 :]),
            (*tensor.stride()[:at], stride, stride * step, *tensor.stride()[at + 1 :]),
            tensor.storage_offset() + residues[0] * stride,
        )
    end = 2 * len(part.lengths) + 1
    return tensor.permute(0, *range(1, end, 2), *range(end, tensor.ndim - 1), *range(2, end, 2), tensor.ndim - 1)


@dataclass
class Scratch:
    """Named buffers, used again and again: fresh memory costs more to fault in than to compute on."""

    dtype: torch.dtype
    device: torch.device
    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def take(self, name: str, *shape: int) -> Tensor:
        """The buffer of that name, contiguous, with whatever it held. The last one taken by the name is gone."""
        size = prod(shape)
        if name not in self.held or self.held[name].numel() < size:
            self.held[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.held[name][:size].view(shape)


def gather(view: Tensor, rows: slice, boxes: Sequence[Slices], scratch: Scratch, name: str) -> Tensor:
    """Copy boxes of `[.., *S, D]` into `[boxes, .., rows, tokens across, D]`."""
    shape = tuple(length(piece) for piece in (rows, *boxes[0]))
    lead = view.shape[: view.ndim - 1 - len(shape)]
    copy = scratch.take(name, len(boxes), *lead, *shape, view.shape[-1])
    for target, box in zip(copy, boxes, strict=True):
        target.copy_(view[(..., rows, *box, slice(None))])
    return copy.view(len(boxes), *lead, shape[0], prod(shape[1:]), view.shape[-1])


def scatter(copy: Tensor, view: Tensor, rows: slice, boxes: Sequence[Slices], *, add: bool = False) -> None:
    """The way back: copy (or add) boxes into the view that they were gathered from."""
    shape = tuple(length(piece) for piece in (rows, *boxes[0]))
    for source, box in zip(copy, boxes, strict=True):
        target = view[(..., rows, *box, slice(None))]
        source = source.reshape(*source.shape[:-3], *shape, source.shape[-1])
        target.add_(source) if add else target.copy_(source)


def slices(shape: Sequence[int], most: int) -> Iterator[Slices]:
    """Cut a box of units into boxes of about `most`, the last axes kept whole as far as they fit."""
    if not shape:
        yield ()
        return
    inner = prod(shape[1:])
    step = max(most // max(inner, 1), 1)
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        for rest in slices(shape[1:], most // (stop - start)):
            yield (slice(start, stop), *rest)


# ---- masks --------------------------------------------------------------------------------------------


@dataclass
class Masks:
    """Masks by pattern, made once each: 0 where a query sees a key, -inf elsewhere, `None` where all see all."""

    dtype: torch.dtype
    device: torch.device
    axes: dict[tuple[Pattern, int], Tensor] = field(default_factory=dict[tuple[Pattern, int], Tensor])
    columns: Sequence[Column] = ()
    rows: dict[tuple[Pattern, int], Tensor | None] = field(default_factory=dict[tuple[Pattern, int], Tensor | None])

    def axis(self, tile: Tile) -> Tensor:
        """`[queries, keys]` along one axis."""
        wanted = tile.pattern, length(tile.keys)
        if wanted not in self.axes:
            start, stop = torch.tensor(tile.pattern, device=self.device).unbind(1)
            key = torch.arange(wanted[1], device=self.device)
            hidden = (key < start[:, None]) | (key >= stop[:, None])
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            self.axes[wanted] = mask.masked_fill_(hidden, -torch.inf)
        return self.axes[wanted]

    def product(self, tiles: Iterable[Tile]) -> Tensor:
        """`[queries, keys]` of a box, both in row-major order."""
        mask = torch.zeros(1, 1, dtype=self.dtype, device=self.device)
        for tile in tiles:
            along = self.axis(tile)
            pairs = mask[:, None, :, None] + along[None, :, None, :]
            mask = pairs.reshape(mask.shape[0] * along.shape[0], mask.shape[1] * along.shape[1])
        return mask

    def chunk(self, row: Tile, columns: Sequence[Column]) -> Tensor | None:
        """`[columns, 1, 1, queries, keys]` of one row. Rows away from the borders share theirs."""
        if columns is not self.columns:
            self.columns, self.rows = columns, {}
        wanted = row.pattern, length(row.keys)
        if wanted not in self.rows:
            tiles = [(row, *column.tiles) for column in columns]
            full = all(run == (0, length(tile.keys)) for box in tiles for tile in box for run in tile.pattern)
            self.rows[wanted] = None if full else torch.stack([self.product(box) for box in tiles])[:, None, None]
        return self.rows[wanted]


# ---- chunks ---------------------------------------------------------------------------------------------


@dataclass
class Chunk:
    """Some units by some columns of equal shape by a slab of rows: what is gathered at a time.

    `C` counts columns times units, `R` the query heads that read one key head times the tokens across.
    """

    part: Part
    units: Slices
    columns: Sequence[Column]
    rows: Sequence[Tile]
    run: int

    @property
    def queries(self) -> slice:
        return slice(self.rows[0].queries.start, self.rows[-1].queries.stop)

    @property
    def keys(self) -> slice:
        return slice(self.rows[0].keys.start, max(row.keys.stop for row in self.rows))

    def gather_queries(self, view: Tensor, scratch: Scratch, name: str) -> Tensor:
        """`[columns, *units, G, rows, across, D]`"""
        return gather(view[self.units], self.queries, [column.queries for column in self.columns], scratch, name)

    def gather_keys(self, view: Tensor, scratch: Scratch, name: str) -> Tensor:
        """`[C, rows, across, D]`"""
        copy = gather(view[self.units], self.keys, [column.keys for column in self.columns], scratch, name)
        return copy.flatten(0, -4)

    def row_of_queries(self, gathered: Tensor, row: Tile) -> Tensor:
        """`[C, queries, D]`: in place, but where several query heads read one key head."""
        start = row.queries.start - self.queries.start
        piece = gathered[..., start : start + length(row.queries), :, :]
        return piece.flatten(-4, -2).flatten(0, -3)

    def put_row(self, piece: Tensor, gathered: Tensor, row: Tile) -> None:
        """Undo `row_of_queries`."""
        start = row.queries.start - self.queries.start
        target = gathered[..., start : start + length(row.queries), :, :]
        target.copy_(piece.view(target.shape))

    def runs(self, row: Tile) -> list[slice]:
        """The keys of a row along axis 0, at most `run` at a time."""
        starts = range(row.keys.start, row.keys.stop, self.run)
        return [slice(start, min(start + self.run, row.keys.stop)) for start in starts]

    def run_of_keys(self, gathered: Tensor, piece: slice) -> Tensor:
        """`[C, keys, D]`, in place."""
        start = piece.start - self.keys.start
        return gathered[:, start : start + length(piece)].flatten(1, 2)


def chunks(part: Part, units: Sequence[int], groups: int, width: int, run: int) -> Iterator[Chunk]:
    """Cut a part into chunks whose scores and keys fit the budgets.

    Args:
        units: `(B, *groups, Hkv)`, the axes of units.
        groups: query heads that read one key head.
        width: elements of one key and its value.
        run: keys along axis 0 that are met at a time.
    """
    box = max(length(row.keys) for row in part.rows)
    tall = max(length(row.queries) for row in part.rows)
    for shape, columns in groupby(part.columns, key=lambda column: column.shape):
        alike = list(columns)
        across = prod(length(piece) for piece in alike[0].keys)
        batch = max(SCORES // (groups * tall * prod(shape) * min(box, run) * across), 1)
        count = min(batch, len(alike))
        held = KEYS // (width * across * count)
        for at in range(0, len(alike), count):
            batched = alike[at : at + count]
            for some in slices(units, batch // count):
                number = prod(length(piece) for piece in some)
                slab = max((held // number - box) // tall, ceil_div(box, tall), 1)
                for first in range(0, len(part.rows), slab):
                    yield Chunk(part, some, batched, part.rows[first : first + slab], run)


# ---- the arithmetic -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """The user's tensors as one part sees them: units first, then the grid of one group."""

    part: Part
    dilation: tuple[int, ...]
    heads_kv: int

    def queries(self, tensor: Tensor) -> Tensor:
        """`[B, *S, H, D]` as `[B, *groups, Hkv, G, *S, D]`."""
        return by_group(tensor.unflatten(-2, (self.heads_kv, -1)), self.part, self.dilation)

    def keys(self, tensor: Tensor) -> Tensor:
        """`[B, *S, Hkv, D]` as `[B, *groups, Hkv, *S, D]`."""
        return by_group(tensor, self.part, self.dilation)

    def additional(self, tensor: Tensor) -> Tensor:
        """`[B, M, Hkv, D]` as `[B, *groups, Hkv, M, D]`."""
        groups = [len(residues) for residues in self.part.residues]
        tensor = tensor.transpose(1, 2)
        return tensor[(slice(None), *[None] * len(groups))].expand(tensor.shape[0], *groups, *tensor.shape[1:])


@dataclass(frozen=True)
class Run:
    """Keys and values that all queries of a row meet, and the mask between them, if one is needed."""

    k: Tensor  # [C, keys, D]
    v: Tensor  # [C, keys, Dv]
    mask: Tensor | None  # [columns, 1 or units.., 1, queries or 1, keys]


def scores(q: Tensor, run: Run, columns: int, groups: int, scratch: Scratch) -> Tensor:
    """Scores in log2, `[C, G * queries, keys]`, -inf where a key is hidden."""
    s = scratch.take("scores", *q.shape[:2], run.k.shape[1])
    torch.bmm(q, run.k.transpose(1, 2), out=s)
    if run.mask is not None:
        s.view(columns, -1, groups, s.shape[1] // groups, s.shape[2]).add_(run.mask)
    return s


@dataclass
class Pass:
    """What the forward and the backward pass share: one problem, walked chunk by chunk and row by row."""

    plan: Plan
    inputs: Inputs

    def __post_init__(self) -> None:
        problem, query = self.plan.problem, self.inputs.query
        # 16-bit inputs are computed in float32: CPUs are no faster in 16 bits, and the sums are long.
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.groups = problem.heads // problem.heads_kv
        self.log2_scale = problem.scale / LN2
        self.masks = Masks(self.dtype, query.device)
        self.scratch = Scratch(self.dtype, query.device)

    def walk(self) -> Iterator[tuple[Views, Chunk]]:
        problem = self.plan.problem
        if problem.batch == 0:
            return
        for part in parts(self.plan.axes):
            units = (problem.batch, *(len(residues) for residues in part.residues), problem.heads_kv)
            width, run = problem.head_dim + problem.head_dim_v, self.plan.tiling.kv_tile[0]
            for chunk in chunks(part, units, self.groups, width, run):
                yield Views(part, problem.dilation, problem.heads_kv), chunk

    def rows(self, views: Views, chunk: Chunk) -> Iterator[tuple[Tile, list[Run]]]:
        """Each row of a chunk with the runs of keys that it meets: its box, cut along axis 0, and the additional keys.

        Runs are views of what was gathered, in the order of `Chunk.runs`.
        """
        keys = chunk.gather_keys(views.keys(self.inputs.key), self.scratch, "keys")
        values = chunk.gather_keys(views.keys(self.inputs.value), self.scratch, "values")
        extra = self.additional(views, chunk)
        for row in chunk.rows:
            across, mask = keys.shape[2], self.masks.chunk(row, chunk.columns)
            runs: list[Run] = []
            for piece in chunk.runs(row):
                start = (piece.start - row.keys.start) * across
                part = None if mask is None else mask[..., start : start + length(piece) * across]
                runs.append(Run(chunk.run_of_keys(keys, piece), chunk.run_of_keys(values, piece), part))
            yield row, [*runs, *extra]

    def additional(self, views: Views, chunk: Chunk) -> list[Run]:
        """The additional keys of a chunk's units, repeated for its columns: there are few of them."""
        keys, values, lengths = self.inputs[3:]
        if keys is None or values is None or keys.shape[1] == 0:
            return []

        def repeat(tensor: Tensor) -> Tensor:
            piece = views.additional(tensor)[chunk.units].to(self.dtype)
            return piece.expand(len(chunk.columns), *piece.shape).flatten(0, -3)

        mask = None
        if lengths is not None:
            valid = torch.arange(keys.shape[1], device=keys.device) < lengths[:, None]
            hidden = torch.zeros(valid.shape, dtype=self.dtype, device=keys.device).masked_fill_(~valid, -torch.inf)
            units = views.additional(hidden[:, :, None, None].expand(-1, -1, keys.shape[2], -1))[chunk.units]
            mask = units.flatten(0, -3)[None, :, None, None, :, 0]
            # What lies beyond a length may hold anything; 0 * inf would still be heard.
            keys = keys.masked_fill(~valid[:, :, None, None], 0)
            values = values.masked_fill(~valid[:, :, None, None], 0)
        return [Run(repeat(keys), repeat(values), mask)]


def attend(
    q: Tensor, runs: Iterable[Run], columns: int, groups: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Softmax over the keys of all runs, one run at a time: `[C, rows, Dv]` and the log2-sum-exp2, `[C, rows, 1]`."""
    out = total = top = None
    for run in runs:
        s = scores(q, run, columns, groups, scratch)
        highest = s.amax(-1, keepdim=True)
        if out is None or total is None or top is None:
            # A row may have no key in this run: keep its maximum finite, so that -inf - top stays -inf.
            top = highest.clamp_(min=torch.finfo(s.dtype).min)
            p = s.sub_(top).exp2_()
            out = torch.bmm(p, run.v, out=scratch.take("out", *p.shape[:2], run.v.shape[2]))
            total = p.sum(-1, keepdim=True)
        else:
            highest = torch.maximum(highest, top)
            decay = (top - highest).exp2_()
            p = s.sub_(highest).exp2_()
            out = out.mul_(decay).baddbmm_(p, run.v)
            total, top = total.mul_(decay).add_(p.sum(-1, keepdim=True)), highest
    assert out is not None and total is not None and top is not None
    return out.div_(total), top + total.log2()


@dataclass(frozen=True)
class Blocked:
    """Tiles of scores in plain PyTorch."""

    name: str = "blocked"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def tilings(self, problem: Problem, hardware: Hardware) -> tuple[Tiling, ...]:
        return default_tilings(problem.axes, problem.heads // problem.heads_kv)

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        problem, query = plan.problem, inputs.query
        work = Pass(plan, inputs)
        out = query.new_empty(*query.shape[:-1], problem.head_dim_v)
        lse = query.new_empty(*query.shape[:-1], 1, dtype=work.dtype)
        for views, chunk in work.walk():
            q = chunk.gather_queries(views.queries(query), work.scratch, "q").mul_(work.log2_scale)
            o = work.scratch.take("o", *q.shape[:-1], problem.head_dim_v)
            sums = work.scratch.take("lse", *q.shape[:-1], 1)
            for row, runs in work.rows(views, chunk):
                q_row = chunk.row_of_queries(q, row)
                found, total = attend(q_row, runs, len(chunk.columns), work.groups, work.scratch)
                chunk.put_row(found, o, row)
                chunk.put_row(total, sums, row)
            boxes = [column.queries for column in chunk.columns]
            scatter(o, views.queries(out)[chunk.units], chunk.queries, boxes)
            scatter(sums.mul_(LN2), views.queries(lse)[chunk.units], chunk.queries, boxes)
        return Output(out, lse.squeeze(-1))

    def backward(
        self, plan: Plan, inputs: Inputs, output: Output, grad_out: Tensor, grad_lse: Tensor | None
    ) -> Gradients:
        work = Backward(plan, inputs)
        return work.run(output, grad_out, grad_lse)


class Backward(Pass):
    """Recompute the weights from the log-sum-exp, tile by tile.

        p = exp(s - lse),  dv = p^T do,  ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q

    with `delta = rowsum(do * o) - dlse`.
    """

    def run(self, output: Output, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
        inputs = self.inputs
        dq = torch.empty_like(inputs.query, memory_format=torch.contiguous_format)
        summed = [
            None if tensor is None else torch.zeros(tensor.shape, dtype=self.dtype, device=tensor.device)
            for tensor in (inputs.key, inputs.value, inputs.additional_keys, inputs.additional_values)
        ]
        for views, chunk in self.walk():
            self.chunk(views, chunk, output, grad_out, grad_lse, dq, summed)
        dk, dv, dak, dav = (None if grad is None else grad.to(inputs.query.dtype) for grad in summed)
        assert dk is not None and dv is not None
        return Gradients(dq, dk, dv, dak, dav)

    def chunk(
        self,
        views: Views,
        chunk: Chunk,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        dq: Tensor,
        summed: Sequence[Tensor | None],
    ) -> None:
        """Add one chunk's share to the gradients."""

        def take(tensor: Tensor, name: str) -> Tensor:
            return chunk.gather_queries(views.queries(tensor), self.scratch, name)

        q, do = take(self.inputs.query, "q").mul_(self.log2_scale), take(grad_out, "do")
        delta = take(output.out, "o").mul_(do).sum(-1, keepdim=True)
        if grad_lse is not None:
            delta -= take(grad_lse[..., None], "dlse")
        lse = take(output.lse[..., None], "lse").div_(LN2)
        grad_q = self.scratch.take("dq", *q.shape)
        sums = self.zero_sums(chunk)
        for row, runs in self.rows(views, chunk):
            rows = [chunk.row_of_queries(tensor, row) for tensor in (q, do, delta, lse)]
            boxes = [chunk.run_of_keys(tensor, piece) for piece in chunk.runs(row) for tensor in sums[:2]]
            targets = [*boxes, *sums[2:]]
            grad = self.scratch.take("dq row", *rows[0].shape).zero_()
            for run, dk, dv in zip(runs, targets[::2], targets[1::2], strict=True):
                self.tile(*rows, run, len(chunk.columns), grad, dk, dv)
            chunk.put_row(grad, grad_q, row)
        boxes = [column.queries for column in chunk.columns]
        scatter(grad_q.mul_(self.plan.problem.scale), views.queries(dq)[chunk.units], chunk.queries, boxes)
        self.collect(views, chunk, sums, summed)

    def tile(
        self,
        q: Tensor,
        do: Tensor,
        delta: Tensor,
        lse: Tensor,
        run: Run,
        columns: int,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Add `ds k`, `ds^T q` and `p^T do` of one row and one run of keys."""
        p = scores(q, run, columns, self.groups, self.scratch).sub_(lse).exp2_()
        dv.add_(torch.bmm(p.transpose(1, 2), do, out=self.scratch.take("dv row", *run.v.shape)))
        ds = torch.bmm(do, run.v.transpose(1, 2), out=self.scratch.take("ds", *p.shape)).sub_(delta).mul_(p)
        dk.add_(torch.bmm(ds.transpose(1, 2), q, out=self.scratch.take("dk row", *run.k.shape)))
        dq.baddbmm_(ds, run.k)

    def zero_sums(self, chunk: Chunk) -> list[Tensor]:
        """Zeros for the gathered keys and values, and for the additional ones if there are any."""
        problem = self.plan.problem
        across = prod(length(piece) for piece in chunk.columns[0].keys)
        batch = len(chunk.columns) * prod(length(piece) for piece in chunk.units)
        shapes = {"keys": (batch, length(chunk.keys), across)}
        if problem.additional:
            shapes["additional"] = (batch, problem.additional)
        widths = {"d k": problem.head_dim, "d v": problem.head_dim_v}
        return [
            self.scratch.take(f"{of} of {keys}", *shape, width).zero_()
            for keys, shape in shapes.items()
            for of, width in widths.items()
        ]

    def collect(self, views: Views, chunk: Chunk, sums: Sequence[Tensor], summed: Sequence[Tensor | None]) -> None:
        """Fold a chunk's sums over keys back onto the grid, and those over additional keys onto their rows."""
        boxes = [column.keys for column in chunk.columns]
        units = [length(piece) for piece in chunk.units]
        # Queries carry scale / ln 2 in their scores, so the gradient by the keys owes ln 2.
        for i, (tensor, factor) in enumerate(zip(sums, (LN2, 1.0, LN2, 1.0), strict=False)):
            target = summed[i]
            assert target is not None
            tensor = tensor.mul_(factor).view(len(boxes), *units, *tensor.shape[1:])
            if i < 2:
                scatter(tensor, views.keys(target)[chunk.units], chunk.keys, boxes, add=True)
            else:
                rank = len(chunk.units) - 2
                folded = tensor.sum(dim=[0, *range(2, 2 + rank)])  # [B, Hkv, M, D]
                target.transpose(1, 2)[chunk.units[0], chunk.units[-1]] += folded


# ---- the choice of tiles -----------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def default_tilings(axes: tuple[Axis, ...], groups: int) -> tuple[Tiling, ...]:
    """Tilings by predicted time, best first: one KV tile holds all that a query tile needs."""
    candidates = [Tiling(tile, tile) for tile in product(*(tile_lengths(axis) for axis in axes))]
    ranked = sorted(candidates, key=cost_of(axes, groups))
    return tuple(covering(tiling, axes) for tiling in ranked[:8])


def tile_lengths(axis: Axis) -> list[int]:
    """Powers of two and multiples of the stride that fit the axis."""
    most = ceil_div(axis.length, axis.dilation)
    lengths = {2**i for i in range(11)} | {axis.stride * 2**i for i in range(11)}
    return sorted(n for n in lengths if n <= most) or [most]


def cost_of(axes: tuple[Axis, ...], groups: int) -> Callable[[Tiling], float]:
    """Predicted time per query of a tiling, in units of one multiply-add's."""

    @lru_cache(maxsize=None)
    def keys(axis: Axis, q_tile: int) -> tuple[int, int]:
        """Keys visited by all query tiles of the axis, and number of tiles."""
        spans = AxisPlan(axis, q_tile, 1).spans
        return sum(span.stop - span.start for span in spans), len(spans)

    def cost(tiling: Tiling) -> float:
        along = [keys(axis, q_tile) for axis, q_tile in zip(axes, tiling.q_tile, strict=True)]
        visited, tiles = prod(n for n, _ in along), prod(n for _, n in along)
        rows = prod(tiling.q_tile) * groups
        # A product with few rows runs at about rows / (rows + 8) of the peak rate; every visited score
        # costs about as much as 40 multiply-adds in passes over it; gathering a key 1/4 of a row.
        padded = prod(tiling.q_tile) * groups * visited * ((rows + 8) / rows + 0.3)
        gathered = visited / max(along[0][0] / axes[0].length, 1) * 8
        overhead = 40_000 * max(tiles * rows / max(SCORES / max(visited / tiles, 1), rows), 1) / 64
        return padded + gathered + overhead

    return cost


def covering(tiling: Tiling, axes: tuple[Axis, ...]) -> Tiling:
    """The same query tiles, with KV tiles as long as the longest span."""
    longest = tuple(
        max(span.stop - span.start for span in AxisPlan(axis, q_tile, 1).spans)
        for axis, q_tile in zip(axes, tiling.q_tile, strict=True)
    )
    return Tiling(tiling.q_tile, longest)


backend = Blocked()
