"""What the tensors of a problem must be. Reads shapes, dtypes and devices only, and so needs no tensor library."""

from __future__ import annotations

from typing import Any

from vicinal.errors import InvalidProblem

FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
"""The dtypes there are, and their bytes."""


def check_tensor(name: str, tensor: Any, query: Any, *, may_be_wider: bool = False) -> None:
    # Asked first: a nested tensor raises at the mere mention of its shape.
    if getattr(tensor, "is_nested", False):
        raise InvalidProblem(f"{name} is a nested tensor; pass a dense one, padded or one grid at a time")
    if not (hasattr(tensor, "shape") and hasattr(tensor, "dtype")):
        raise InvalidProblem(f"{name} must be a tensor, got {type(tensor).__name__}")
    if (layout := str(getattr(tensor, "layout", "strided")).removeprefix("torch.")) != "strided":
        kind = "sparse" if "sparse" in layout else layout.strip("_")
        raise InvalidProblem(f"{name} is a {kind} tensor; pass a dense one, for example {name}.to_dense()")
    if dtype_of(tensor) not in FLOATS:
        raise InvalidProblem(f"{name} must have one of the dtypes {', '.join(FLOATS)}, got {dtype_of(tensor)}")
    for what, here, there in (
        ("dtype", dtype_of(tensor), dtype_of(query)),
        ("device", getattr(tensor, "device", None), getattr(query, "device", None)),
    ):
        is_wider = may_be_wider and here == "float32" and there in ("float16", "bfloat16")
        if here != there and not is_wider:
            raise InvalidProblem(f"{name} and query must share one {what}, got {here} and {there}")


def check_packed(qkv: Any) -> None:
    check_tensor("qkv", qkv, qkv)
    shape = tuple(qkv.shape)
    if not (5 <= len(shape) <= 7 and shape[-3] == 3):
        raise InvalidProblem(
            "qkv must be [B, *S, 3, H, D] with 1 to 3 spatial axes, queries, keys and values of as many heads and one "
            f"width, got shape {shape}; where they differ, pass them apart to neighborhood_attention"
        )


def check_shapes(query: Any, key: Any, value: Any) -> None:
    if not 4 <= len(query.shape) <= 6:
        raise InvalidProblem(
            f"query must be [B, *S, H, D] with 1 to 3 spatial axes, so of rank 4 to 6, got shape {tuple(query.shape)}"
        )
    for name, tensor in (("key", key), ("value", value)):
        if tuple(tensor.shape[:-2]) != tuple(query.shape[:-2]):
            raise InvalidProblem(
                f"{name} must have query's batch and grid {tuple(query.shape[:-2])}, got shape {tuple(tensor.shape)}"
            )
    if key.shape[-1] != query.shape[-1]:
        raise InvalidProblem(
            f"key must have query's head_dim {query.shape[-1]} as its last axis, got shape {tuple(key.shape)}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise InvalidProblem(f"key and value must have the same heads, got {key.shape[-2]} and {value.shape[-2]}")


def check_additional(query: Any, key: Any, value: Any, keys: Any, values: Any, lengths: Any) -> None:
    for name, tensor, like in (("additional_keys", keys, key), ("additional_values", values, value)):
        wanted = (query.shape[0], keys.shape[1] if len(keys.shape) > 1 else "M", *like.shape[-2:])
        if tuple(tensor.shape) != wanted:
            raise InvalidProblem(
                f"{name} must be [B, M, Hkv, D] = [{', '.join(str(n) for n in wanted)}], got {tuple(tensor.shape)}"
            )
    if lengths is None:
        return
    # PyTorch compares no wider unsigned integers with others.
    if not (hasattr(lengths, "dtype") and dtype_of(lengths) in ("uint8", "int8", "int16", "int32", "int64")):
        raise InvalidProblem(
            "additional_lengths must be a tensor of integers (int8 to int64, or uint8), "
            f"got {getattr(lengths, 'dtype', lengths)!r}"
        )
    if tuple(lengths.shape) != (query.shape[0],):
        raise InvalidProblem(
            f"additional_lengths must hold one length per batch row, shape ({query.shape[0]},), "
            f"got {tuple(lengths.shape)}"
        )
    if getattr(lengths, "device", None) != getattr(query, "device", None):
        raise InvalidProblem(
            f"additional_lengths and query must share one device, got {lengths.device} and {query.device}"
        )


def check_bias(query: Any, bias: Any, wanted: tuple[int, ...]) -> None:
    check_tensor("position_bias", bias, query, may_be_wider=True)  # it is added to scores, which are
    if tuple(bias.shape) != wanted:
        raise InvalidProblem(
            f"position_bias must be [H, 2 * kernel_size - 1 of each axis] = [{', '.join(str(n) for n in wanted)}], "
            f"got {tuple(bias.shape)}"
        )


def dtype_of(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")
