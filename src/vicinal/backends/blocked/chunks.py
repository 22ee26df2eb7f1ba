"""What is gathered at a time: views of the user's tensors, and copies of the boxes that some tiles need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from math import prod

import torch
from torch import Tensor

from vicinal._tuples import ceil_div
from vicinal.backends.blocked.tiles import Column, Part, Slices, Tile, length

SCORES = 2**18
"""Scores held at a time, if one tile does not have more: 1 MiB in float32, about a core's L2 cache."""

KEYS = 2**22
"""Elements of gathered keys and values held at a time, likewise: about the last-level cache."""

SHARES = 2
"""Chunks for each worker, if there are rows enough: the last ones to finish should not wait long."""

KEEP = 2**26
"""Bytes of buffers that a worker leaves to the next call, at most."""


@dataclass
class Scratch:
    """Named buffers, used again and again: fresh memory costs more to fault in than to compute on.

    For the same reason a worker on a CPU leaves its buffers to the next call (`keep`); other devices
    have an allocator that does so.
    """

    dtype: torch.dtype
    device: torch.device
    held: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __post_init__(self) -> None:
        if self.device.type == "cpu" and _KEPT:
            with suppress(IndexError):  # another thread was faster
                self.held = _KEPT.pop()

    def take(self, name: str, *shape: int) -> Tensor:
        """The buffer of that name, contiguous, with whatever it held. The last one taken by the name is gone."""
        size, key = prod(shape), f"{name} {self.dtype}"
        if key not in self.held or self.held[key].numel() < size:
            # Not an inference tensor even in inference mode: a later call may write to it outside.
            with torch.inference_mode(False):
                self.held[key] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.held[key][:size].view(shape)

    def keep(self) -> None:
        """Leave the buffers to a later call, unless they are large."""
        size = sum(buffer.numel() * buffer.element_size() for buffer in self.held.values())
        if self.device.type == "cpu" and size <= KEEP and len(_KEPT) < torch.get_num_threads():
            _KEPT.append(self.held)
        self.held = {}


_KEPT: list[dict[str, Tensor]] = []


def gather(view: Tensor, rows: slice, boxes: Sequence[Slices], scratch: Scratch, name: str) -> Tensor:
    """Copy boxes of `[.., *S, D]` into `[boxes, .., rows, tokens across, D]`."""
    shape = tuple(length(piece) for piece in (rows, *boxes[0]))
    lead = view.shape[: view.ndim - 1 - len(shape)]
    copy = scratch.take(name, len(boxes), *lead, *shape, view.shape[-1])
    for which, source in stretches(view, rows, boxes):
        copy[which].copy_(source)
    return copy.view(len(boxes), *lead, shape[0], prod(shape[1:]), view.shape[-1])


def scatter(copy: Tensor, view: Tensor, rows: slice, boxes: Sequence[Slices]) -> None:
    """The way back, into boxes that do not overlap."""
    copy = _unfold(copy, rows, boxes[0])
    for which, target in stretches(view, rows, boxes):
        target.copy_(copy[which])


def scatter_add(copy: Tensor, view: Tensor, rows: slice, boxes: Sequence[Slices]) -> None:
    """Add to boxes that may overlap, one after the other."""
    for source, box in zip(_unfold(copy, rows, boxes[0]), boxes, strict=True):
        view[(..., rows, *box, slice(None))].add_(source)


def _unfold(copy: Tensor, rows: slice, box: Slices) -> Tensor:
    """`[.., rows, tokens across, D]` as `[.., rows, *across, D]`."""
    return copy.reshape(*copy.shape[:-3], length(rows), *(length(piece) for piece in box), copy.shape[-1])


def stretches(view: Tensor, rows: slice, boxes: Sequence[Slices]) -> Iterator[tuple[slice, Tensor]]:
    """Views of boxes, `[boxes, .., rows, *across, D]`: as many at a time as lie at equal steps along the last axis.

    One call for many boxes, since each call may have to wait for Python's lock.
    """
    first = 0
    while first < len(boxes):
        box = view[(..., rows, *boxes[first], slice(None))]
        step, stop = 0, first + 1
        while stop < len(boxes) and boxes[stop][:-1] == boxes[first][:-1]:
            ahead = boxes[stop][-1].start - boxes[stop - 1][-1].start
            if ahead < 0 or (stop > first + 1 and ahead != step):
                break
            step, stop = ahead, stop + 1
        strides = (step * view.stride(-2), *box.stride())
        yield slice(first, stop), box.as_strided((stop - first, *box.shape), strides, box.storage_offset())
        first = stop


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
class Band:
    """Rows that are computed at a time: as long as each other, of one pattern, their keys at equal steps."""

    rows: tuple[Tile, ...]

    @property
    def step(self) -> int:
        """From one row's keys to the next one's."""
        return self.rows[-1].keys.start - self.rows[-2].keys.start if len(self.rows) > 1 else 0


