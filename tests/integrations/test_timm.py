"""Our models among timm's."""

from __future__ import annotations

import pytest
import torch

from vicinal.integrations import timm as bridge
from vicinal.models import ARCHITECTURES, create_model

timm = pytest.importorskip(
    "timm", reason="timm is not installed: pip install -r requirements-timm.txt, see `make timm`"
)


def test_every_variant_is_listed_once_registered():
    bridge.register()
    bridge.register()
    assert set(ARCHITECTURES) <= set(timm.list_models())
    assert timm.get_pretrained_cfg("dinat_large_384").input_size == (3, 384, 384)


def test_timm_builds_what_we_build():
    bridge.register()
    theirs = timm.create_model("dinat_mini", num_classes=7).eval()
    ours = create_model("dinat_mini", num_classes=7).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(theirs(images), ours(images))
    assert timm.data.resolve_model_data_config(theirs)["input_size"] == (3, 224, 224)
    assert theirs.get_classifier().out_features == 7


@pytest.mark.parametrize("name", ["nat_mini", "dinat_s_tiny"])
def test_features_only(name: str):
    bridge.register()
    features = timm.create_model(name, features_only=True, out_indices=(0, 2))
    channels = [ARCHITECTURES[name].embed_dim * factor for factor in (1, 4)]
    assert features.feature_info.channels() == channels
    assert features.feature_info.reduction() == [4, 16]
    maps = features(torch.randn(1, 3, 64, 96))
    assert [tuple(each.shape) for each in maps] == [(1, channels[0], 16, 24), (1, channels[1], 4, 6)]


def test_parameters_group_by_depth_for_layerwise_rates():
    bridge.register()
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("nat_mini")
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    grouped = sum(parameter.numel() for group in groups for parameter in group["params"])
    assert grouped == sum(parameter.numel() for parameter in model.parameters())
    assert len({group["lr_scale"] for group in groups}) > 10
