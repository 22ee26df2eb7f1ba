"""NAT and DiNAT: sizes, shapes, names and conventions. Their numbers are compared in `test_dinat_parity`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from vicinal.errors import InvalidProblem
from vicinal.models import ARCHITECTURES, Architecture, Features, NeighborhoodTransformer, create_model, default_cfgs
from vicinal.models.layers import DropPath, PaddedNeighborhoodAttention2D
from vicinal.models.weights import from_official, to_official

SMALL = Architecture(16, (2, 1), (2, 4), 2.0, kernel_size=3, dilations=((1, 3), (1,)), layer_scale=0.5)
VARIANTS = {
    "pyramid": SMALL,
    "patches": replace(SMALL, tokens=4, layer_scale=None),
    "isotropic": Architecture(24, (3,), (3,), 2.0, kernel_size=3, dilations=((1, 2),), tokens=8),
}

PUBLISHED = {
    "nat_mini": 20, "nat_tiny": 28, "nat_small": 51, "nat_base": 90, "nat_isotropic_small": 22,
    "nat_isotropic_base": 86, "dinat_mini": 20, "dinat_tiny": 28, "dinat_small": 51, "dinat_base": 90,
    "dinat_large": 201, "dinat_large_384": 201, "dinat_large_384_11x11": 201, "dinat_s_tiny": 28, "dinat_s_small": 50,
    "dinat_s_base": 88, "dinat_s_large": 197, "dinat_s_large_384": 197, "dinat_isotropic_small": 22,
    "dinat_isotropic_base": 86,
}  # fmt: skip
"""Millions of parameters. The papers say 200 for DiNAT-Large, which has 200.9."""

COUNTS = {"nat_mini": 19_984_174, "dinat_mini": 19_984_174, "dinat_large": 200_943_514}
"""Counted on the official models."""


def counted(a: Architecture, classes: int = 1000) -> int:
    """Parameters by the published architecture, layer by layer."""
    side = 2 * a.kernel_size - 1
    total, dim = 0, a.embed_dim
    if a.tokens == "conv":
        total += 3 * 9 * (dim // 2) + dim // 2 + (dim // 2) * 9 * dim + dim
    else:
        total += 3 * a.tokens**2 * dim + dim
    total += 2 * dim  # normalisation of tokens
    for level, (depth, heads) in enumerate(zip(a.depths, a.num_heads, strict=True)):
        hidden = int(dim * a.mlp_ratio)
        block = 4 * dim + dim * 3 * dim + 3 * dim + heads * side**2 + dim * dim + dim
        block += dim * hidden + hidden + hidden * dim + dim + (2 * dim if a.layer_scale is not None else 0)
        total += depth * block
        if level + 1 < len(a.depths):
            total += 9 * dim * 2 * dim + 2 * 2 * dim if a.tokens == "conv" else 4 * dim * 2 * dim + 2 * 4 * dim
            dim *= 2
    return total + 2 * dim + dim * classes + classes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_variant_has_the_published_number_of_parameters(name: str):
    with torch.device("meta"):
        model = create_model(name)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == counted(ARCHITECTURES[name])
    assert round(count / 1e6) == PUBLISHED[name]
    assert count == COUNTS.get(name, count)
    assert default_cfgs[name]["first_conv"] + ".weight" in dict(model.named_parameters())


def test_the_variants_tested_are_all():
    assert set(PUBLISHED) == set(ARCHITECTURES) == set(default_cfgs)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(64, 52), (19, 37)])
def test_images_of_any_size_give_logits_maps_and_gradients(variant: str, size: tuple[int, int]):
    model = NeighborhoodTransformer(VARIANTS[variant], num_classes=7).eval()
    images = torch.randn(2, 3, *size)
    logits, features = model(images), model.forward_features(images)
    assert logits.shape == (2, 7)
    assert features.shape[-1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), logits)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features.mean((1, 2)))
    final, maps = model.forward_intermediates(images, norm=True)
    torch.testing.assert_close(final, features)
    torch.testing.assert_close(maps[-1].permute(0, 2, 3, 1), features)
    assert [each.shape[1] for each in maps] == [info["num_chs"] for info in model.feature_info]
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_map_smaller_than_its_window_is_padded_with_zeros_and_cropped():
    layer = PaddedNeighborhoodAttention2D(8, 2, 5, 2).double()
    x = torch.randn(1, 4, 13, 8, dtype=torch.float64)
    padded = torch.zeros(1, 10, 13, 8, dtype=torch.float64)
    padded[:, :4] = x
    torch.testing.assert_close(layer(x), layer(padded)[:, :4])


def test_features_are_the_maps_of_levels():
    model = NeighborhoodTransformer(SMALL).eval()
    images = torch.randn(1, 3, 40, 24)
    _, wanted = model.forward_intermediates(images)
    for indices in (None, (0,), (-1,), 1):
        copy = NeighborhoodTransformer(SMALL).eval()
        copy.load_state_dict(model.state_dict())
        features = Features(copy, indices)
        kept = {None: (0, 1), (0,): (0,), (-1,): (1,), 1: (1,)}[indices]
        for ours, i in zip(features(images), kept, strict=True):
            torch.testing.assert_close(ours, wanted[i])
        assert features.channels == [16 * 2**i for i in kept]
    only = create_model("dinat_mini", features_only=True, out_indices=(0, 1))
    assert [tuple(each.shape) for each in only(images)] == [(1, 64, 10, 6), (1, 128, 5, 3)]


def test_checkpointing_gives_the_same_gradients():
    model = NeighborhoodTransformer(SMALL, num_classes=3, drop_path_rate=0.0).train()
    images = torch.randn(2, 3, 32, 24)
    plain = torch.autograd.grad(model(images).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    for ours, theirs in zip(
        torch.autograd.grad(model(images).square().sum(), list(model.parameters())), plain, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_compiles_as_one_graph_with_its_gradients(variant: str, autocast: bool):
    torch.manual_seed(0)
    model = NeighborhoodTransformer(VARIANTS[variant], num_classes=7, drop_path_rate=0.0).train()
    images = torch.randn(2, 3, 52, 36)

    def solved(call: Any) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = call(images)
        return [logits, *torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))]

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(solved(compiled), solved(model), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2 if autocast else 1e-4, atol=2e-2 if autocast else 1e-5)


def test_a_classifier_can_be_replaced_or_left_out():
    model = NeighborhoodTransformer(SMALL, num_classes=3)
    model.reset_classifier(5)
    assert model(torch.zeros(1, 3, 32, 24)).shape == (1, 5)
    model.reset_classifier(0)
    assert model(torch.zeros(1, 3, 32, 24)).shape == (1, 32)
    model.reset_classifier(0, "")
    assert model(torch.zeros(1, 3, 32, 24)).shape == (1, 4, 3, 32)
    assert model.no_weight_decay() == {name for name, _ in model.named_parameters() if "rpb" in name} != set()


def test_paths_are_dropped_in_training_only_and_rightly_scaled():
    drop = DropPath(0.25)
    x = torch.ones(20_000, 1, 1)
    assert drop.eval()(x) is x
    out = drop.train()(x)
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    rates = [b.drop_path.probability for level in create_model("dinat_mini").stages for b in level.blocks]
    assert rates == sorted(rates)
    assert (rates[0], rates[-1]) == (0.0, pytest.approx(0.2))


NAMES = {
    "nat_small": [
        "patch_embed.proj.0.weight", "patch_embed.norm.bias", "levels.0.blocks.2.norm1.weight",
        "levels.0.blocks.2.attn.rpb", "levels.0.blocks.2.attn.qkv.weight", "levels.0.blocks.2.attn.proj.bias",
        "levels.0.blocks.2.mlp.fc1.weight", "levels.0.blocks.2.gamma1", "levels.0.downsample.reduction.weight",
        "levels.0.downsample.norm.weight", "norm.weight", "head.bias",
    ],
    "dinat_s_tiny": [
        "patch_embed.proj.weight", "layers.2.blocks.5.attn.rpb", "layers.2.downsample.reduction.weight",
        "layers.2.downsample.norm.weight", "layers.3.blocks.1.mlp.fc2.bias", "head.weight",
    ],
    "dinat_isotropic_small": ["patch_embed.proj.weight", "layers.11.attn.rpb", "layers.0.norm2.weight", "norm.bias"],
}  # fmt: skip
"""Some names of the official checkpoints."""


@pytest.mark.parametrize("name", NAMES)
def test_official_checkpoints_load_and_are_written(name: str):
    with torch.device("meta"):
        model = create_model(name)
    theirs = to_official(model.state_dict(), ARCHITECTURES[name])
    assert set(NAMES[name]) <= set(theirs)
    heads = ("patch_embed", "levels", "norm", "head") if name.startswith("nat") else ("patch_embed", "layers", "norm")
    assert {key.split(".")[0] for key in theirs} <= {*heads, "head"}
    for checkpoint in (theirs, {"state_dict": {f"module.{key}": tensor for key, tensor in theirs.items()}}):
        assert {k: t.shape for k, t in from_official(checkpoint).items()} == {
            k: t.shape for k, t in model.state_dict().items()
        }


@pytest.mark.parametrize(("build", "message"), [
    (lambda: create_model("nat_huge"), "name must be one of nat_mini, .*, got 'nat_huge'"),
    (lambda: Architecture(16, (1, 1), (2,), 2.0), "depths, num_heads and dilations must have one entry per level"),
    (lambda: NeighborhoodTransformer(SMALL, global_pool="max"), "global_pool must be 'avg'"),
    (lambda: NeighborhoodTransformer(SMALL).forward_intermediates(torch.zeros(1, 3, 32, 32), (0, 5)), "indices must"),
    (lambda: NeighborhoodTransformer(SMALL, num_classes=-1), "num_classes must not be negative, got -1"),
    (lambda: Architecture(16, (1, 1), (2, 4), 2.0, (3,), ((1,), (1,))), "kernel_size must be a number, or one"),
    (lambda: Architecture(16, (1, 1), (2, 4), 2.0, 3, ((1,), ())), "dilations must hold one at least for each level"),
    (lambda: Architecture(16, (1, 1), (2, 4), 2.0, 3, (1, 2)), "dilations must hold one at least for each level"),
    (lambda: Architecture(16, (), (), 2.0, 3, ()), "depths must hold a block at least"),
    (lambda: Architecture(16, (1,), (2,), 2.0, 3, ((1,),), tokens=0), "tokens must be 'conv' or the pixels .* got 0"),
    (lambda: create_model("nat_mini", out_indices=(0,)), "out_indices needs features_only=True"),
    (lambda: NeighborhoodTransformer(SMALL, drop_path_rate=1.0), r"stochastic depth must lie in \[0, 1\), got 1.0"),
    *((lambda wrong=wrong: Features(NeighborhoodTransformer(SMALL), wrong), "indices must be different ones of")
      for wrong in (0, 9, -1, (7,), (0, 0), ())),
])  # fmt: skip
def test_bad_arguments_are_named(build: Any, message: str):
    with pytest.raises(InvalidProblem, match=message):
        build()


def test_readable_names_are_functions_too():
    from vicinal.models import dinat, nat

    for name, architecture in ARCHITECTURES.items():
        module = nat if re.match("nat", name) else dinat
        with torch.device("meta"):
            assert getattr(module, name)(num_classes=2).architecture == architecture
