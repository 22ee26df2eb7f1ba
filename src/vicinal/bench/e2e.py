"""A denoising step, or a decode, of a whole model: dense against windows, and what the simulator expected."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from math import prod
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from vicinal._tuples import times
from vicinal.backends import choose, present
from vicinal.bench.e2e_result import EndToEnd, Pass
from vicinal.bench.parts import Stopwatch
from vicinal.bench.results import today
from vicinal.errors import InvalidProblem
from vicinal.hardware import Hardware
from vicinal.integrations.sparsity import Setting
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.simulate import simulate

Watched = dict[str, list[tuple[Stopwatch, int] | None]]
"""Of each way its passes, with their peaks of memory; `None` where it ran out."""


def measure(
    name: str,
    *,
    window: Mapping[str, Any] | None = None,
    grid: tuple[int, ...] | None = None,
    tiny: bool = False,
    layers: int | None = None,
    repeats: int = 3,
    dense_steps: int = 0,
    steps: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, now: None,
) -> EndToEnd:
    """Time one step of a model with random weights, dense and with windows in turn.

    Args:
        name: of the model, see `vicinal.integrations.diffusers.zoo`.
        window: arguments of `sparsify`; by default the model's own there. Not for a decoder.
        grid: tokens per axis; by default the model's own.
        tiny: a configuration that a CPU runs in no time, for tests.
        layers: build only so many, and scale times up; by default all.
        repeats: timed passes of each way.
        dense_steps, steps: of a whole run, for its speed-up.
        device, dtype: by default bfloat16 on accelerators and float32 elsewhere.
        progress: called with passes done, passes in all, and what is being done.

    Raises:
        InvalidProblem: the model is unknown, or the window does not fit it.
        Unsupported: diffusers is missing, or of another version.
    """
    from vicinal.integrations.diffusers import require_diffusers

    require_diffusers()
    from vicinal.integrations.diffusers.zoo import specimen

    found = specimen(name)
    if repeats < 1:
        raise InvalidProblem(f"repeats must be at least 1, got {repeats}")
    if steps < 1 or not 0 <= dense_steps <= steps:
        raise InvalidProblem(
            f"dense_steps must lie in [0, steps] and steps be at least 1, got {dense_steps} of {steps}"
        )
    if grid is not None and (len(grid) != len(found.grid) or min(grid) < 1):
        raise InvalidProblem(f"grid must hold {len(found.grid)} numbers of tokens, at least 1 each, got {times(grid)}")
    device = torch.device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    grid = grid or (found.tiny_grid if tiny else found.grid)
    window = dict(window or (found.tiny_window if tiny else found.window))
    progress(0, 2 * repeats, f"building {name}")
    model = found.build(tiny=tiny, device=device, dtype=dtype, layers=layers)
    arguments = found.arguments(model, grid, tiny=tiny)
    ways = _decoder_ways(model) if found.is_decoder else _transformer_ways(model, window)
    scale = found.layers(tiny=tiny) / found.layers_of(model)
    with torch.no_grad(), _unmasked(model, arguments), _fastest_dense(device):
        watched, settings = _passes(model, arguments, ways, prod(grid), device, repeats, progress)
    dense, sparse = (_pass(way, passes, scale) for way, passes in watched.items())
    return EndToEnd(
        model=name,
        grid=grid,
        text=found.tiny_text if tiny else found.text,
        window="its own windows" if found.is_decoder else _described(window),
        dtype=str(dtype).removeprefix("torch."),
        where=today(device),
        layers=found.layers_of(model),
        layers_in_all=found.layers(tiny=tiny),
        dense=dense,
        sparse=sparse,
        attention=_expected(model, settings, found, tiny, dtype, device) if settings else None,
        dense_steps=dense_steps,
        steps=steps,
    )


Ways = Mapping[str, Callable[[], AbstractContextManager[Any]]]


def _transformer_ways(model: Any, window: Mapping[str, Any]) -> Ways:
    from vicinal.integrations.diffusers import sparsify

    sparsify(model, **window).remove()  # whatever is wrong with it is said before anything runs
    # Of a preset with dense steps, the step that is timed is one of the others.
    settings: dict[str, Any] = {"dense_steps": 0, **window}
    return {"dense": nullcontext, "windows": lambda: sparsify(model, **settings)}


def _decoder_ways(model: Any) -> Ways:
    from diffusers.models.autoencoders import ltx2_diffusion_decoder as own

    from vicinal.integrations.diffusers import LTX2DecoderProcessor

    @contextmanager
    def run_by(processor: Any) -> Generator[None]:
        model.set_attn_processor(processor())
        yield

    return {
        "flex": lambda: run_by(own.LTX2VideoVaeNeighborhoodAttnProcessor),
        "vicinal": lambda: run_by(LTX2DecoderProcessor),
    }


def _passes(
    model: Any,
    arguments: Mapping[str, Any],
    ways: Ways,
    tokens: int,
    device: torch.device,
    repeats: int,
    progress: Callable[[int, int, str], None],
) -> tuple[Watched, list[Setting | None]]:
    """All passes, the ways in turn, and the windows that the layers had."""
    watched: Watched = {way: [] for way in ways}
    settings: list[Setting | None] = []
    for turn in range(repeats):
        for index, (way, enter) in enumerate(ways.items()):
            progress(2 * turn + index, 2 * repeats, f"{type(model).__name__}: {way}")
            with enter() as handle:
                watch = partial(Stopwatch, tokens, device, in_parts=way != "flex")
                # The first pass is not counted: kernels are compiled in it, and plans are made.
                latest = _timed(model, arguments, watch, device)
                if turn == 0 and latest is not None:
                    latest = _timed(model, arguments, watch, device)
                watched[way].append(latest)
                settings = getattr(handle, "settings", settings)
    return watched, settings


@contextmanager
def _unmasked(model: Any, arguments: Mapping[str, Any]) -> Generator[None]:
    """Without padding there is nothing to mask: spare HunyuanVideo's layers a mask of truth, dense and sparse alike.

    PyTorch's fastest attention takes none, and a comparison with a slower one would flatter us.
    """
    if type(model).__name__ != "HunyuanVideoTransformer3DModel" or not bool(arguments["encoder_attention_mask"].all()):
        yield
        return

    def drop(layer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": None}

    with ExitStack() as stack:
        for blocks in (model.transformer_blocks, model.single_transformer_blocks):
            for block in blocks:
                stack.callback(block.attn.register_forward_pre_hook(drop, with_kwargs=True).remove)
        yield


def _fastest_dense(device: torch.device) -> AbstractContextManager[Any]:
    """On NVIDIA's accelerators cuDNN's attention comes first: PyTorch's own order may put a slower one before it."""
    if device.type != "cuda":
        return nullcontext()
    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel(order, set_priority=True)


