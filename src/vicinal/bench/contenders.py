"""Who runs in a benchmark: our backends, and peers that answer the same question or the dense one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from vicinal import backends
from vicinal.backends.base import Backend, Inputs
from vicinal.bench.specs import FORWARD
from vicinal.functional import neighborhood_attention
from vicinal.problem import Axis, Problem
from vicinal.testing.truth import mask

BLOCK = 128
"""Tokens per block of FlexAttention's mask: its own default."""

MOST_FLEX_TOKENS = 300_000
"""Above, a block mask takes minutes to build: it touches all pairs of tokens."""

Call = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        """A function of query, key and value, `[B, *S, H, D]` to `[B, *S, H, Dv]`; may take its time."""
        ...


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
        return partial(
            neighborhood_attention,
            kernel_size=problem.kernel_size,
            stride=problem.stride,
            dilation=problem.dilation,
            is_causal=problem.is_causal,
            scale=problem.scale,
            additional_keys=inputs.additional_keys,
            additional_values=inputs.additional_values,
            additional_lengths=inputs.additional_lengths,
            backend=self.name,
        )


@dataclass(frozen=True)
class Dense:
    """PyTorch's own operator over all tokens: what sparsity is measured against."""

    name: str = "dense"
    is_dense: bool = True

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        return ("leaves additional keys out",) if problem.additional else ()

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        # The fastest first; on CPUs the order means nothing.
        order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        order += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (tensor.flatten(1, problem.rank).transpose(1, 2) for tensor in (query, key, value))
            with sdpa_kernel(order, set_priority=True):
                out = torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, scale=problem.scale, enable_gqa=problem.heads != problem.heads_kv
                )
            return out.transpose(1, 2).reshape(*query.shape[:-1], -1)

        return call


@dataclass(frozen=True)
class Flex:
    """Compiled FlexAttention with the same mask, tokens in row-major order."""

    name: str = "flex"
    is_dense: bool = False

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        facts = (
            (problem.additional == 0, "leaves additional keys out"),
            (device.type != "cpu" or what == FORWARD, "has no backward on CPUs"),
            (problem.tokens <= MOST_FLEX_TOKENS, f"its block mask touches {problem.tokens}^2 pairs"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        blocks = block_mask(problem, inputs.query.device)
        # Each case's mask compiles anew, and after eight PyTorch would silently stop compiling.
        torch.compiler.reset()
        compiled: Any = torch.compile(flex_attention, dynamic=False)

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (tensor.flatten(1, problem.rank).transpose(1, 2) for tensor in (query, key, value))
            grouped = problem.heads != problem.heads_kv
            out = compiled(q, k, v, block_mask=blocks, scale=problem.scale, enable_gqa=grouped)
            return out.transpose(1, 2).reshape(*query.shape[:-1], -1)

        return call


def block_mask(problem: Problem, device: torch.device) -> Any:
    """FlexAttention's block mask, a strip of blocks at a time: it never holds all pairs of tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    tokens, count = problem.tokens, -(-problem.tokens // BLOCK)
    some = torch.zeros(count, count, dtype=torch.bool, device=device)
    every = torch.zeros_like(some)
    for row in range(count):
        strip = mask(problem, torch.arange(row * BLOCK, min((row + 1) * BLOCK, tokens), device=device))
        padded = torch.zeros(len(strip), count * BLOCK, dtype=torch.bool, device=device)
        padded[:, :tokens] = strip
        blocks = padded.unflatten(1, (count, BLOCK))
        some[row] = blocks.any(2).any(0)
        every[row] = blocks.all(2).all(0) & (len(strip) == BLOCK)

    def listed(which: Tensor) -> tuple[Tensor, Tensor]:
        order = which.int().argsort(dim=1, descending=True, stable=True).int()
        return which.sum(1).int()[None, None], order[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~every),
        *listed(every),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod(problem),
        seq_lengths=(tokens, tokens),
    )


def mask_mod(problem: Problem) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
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
class Natten:
    """The library that neighborhood attention is known by, where it is installed."""

    name: str = "natten"
    is_dense: bool = False

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        facts = (
            (find_spec("natten") is not None, "is not installed"),
            (device.type == "cuda", "runs on CUDA devices only"),
            (problem.additional == 0, "is not given additional keys"),
            (min(problem.kernel_size) > 1, "needs windows of two keys and more"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        import natten  # pyright: ignore[reportMissingImports]

        na: Any = getattr(natten, f"na{problem.rank}d")  # pyright: ignore[reportUnknownArgumentType]
        window = {name: getattr(problem, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}
        return partial(na, **window, scale=problem.scale)


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
            (problem.additional == 0, "leaves additional keys out"),
        )
        return tuple(reason for holds, reason in facts if not holds)

    def prepare(self, problem: Problem, inputs: Inputs) -> Call:
        from flash_attn import flash_attn_func  # pyright: ignore

        attend: Any = flash_attn_func  # pyright: ignore[reportUnknownVariableType]

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            q, k, v = (tensor.flatten(1, problem.rank) for tensor in (query, key, value))
            return attend(q, k, v, softmax_scale=problem.scale).reshape(*query.shape[:-1], -1)

        return call


PEERS: tuple[Contender, ...] = (Dense(), Flex(), Natten(), DenseFlash())


def contenders(only: tuple[str, ...] = ()) -> tuple[Contender, ...]:
    """All of them, our backends first; or those of the given names.

    Example:
        >>> [contender.name for contender in contenders(("blocked", "dense"))]
        ['blocked', 'dense']
    """
    everyone: tuple[Contender, ...] = (*(Ours(backend) for backend in backends.ALL), *PEERS)
    return tuple(contender for contender in everyone if not only or contender.name in only)
