"""What users call: the answers, the gradients, NATTEN's signatures, merging, and every refusal."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from vicinal.errors import InvalidProblem, Unsupported
from vicinal.functional import attention_with_lse, merge_attentions, na1d, na2d, na3d, neighborhood_attention
from vicinal.problem import Problem
from vicinal.testing import assert_as_good_as_eager
from vicinal.testing.cases import make_inputs
from vicinal.testing.strategies import problems, seeds
from vicinal.testing.truth import truth_and_eager
from vicinal.tiling import Tiling
from vicinal.window import window

CPU = torch.device("cpu")


def refused(message: str) -> Any:
    return pytest.raises(InvalidProblem, match=re.escape(message))


def qkv(*shape: int, heads: int = 4, heads_kv: int = 2, width: int = 8, width_v: int = 6, **more: Any) -> list[Tensor]:
    return [torch.randn(*shape, h, d, **more) for h, d in ((heads, width), (heads_kv, width), (heads_kv, width_v))]


def doubles(**changes: Any) -> dict[str, Any]:
    """A small problem in float64 with additional keys and position bias for windows of 3, for gradcheck."""
    query, key, value = qkv(2, 3, 5, heads=2, heads_kv=1, width=3, width_v=2, dtype=torch.float64)
    keys, values = torch.randn(2, 2, 1, 3, dtype=torch.float64), torch.randn(2, 2, 1, 2, dtype=torch.float64)
    bias = torch.randn(2, 5, 5, dtype=torch.float64)
    tensors = {"query": query, "key": key, "value": value, "additional_keys": keys, "additional_values": values}
    tensors["position_bias"] = bias
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()} | changes


@given(problems(most_tokens=60), seeds())
def test_the_function_answers_the_problem_that_its_arguments_pose(problem: Problem, seed: int):
    inputs = make_inputs(problem, CPU, seed)
    window = {name: getattr(problem, name) for name in ("kernel_size", "stride", "dilation", "is_causal")}
    extra = dict(zip(inputs._fields[3:], inputs[3:], strict=True))
    out, lse = attention_with_lse(*inputs[:3], **window, scale=problem.scale, **extra)
    truth, eager = truth_and_eager(problem, inputs)
    # Few numbers are drawn, so that their largest error scatters.
    for what, actual, a, b in (("out", out, eager.out, truth.out), ("lse", lse, eager.lse, truth.lse)):
        assert_as_good_as_eager(actual.flatten(1, problem.rank), a, b, slack=8, summed=inputs.value, what=what)
    assert torch.equal(neighborhood_attention(*inputs[:3], **window, scale=problem.scale, **extra), out)


@pytest.mark.parametrize("backend", [None, "blocked", "reference"])
def test_the_default_scale_is_one_over_the_root_of_the_head_dim(backend: str | None):
    query, key, value = qkv(1, 7, 9)
    plain = neighborhood_attention(query, key, value, kernel_size=3, backend=backend)
    assert torch.equal(plain, neighborhood_attention(query, key, value, kernel_size=3, scale=8**-0.5, backend=backend))
    zero = neighborhood_attention(query, key, value, kernel_size=-1, scale=0.0, backend=backend)
    mean = value.mean((1, 2), keepdim=True).repeat_interleave(2, 3)
    torch.testing.assert_close(zero, mean.expand_as(zero))


def test_a_tiling_is_obeyed_and_changes_nothing():
    query, key, value = qkv(1, 7, 9)
    default = neighborhood_attention(query, key, value, kernel_size=3)
    cut = neighborhood_attention(query, key, value, kernel_size=3, tiling=Tiling((2, 3), (4, 1), "grid"))
    torch.testing.assert_close(cut, default)
    with refused("tiling must have one number per axis"):
        neighborhood_attention(query, key, value, kernel_size=3, tiling=Tiling((2,), (4,)))


def test_one_key_is_its_value():
    query, key, value = qkv(2, 6, heads_kv=4)
    out, lse = attention_with_lse(query, key, value, kernel_size=1)
    torch.testing.assert_close(out, value)
    torch.testing.assert_close(lse, (query * key).sum(-1) * 8**-0.5)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("window", [
    {"kernel_size": (2, 3)},
    {"kernel_size": (3, 2), "stride": (2, 1), "dilation": (1, 2), "is_causal": (True, False)},
    {"kernel_size": 1, "additional_lengths": torch.tensor([0, 1])},
], ids=["plain", "everything", "single keys"])  # fmt: skip
def test_gradients_of_values_and_lse_are_those_of_finite_differences(backend: str, window: dict[str, Any]):
    size = window["kernel_size"]
    sizes = (size, size) if isinstance(size, int) else size
    tensors = doubles(position_bias=torch.randn(2, *(2 * n - 1 for n in sizes)).double().requires_grad_())

    def both(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return attention_with_lse(**dict(zip(tensors, leaves, strict=True)), **window, backend=backend)

    assert torch.autograd.gradcheck(both, tuple(tensors.values()))


def test_the_gradient_of_lse_alone_is_the_softmax():
    query, key, value = (t.double().requires_grad_() for t in qkv(1, 9, heads=2, heads_kv=2))
    _, lse = attention_with_lse(query, key, value, kernel_size=9, scale=1.0)
    weights = torch.einsum("bqhd,bkhd->bhqk", query, key).softmax(-1)
    grads = torch.autograd.grad(lse.sum(), (query, key, value), allow_unused=True)
    assert grads[0] is not None
    assert grads[1] is not None
    torch.testing.assert_close(grads[0], torch.einsum("bhqk,bkhd->bqhd", weights, key))
    torch.testing.assert_close(grads[1], torch.einsum("bhqk,bqhd->bkhd", weights, query))
    assert grads[2] is None or not grads[2].any()


@pytest.mark.parametrize("wanted", ["query", "key", "value", "additional_keys", "additional_values", "position_bias"])
def test_one_gradient_may_be_wanted_alone(wanted: str):
    tensors = doubles()
    everything = torch.autograd.grad(neighborhood_attention(**tensors, kernel_size=3).sum(), list(tensors.values()))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    (alone,) = torch.autograd.grad(neighborhood_attention(**tensors, kernel_size=3).sum(), tensors[wanted])
    torch.testing.assert_close(alone, everything[list(tensors).index(wanted)])


def test_inputs_are_left_as_they_were():
    tensors = doubles(additional_lengths=torch.tensor([1, 2]))
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    neighborhood_attention(**tensors, kernel_size=3).sum().backward()
    assert all(torch.equal(tensors[name], was) for name, was in before.items())


def split_attention(query: Tensor, key: Tensor, value: Tensor, *cuts: int) -> tuple[list[Tensor], list[Tensor]]:
    """Dense attention to runs of keys apart: `[B, N, H, D]`."""
    scores = torch.einsum("bqhd,bkhd->bqhk", query, key)
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for start, stop in zip((0, *cuts), (*cuts, key.shape[1]), strict=True):
        piece = scores[..., start:stop]
        outs.append(torch.einsum("bqhk,bkhd->bqhd", piece.softmax(-1), value[:, start:stop]))
        lses.append(piece.logsumexp(-1))
    return outs, lses


@pytest.mark.parametrize("cuts", [(), (4,), (1, 2, 9)])
def test_merged_parts_are_the_whole_and_so_are_their_gradients(cuts: tuple[int, ...]):
    leaves = [t.requires_grad_() for t in qkv(2, 11, heads=3, heads_kv=3, dtype=torch.float64)]
    (whole,), (whole_lse,) = split_attention(*leaves)
    merged = merge_attentions(*split_attention(*leaves, *cuts))
    torch.testing.assert_close(merged.out, whole)
    torch.testing.assert_close(merged.lse, whole_lse)
    weights = torch.randn_like(whole), torch.randn_like(whole_lse)
    for a, b in zip(
        torch.autograd.grad([whole, whole_lse], leaves, weights),
        torch.autograd.grad(list(merged), leaves, weights),
        strict=True,
    ):
        torch.testing.assert_close(b, a)


def test_merging_survives_gradcheck_with_parts_that_nobody_else_keeps():
    outs = [torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *t: tuple(merge_attentions(t[:3], t[3:])), (*outs, *lses))


def test_merging_does_not_touch_its_parts():
    outs, lses = [torch.randn(1, 3, 2, 2) for _ in range(2)], [torch.randn(1, 3, 2) for _ in range(2)]
    before = [t.clone() for t in (*outs, *lses)]
    merge_attentions(outs, lses)
    assert all(torch.equal(a, b) for a, b in zip((*outs, *lses), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["blocked", "reference", pytest.param("triton", marks=pytest.mark.gpu)])
def test_a_bias_may_be_of_32_bits_beside_16(backend: str, dtype: torch.dtype):
    device = "cuda" if backend == "triton" else "cpu"
    query, key, value = (t.to(device).requires_grad_() for t in qkv(2, 9, 11, width_v=8, dtype=dtype))
    table = torch.randn(4, 5, 9, device=device).to(dtype).requires_grad_()

    def solved(table: Tensor) -> tuple[Tensor, ...]:
        found = attention_with_lse(query, key, value, (3, 5), position_bias=table, backend=backend)
        loss = sum(each.float().square().sum() for each in found)
        return *found, *torch.autograd.grad(loss, (query, key, value, table))

    narrow, wide = solved(table), solved(table.detach().float().requires_grad_())
    assert wide[-1].dtype == torch.float32 and narrow[-1].dtype == dtype
    for a, b in zip(narrow, wide, strict=True):
        assert torch.equal(a, b.to(a.dtype))
    if dtype is torch.float16:
        finer = solved((table.detach().float() * (1 + 2**-14)).requires_grad_())
        assert not torch.equal(finer[1], wide[1])  # it is not rounded on its way


def test_a_part_without_keys_weighs_nothing():
    out, lse = torch.randn(1, 3, 2, 2), torch.randn(1, 3, 2)
    nothing = torch.full_like(lse, -math.inf)
    merged = merge_attentions([out, torch.randn_like(out)], [lse, nothing])
    torch.testing.assert_close(merged.out, out)
    torch.testing.assert_close(merged.lse, lse)
    void = merge_attentions([out, out], [nothing, nothing])
    assert not void.out.any()
    assert torch.equal(void.lse, nothing)


def test_huge_and_tiny_lses_merge_without_overflow():
    outs = [torch.full((1, 1, 1, 1), float(i)) for i in range(3)]
    lses = [torch.full((1, 1, 1), x) for x in (-1e4, 1e4, 1e4)]
    merged = merge_attentions(outs, lses)
    torch.testing.assert_close(merged.out, torch.full((1, 1, 1, 1), 1.5))
    torch.testing.assert_close(merged.lse, torch.full((1, 1, 1), 1e4 + math.log(2)))


def test_merging_keeps_the_dtype_of_outputs_and_the_width_of_lses():
    out, lse = torch.randn(1, 3, 2, 2).bfloat16(), torch.randn(1, 3, 2)
    merged = merge_attentions([out, out], [lse, lse])
    assert (merged.out.dtype, merged.lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        (0, 0, "outputs and lses must be as many and at least one each, got 0 outputs and 0 lses"),
        (2, 1, "outputs and lses must be as many and at least one each, got 2 outputs and 1 lses"),
    ],
)
def test_merging_counts_its_parts(outs: int, lses: int, message: str):
    with refused(message):
        merge_attentions([torch.zeros(1, 3, 2, 2)] * outs, [torch.zeros(1, 3, 2)] * lses)


def test_merging_names_the_part_that_does_not_fit():
    out, lse = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2)
    with refused("outputs[1] must have shape (1, 3, 2, 2) to go with outputs[0], got (1, 3, 2, 4)"):
        merge_attentions([out, torch.zeros(1, 3, 2, 4)], [lse, lse])
    with refused("lses[1] must have shape (1, 3, 2) to go with outputs[0], got (1, 2, 3)"):
        merge_attentions([out, out], [lse, torch.zeros(1, 2, 3)])
    with refused("lses[0] must be a tensor, got NoneType"):
        merge_attentions([out], [None])


NATTEN = (
    "query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale", "additional_keys",
    "additional_values", "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape", "backward_q_tile_shape",
    "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction", "run_persistent_kernel",
    "kernel_schedule", "torch_compile", "return_lse",
)  # fmt: skip


@pytest.mark.parametrize(("na", "grid"), [(na1d, (11,)), (na2d, (5, 7)), (na3d, (4, 3, 6))])
def test_natten_names_take_nattens_arguments_in_its_order(na: Callable[..., Any], grid: tuple[int, ...]):
    assert tuple(inspect.signature(na).parameters) == NATTEN
    assert na.__name__ == f"na{len(grid)}d"
    query, key, value = qkv(2, *grid, heads_kv=4)
    keys, values = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 4, 6)
    wanted, lse = attention_with_lse(
        query, key, value, kernel_size=3, stride=2, is_causal=True, scale=0.5,
        additional_keys=keys, additional_values=values,
    )  # fmt: skip
    kwargs = {"backend": "cutlass-fna"}
    assert torch.equal(na(query, key, value, 3, 2, 1, True, 0.5, keys, values, kwargs), wanted)
    assert kwargs == {"backend": "cutlass-fna"}
    out, returned = na(query, key, value, 3, 2, 1, True, 0.5, keys, values, return_lse=True)
    assert torch.equal(out, wanted)
    assert torch.equal(returned, lse)
    assert isinstance(na(query, key, value, kernel_size=3), Tensor)


def test_natten_names_insist_on_their_rank():
    query, key, value = qkv(2, 5, 7)
    with refused("na1d takes query as [B, *S, H, D] with 1 spatial axes"):
        na1d(query, key, value, 3)
    with refused("na3d takes query as [B, *S, H, D] with 3 spatial axes"):
        na3d(query, key, value, 3)


def test_natten_tiles_are_a_tiling_and_come_together():
    query, key, value = qkv(2, 5, 7)
    tiled = na2d(query, key, value, 3, q_tile_shape=(2, 3), kv_tile_shape=(3, 2))
    torch.testing.assert_close(tiled, na2d(query, key, value, 3))
    with refused("q_tile_shape and kv_tile_shape must come together, got (2, 3) and None"):
        na2d(query, key, value, 3, q_tile_shape=(2, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel_size": (3, 3, 3)}, "kernel_size needs 2 values, one per spatial axis, got 3: (3, 3, 3)"),
        (
            {"kernel_size": (3, 9)},
            "axis 1 of 5x7: the window does not fit: kernel_size * dilation = 9 * 1 = 9 > axis length 7",
        ),
        ({"dilation": 2}, "axis 0 of 5x7: the window does not fit: kernel_size * dilation = 3 * 2 = 6 > axis length 5"),
        ({"stride": 4}, "axis 0 of 5x7: stride must lie in [1, kernel_size] = [1, 3], got 4"),
        ({"is_causal": 1}, "is_causal must be a bool or a tuple of them"),
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"scale": math.inf}, "scale must be a finite number, got inf"),
        ({"backend": "fast"}, "got 'fast'"),
        (
            {"query": torch.zeros(2, 5, 7, 4, 8).long()},
            "query must have one of the dtypes float16, bfloat16, float32, float64, got int64",
        ),
        ({"query": torch.zeros(2, 5, 7, 4, 8).to_sparse()}, "query is a sparse tensor"),
        ({"query": torch.zeros(7, 4, 8)}, "query"),
        ({"query": None}, "query must be a tensor, got NoneType"),
        ({"query": torch.zeros(2, 5, 7, 4, 8).numpy()}, "query must be a tensor, got ndarray"),
        ({"value": torch.zeros(2, 5, 7, 2, 6).numpy()}, "value must be a tensor, got ndarray"),
        ({"query": torch.zeros(2, 5, 7, 4, 8).to_mkldnn()}, "query is a mkldnn tensor; pass a dense one"),
        ({"key": torch.zeros(2, 5, 7, 2, 8).half()}, "key and query must share one dtype, got float16 and float32"),
        ({"key": torch.zeros(2, 5, 7, 2, 8, device="meta")}, "key and query must share one device, got meta and cpu"),
        ({"key": torch.zeros(2, 5, 6, 2, 8)}, "key must have query's batch and grid (2, 5, 7)"),
        ({"value": torch.zeros(2, 5, 7, 3, 6)}, "key and value must have the same heads, got 2 and 3"),
        ({"query": torch.zeros(2, 5, 7, 3, 8)}, "query heads must be a multiple of key/value heads, got 3 and 2"),
        (
            {"additional_keys": torch.zeros(2, 3, 2, 8)},
            "additional_keys came without additional_values; pass both or neither",
        ),
        (
            {"additional_lengths": torch.tensor([1, 1])},
            "additional_lengths came without additional_keys and additional_values",
        ),
        (
            {"position_bias": torch.zeros(4, 3, 5)},
            "position_bias must be [H, 2 * kernel_size - 1 of each axis] = [4, 5, 5], got (4, 3, 5)",
        ),
        (
            {"position_bias": torch.zeros(4, 5, 5).half()},
            "position_bias and query must share one dtype, got float16 and float32",
        ),
    ],
)
@pytest.mark.parametrize("call", [neighborhood_attention, attention_with_lse, na2d])
def test_bad_arguments_are_refused_before_anything_runs(
    call: Callable[..., Any], changes: dict[str, Any], message: str
):
    if call is na2d and (
        {"additional_lengths", "position_bias"} & set(changes) or getattr(changes.get("query"), "ndim", 5) != 5
    ):
        pytest.skip(
            "NATTEN's signature has no additional lengths and no bias, and its names have their own message on rank"
        )
    fine = {
        "query": torch.zeros(2, 5, 7, 4, 8),
        "key": torch.zeros(2, 5, 7, 2, 8),
        "value": torch.zeros(2, 5, 7, 2, 6),
        "kernel_size": 3,
    }
    with refused(message):
        call(**{**fine, **changes})


@pytest.mark.parametrize("tiling", [(8, 8), "8x8"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_tiling_is_a_tiling(tiling: Any, watched: bool):
    query, key, value = qkv(1, 9)
    with refused(f"tiling must be a Tiling, got {tiling!r}"), torch.profiler.profile() if watched else nullcontext():
        neighborhood_attention(query, key, value, 3, tiling=tiling)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_calls_refuse_nested_tensors():
    nested = torch.nested.nested_tensor([torch.zeros(5, 4, 8), torch.zeros(7, 4, 8)])
    with refused("query is a nested tensor; pass a dense one, padded or one grid at a time"):
        neighborhood_attention(nested, nested, nested, 3)


def test_any_sequence_holds_one_value_per_axis():
    """As configuration files give them; watched calls, too, which spell settings out for the operator."""
    query, key, value = qkv(1, 5, 7)
    wanted = neighborhood_attention(query, key, value, (3, 5))
    for watched in (False, True):
        with torch.profiler.profile() if watched else nullcontext():
            got = neighborhood_attention(query, key, value, range(3, 6, 2))
        assert torch.equal(got, wanted)


def test_merging_takes_stacked_parts():
    query, key, value = qkv(1, 9)
    out, lse = attention_with_lse(query, key, value, 3)
    merged = merge_attentions(torch.stack([out, out]), torch.stack([lse, lse]))
    torch.testing.assert_close(merged.out, out)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_a_bias_is_read_at_the_offset_of_the_key_in_units_of_the_dilation(backend: str):
    """With queries of zero and one entry far above the rest, a query gets the value at that offset, if it sees it."""
    length, size, dilation = 29, 5, 3
    value = torch.arange(float(length)).view(1, length, 1, 1)
    for offset in range(1 - size, size):
        table = torch.zeros(1, 2 * size - 1)
        table[0, offset + size - 1] = 1e4
        zeros = torch.zeros(1, length, 1, 1)
        out = neighborhood_attention(zeros, zeros, value, size, dilation=dilation, position_bias=table, backend=backend)
        seen = 0
        for query in range(length):
            keys = list(window(query, length, size, dilation=dilation))
            wanted = query + offset * dilation
            seen += wanted in keys
            expected = float(wanted) if wanted in keys else sum(keys) / size
            assert out[0, query, 0, 0].item() == pytest.approx(expected)
        assert seen >= dilation  # each offset occurs, the largest ones at the borders


def test_a_causal_axis_never_reads_the_bias_of_later_keys():
    query, key, value = qkv(2, 9, heads_kv=4)
    table = torch.randn(4, 9)
    poisoned = table.clone()
    poisoned[:, 5:] = torch.nan
    wanted = neighborhood_attention(query, key, value, 5, is_causal=True, position_bias=table)
    for backend in ("blocked", "reference"):
        got = neighborhood_attention(query, key, value, 5, is_causal=True, position_bias=poisoned, backend=backend)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["fused", "blocked", "reference"])
@pytest.mark.parametrize("length", [-1, 0, 3, 4])
def test_lengths_beyond_the_additional_keys_count_what_there_is(backend: str, length: int):
    query, key, _ = qkv(1, 6)
    extra = torch.randn(1, 3, 2, 8)
    count = min(max(length, 0), 3)
    wanted = attention_with_lse(
        *(query, key, key, 3), additional_keys=extra[:, :count], additional_values=extra[:, :count], backend=backend
    )
    lengths = torch.tensor([length])
    got = attention_with_lse(
        *(query, key, key, 3),
        additional_keys=extra,
        additional_values=extra,
        additional_lengths=lengths,
        backend=backend,
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("backend", ["fused", "blocked", "reference"])
@pytest.mark.parametrize("name", ["query", "key", "value", "additional_keys", "additional_values"])
def test_elements_of_a_head_may_lie_apart(backend: str, name: str):
    """In float32, which no conversion copies."""
    query, key, _ = qkv(2, 5, 7)
    extra = torch.randn(2, 3, 2, 8)
    tensors = {"query": query, "key": key, "value": key, "additional_keys": extra, "additional_values": extra}
    wanted = neighborhood_attention(**tensors, kernel_size=3, backend=backend)
    apart = torch.stack([tensors[name], torch.full_like(tensors[name], torch.nan)], -1)[..., 0]
    got = neighborhood_attention(**{**tensors, name: apart}, kernel_size=3, backend=backend)
    torch.testing.assert_close(got, wanted)
    alike = tensors[name][..., :1].expand_as(tensors[name])
    wanted = neighborhood_attention(**{**tensors, name: alike.contiguous()}, kernel_size=3, backend=backend)
    torch.testing.assert_close(
        neighborhood_attention(**{**tensors, name: alike}, kernel_size=3, backend=backend), wanted
    )


def test_an_unnamed_derivative_is_refused_in_a_sentence():
    query, key, value = (t.requires_grad_() for t in qkv(1, 6))
    (grad,) = torch.autograd.grad(
        neighborhood_attention(query, key, value, kernel_size=3).square().sum(), query, create_graph=True
    )
    with pytest.raises((Unsupported, RuntimeError), match=r"(?i)derivative|differentiat|does not require grad|grad_fn"):
        torch.autograd.grad(grad.sum(), query)
