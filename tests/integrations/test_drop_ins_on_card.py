"""The drop-ins on an accelerator give what they give on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-models.txt")

pytestmark = pytest.mark.gpu


def on_both(run: Callable[[torch.device], torch.Tensor], *, allowed: float) -> None:
    """The result on the accelerator differs from the CPU's by a share of its size at most."""
    there, here = run(torch.device("cuda")).cpu().double(), run(torch.device("cpu")).double()
    assert float((there - here).norm()) <= allowed * float(here.norm())


@pytest.fixture(autouse=True)
def whole_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")


def test_the_drop_in_for_natten_with_the_old_bias():
    from vicinal.integrations import natten as drop_in

    numbers = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 14, 19, 32, generator=numbers)
    table = torch.randn(4, 13, 13, generator=numbers)
    drop_in.install()
    try:
        from natten.functional import natten2dav, natten2dqkrpb  # pyright: ignore

        def halves(device: torch.device) -> torch.Tensor:
            scores = natten2dqkrpb(q.to(device), k.to(device), table.to(device), 7, 2)
            return natten2dav(scores.softmax(-1), v.to(device), 7, 2)

        on_both(halves, allowed=1e-5)
    finally:
        drop_in.uninstall()


def test_the_patched_dinat_of_transformers():
    from transformers import DinatConfig, DinatForImageClassification

    from vicinal.integrations.transformers import patch_dinat

    config = DinatConfig(
        embed_dim=32, depths=[2, 2], num_heads=[2, 4], kernel_size=3, dilations=[[1, 3], [1, 2]], num_labels=10,
        initializer_range=0.3,
    )  # fmt: skip
    undo = patch_dinat()
    try:
        model = DinatForImageClassification(config).eval()
        images = torch.randn(2, 3, 56, 76)

        def logits(device: torch.device) -> torch.Tensor:
            with torch.no_grad():
                return model.to(device)(images.to(device)).logits

        on_both(logits, allowed=1e-4)
    finally:
        undo()


def test_generated_text_of_a_model_with_sliding_windows():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from vicinal.integrations.transformers import register

    config = Gemma3TextConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=7, max_position_embeddings=128, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    register()
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    prompt = torch.randint(3, 50, (2, 19))
    texts: list[list[int]] = []
    for device, kind in (("cpu", "sdpa"), ("cuda", "vicinal"), ("cuda", "sdpa")):
        model.to(device).set_attn_implementation(kind)
        out: Any = model.generate(prompt.to(device), max_new_tokens=12, do_sample=False)
        texts.append(out.cpu().tolist())
    assert texts[0] == texts[1] == texts[2]
