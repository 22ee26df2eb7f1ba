"""Neighborhood attention as functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vicinal import _eager, _transforms, flops, ops
from vicinal.backends.base import Inputs, unpacked
from vicinal.errors import InvalidProblem
from vicinal.tiling import Tiling

T = TypeVar("T")
Each = T | Sequence[T]
"""One value for all spatial axes, or one per axis."""

_LOWERED = (torch.float16, torch.bfloat16, torch.float32)  # the last not if it is a position bias


class AttentionOutput(NamedTuple):
    """`out [B, *S, H, Dv]` and the natural log-sum-exp of the scaled scores, `lse [B, *S, H]`."""

    out: Tensor
    lse: Tensor


def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Each[int],
    *,
    stride: Each[int] = 1,
    dilation: Each[int] = 1,
    is_causal: Each[bool] = False,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    backend: str | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Attention in which every query sees only the keys near it on a 1-D, 2-D or 3-D grid.

        out[i] = sum_j softmax_j(scale * query[i] . key[j] + bias[j - i]) * value[j],   j in the window of i

    The window is a product of one window per axis (`vicinal.window.window` is the definition), and
    every query also sees all additional keys: text tokens, registers.

    Args:
        query: `[B, *S, H, D]`, with one to three spatial axes `*S`.
        key: `[B, *S, Hkv, D]`; `H` must be a multiple of `Hkv`, and query head `h` reads key head
            `h // (H // Hkv)` in place.
        value: `[B, *S, Hkv, Dv]`.
        kernel_size: keys per window and axis, the query itself counted; `-1` is the whole axis.
        stride: queries that share a window, at most `kernel_size`. 1 slides; `kernel_size` gives
            blocked attention.
        dilation: distance between neighboring keys; `kernel_size * dilation` must fit the axis.
        is_causal: whether a query sees only itself and what comes before, per axis.
        scale: multiplies the scores; `None` is `D ** -0.5`. 0.0 is legal.
        position_bias: a table `[H, 2 * k - 1, ...]` with the kernel size `k` of each axis, learnable. The
            score of a key gets the entry at its offset from the query, counted in steps of `dilation`,
            plus `k - 1`: offset 0 is in the middle. Windows that are pushed inside at a border or shared
            by a stride still hold their query, so no offset is larger. Where an axis is causal, the
            entries of later keys are never read. Additional keys get none. In the inputs' dtype, or in
            float32 beside inputs of 16 bits, and so is its gradient.
        additional_keys, additional_values: `[B, M, Hkv, D]` and `[B, M, Hkv, Dv]`.
        additional_lengths: integers `[B]`: only so many of the `M` are seen in each batch row.
            Values below 0 count as 0, above `M` as `M`.
        backend: insist on one by name; by default the first that can run the problem, see `explain`.
        tiling: insist on how the work is cut. Changes the time, never the answer.

    Returns:
        `[B, *S, H, Dv]`, contiguous, in the dtype of the inputs.

    Raises:
        InvalidProblem: the arguments do not fit each other; the message names the one at fault.
        Unsupported: no backend, or not the one named, runs this problem on this device.

    Source: Generalized Neighborhood Attention, arXiv 2504.16922; Faster Neighborhood Attention,
        arXiv 2403.04690; Dilated Neighborhood Attention Transformer, arXiv 2209.15001.

    Example:
        >>> query, key, value = torch.randn(3, 1, 12, 20, 4, 16)  # one picture of 12x20 tokens, 4 heads of 16
        >>> neighborhood_attention(query, key, value, kernel_size=(7, 5), dilation=(1, 2)).shape
        torch.Size([1, 12, 20, 4, 16])
    """
    return attention_with_lse(
        query,
        key,
        value,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        scale=scale,
        position_bias=position_bias,
        additional_keys=additional_keys,
        additional_values=additional_values,
        additional_lengths=additional_lengths,
        backend=backend,
        tiling=tiling,
    ).out


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Each[int],
    *,
    stride: Each[int] = 1,
    dilation: Each[int] = 1,
    is_causal: Each[bool] = False,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    backend: str | None = None,
    tiling: Tiling | None = None,
) -> AttentionOutput:
    """`neighborhood_attention`, and with it the log-sum-exp that lets results be merged.

        lse[i] = log sum_j exp(scale * query[i] . key[j] + bias[j - i]),   j in the window of i, or additional

    Both outputs have right gradients.

    Args:
        query, key, value, ...: as for `neighborhood_attention`.

    Returns:
        `(out, lse)`: `[B, *S, H, Dv]` in the dtype of the inputs, and `[B, *S, H]` in float32
        (float64 for float64).

    Raises:
        InvalidProblem: the arguments do not fit each other; the message names the one at fault.
        Unsupported: no backend, or not the one named, runs this problem on this device.

    Example:
        >>> q = k = v = torch.zeros(1, 5, 7, 2, 8)
        >>> out, lse = attention_with_lse(q, k, v, kernel_size=3)
        >>> lse.exp().mean().item()  # nine equal scores of 0 in each window
        9.0
    """
    settings = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    tensors = query, key, value, additional_keys, additional_values, additional_lengths, position_bias
    return _attend(tensors, settings, scale, backend, tiling)