def _timed(
    model: Any, arguments: Mapping[str, Any], make_watch: Callable[[], Stopwatch], device: torch.device
) -> tuple[Stopwatch, int] | None:
    """A pass and its peak of memory, or `None` if that ran out."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch = make_watch()
    try:
        with watch:
            model(**arguments)
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return None
    return watch, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _pass(name: str, passes: list[tuple[Stopwatch, int] | None], scale: float) -> Pass:
    done = [one for one in passes if one is not None]
    if not done:
        return Pass(name, None, 0.0, {}, 0)
    seconds = [watch.seconds for watch, _ in done]
    middle = median(seconds)
    watch = min((watch for watch, _ in done), key=lambda watch: abs(watch.seconds - middle))
    parts = {part: found * scale for part, found in watch.parts.items()}
    return Pass(name, middle * scale, (max(seconds) - min(seconds)) / middle, parts, max(peak for _, peak in done))


def _expected(
    model: Any, settings: list[Setting | None], found: Any, tiny: bool, dtype: torch.dtype, device: torch.device
) -> float:
    """The simulator's speed-up of attention over all layers, from tiles visited on average."""
    hardware = present(device)
    rates = hardware if hardware.flops_per_s else Hardware.named("cpu")
    shares: list[float] = []
    for setting in settings:
        if setting is None:
            shares.append(1.0)
            continue
        problem = Problem.grid(
            setting.grid,
            setting.kernel_size,
            stride=setting.stride,
            dilation=setting.dilation,
            is_causal=setting.is_causal,
            heads=model.config.num_attention_heads,
            head_dim=model.config.attention_head_dim,
            dtype=str(dtype).removeprefix("torch."),
            additional=(found.tiny_text if tiny else found.text) if found.joint else 0,
        )
        tiling = next(iter(choose(problem, hardware).tilings(problem, hardware)))
        shares.append(1 / simulate(make_plan(problem, tiling), rates).speedup.mean_tile)
    return len(shares) / sum(shares)


def _described(window: Mapping[str, Any]) -> str:
    def text(value: Any) -> str:
        return times(value) if isinstance(value, (tuple, list)) else str(value)

    return ", ".join(f"{name.replace('_', ' ')} {text(value)}" for name, value in window.items())
