"""The layers: any resolution, right projections, positions that only matter by distance."""

import pytest
import torch

from vicinal import InvalidProblem, neighborhood_attention
from vicinal.nn import (
    NeighborhoodAttention,
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    Rotary,
)


@pytest.mark.parametrize(("layer", "shape"), [
    (NeighborhoodAttention1D, (17,)),
    (NeighborhoodAttention2D, (9, 14)),
    (NeighborhoodAttention3D, (4, 7, 6)),
])  # fmt: skip
def test_a_layer_is_attention_between_two_projections(layer, shape):
    module = layer(24, 4, 3, num_heads_kv=2).double()
    x = torch.randn(2, *shape, 24, dtype=torch.float64)
    q, k, v = module.qkv(x).split([24, 12, 12], dim=-1)
    split = [t.reshape(2, *shape, -1, 6) for t in (q, k, v)]
    expected = module.proj(neighborhood_attention(*split, kernel_size=3).reshape(x.shape))
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("shape", [(2, 3), (2, 30), (21, 4), (6, 9)])
def test_an_axis_shorter_than_the_window_is_attended_to_whole(shape):
    module = NeighborhoodAttention2D(8, 2, (7, 5), stride=(7, 1), dilation=(1, 2)).double()
    x = torch.randn(1, *shape, 8, dtype=torch.float64)
    windows = module.windows(shape)
    for length, size, dilation in zip(shape, windows["kernel_size"], windows["dilation"], strict=True):
        assert size == -1 or size * dilation <= length
    small = all(n * d > length for n, d, length in zip((7, 5), (1, 2), shape, strict=True))
    q, k, v = (t.reshape(1, *shape, 2, 4) for t in module.qkv(x).chunk(3, dim=-1))
    expected = neighborhood_attention(q, k, v, **windows)
    if small:
        dense = torch.nn.functional.scaled_dot_product_attention(*(t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)))
        torch.testing.assert_close(expected.flatten(1, 2), dense.transpose(1, 2))
    torch.testing.assert_close(module(x), module.proj(expected.flatten(-2)))


def test_weights_load_from_a_layer_of_another_resolution_and_from_natten_names():
    module = NeighborhoodAttention2D(16, 4, 7)
    assert set(module.state_dict()) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    assert module.qkv.weight.shape == (48, 16)


@pytest.mark.parametrize("shape", [(11,), (5, 8), (3, 6, 4)])
def test_rotary_scores_depend_on_distances_only(shape):
    rank = len(shape)
    rotary = Rotary(12, rank)
    q, k = torch.randn(2, 1, *[1] * rank, 1, 12, dtype=torch.float64)
    q, k = (rotary(t.expand(1, *shape, 1, 12)).reshape(-1, 12) for t in (q, k))
    places = torch.cartesian_prod(*(torch.arange(n) for n in shape)).reshape(-1, rank)
    scores = q @ k.T
    by_offset: dict[tuple[int, ...], float] = {}
    for i, a in enumerate(places.tolist()):
        for j, b in enumerate(places.tolist()):
            offset = tuple(x - y for x, y in zip(a, b, strict=True))
            known = by_offset.setdefault(offset, scores[i, j].item())
            assert abs(scores[i, j].item() - known) < 1e-9
    assert len({round(value, 9) for value in by_offset.values()}) > 1


def test_rotary_keeps_lengths_and_dtype():
    x = torch.randn(2, 5, 7, 3, 10)
    torch.testing.assert_close(Rotary(10, 2)(x).norm(dim=-1), x.norm(dim=-1))
    assert Rotary(10, 2)(x.bfloat16()).dtype == torch.bfloat16
    assert Rotary(10, 2).axes_dim == (6, 4)


