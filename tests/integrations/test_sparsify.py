"""Windows on tiny models of every family: each model's own processors under the same mask are the oracle."""

from __future__ import annotations

import copy
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vicinal import InvalidProblem, Problem, Unsupported
from vicinal.integrations.diffusers import desparsify, sparsify
from vicinal.integrations.sparsity import Window
from vicinal.testing import truth
from vicinal.testing.tolerance import assert_as_good_as_eager

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install -r requirements-models.txt")

from vicinal.integrations.diffusers.specimen import Specimen
from vicinal.integrations.diffusers.zoo import ZOO, specimen

MODELS = [
    name
    for name in ZOO
    if name not in ("cosmos-predict2-2b", "cosmos-predict2-14b", "ltx2-decoder")  # as cosmos-7b
]
TEXTUAL = [name for name in MODELS if ZOO[name].joint]


@contextmanager
def masked(model: nn.Module, seen: Callable[[int], Tensor | None], tokens: int) -> Iterator[None]:
    """Let the model's own processors attend under masks: `seen(layer)` is `[tokens, tokens]`, or `None`.

    The function that all of them call for attention is given the window's mask, and truth for text, wherever
    queries and keys are one sequence that holds the grid. Nothing of ours runs.
    """
    module = sys.modules[type(model).__module__]
    real, name = module.dispatch_attention_fn, type(model).__name__
    first = name.startswith("Flux")
    layer = -1

    def dispatch(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        nonlocal layer
        text = query.shape[1] - tokens
        if query.shape[1] != key.shape[1] or text < 0 or (text and not joint):
            return real(query, key, value, attn_mask=attn_mask, **rest)
        layer += 1
        window = seen(layer)
        if window is not None:
            pad = (text, 0, text, 0) if first else (0, text, 0, text)
            mask = nn.functional.pad(window, pad, value=True)[None, None]
            attn_mask = mask if attn_mask is None else mask & attn_mask.bool()
        return real(query, key, value, attn_mask=attn_mask, **rest)

    joint = next(found.joint for found in ZOO.values() if found.kind == name)
    module.dispatch_attention_fn = dispatch
    try:
        yield
    finally:
        module.dispatch_attention_fn = real


def mask_of(grid: tuple[int, ...], kernel_size: Any, **window: Any) -> Tensor:
    return truth.mask(Problem.grid(grid, kernel_size, **window))


def output(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """All that the model returns, in one vector."""
    found = model(**arguments, return_dict=False)
    return torch.cat([tensor.flatten() for tensor in found])


def pad_text(arguments: dict[str, Any]) -> None:
    """Some rows of the batch have less text than others."""
    for name in ("encoder_attention_mask", "encoder_attention_mask_2"):
        if name in arguments:
            arguments[name] = arguments[name].clone()
            arguments[name][1, 2:] = 0


def case(found: Specimen, dtype: torch.dtype, weights: nn.Module | None = None) -> tuple[nn.Module, dict[str, Any]]:
    model = found.build(tiny=True, dtype=dtype)
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    reference = weights or model
    arguments = found.arguments(reference, tiny=True, batch=2)
    pad_text(arguments)
    floating = {k: v.to(dtype) for k, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
    return model, {**arguments, **floating}


def with_gradients(model: nn.Module, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    leaf = arguments["hidden_states"].clone().requires_grad_()
    out = output(model, {**arguments, "hidden_states": leaf})
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers = torch.Generator().manual_seed(3)
    loss = (out * torch.randn(out.shape, generator=numbers, dtype=torch.float64).to(out.dtype)).sum()
    found = torch.autograd.grad(loss, [leaf, *weights], allow_unused=True)
    return out.detach(), torch.cat([gradient.flatten() for gradient in found if gradient is not None])


@pytest.mark.parametrize("name", MODELS)
def test_windows_equal_the_models_own_attention_under_the_same_mask(name):
    found = specimen(name)
    exact, arguments64 = case(found, torch.float64)
    single, arguments = case(found, torch.float32, exact)
    window = mask_of(found.tiny_grid, **found.tiny_window)
    tokens = torch.Size(found.tiny_grid).numel()
    wanted = []
    for model, inputs in ((exact, arguments64), (single, arguments)):
        with masked(model, lambda layer: window, tokens):
            wanted.append(with_gradients(model, inputs))
    with sparsify(single, **found.tiny_window) as handle:
        ours = with_gradients(single, arguments)
        assert handle.grid == found.tiny_grid
    dense = with_gradients(single, arguments)
    for what, actual, true, eager, other in zip(("output", "gradients"), ours, *wanted, dense, strict=True):
        # A model rounds in many places that are not attention: four times its own error instead of twice.
        assert_as_good_as_eager(actual, eager, true, slack=4.0, what=what)
        assert (other - true).abs().max() > 1e-3  # the window is felt


@pytest.mark.parametrize("name", MODELS)
def test_a_window_over_the_whole_grid_changes_nothing_and_remove_restores(name):
    found = specimen(name)
    model, arguments = case(found, torch.float32)
    own = {n: layer.processor for n, layer in model.named_modules() if hasattr(layer, "processor")}
    with torch.no_grad():
        before = output(model, arguments)
        for whole in (-1, 1.0, found.tiny_grid):
            with sparsify(model, whole):
                assert torch.equal(output(model, arguments), before)
        handle = sparsify(model, **found.tiny_window)
        assert not torch.equal(output(model, arguments), before)
        handle.remove()
        handle.remove()
        assert torch.equal(output(model, arguments), before)
    assert {n: layer.processor for n, layer in model.named_modules() if hasattr(layer, "processor")} == own
    assert not model._forward_pre_hooks


def test_windows_whose_handle_is_lost_are_taken_off():
    model = specimen("flux").build(tiny=True)
    own = {n: layer.processor for n, layer in model.named_modules() if hasattr(layer, "processor")}
    for _ in range(2):
        sparsify(model, 3)
        with pytest.raises(InvalidProblem, match=r"or desparsify\(model\) where their handle is lost"):
            sparsify(model, 3)
        desparsify(torch.compile(model, backend="eager"))
        desparsify(model)
        assert {n: layer.processor for n, layer in model.named_modules() if hasattr(layer, "processor")} == own
        assert not model._forward_pre_hooks
    with pytest.raises(Unsupported, match="no windows for Linear"):
        desparsify(nn.Linear(2, 2))


@pytest.mark.parametrize("name", MODELS)
def test_only_self_attention_over_the_grid_is_touched(name):
    model = specimen(name).build(tiny=True)
    own = {n: layer.processor for n, layer in model.named_modules() if hasattr(layer, "processor")}
    with sparsify(model, 0.5) as handle:
        assert set(handle.layers) <= set(own)
        for other in set(own) - set(handle.layers):
            assert model.get_submodule(other).processor is own[other]
        assert not any(word in layer for layer in handle.layers for word in ("attn2", "audio", "refiner", "context"))


def test_layers_have_windows_of_their_own_and_dense_ones_among_them():
    found = specimen("flux")
    model, arguments = case(found, torch.float32)
    windows = [None, Window(3), Window((9, 5), stride=(1, 5)), None]
    masks = [None, mask_of(found.tiny_grid, 3), mask_of(found.tiny_grid, (9, 5), stride=(1, 5)), None]
    with torch.no_grad():
        with masked(model, lambda layer: masks[layer], 126):
            wanted = output(model, arguments)
        with sparsify(model, rule=lambda layer, step: windows[layer]):
            torch.testing.assert_close(output(model, arguments), wanted)
        with masked(model, lambda layer: mask_of(found.tiny_grid, 3) if layer in (1, 2) else None, 126):
            wanted = output(model, arguments)
        with sparsify(model, 3, dense_layers=(1, 1)):
            torch.testing.assert_close(output(model, arguments), wanted)


def test_steps_are_counted_by_the_timestep():
    model, arguments = case(specimen("wan-14b"), torch.float32)
    times = [900.0, 900.0, 700.0, 700.0, 300.0, 50.0]
    with torch.no_grad(), sparsify(model, 3, dense_steps=(1, 1), steps=4) as handle:
        for _ in range(2):  # a second run begins where the timestep rises
            sparse, steps = [], []
            for time in times:
                output(model, {**arguments, "timestep": torch.full((2,), time)})
                steps.append(handle.step)
                sparse.append(model.blocks[0].attn1.processor.setting is not None)
            assert steps == [0, 0, 1, 1, 2, 3]
            assert sparse == [False, False, True, True, True, False]
        handle.reset()
        output(model, {**arguments, "timestep": torch.full((2,), 10.0)})
        assert handle.step == 0


def test_a_token_that_conditions_has_a_timestep_of_its_own():
    model, arguments = case(specimen("wan-14b"), torch.float32)
    with torch.no_grad(), sparsify(model, 3) as handle:
        for time in (800.0, 600.0):
            timestep = torch.full((2, 168), time)
            timestep[:, :42] = 0
            output(model, {**arguments, "timestep": timestep})
        assert handle.step == 1


def test_the_grid_may_change_from_call_to_call_and_rows_need_not_divide():
    found = specimen("hunyuan-video")
    model = found.build(tiny=True)
    with torch.no_grad(), sparsify(model, (-1, 0.5, 0.4), stride=(1, 2, 2)) as handle:
        for grid in ((3, 5, 9), (1, 45, 8), (5, 4, 6)):
            arguments = found.arguments(model, grid)
            window = Window((-1, 0.5, 0.4), stride=(1, 2, 2)).on(grid)
            assert window is not None
            ours = output(model, arguments)
            assert handle.grid == grid
            seen = mask_of(grid, window.kernel_size, stride=window.stride)
            handle.remove()
            with masked(model, lambda layer, seen=seen: seen, torch.Size(grid).numel()):
                torch.testing.assert_close(ours, output(model, arguments))
            handle = sparsify(model, (-1, 0.5, 0.4), stride=(1, 2, 2))
        handle.remove()


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5"])
def test_padding_of_text_is_seen_by_none(name):
    model, arguments = case(specimen(name), torch.float32)
    other = dict(arguments)
    for key, mask in (
        ("encoder_hidden_states", "encoder_attention_mask"),
        ("encoder_hidden_states_2", "encoder_attention_mask_2"),
    ):
        if key in other:
            padded = other[mask][..., None] == 0
            other[key] = torch.where(padded, 100.0, other[key])
    with torch.no_grad(), sparsify(model, 3):
        torch.testing.assert_close(output(model, other), output(model, arguments))


def test_models_in_one_process_do_not_disturb_each_other():
    one, arguments = case(specimen("wan-14b"), torch.float32)
    two = specimen("wan-14b").build(tiny=True)
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        dense = output(one, arguments)
        with sparsify(two, 3) as handle, sparsify(one, (4, 5, 5)):
            handle.remove()
            assert torch.equal(output(two, arguments), dense)
            assert not torch.equal(output(one, arguments), dense)


def test_a_copy_of_a_model_with_windows_is_dense_and_takes_windows_of_its_own():
    """As `torch.optim.swa_utils.AveragedModel` makes one in fine-tuning."""
    found = specimen("wan-14b")
    model = found.build(tiny=True)
    arguments = found.arguments(model, tiny=True)
    with torch.no_grad():
        dense = output(model, arguments)
        with sparsify(model, **found.tiny_window) as handle:
            twin = copy.deepcopy(model)
            assert torch.equal(output(twin, arguments), dense)
            assert handle.grid is None  # it was not its call
            sparse = output(model, arguments)
        with sparsify(twin, **found.tiny_window):
            assert torch.equal(output(twin, arguments), sparse)
        assert torch.equal(output(twin, arguments), dense)
    assert not torch.equal(sparse, dense)


def test_attention_backends_can_be_chosen_while_windows_are_on():
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    model, arguments = case(specimen("flux"), torch.float32)
    with torch.no_grad(), attention_backend("native"):  # set_attention_backend leaks into the global one
        with sparsify(model, 3):
            before = output(model, arguments)
            model.set_attention_backend("_native_math")
            torch.testing.assert_close(output(model, arguments), before)
        kept = model.transformer_blocks[0].attn.processor._attention_backend
        assert AttentionBackendName(kept) == AttentionBackendName._NATIVE_MATH


def test_fused_projections_take_part():
    model, arguments = case(specimen("flux"), torch.float32)
    with torch.no_grad(), sparsify(model, 3):
        before = output(model, arguments)
        model.fuse_qkv_projections()
        torch.testing.assert_close(output(model, arguments), before)


def test_lora_takes_part_and_learns():
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install -r requirements-models.txt")
    model, arguments = case(specimen("wan-14b"), torch.float32)
    with sparsify(model, 3):
        before = output(model, arguments)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
        model.add_adapter(config)
        after = output(model, arguments)
        assert not torch.allclose(after, before)
        after.sum().backward()
        learning = [p for n, p in model.named_parameters() if "attn1" in n and "lora" in n]
        assert learning and all(p.grad is not None and p.grad.abs().max() > 0 for p in learning)


def test_gradient_checkpointing_gives_the_same_gradients():
    model, arguments = case(specimen("flux"), torch.float32)
    with sparsify(model, 3):
        _, wanted = with_gradients(model, arguments)
        model.enable_gradient_checkpointing()
        _, found = with_gradients(model.train(), arguments)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["flux", "wan-14b", "hunyuan-video"])
def test_repeated_blocks_compile_whole_and_as_often_as_without_windows(name):
    import torch._dynamo

    found = specimen(name)
    first = found.arguments(found.build(tiny=True), tiny=True)
    second = found.arguments(found.build(tiny=True), tuple(n + 2 for n in found.tiny_grid))

    def compiled(windows: bool) -> list[int]:
        """How many graphs there are after a call, and after one with another grid."""
        torch._dynamo.reset()
        graphs: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(1)
            return graph.forward

        model = found.build(tiny=True)
        handle = sparsify(model, (0.5,) * len(found.tiny_grid)) if windows else nullcontext()
        counts = []
        with torch.no_grad(), handle:
            wanted = [output(model, arguments) for arguments in (first, second)]
            model.compile_repeated_blocks(fullgraph=True, backend=backend)
            for arguments, expected in zip((first, second), wanted, strict=True):
                torch.testing.assert_close(output(model, arguments), expected)
                counts.append(len(graphs))
        torch._dynamo.reset()
        return counts

    assert compiled(windows=True) == compiled(windows=False)


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda m: sparsify(m), InvalidProblem, "exactly one of kernel_size, preset and rule, got none"),
    (lambda m: sparsify(m, 3, preset="cosmos-7b"), InvalidProblem, "got kernel_size and preset"),
    (lambda m: sparsify(m, preset="cosmos"), InvalidProblem, "preset must be one of cosmos-7b, .* got 'cosmos'"),
    (lambda m: sparsify(m, preset="cosmos-7b"), InvalidProblem, "made for another model: .*class Wan.* layers 3 .* 28"),
    (lambda m: sparsify(m, 0), InvalidProblem, "kernel_size must be at least 1, or -1"),
    (lambda m: sparsify(m, 1.5), InvalidProblem, r"kernel_size as a share of an axis must lie in \(0, 1\], got 1.5"),
    (lambda m: sparsify(m, 3, stride=-1), InvalidProblem, "stride must be at least 1, got -1"),
    (lambda m: sparsify(m, "3"), InvalidProblem, "kernel_size must be tokens"),
    (lambda m: sparsify(m, 3, dense_steps=(1, 2)), InvalidProblem, "pass steps= as well"),
    (lambda m: sparsify(m, 3, dense_layers=-1), InvalidProblem, "dense_layers must be a number of first ones"),
    (lambda m: sparsify(m, 3, dense_layers=(99, 1)), InvalidProblem, r"dense_layers=\(99, 1\) are more than all"),
    (lambda m: sparsify(m, 3, dense_steps=(0, 1), steps=0), InvalidProblem, "steps must be an integer of at least 1"),
    (lambda m: sparsify(m, 3, grid=7), InvalidProblem, "grid must be a tuple of tokens, one number per axis, got 7"),
    (lambda m: sparsify(m, rule=3), InvalidProblem, "rule must be a function of layer and step, got 3"),
    (lambda m: sparsify(m, rule=lambda layer, step: (3, 3, 3), grid=(4, 6, 7)), InvalidProblem,
     r"rule must give a Window or None, got \(3, 3, 3\) for layer 0 at step 0"),
    (lambda m: sparsify(m, rule=lambda layer, step: None, stride=2), InvalidProblem, "rule decides on its own"),
    (lambda m: sparsify(m, (2, 3, 9), grid=(4, 6, 7)), InvalidProblem, "layer 0 .blocks.0.attn1. at step 0: axis 2"),
    (lambda m: sparsify(m.blocks[0], 3), Unsupported, "no windows for WanTransformerBlock; the models known are Flux"),
])  # fmt: skip
def test_bad_arguments_are_refused_at_once_and_the_model_is_untouched(change, error, message):
    model = specimen("wan-14b").build(tiny=True)
    own = [block.attn1.processor for block in model.blocks]
    with pytest.raises(error, match=message):
        change(model)
    assert [block.attn1.processor for block in model.blocks] == own
    assert not model._forward_pre_hooks