@dataclass
class Chunk:
    """Some units by some columns of equal shape by a slab of rows: what is gathered at a time.

    `C` counts columns times units, `G` the query heads that read one key head.
    """

    part: Part
    units: Slices
    columns: Sequence[Column]
    rows: Sequence[Tile]
    run: int
    together: int
    """Rows that are computed at a time. More than one only where `C` is 1: a batch has one step in memory."""

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
        """`[C, rows, across, D]`, to be read only.

        In one dimension nothing lies across, and keys stay where they are if a product can read them there.
        """
        is_plain = view.dtype == scratch.dtype and view.stride(-1) == 1 and view.stride(-2) >= view.shape[-1]
        if is_plain and not self.columns[0].tiles:
            return view[self.units][..., self.keys, None, :].flatten(0, -4)
        copy = gather(view[self.units], self.keys, [column.keys for column in self.columns], scratch, name)
        return copy.flatten(0, -4)

    @property
    def bands(self) -> Iterator[Band]:
        """The rows in their order, as many at a time as `together` allows and lie at equal steps."""
        first = 0
        while first < len(self.rows):
            stop = first + 1
            while stop < min(first + self.together, len(self.rows)) and _continues(self.rows[first : stop + 1]):
                stop += 1
            yield Band(tuple(self.rows[first:stop]))
            first = stop

    def batch_of_queries(self, gathered: Tensor, band: Band) -> Tensor:
        """`[C * rows, queries, D]`: in place, but where several query heads read one key head."""
        return self.piece(gathered, band).flatten(-4, -2).flatten(0, -3)

    def piece(self, gathered: Tensor, band: Band) -> Tensor:
        """View of what was gathered for some rows' queries: `[columns, *units, rows, G, queries, across, D]`."""
        start = band.rows[0].queries.start - self.queries.start
        tall = length(band.rows[0].queries)
        some = gathered[..., start : start + tall * len(band.rows), :, :]
        return some.unflatten(-3, (len(band.rows), tall)).movedim(-4, -5)

    def runs(self, band: Band) -> list[slice]:
        """The keys of the band's first row along axis 0, at most `run` at a time."""
        keys = band.rows[0].keys
        starts = range(keys.start, keys.stop, self.run)
        return [slice(start, min(start + self.run, keys.stop)) for start in starts]

    def batch_of_keys(self, gathered: Tensor, band: Band, piece: slice) -> Tensor:
        """`[C * rows, keys, D]`, in place."""
        return self.rows_of_keys(gathered, band, piece).flatten(0, 1)

    def rows_of_keys(self, gathered: Tensor, band: Band, piece: slice) -> Tensor:
        """`[C, rows, keys, D]`, in place: the runs of neighboring rows overlap."""
        run = self.run_of_keys(gathered, piece)
        strides = (run.stride(0), band.step * gathered.stride(1), *run.stride()[1:])
        return run.as_strided((len(run), len(band.rows), *run.shape[1:]), strides, run.storage_offset())

    def run_of_keys(self, gathered: Tensor, piece: slice) -> Tensor:
        """`[C, keys, D]`, in place."""
        start = piece.start - self.keys.start
        return gathered[:, start : start + length(piece)].flatten(1, 2)


def _continues(rows: Sequence[Tile]) -> bool:
    """Whether the last of these rows is like the first, and as far from the one before as the second is."""
    (first, second), (before, last) = rows[:2], rows[-2:]
    is_alike = last.pattern == first.pattern and length(last.keys) == length(first.keys)
    return is_alike and last.keys.start - before.keys.start == second.keys.start - first.keys.start


def chunks(part: Part, units: Sequence[int], groups: int, width: int, run: int, workers: int = 1) -> Iterator[Chunk]:
    """Cut a part into chunks whose scores and keys fit the budgets, with some for every worker if possible.

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
        # Units are the first to go where keys would not fit: short slabs gather their overlap twice.
        whole = count * width * across * part.lengths[0]
        most = max(min(batch // count, KEYS // whole, ceil_div(prod(units), workers)), 1)
        if count == 1 and len(part.rows) >= batch:
            most = 1  # A long single column: a batch of its rows needs fewer and longer calls.
        slab = max((KEYS // (whole // part.lengths[0] * most) - box) // tall, ceil_div(box, tall), 1)
        pieces = ceil_div(len(alike), count) * ceil_div(prod(units), most)
        slab = min(slab, ceil_div(len(part.rows), ceil_div(SHARES * workers, pieces)))
        for at in range(0, len(alike), count):
            batched = alike[at : at + count]
            for some in slices(units, most):
                together = batch if len(batched) * prod(length(piece) for piece in some) == 1 else 1
                for first in range(0, len(part.rows), slab):
                    yield Chunk(part, some, batched, part.rows[first : first + slab], run, together)