def test_qk_norm_and_rotary_are_applied_to_queries_and_keys_before_attention():
    module = NeighborhoodAttention1D(16, 2, 5, qk_norm=True, rotary=True).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    q, k, v = (t.reshape(1, 9, 2, 8) for t in module.qkv(x).chunk(3, dim=-1))
    q, k = (module.rotary(torch.nn.functional.rms_norm(t, (8,))) for t in (q, k))
    expected = module.proj(neighborhood_attention(q, k, v, 5).flatten(-2))
    torch.testing.assert_close(module(x), expected)
    assert module(x).sum().backward() is None
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("shape", [(9, 14), (9, 11), (4, 20), (3, 5)])
def test_position_bias_is_learnt_by_offset_at_any_resolution(shape):
    module = NeighborhoodAttention2D(12, 3, (7, 5), dilation=(1, 3), position_bias=True).double()
    assert module.rpb.shape == (3, 13, 9)
    x = torch.randn(1, *shape, 12, dtype=torch.float64)
    q, k, v = (t.reshape(1, *shape, 3, 4) for t in module.qkv(x).chunk(3, dim=-1))
    windows = module.windows(shape)
    sizes = [length if n == -1 else n for n, length in zip(windows["kernel_size"], shape, strict=True)]
    table = torch.zeros(3, *(2 * n - 1 for n in sizes), dtype=torch.float64)
    for i in range(13):
        for j in range(9):
            a, b = i - 6 + sizes[0] - 1, j - 4 + sizes[1] - 1
            if 0 <= a < table.shape[1] and 0 <= b < table.shape[2]:
                table[:, a, b] = module.rpb[:, i, j].detach()
    expected = module.proj(neighborhood_attention(q, k, v, **windows, position_bias=table).flatten(-2))
    torch.testing.assert_close(module(x), expected)
    module(x).sum().backward()
    assert module.rpb.grad is not None
    assert module.rpb.grad.any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_whole_axes_are_whole_on_grids_too_short_for_their_stride_or_dilation(is_causal: bool):
    module = NeighborhoodAttention2D(12, 3, -1, stride=4, dilation=(1, 5), is_causal=is_causal)
    plain = NeighborhoodAttention2D(12, 3, -1, is_causal=is_causal)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, 2, 3, 12)
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize(("build", "message"), [
    (lambda: NeighborhoodAttention(12, 3, (3, -1), position_bias=True), "position_bias needs a kernel_size in numbers"),
    (lambda: NeighborhoodAttention(10, 3, (3, 3)), "num_heads must divide embed_dim 10, got 3"),
    (lambda: NeighborhoodAttention(12, 4, (3, 3), num_heads_kv=3), "num_heads_kv must divide num_heads 4, got 3"),
    (lambda: NeighborhoodAttention(12, 4, 3), "rank is needed"),
    (lambda: NeighborhoodAttention(12, 4, (3, 3), dilation=(1, 1, 1)), "kernel_size has 2, dilation has 3"),
    (lambda: NeighborhoodAttention2D(12, 4, (3, 3, 3)), "rank has 2, kernel_size has 3"),
    (lambda: NeighborhoodAttention2D(12, 4, 3, stride=5), r"stride must lie in \[1, 3\]|\[1, kernel_size\] = \[1, 3\]"),
    (lambda: NeighborhoodAttention2D(12, 4, 3)(torch.zeros(1, 5, 12)), "x must be .* with 2 spatial axes and C = 12"),
    (lambda: NeighborhoodAttention2D(12, 4, 0), "kernel_size must be at least 1, or -1 for the whole axis, got 0"),
    (lambda: NeighborhoodAttention2D(12, 4, 3, dilation=(1, 0)), "dilation must be at least 1, got 0"),
    (lambda: NeighborhoodAttention2D(12, 4, -1, stride=0), r"stride must lie in .* got 0"),
    (lambda: NeighborhoodAttention2D(0, 4, 3), "embed_dim must be an integer of at least 1, got 0"),
    (lambda: NeighborhoodAttention2D(12, 4.0, 3), "num_heads must be an integer of at least 1, got 4.0"),
    (lambda: NeighborhoodAttention(12, 4, 3, rank=4), "rank must be 1, 2 or 3, got 4"),
    (lambda: Rotary(8, 0), "rank must be 1, 2 or 3, got 0"),
    (lambda: Rotary(8, 2)(torch.zeros(1, 5, 1, 8)), "x must be .* with 2 spatial axes and D = 8, got shape"),
    (lambda: Rotary(8, 2)(torch.zeros(1, 5, 7, 1, 6)), "x must be .* with 2 spatial axes and D = 8, got shape"),
    (lambda: Rotary(6, 2, axes_dim=(3, 3)), "axes_dim must be 2 even numbers that sum to head_dim 6"),
    (lambda: Rotary(8, 2, axes_dim=4), "axes_dim must be 2 even numbers that sum to head_dim 8, got 4"),
    (lambda: Rotary(8, 2, axes_dim=(4.0, 4.0)), "axes_dim must be 2 even numbers that sum to head_dim 8"),
    (lambda: Rotary(8, 2, axes_dim="44"), "axes_dim must be 2 even numbers that sum to head_dim 8, got '44'"),
    (lambda: Rotary(8.0, 2), "head_dim must be an integer, got 8.0"),
])  # fmt: skip
def test_bad_arguments_are_named(build, message):
    with pytest.raises(InvalidProblem, match=message):
        build()