def test_what_does_not_fit_the_grid_is_refused_before_any_layer_runs():
    model, arguments = case(specimen("wan-14b"), torch.float32)
    ran = []
    model.patch_embedding.register_forward_hook(lambda *_: ran.append(1))
    with sparsify(model, (2, 7, 3)), pytest.raises(InvalidProblem, match=r"layer 0 .* axis 1 of 4x6x7"):
        output(model, arguments)
    with sparsify(model, (2, 3)), pytest.raises(InvalidProblem, match="one value for each of the 3 axes"):
        output(model, arguments)
    with sparsify(model, 3, grid=(4, 6, 8)), pytest.raises(InvalidProblem, match=r"given as 4x6x8, .* has 4x6x7"):
        output(model, arguments)
    assert not ran


def test_a_second_set_of_windows_and_foreign_processors_are_refused():
    model = specimen("flux").build(tiny=True)
    with sparsify(model, 3), pytest.raises(InvalidProblem, match=r"has windows already \(at transformer_blocks.0"):
        sparsify(model, 5)

    class Foreign:
        def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
            return hidden_states

    model.transformer_blocks[1].attn.processor = Foreign()
    with pytest.raises(Unsupported, match=r"transformer_blocks.1.attn runs a Foreign.* windows know FluxAttnProcessor"):
        sparsify(model, 3)