def neighborhood_attention_packed(
    qkv: Tensor,
    kernel_size: Each[int],
    *,
    stride: Each[int] = 1,
    dilation: Each[int] = 1,
    is_causal: Each[bool] = False,
    scale: float | None = None,
    position_bias: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    additional_lengths: Tensor | None = None,
    backend: str | None = None,
    tiling: Tiling | None = None,
) -> Tensor:
    """`neighborhood_attention` where queries, keys and values lie in one tensor, as one projection makes them.

        neighborhood_attention_packed(qkv, ...) = neighborhood_attention(*qkv.unbind(-3), ...)

    The same numbers, with less memory traffic in training: the gradient of `qkv` is written where it belongs, while
    those of three slices would be put together by a copy.

    Args:
        qkv: `[B, *S, 3, H, D]`, in any strides. Heads and widths that differ cannot be packed.
        kernel_size, ...: as for `neighborhood_attention`; additional keys and values are tensors of their own.

    Returns:
        `[B, *S, H, D]`, contiguous, in the dtype of `qkv`.

    Raises:
        InvalidProblem: the arguments do not fit each other; the message names the one at fault.
        Unsupported: no backend, or not the one named, runs this problem on this device.

    Example:
        >>> project = torch.nn.Linear(64, 3 * 64)
        >>> qkv = project(torch.randn(1, 12, 20, 64)).unflatten(-1, (3, 4, 16))  # 4 heads of 16
        >>> neighborhood_attention_packed(qkv, kernel_size=(7, 5)).shape
        torch.Size([1, 12, 20, 4, 16])
    """
    settings = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation, "is_causal": is_causal}
    tensors = qkv, None, None, additional_keys, additional_values, additional_lengths, position_bias
    return _attend(tensors, settings, scale, backend, tiling, is_packed=True).out


def _attend(
    tensors: tuple[Any, ...],
    settings: dict[str, Any],
    scale: float | None,
    backend: str | None,
    tiling: Tiling | None,
    *,
    is_packed: bool = False,
) -> AttentionOutput:
    """Attention of the tensors of a call, as `unpacked` takes them."""
    needed = tensors[:1] if is_packed else tensors[:3]
    if torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled():
        tensors = autocast(tensors)
    if _eager.is_plain([*needed, *[tensor for tensor in tensors[3:] if tensor is not None]]):
        return AttentionOutput(*_eager.attention(tensors, {**settings, "scale": scale}, backend, tiling))
    floats = *tensors[:5], tensors[6]
    if not torch.compiler.is_compiling() or None in needed:
        # Compiled calls meet the same checks in the operator's own entry; here they come before dispatch.
        inputs = unpacked(*tensors) if is_packed else Inputs(*tensors)
        ops.problem_of(inputs, {**settings, "scale": scale})
        _refuse_tangents(*floats)
        flops.ensure_registered()
    rank = tensors[0].ndim - (4 if is_packed else 3)
    out, lse = _transforms.attention(
        *tensors,
        *(each(setting, rank) for setting in settings.values()),
        tensors[0].shape[-1] ** -0.5 if scale is None else float(scale),
        backend or "",
        ops.encode(tiling),
        torch.is_grad_enabled()
        and not torch._C._get_tracing_state()  # what is recorded will be called with gradients and without
        and (_transforms.is_transformed() or any(t is not None and t.requires_grad for t in floats)),
    )
    return AttentionOutput(out, lse)


