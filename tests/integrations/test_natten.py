"""`import natten` finds us: its names of today and of before, and the numbers they gave."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vicinal
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.integrations import natten as drop_in
from vicinal.integrations import natten_kernel
from vicinal.window import window


@pytest.fixture
def natten() -> Iterator[Any]:
    if importlib.util.find_spec("natten") is not None:
        pytest.skip("the real NATTEN is installed here")
    drop_in.install()
    import natten  # pyright: ignore
    import natten.functional  # pyright: ignore

    yield natten
    drop_in.uninstall()


def test_it_is_found_by_import_and_by_its_metadata_and_leaves_again(natten: Any):
    assert natten.__version__ == importlib.metadata.version("natten") == drop_in.VERSION
    from natten.functional import na2d_qk  # pyright: ignore

    assert na2d_qk is natten.functional.na2d_qk
    with pytest.raises(AttributeError, match=r"vicinal's natten has no 'autotuner'; it has HAS_LIBNATTEN, Neigh"):
        _ = natten.autotuner
    drop_in.uninstall()
    assert importlib.util.find_spec("natten") is None
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("natten")


def test_another_natten_is_not_pushed_aside_unasked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "natten", type(sys)("natten"))
    with pytest.raises(InvalidProblem, match="another natten is there already"):
        drop_in.install()


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("additional", [None, 0, 4])
def test_old_halves_with_bias_are_attention(natten: Any, rank: int, is_causal: bool, additional: int | None):
    shape, sizes = (11, 9, 7)[:rank], (5, 3, 3)[:rank]
    dilation = (2, 1, 2)[:rank]
    q, k, v = (torch.randn(2, 3, *shape, 8, dtype=torch.float64) for _ in range(3))
    extra: list[Any] = [None, None]
    if additional is not None:  # none at all is not the same as none of them
        extra = [torch.randn(2, 3, additional, 8, dtype=torch.float64) for _ in range(2)]
    rpb = torch.randn(3, *(2 * n - 1 for n in sizes), dtype=torch.float64)
    qk, av = (getattr(natten.functional, f"na{rank}d_{half}") for half in ("qk", "av"))
    scores = qk(q * 8**-0.5, k, sizes, dilation, additional_keys=extra[0], is_causal=is_causal, rpb=rpb)
    out = av(scores.softmax(-1), v, sizes, dilation, additional_values=extra[1], is_causal=is_causal)
    wanted = vicinal.neighborhood_attention(
        *(t.movedim(1, -2) for t in (q, k, v)), sizes, dilation=dilation, is_causal=is_causal, position_bias=rpb,
        additional_keys=None if extra[0] is None else extra[0].transpose(1, 2),
        additional_values=None if extra[1] is None else extra[1].transpose(1, 2), backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(out, wanted.movedim(-2, 1))


def test_the_oldest_names_give_scores_pair_by_pair(natten: Any):
    length, size, dilation = 12, 3, 2
    q, k, rpb = torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4), torch.randn(2, 2 * size - 1)
    scores = natten.functional.natten1dqkrpb(q, k, rpb, size, dilation)
    plain = natten.functional.natten1dqk(q, k, size, dilation)
    for i in range(length):
        for t, j in enumerate(window(i, length, size, dilation=dilation)):
            for head in range(2):
                pair = q[0, head, i] @ k[0, head, j]
                torch.testing.assert_close(plain[0, head, i, t], pair)
                torch.testing.assert_close(scores[0, head, i, t], pair + rpb[head, (j - i) // dilation + size - 1])
    summed = natten.functional.natten1dav(torch.ones(1, 2, length, size), k, size, dilation)
    torch.testing.assert_close(summed[0, 1, 5], sum(k[0, 1, j] for j in window(5, length, size, dilation=dilation)))


def test_fused_calls_of_today_and_with_the_old_bias(natten: Any):
    q, k, v = torch.randn(3, 2, 9, 7, 2, 8)
    torch.testing.assert_close(natten.na2d(q, k, v, 3, 2, 1, backend="cutlass-fna"), vicinal.na2d(q, k, v, 3, stride=2))
    torch.testing.assert_close(natten.functional.neighborhood_attention_generic(q, k, v, 3), vicinal.na2d(q, k, v, 3))
    rpb = torch.randn(2, 5, 5)
    wanted = vicinal.attention_with_lse(q, k, v, 3, dilation=2, position_bias=rpb)
    torch.testing.assert_close(natten.na2d(q, k, v, 3, 2, rpb=rpb), wanted.out)
    for ours, theirs in zip(natten.na2d(q, k, v, 3, dilation=2, rpb=rpb, return_lse=True), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_kernel_for_others_takes_names_of_their_backends():
    written: dict[str, Any] = {}
    exec(natten_kernel.MODULE, written)
    q, k, v = torch.randn(3, 1, 9, 7, 2, 8)
    out, lse = written["na2d"](q, k, v, 3, backend="hopper-fna", return_lse=True)
    torch.testing.assert_close(out, vicinal.na2d(q, k, v, 3))
    assert torch.equal(written["merge_attentions"]([out], [lse], torch_compile=False)[0], out)


@pytest.mark.parametrize("keys", [10, 6])
def test_dense_attention_and_merging(natten: Any, keys: int):
    q, k, v = (torch.randn(2, n, h, 8) for n, h in ((10, 4), (keys, 2), (keys, 2)))
    out, lse = natten.attention(q, k, v, return_lse=True)
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bqhk", q, k) * 8**-0.5
    torch.testing.assert_close(out, torch.einsum("bqhk,bkhd->bqhd", scores.softmax(-1), v))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    merged, merged_lse = natten.merge_attentions([out, out], [lse, lse], torch_compile=False)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_lse, lse + torch.tensor(2.0).log())
    with pytest.raises(Unsupported, match="packed sequences"):
        natten.attention(q, q, q, seqlens_Q=torch.tensor([10]))


def test_layers_take_old_and_new_arguments(natten: Any):
    layer = natten.NeighborhoodAttention2D(dim=16, num_heads=4, kernel_size=3, dilation=2, rel_pos_bias=True)
    assert layer.rpb.shape == (4, 5, 5)
    assert layer(torch.randn(1, 7, 9, 16)).shape == (1, 7, 9, 16)
    assert natten.NeighborhoodAttention1D(16, 4, 3, 2).stride == (2,)
    for twice in ({"embed_dim": 32}, {"dim": 32}, {"kernel_size": 5}):
        with pytest.raises(InvalidProblem, match="came twice"):
            natten.NeighborhoodAttention2D(16, 4, 3, **twice)
    old = natten.NeighborhoodAttention1D(16, 4, 3, 2, True, rel_pos_bias=True)
    assert (old.stride, old.dilation, old.is_causal) == ((1,), (2,), (True,)), "the order of releases that had it"
    with pytest.raises(InvalidProblem, match="pass the others by name"):
        natten.NeighborhoodAttention1D(16, 4, 3, 2, True, False, bias=True)
    with pytest.raises(Unsupported, match="attn_drop"):
        natten.NeighborhoodAttention1D(16, 4, 3, attn_drop=0.1)


def rows_of_the_guide() -> list[tuple[str, str]]:
    page = (Path(__file__).parents[2] / "docs" / "natten.md").read_text()
    rows = re.findall(r"^\| `(natten\.\S.*?\))` \| `(vicinal\..*?\))`", page, flags=re.MULTILINE)
    assert len(rows) == page.count("\n| `natten."), "a row of the guide is not a pair of calls"
    return rows


@pytest.mark.parametrize(("theirs", "ours"), rows_of_the_guide())
def test_calls_of_the_guide_give_the_same(natten: Any, theirs: str, ours: str):
    q, k, v = torch.randn(3, 1, 24, 40, 4, 32)
    extra_k, extra_v = torch.randn(2, 1, 5, 4, 32)
    names: dict[str, Any] = {"natten": natten, "vicinal": vicinal, "q": q, "k": k, "v": v}
    names |= {"extra_k": extra_k, "extra_v": extra_v, "s": torch.randn(2, 50, 4, 32), "rpb": torch.randn(4, 13, 13)}
    names |= {"out": v, "lse": torch.randn(1, 24, 40, 4), "weights": torch.rand(1, 24, 40, 4, 49)}
    there, here = eval(theirs, dict(names)), eval(ours, dict(names))
    if isinstance(here, torch.nn.Module):
        here.load_state_dict(there.state_dict())
        x = torch.randn(1, 24, 40, 128)
        there, here = there(x), here(x)
    pairs = [(there, here)] if isinstance(here, torch.Tensor) else zip(there, here, strict=True)
    for theirs_is, ours_is in pairs:
        torch.testing.assert_close(theirs_is, ours_is)


def test_global_settings_are_told_again_and_change_nothing(natten: Any):
    q, k, v = torch.randn(3, 1, 9, 7, 2, 8)
    before = natten.na2d(q, k, v, 3)
    natten.use_deterministic_algorithms(True)
    natten.context.use_kv_parallelism_in_fused_na(False)
    natten.set_memory_usage_preference("strict")
    natten.allow_flex_compile(True, backprop=True)
    assert natten.are_deterministic_algorithms_enabled() and not natten.is_kv_parallelism_in_fused_na_enabled()
    assert natten.is_memory_usage_strict() and natten.is_flex_compile_backprop_allowed()
    assert torch.equal(natten.na2d(q, k, v, 3), before)
    natten.disable_flex_compile()
    assert not natten.is_flex_compile_allowed() and not natten.is_flex_compile_backprop_allowed()
    with pytest.raises(InvalidProblem, match="pref must be one of default, strict, unrestricted, got 'most'"):
        natten.set_memory_usage_preference("most")
    natten.use_deterministic_algorithms(False)
    natten.use_kv_parallelism_in_fused_na(True)
    natten.set_memory_usage_preference()
