"""Modules: neighborhood attention with its projections, and rotary positions on grids."""

from vicinal.nn.attention import (
    NeighborhoodAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)
from vicinal.nn.rope import Rotary

__all__ = [
    "NeighborhoodAttention",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Rotary",
]
