"""Position bias as tiles: made once for each place of a tile's keys relative to its queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vicinal.backends.blocked.masks import Masks
from vicinal.backends.blocked.tiles import Column, Pattern, Tile, length
from vicinal.backends.devices import add_at
from vicinal.problem import Problem

Place = tuple[Pattern, int, int]
"""What the bias of a tile depends on along one axis: windows, keys, and where these begin, seen from the queries."""


@dataclass
class Bias:
    """The table in log2, and the tiles of it that the rows of some columns need.

    Every score gets an entry, those that a mask hides too, so a tile holds both: bias where a query
    sees a key, -inf elsewhere.
    """

    problem: Problem
    table: Tensor  # [Hkv, G, entries]
    masks: Masks
    within: tuple[Sequence[Column], slice] | None = None
    rows: dict[Place, tuple[Tensor, Tensor]] = field(default_factory=dict[Place, tuple[Tensor, Tensor]])

    def chunk(self, row: Tile, columns: Sequence[Column], heads: slice) -> tuple[Tensor, Tensor]:
        """Bias and mask of a row, `[columns, 1, heads, G, queries, keys]`, and entries, `[columns, queries, keys]`."""
        if self.within is None or columns is not self.within[0] or heads != self.within[1]:
            self.within, self.rows = (columns, heads), {}
        wanted = row.pattern, length(row.keys), row.keys.start - row.queries.start
        if wanted not in self.rows:
            entries = torch.stack([self.entries((row, *column.tiles)) for column in columns])
            bias = self.table[heads].flatten(0, 1).index_select(1, entries.flatten())
            bias = bias.view(-1, self.table.shape[1], *entries.shape).movedim(2, 0)[:, None]
            mask = self.masks.chunk(row, columns)
            if mask is not None:
                bias = torch.where(mask == 0, bias, -torch.inf)
            self.rows[wanted] = bias, entries
        return self.rows[wanted]

    def entries(self, tiles: Sequence[Tile]) -> Tensor:
        """Which entry of the table a query and a key of a box have, `[queries, keys]`; any one outside windows."""
        entries = torch.zeros(1, 1, dtype=torch.int64, device=self.table.device)
        for tile, axis in zip(tiles, self.problem.axes, strict=True):
            query = torch.arange(tile.queries.start, tile.queries.stop, device=entries.device)
            key = torch.arange(tile.keys.start, tile.keys.stop, device=entries.device)
            most = axis.kernel_size - 1
            along = (key - query[:, None]).clamp_(-most, most) + most
            pairs = entries[:, None, :, None] * (2 * most + 1) + along[None, :, None, :]
            entries = pairs.reshape(entries.shape[0] * len(query), entries.shape[1] * len(key))
        return entries


def add_gradient(total: Tensor, grad_scores: Tensor, entries: Tensor) -> None:
    """Add the gradients of the scores of a chunk's units, `[C, G * queries, keys]`, to those of the table.

    Args:
        total: `[heads, G, all entries]`, of the heads of the chunk.
        entries: `[columns, queries, keys]`.
    """
    heads, groups, _ = total.shape
    columns, *pairs = entries.shape
    summed = grad_scores.view(columns, -1, heads, groups, *pairs).sum(1)
    summed = summed.movedim(0, 2).reshape(heads, groups, -1)
    add_at(total, entries.flatten(), summed)
