"""Who runs in a benchmark: our backends, and peers that answer the same question or the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vicinal import backends
from vicinal.backends.base import Backend, Inputs
from vicinal.bench.contender import Call, Contender
from vicinal.bench.flex import Flex, FlexTiled
from vicinal.bench.specs import FORWARD
from vicinal.functional import neighborhood_attention
from vicinal.problem import Problem

MOST_DENSE_OPERATIONS = 1e15
"""Of one forward pass over all pairs of tokens: two seconds on an H100. Above, dense attention is not asked."""


@dataclass(frozen=True)
class Ours:
    """A backend, called as users call it."""

    backend: Backend
    is_dense: bool = False

    @property
    def name(self) -> str:
        return self.backend.name

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        hardware = backends.present(device)
        reasons = self.backend.why_not(problem, hardware)
        if what != FORWARD:
            reasons += self.backend.why_not_gradients(problem, hardware)
        if self.name == "reference" and problem.tokens > 4096:
            reasons += (f"holds {problem.tokens}^2 scores at once",)
        return reasons

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        attend = partial(
            neighborhood_attention,
            kernel_size=problem.kernel_size,
            stride=problem.stride,
            dilation=problem.dilation,
            is_causal=problem.is_causal,
            scale=problem.scale,
            additional_keys=inputs.additional_keys,
            additional_values=inputs.additional_values,
            additional_lengths=inputs.additional_lengths,
            position_bias=inputs.position_bias,
            backend=self.name,
        )
        return Call(attend)


@dataclass(frozen=True)
class Dense:
    """PyTorch's own operator over all tokens: what sparsity is measured against."""

    name: str = "dense"
    is_dense: bool = True

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        return dense_reasons(problem)

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # The fastest first; on CPUs the order means nothing.
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        order += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (tensor.flatten(1, problem.rank).transpose(1, 2) for tensor in (query, key, value))
            with sdpa_kernel(order, set_priority=True):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, scale=problem.scale, enable_gqa=problem.heads != problem.heads_kv
                )
            return out.transpose(1, 2).reshape(*query.shape[:-1], -1)

        return Call(attend)


def dense_reasons(problem: Problem) -> tuple[str, ...]:
    """Why attention over all pairs of tokens is not asked for."""
    pairs = problem.batch * problem.heads * problem.tokens**2
    operations = 2 * pairs * (problem.head_dim + problem.head_dim_v)
    facts = (
        (problem.additional == 0, "leaves additional keys out"),
        (not problem.position_bias, "leaves position bias out"),
        (operations <= MOST_DENSE_OPERATIONS, f"all pairs of {problem.tokens} tokens take {operations:.1e} operations"),
    )
    return tuple(reason for holds, reason in facts if not holds)


@dataclass(frozen=True)
class Natten:
    """The library that neighborhood attention is known by, where it is installed."""

    name: str = "natten"
    is_dense: bool = False

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        facts = (
            (find_spec("natten") is not None, "is not installed"),
            (device.type == "cuda", "runs on CUDA devices only"),
            (problem.additional == 0, "is not given additional keys"),
            (not problem.position_bias, "adds no position bias"),
            (min(problem.kernel_size) > 1, "needs windows of two keys and more"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        import natten  # pyright: ignore[reportMissingImports]

        na: Any = getattr(natten, f"na{problem.rank}d")  # pyright: ignore[reportUnknownArgumentType]
        window = {name: getattr(problem, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}
        return Call(partial(na, **window, scale=problem.scale))


@dataclass(frozen=True)
class DenseFlash:
    """flash-attn over all tokens, where it is installed."""

    name: str = "dense flash-attn"
    is_dense: bool = True

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        facts = (
            (find_spec("flash_attn") is not None, "is not installed"),
            (device.type == "cuda", "runs on CUDA devices only"),
            (problem.itemsize == 2, "computes in 16 bits only"),
        )
        return tuple(reason for holds, reason in facts if not holds) + dense_reasons(problem)

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        from flash_attn import flash_attn_func  # pyright: ignore

        flash: Any = flash_attn_func  # pyright: ignore[reportUnknownVariableType]

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (tensor.flatten(1, problem.rank) for tensor in (query, key, value))
            return flash(q, k, v, softmax_scale=problem.scale).reshape(*query.shape[:-1], -1)

        return Call(attend)


PEERS: tuple[Contender, ...] = (Dense(), Flex(), FlexTiled(), Natten(), DenseFlash())


def contenders(only: tuple[str, ...] = ()) -> tuple[Contender, ...]:
    """All of them, our backends first; or those of the given names.

    Example:
        >>> [contender.name for contender in contenders(("blocked", "dense"))]
        ['blocked', 'dense']
    """
    everyone: tuple[Contender, ...] = (*(Ours(backend) for backend in backends.ALL), *PEERS)
    return tuple(contender for contender in everyone if not only or contender.name in only)