def test_a_processor_put_there_in_between_stays():
    model = specimen("flux").build(tiny=True)
    handle = sparsify(model, 3)
    other = handle._ours[0][1].own.__class__()
    model.transformer_blocks[0].attn.set_processor(other)
    handle.remove()
    assert model.transformer_blocks[0].attn.processor is other


def test_reference_images_have_no_place_on_the_grid():
    found = specimen("flux")
    model, arguments = case(found, torch.float32)
    twice = {
        **arguments,
        "hidden_states": arguments["hidden_states"].repeat(1, 2, 1),
        "img_ids": arguments["img_ids"].repeat(2, 1),
    }
    with sparsify(model, 3), pytest.raises(InvalidProblem, match="252 tokens that are no picture of 9x14"):
        output(model, twice)


def test_a_grid_that_the_call_does_not_say_can_be_given():
    model, arguments = case(specimen("ltx-video"), torch.float32)
    for name in ("num_frames", "height", "width"):
        coordinates = arguments.pop(name)
    assert coordinates == 7
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in (4, 6, 7))).T
    arguments["video_coords"] = places[None].expand(2, -1, -1)
    with torch.no_grad():
        with sparsify(model, 3), pytest.raises(InvalidProblem, match=r"cannot be read off .* pass sparsify"):
            output(model, arguments)
        with sparsify(model, 3, grid=(4, 6, 7)) as handle:
            output(model, arguments)
            assert handle.grid == (4, 6, 7)
        with sparsify(model, 3, grid=(4, 6, 8)), pytest.raises(InvalidProblem, match="168 tokens, which is no grid"):
            output(model, arguments)


