"""Our attention in the models of diffusers 0.42: `sparsify` for transformers, a processor for LTX-2.5's decoder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vicinal.errors import InvalidProblem, Unsupported
from vicinal.integrations.diffusers.decoder import LTX2DecoderProcessor
from vicinal.integrations.presets import Preset, load_preset
from vicinal.integrations.sparsity import Length, Sparsity, Window, first_and_last

if TYPE_CHECKING:
    from vicinal.integrations.diffusers.handle import Rule, Sparsified

__all__ = ["LTX2DecoderProcessor", "Window", "desparsify", "require_diffusers", "sparsify"]

SUPPORTED = "0.42"
"""The minor version of diffusers whose processors ours stand in for."""


def sparsify(
    model: Any,
    kernel_size: Length | Sequence[Length] | None = None,
    *,
    stride: Length | Sequence[Length] = 1,
    dilation: Length | Sequence[Length] = 1,
    dense_layers: int | Sequence[int] = 0,
    dense_steps: int | Sequence[int] | None = None,
    steps: int | None = None,
    preset: str | None = None,
    rule: Rule | None = None,
    grid: Sequence[int] | None = None,
) -> Sparsified:
    """Let every image or video token of a diffusion transformer see only its window, and all text.

        with sparsify(pipe.transformer, kernel_size=(18, 24, 24), stride=(16, 8, 8), dense_steps=15):
            video = pipe(prompt).frames

    Only self-attention over the grid of tokens changes, where the window is
    `vicinal.neighborhood_attention`'s. Text that shares the attention (FLUX, HunyuanVideo) is seen by all
    and sees all; padding of text is seen by none. Cross-attention, the rest of the model, other models in
    the process and global backends are left alone. Leaving the `with`, or `remove()`, restores the model.

    Knows FLUX.1 and FLUX.2, HunyuanVideo and 1.5, Wan 2.x, Cosmos 1, Predict2 and 2.5, LTX-Video and
    LTX-2. Works with LoRA, in training, under `torch.compile` of the repeated blocks, and with grids that
    change from call to call. A deep copy of the model, for averaged weights say, is dense: give it windows too.

    Args:
        model: the transformer, `pipe.transformer`. A pipeline with two is to have both called.
        kernel_size: keys per window and axis (frames, rows, columns; rows, columns for images). Integers
            are tokens, floats a share of the axis; `-1` is the whole axis.
        stride: queries that share a window, tokens or a share.
        dilation: distance between keys.
        dense_layers: layers that stay dense: the first so many, or `(first, last)`. FLUX and HunyuanVideo
            count double blocks, then single ones.
        dense_steps: denoising steps that stay dense, likewise. By default the preset's, or none. Counted from the
            first step that this model takes: of two models in a pipeline, each has its own.
        steps: denoising steps of a run, needed only if the last ones are to be dense.
        preset: windows for all layers from `vicinal.integrations.presets`, in place of `kernel_size`.
        rule: in place of both, a function `(layer, step) -> Window | None`.
        grid: tokens per axis, for calls that do not say it themselves; also checks the windows at once.

    Returns:
        A handle with `remove()`, `layers`, `grid`, `step`; a context manager.

    Raises:
        Unsupported: the model, a layer's processor or the version of diffusers is unknown. At once.
        InvalidProblem: arguments that contradict each other, a preset made for another model (both at
            once), a window that does not fit the grid (before any layer of that call runs). The model is
            untouched in each case.

    Example:
        >>> from vicinal.integrations.diffusers.zoo import specimen
        >>> wan = specimen("wan-14b")
        >>> model = wan.build(tiny=True)
        >>> with sparsify(model, kernel_size=(-1, 0.5, 0.5)) as handle, torch.no_grad():
        ...     video = model(**wan.arguments(model, grid=(4, 6, 8), tiny=True)).sample
        >>> print(handle)
        WanTransformer3DModel, 3 layers with windows, 4x6x8 tokens at step 0, removed
    """
    require_diffusers()
    from vicinal.integrations.diffusers.families import family_of
    from vicinal.integrations.diffusers.handle import Sparsified

    # A compiled model wraps the one whose layers these are.
    model = getattr(model, "_orig_mod", model)
    family_of(model)
    given = {"kernel_size": kernel_size, "preset": preset, "rule": rule}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise InvalidProblem(f"pass exactly one of kernel_size, preset and rule, got {' and '.join(named) or 'none'}")
    if rule is not None and not callable(rule):
        raise InvalidProblem(f"rule must be a function of layer and step, got {rule!r}")
    if grid is not None and not isinstance(grid, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidProblem(f"grid must be a tuple of tokens, one number per axis, got {grid!r}")
    if rule is None:
        rule = _rule(model, kernel_size, stride, dilation, dense_layers, dense_steps, steps, preset)
    elif (stride, dilation, dense_layers, dense_steps, steps) != (1, 1, 0, None, None):
        raise InvalidProblem("rule decides on its own; stride, dilation, dense_layers, dense_steps and steps go unused")
    return Sparsified(model, rule, None if grid is None else tuple(grid))


def desparsify(model: Any) -> None:
    """Take its windows off a model whose handle is lost, in a notebook say; one without windows stays as it is.

    Args:
        model: the transformer, as `sparsify` was given it.

    Raises:
        Unsupported: the model or the version of diffusers is unknown.

    Example:
        >>> from diffusers import WanTransformer3DModel  # doctest: +SKIP
        >>> model = WanTransformer3DModel(num_layers=2)  # doctest: +SKIP
        >>> _ = sparsify(model, kernel_size=(-1, 0.5, 0.5))  # doctest: +SKIP
        >>> desparsify(model)  # doctest: +SKIP
    """
    require_diffusers()
    from vicinal.integrations.diffusers.handle import remove_from

    remove_from(getattr(model, "_orig_mod", model))


def _rule(
    model: Any,
    kernel_size: Length | Sequence[Length] | None,
    stride: Length | Sequence[Length],
    dilation: Length | Sequence[Length],
    dense_layers: int | Sequence[int],
    dense_steps: int | Sequence[int] | None,
    steps: int | None,
    preset: str | None,
) -> Rule:
    from vicinal.integrations.diffusers.families import family_of

    layers = sum(1 for _ in family_of(model).layers(model))
    if preset is not None:
        if (stride, dilation) != (1, 1):
            raise InvalidProblem("a preset brings its own stride and dilation; pass kernel_size to choose them")
        found = load_preset(preset)
        _check_model(found, model, layers)
        windows, by_default = found.windows, found.dense_steps
    else:
        assert kernel_size is not None
        windows, by_default = (Window(kernel_size, stride, dilation),), 0
    first_and_last_layers = first_and_last(dense_layers, "dense_layers")
    if sum(first_and_last_layers) > layers:
        raise InvalidProblem(f"dense_layers={dense_layers} are more than all {layers} layers of this model")
    sparsity = Sparsity(
        windows,
        first_and_last_layers,
        first_and_last(by_default if dense_steps is None else dense_steps, "dense_steps"),
        steps,
    )
    return lambda layer, step: sparsity.window(layer, layers, step)


def _check_model(preset: Preset, model: Any, layers: int) -> None:
    names = {kind.__name__ for kind in type(model).__mro__}
    found = {
        "class": preset.model["class"] if preset.model["class"] in names else type(model).__name__,
        "layers": layers,
        "heads": model.config.num_attention_heads,
        "head_dim": model.config.attention_head_dim,
    }
    wrong = [
        f"{name} {found[name]} instead of {wanted}" for name, wanted in preset.model.items() if found[name] != wanted
    ]
    if wrong:
        raise InvalidProblem(f"preset {preset.name!r} is made for another model: this one has {', '.join(wrong)}")


def require_diffusers() -> None:
    """Make sure that a version of diffusers is here which this package knows.

    Raises:
        Unsupported: if not.

    Example:
        >>> require_diffusers()
    """
    try:
        found = version("diffusers")
    except PackageNotFoundError:
        raise Unsupported("this needs diffusers; install it, for example as pip install 'vicinal[diffusers]'") from None
    if found.split(".")[:2] != SUPPORTED.split("."):
        raise Unsupported(
            f"windows know the processors of diffusers {SUPPORTED}, not those of {found}; "
            f"install diffusers~={SUPPORTED}.0"
        )
