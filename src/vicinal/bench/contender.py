"""What can be timed: a contender, and the function that it makes of a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.problem import Problem


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Call:
    """A function of query, key and value, `[B, *S, H, D]` to `[B, *S, H, Dv]`, of which only `attend` is timed.

    Args:
        attend: attention, of tensors that `enter` has laid out.
        enter: lays a tensor out as the contender likes it best; a model could keep its tokens so throughout.
        leave: undoes it.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    enter: Callable[[Tensor], Tensor] = as_it_is
    leave: Callable[[Tensor], Tensor] = as_it_is

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return self.leave(self.attend(self.enter(query), self.enter(key), self.enter(value)))


class Contender(Protocol):
    """Something that can be timed."""

    @property
    def name(self) -> str: ...

    @property
    def is_dense(self) -> bool:
        """Whether it answers for all pairs of tokens, whatever the window."""
        ...

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        """Why it does not run that pass of the problem there."""
        ...

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        """May take its time."""
        ...