def test_masks_that_decide_who_sees_whom_are_refused():
    model, arguments = case(specimen("ltx2"), torch.float32)
    with sparsify(model, 3), pytest.raises(Unsupported, match="video_self_attention_mask decides by itself"):
        output(model, {**arguments, "video_self_attention_mask": torch.ones(2, 168, 168)})


def test_guidance_that_perturbs_rows_of_a_batch_keeps_its_meaning():
    found = specimen("ltx2")
    model = found.build(tiny=True)
    config = {**found.tiny, "perturbed_attn": True}
    perturbed = type(model)(**config).eval()
    perturbed.load_state_dict(model.state_dict())
    arguments = found.arguments(perturbed, tiny=True, batch=2)
    window = mask_of(found.tiny_grid, 3)
    for mask in (torch.tensor([0.0, 1.0]), torch.zeros(2), None):
        more = {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": mask}
        with torch.no_grad():
            # A block that is perturbed for the whole batch attends not at all, so it does not count as a layer.
            with masked(perturbed, lambda layer: window, 168):
                wanted = output(perturbed, {**arguments, **more})
            with sparsify(perturbed, 3):
                torch.testing.assert_close(output(perturbed, {**arguments, **more}), wanted)


def test_pipelines_are_told_to_pass_the_model_inside():
    class Pipeline:
        transformer = None

    with pytest.raises(Unsupported, match=r"no windows for Pipeline; pass the model inside it, \.transformer"):
        sparsify(Pipeline(), 3)


def test_other_versions_of_diffusers_are_refused(monkeypatch):
    from vicinal.integrations import diffusers as ours

    model = specimen("wan-14b").build(tiny=True)
    monkeypatch.setattr(ours, "version", lambda name: "0.31.0")
    with pytest.raises(Unsupported, match=r"diffusers 0.42, not those of 0.31.0; install diffusers~=0.42.0"):
        sparsify(model, 3)


def test_the_handle_says_what_it_is():
    model, arguments = case(specimen("wan-14b"), torch.float32)
    handle = sparsify(model, 3)
    assert str(handle) == "WanTransformer3DModel, 3 layers with windows, not called yet"
    output(model, arguments)
    assert str(handle).endswith("4x6x7 tokens at step 0")
    handle.remove()
    assert str(handle).endswith("removed")


def test_a_pipeline_with_guidance_counts_its_steps_and_begins_anew():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-models.txt")
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    model = specimen("wan-14b").build(tiny=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    seen: list[tuple[int, bool]] = []
    with sparsify(model, (2, 3, 5), dense_steps=(1, 1), steps=4) as handle:
        model.blocks[0].register_forward_pre_hook(
            lambda block, _: seen.append((handle.step, block.attn1.processor.setting is not None))
        )
        for _ in range(2):
            pipe(
                prompt_embeds=torch.randn(1, 7, 12),
                negative_prompt_embeds=torch.randn(1, 7, 12),
                height=96,
                width=112,
                num_frames=13,
                num_inference_steps=4,
                guidance_scale=4.0,
                output_type="latent",
            )
    once = [(0, False)] * 2 + [(1, True)] * 2 + [(2, True)] * 2 + [(3, False)] * 2
    assert seen == once * 2


def test_a_pipeline_of_pictures_says_its_grid():
    pytest.importorskip("transformers", reason="transformers is not installed: pip install -r requirements-models.txt")
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    model = specimen("flux").build(tiny=True)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=model, **nothing)
    pipe.set_progress_bar_config(disable=True)
    with sparsify(model, (4, 5), dense_steps=1) as handle:
        pipe(
            prompt_embeds=torch.randn(1, 7, 12),
            pooled_prompt_embeds=torch.randn(1, 6),
            height=144,
            width=224,
            num_inference_steps=3,
            output_type="latent",
        )
        assert (handle.grid, handle.step) == ((9, 14), 2)
        assert all(setting is not None for setting in handle.settings)


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["flux", "hunyuan_video", "wan", "cosmos_predict2", "ltx_video"])
def test_examples_denoise_as_dense_attention_under_the_same_mask_does(name, monkeypatch, capsys):
    example = runpy.run_path(str(EXAMPLES / f"{name}.py"))
    found = specimen(example["MODEL"])
    model = found.build(tiny=True)
    arguments = found.arguments(model, tiny=True)
    windows = dict(example["WINDOWS"])
    dense = windows.pop("dense_layers", (0, 0))
    first, last = (dense, 0) if isinstance(dense, int) else dense
    setting = Window(**windows).on(found.tiny_grid)
    assert setting is not None
    seen = mask_of(found.tiny_grid, setting.kernel_size, stride=setting.stride, dilation=setting.dilation)
    layers = found.layers(tiny=True)
    steps = 3

    def of(call: int) -> Tensor | None:
        return seen if first <= call % layers < layers - last else None

    with masked(model, of, torch.Size(found.tiny_grid).numel()):
        wanted = example["denoise"](model, arguments, steps)
    with sparsify(model, **example["WINDOWS"]) as handle:
        torch.testing.assert_close(example["denoise"](model, arguments, steps), wanted)
        assert handle.step == steps - 1
    monkeypatch.setattr(sys, "argv", [name])
    example["main"]()
    assert "windows changed the result by" in capsys.readouterr().out


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 80
