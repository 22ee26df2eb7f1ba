"""transformers on our attention: Dinat with our own models' logits, and causal sliding windows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from vicinal.errors import InvalidProblem, Unsupported
from vicinal.integrations import transformers as bridge
from vicinal.models import Features, NeighborhoodTransformer
from vicinal.models.weights import architecture_of, from_huggingface, to_huggingface

transformers = pytest.importorskip("transformers", reason="transformers is not installed: see requirements-models.txt")


@pytest.fixture
def dinat() -> Iterator[Any]:
    undo = bridge.patch_dinat()
    yield transformers
    undo()


def config(**changes: Any) -> Any:
    small = {
        "embed_dim": 16, "depths": [2, 1, 1], "num_heads": [2, 4, 8], "kernel_size": 3, "mlp_ratio": 2.0,
        "dilations": [[1, 4], [1], [2]], "num_labels": 5, "initializer_range": 0.3, "drop_path_rate": 0.1,
    }  # fmt: skip
    return transformers.DinatConfig(**{**small, **changes})


def randomize(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
@pytest.mark.parametrize("size", [(64, 52), (20, 36)])  # the second has maps smaller than windows
def test_logits_are_those_of_hugging_face(dinat: Any, layer_scale: float, size: tuple[int, int]):
    theirs = dinat.DinatForImageClassification(config(layer_scale_init_value=layer_scale)).double().eval()
    randomize(theirs)
    ours = NeighborhoodTransformer(architecture_of(theirs.config), num_classes=5).double().eval()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        wanted = theirs(images).logits
        torch.testing.assert_close(ours(images), wanted, rtol=1e-10, atol=1e-10)
        # Asked for weights, it takes the unfused way.
        asked = theirs(images, output_attentions=True)
    torch.testing.assert_close(asked.logits, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(asked.attentions[0].sum(-1), torch.ones_like(asked.attentions[0][..., 0]))
    assert wanted.std() > 1e-3


def test_weights_go_there_and_back(dinat: Any):
    theirs = dinat.DinatForImageClassification(config(layer_scale_init_value=0.1))
    state = theirs.state_dict()
    back = to_huggingface(from_huggingface(state))
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    theirs.load_state_dict(back)
    with pytest.raises(InvalidProblem, match="'nothing' is not a parameter"):
        from_huggingface({"dinat.nothing": torch.zeros(1)})
    with pytest.raises(InvalidProblem, match=r"config.hidden_act must be 'gelu', got 'relu'"):
        architecture_of(config(hidden_act="relu"))


def test_backbones_give_the_same_maps(dinat: Any):
    theirs = dinat.DinatBackbone(config(out_features=["stage1", "stage3"])).eval()
    randomize(theirs)
    ours = Features(NeighborhoodTransformer(architecture_of(theirs.config)), (0, 2), norm=True).eval()
    ours.load_state_dict(from_huggingface(theirs.state_dict()))
    assert set(to_huggingface(ours.state_dict())) == set(theirs.state_dict())
    images = torch.randn(1, 3, 48, 40)
    for a, b in zip(ours(images), theirs(images).feature_maps, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_patched_dinat_learns_with_dropout_of_weights(dinat: Any):
    model = dinat.DinatForImageClassification(config(attention_probs_dropout_prob=0.5)).train()
    loss = model(torch.randn(2, 3, 32, 40), labels=torch.tensor([0, 3])).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


WINDOW = 6


@pytest.fixture
def registered() -> None:
    if not hasattr(transformers, "AttentionMaskInterface"):
        pytest.skip("this transformers has no AttentionMaskInterface")
    bridge.register()


KINDS = [("Mistral", {}), ("Gemma3", {"layer_types": ["sliding_attention", "full_attention"] * 2})]


def pair(kind: str, changes: dict[str, Any]) -> list[Any]:
    models: list[Any] = []
    for implementation in ("sdpa", bridge.NAME):
        name = {"Mistral": ("MistralConfig", "MistralForCausalLM"), "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
        config_class, model_class = (getattr(transformers, each) for each in name[kind])
        settings = {
            "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": WINDOW,
            "max_position_embeddings": 128, "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2,
        }  # fmt: skip
        torch.manual_seed(0)
        model = model_class(config_class(**settings, **changes)).eval()
        model.set_attn_implementation(implementation)
        models.append(model)
    return models


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=lambda each: each if isinstance(each, str) else "")
@pytest.mark.parametrize("padding", ["none", "left", "right", "short", "holes"])
def test_sliding_windows_give_the_logits_of_pytorch(
    registered: None, kind: str, changes: dict[str, Any], padding: str, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    ours = bridge.neighborhood_attention
    monkeypatch.setattr(bridge, "neighborhood_attention", lambda *a, **k: calls.append(1) or ours(*a, **k))
    sdpa, vicinal = pair(kind, changes)
    length = 4 if padding == "short" else 21
    tokens = torch.randint(3, 97, (3, length))
    mask = torch.ones_like(tokens)
    if padding == "left":
        mask[0, :9], mask[2, :1] = 0, 0
    elif padding == "right":
        mask[0, 9:], mask[2, -1:] = 0, 0
    elif padding == "holes":
        mask[0, 5:9] = 0
    with torch.no_grad():
        wanted, got = (model(tokens, attention_mask=mask).logits for model in (sdpa, vicinal))
    torch.testing.assert_close(got[mask.bool()], wanted[mask.bool()], rtol=2e-4, atol=2e-4)
    assert got.isfinite().all()
    windows = 2 if kind == "Gemma3" else 4
    assert len(calls) == (0 if padding == "holes" else windows)


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=lambda each: each if isinstance(each, str) else "")
def test_generated_text_is_the_same(registered: None, kind: str, changes: dict[str, Any]):
    tokens = torch.randint(3, 97, (2, 15))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    for more in ({}, {"cache_implementation": "static"}):
        texts = [
            model.generate(tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, **more)
            for model in pair(kind, changes)
        ]
        assert torch.equal(*texts)


def test_windowed_layers_learn(registered: None):
    sdpa, vicinal = pair("Mistral", {})
    tokens = torch.randint(3, 97, (2, 17))
    gradients = [
        torch.autograd.grad(model(tokens, labels=tokens).loss, list(model.parameters())) for model in (sdpa, vicinal)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_what_would_be_wrong_is_refused_in_words():
    module = type("Attention", (torch.nn.Module,), {"is_causal": False})()
    q = torch.randn(1, 2, 9, 4)
    with pytest.raises(Unsupported, match="a sliding window of 4 that looks both ways loses keys at the ends"):
        bridge.attend(module, q, q, q, None, sliding_window=4)
    module.is_causal = True
    valid = torch.ones(1, 9, dtype=torch.bool)
    with pytest.raises(Unsupported, match="s_aux is not offered"):
        bridge.attend(module, q, q, q, valid, sliding_window=4, s_aux=q)
    with pytest.raises(Unsupported, match="made a mask for a sliding window and then attends without one"):
        bridge.attend(module, q, q, q, valid)
    with pytest.raises(Unsupported, match=r"attention_dropout=0.5 is not offered"):
        bridge.attend(module, q, q, q, valid, dropout=0.5, sliding_window=4)
