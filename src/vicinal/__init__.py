"""Neighborhood attention on 1-D, 2-D and 3-D grids: meaning, plan, prediction, kernels.

    out = vicinal.neighborhood_attention(query, key, value, kernel_size=7)   tensors [B, *S, H, D]
    vicinal.explain(vicinal.Problem.of(query, key, value, kernel_size=7))    which backend runs it, and why

Layers are in `vicinal.nn`, models in `vicinal.models`, drop-ins for other libraries in `vicinal.integrations`, the laws
that backends obey in `vicinal.testing`. On the command line: `vicinal --help`.
"""

from vicinal import nn as nn  # as torch.nn: a namespace that is there at once
from vicinal.backends import explain
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.functional import (
    attention_with_lse,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    neighborhood_attention,
    neighborhood_attention_packed,
)
from vicinal.hardware import Hardware
from vicinal.plan import Plan, make_plan
from vicinal.problem import Problem
from vicinal.simulate import simulate
from vicinal.suggest import suggest
from vicinal.tiling import Tiling
from vicinal.unfused import neighborhood_aggregate, neighborhood_scores

__version__ = "0.1.0"

__all__ = [
    "Hardware",
    "InvalidProblem",
    "Plan",
    "Problem",
    "Tiling",
    "Unsupported",
    "attention_with_lse",
    "explain",
    "make_plan",
    "merge_attentions",
    "na1d",
    "na2d",
    "na3d",
    "neighborhood_aggregate",
    "neighborhood_attention",
    "neighborhood_attention_packed",
    "neighborhood_scores",
    "simulate",
    "suggest",
]
