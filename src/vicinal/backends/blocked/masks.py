"""Additive masks, made once for each pattern of windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vicinal.backends.blocked.tiles import Column, Pattern, Tile, length


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
        """`[columns, 1, 1, 1, queries, keys]` of one row. Rows away from the borders share theirs."""
        if columns is not self.columns:
            self.columns, self.rows = columns, {}
        wanted = row.pattern, length(row.keys)
        if wanted not in self.rows:
            tiles = [(row, *column.tiles) for column in columns]
            full = all(run == (0, length(tile.keys)) for box in tiles for tile in box for run in tile.pattern)
            self.rows[wanted] = None if full else torch.stack([self.product(box) for box in tiles])[:, None, None, None]
        return self.rows[wanted]