def merge_attentions(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> AttentionOutput:
    """Attention over a union of disjoint key sets, from the attention over each.

        lse = log sum_n exp(lse_n),   out = sum_n exp(lse_n - lse) * out_n

    Computed in float32 (float64 for float64) by differentiable operations, so that every output
    and every lse gets its right gradient.

    Args:
        outputs: `[B, *S, H, Dv]` each.
        lses: `[B, *S, H]` each, natural logarithms; `-inf` where a part saw no key.

    Returns:
        `(out, lse)` in the dtypes of the parts.

    Raises:
        InvalidProblem: if there is no part, or the parts do not fit each other.

    Example:
        >>> q, k, v = torch.randn(3, 1, 6, 10, 2, 8)
        >>> near = attention_with_lse(q, k, v, kernel_size=3)
        >>> merged = merge_attentions([near.out], [near.lse])
        >>> torch.allclose(merged.out, near.out)
        True
    """
    if not len(outputs) or len(outputs) != len(lses):
        raise InvalidProblem(
            f"outputs and lses must be as many and at least one each, got {len(outputs)} outputs and {len(lses)} lses"
        )
    for name, tensors in (("outputs", outputs), ("lses", lses)):
        for i, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise InvalidProblem(f"{name}[{i}] must be a tensor, got {type(tensor).__name__}")
    first = outputs[0]
    for name, tensors, shape in (("outputs", outputs, first.shape), ("lses", lses, first.shape[:-1])):
        for i, tensor in enumerate(tensors):
            if tensor.shape != shape:
                raise InvalidProblem(
                    f"{name}[{i}] must have shape {tuple(shape)} to go with outputs[0], got {tuple(tensor.shape)}"
                )
    stacked = torch.stack(tuple(lses))
    lse = stacked.logsumexp(0)
    # Where no part saw a key, every weight is to be 0, not exp(-inf + inf).
    unseen = lse == -torch.inf
    weights = stacked.masked_fill(unseen, 0.0).softmax(0).masked_fill(unseen, 0.0)
    merged = torch.zeros_like(first, dtype=weights.dtype)
    for weight, out in zip(weights.unsqueeze(-1), outputs, strict=True):
        merged = merged + weight * out.to(weight.dtype)
    return AttentionOutput(merged.to(first.dtype), lse)


def _natten(rank: int, example: str):
    """`na1d`, `na2d` or `na3d`: one body, since rank is a number and not a kind."""

    def na(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: Each[int],
        stride: Each[int] = 1,
        dilation: Each[int] = 1,
        is_causal: Each[bool] = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        backend: str | None = None,
        q_tile_shape: Sequence[int] | None = None,
        kv_tile_shape: Sequence[int] | None = None,
        backward_q_tile_shape: Sequence[int] | None = None,
        backward_kv_tile_shape: Sequence[int] | None = None,
        backward_kv_splits: Sequence[int] | None = None,
        backward_use_pt_reduction: bool = False,
        run_persistent_kernel: bool = True,
        kernel_schedule: str | None = None,
        torch_compile: bool = False,
        return_lse: bool = False,
    ) -> Tensor | AttentionOutput:
        if getattr(query, "ndim", rank + 3) != rank + 3:  # what is no tensor is refused below
            raise InvalidProblem(
                f"na{rank}d takes query as [B, *S, H, D] with {rank} spatial axes, so of rank {rank + 3}, "
                f"got shape {tuple(query.shape)}"
            )
        if (q_tile_shape is None) != (kv_tile_shape is None):
            raise InvalidProblem(
                f"q_tile_shape and kv_tile_shape must come together, got {q_tile_shape} and {kv_tile_shape}"
            )
        tiling = None
        if q_tile_shape is not None and kv_tile_shape is not None:
            tiling = Tiling(tuple(q_tile_shape), tuple(kv_tile_shape))
        output = attention_with_lse(
            query,
            key,
            value,
            kernel_size,
            stride=stride,
            dilation=dilation,
            is_causal=is_causal,
            scale=scale,
            additional_keys=additional_keys,
            additional_values=additional_values,
            backend=backend,
            tiling=tiling,
        )
        return output if return_lse else output.out

    na.__name__ = na.__qualname__ = f"na{rank}d"
    na.__doc__ = f"""{rank}-D neighborhood attention with NATTEN 0.21's signature: change the import, keep the call.

    Tensors and windows mean what they mean in `neighborhood_attention`; `backend` takes our names.
    `q_tile_shape` and `kv_tile_shape`, given together, are a `Tiling`. `attention_kwargs` and all
    after `kv_tile_shape` choose among NATTEN's own kernels; they are accepted and have no effect.

    Args:
        query, key, value, ...: as for `neighborhood_attention`, which has those of NATTEN's by the same names.
        return_lse: whether to give the log-sum-exp, too.

    Returns:
        `out [B, *S, H, Dv]`, or `(out, lse)` if `return_lse`.

    Raises:
        InvalidProblem, Unsupported: as `neighborhood_attention`; also if the grid is not {rank}-D.

    Example:
        >>> q, k, v = torch.randn(3, 2, {example}, 4, 16)
        >>> out, lse = na{rank}d(q, k, v, kernel_size=5, return_lse=True)
        >>> lse.shape
        torch.Size([2, {example}, 4])
    """
    return na


na1d = _natten(1, "40")
na2d = _natten(2, "10, 14")
na3d = _natten(3, "5, 6, 8")


def each(value: Any, rank: int) -> list[Any]:
    """One value per axis, as an operator's schema wants them."""
    return list(value) if isinstance(value, Sequence) else [value] * rank


def _refuse_tangents(*tensors: Tensor | None) -> None:
    """Forward-mode derivatives would silently come out as zero: PyTorch has no rule for them in custom operators."""
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        _transforms.refuse_tangents()


def autocast(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Under autocast, floats of up to 32 bits in its dtype: attention is among the operations that it lowers.

    Not the last, the position bias, if it is of 32 bits as a layer's is: scores are, too, and to lower it would cost
    two more kernels than it saves. What is no tensor of floats stays, to be refused in words.
    """
    device = next((tensor.device.type for tensor in tensors if isinstance(tensor, Tensor)), "cpu")
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)

    def lowered(tensor: Any, kinds: Sequence[torch.dtype] = _LOWERED) -> Any:
        is_other = isinstance(tensor, Tensor) and tensor.dtype is not dtype and tensor.dtype in kinds
        return tensor.to(dtype) if is_other else tensor

    *others, bias = tensors
    return *[lowered(tensor) for tensor in others], lowered(bias, _LOWERED[:2])
