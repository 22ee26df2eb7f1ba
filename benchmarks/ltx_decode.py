"""LTX-2.5's decoder by every path that runs here: `ltx_decode.py TABLE.csv [--grid T H W] [--ways NAME ...]`.

FlexAttention as diffusers ships it keeps a score for each pair of tokens. Here it is compiled, both the attention and
the making of its masks, as PyTorch's documentation advises; the masks are made anew for every decode, as diffusers
does, and their share of the time is told. Beside it comes the decoder with its attention layers compiled as wholes,
projections and rotation included. All decode the same latents from the same noise, and must agree before a time is
written. Weights are random: time does not depend on them, and nothing is said about quality.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers.models.autoencoders import ltx2_diffusion_decoder as own
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from vicinal._tuples import times
from vicinal.bench.e2e_result import rounded
from vicinal.bench.results import append_rows, today
from vicinal.integrations.diffusers import LTX2DecoderProcessor
from vicinal.integrations.diffusers.zoo import specimen

WAYS = ("vicinal", "flex compiled", "vicinal, layers compiled", "flex, layers compiled", "flex")
COLUMNS = ("date", "device", "driver", "versions", "grid", "video", "way")
COLUMNS += ("seconds", "spread", "masks_s", "first_s", "peak_bytes", "difference")

Row = dict[str, Any]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Masks:
    """Makes FlexAttention's masks, and adds up how long that takes."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self.seconds = make, 0.0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wait()
        begin = time.perf_counter()
        made = self._make(*args, **kwargs)
        wait()
        self.seconds += time.perf_counter() - begin
        return made


@contextmanager
def replaced(module: Any, **functions: Any) -> Generator[None]:
    before = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(module, name, function)


@contextmanager
def way(model: Any, name: str) -> Generator[Masks]:
    """The model as that path runs it."""
    ours, whole_layers = name.startswith("vicinal"), name.endswith("layers compiled")
    model.set_attn_processor(LTX2DecoderProcessor() if ours else own.LTX2VideoVaeNeighborhoodAttnProcessor())
    fixed = partial(torch.compile, dynamic=False)  # shapes are few
    masks = Masks(flex.create_block_mask if name == "flex" else fixed(flex.create_block_mask))
    layers = [layer for layer in model.modules() if isinstance(layer, own.LTX2VideoVaeNeighborhoodAttention)]
    with ExitStack() as stack:
        stack.enter_context(replaced(flex, create_block_mask=masks))
        if name == "flex compiled":
            stack.enter_context(replaced(flex, flex_attention=fixed(flex.flex_attention)))
        if whole_layers:
            # Not whole blocks: the products in them walk over tiles of tokens in Python, which would be unrolled.
            for layer in layers:
                layer.compile(dynamic=False)
                stack.callback(setattr, layer, "_compiled_call_impl", None)
        yield masks


def measure(model: Any, latent: Tensor, name: str, repeats: int, expected: Tensor | None) -> tuple[Row, Tensor | None]:
    """One path: its times, its peak of memory, and what it gave; no time if memory ran out."""
    torch._dynamo.reset()
    cuda = latent.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds: list[float] = []
    video: Any = None
    try:
        with way(model, name) as masks, torch.no_grad():
            for _ in range(repeats + 1):
                video, masks.seconds = None, 0.0
                wait()
                begin = time.perf_counter()
                video = model.decode(latent, generator=torch.Generator(latent.device).manual_seed(0)).sample
                wait()
                seconds.append(time.perf_counter() - begin)
                print(f"{name}: {seconds[-1]:.3f} s, masks {masks.seconds:.3f} s", flush=True)
    except torch.OutOfMemoryError as error:
        print(f"{name}: {str(error)[:200]}")
        return {"way": name}, None
    first, *rest = seconds
    spread = (max(rest) - min(rest)) / median(rest)
    row: Row = {"way": name, "seconds": median(rest), "spread": spread, "masks_s": masks.seconds, "first_s": first}
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if cuda else 0
    if expected is not None:
        wanted = expected.to(video.device)
        row["difference"] = float((video - wanted).float().norm() / wanted.float().norm())
        # Both round to 16 bits in every layer, each in its own order.
        if not row["difference"] < (0.05 if video.dtype == torch.bfloat16 else 1e-3):
            raise SystemExit(f"{name} decodes another video, off by {row['difference']:.3g}")
    return row, video


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="CSV that rows are added to")
    parser.add_argument("--grid", type=int, nargs=3, help="latents: frames, height, width")
    parser.add_argument("--ways", nargs="+", default=WAYS[:2], choices=WAYS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a small model on the CPU, to try this script")
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this needs an accelerator that PyTorch calls cuda; --tiny runs without")
    torch._dynamo.config.recompile_limit = 64
    found = specimen("ltx2-decoder")
    device, dtype = ("cpu", torch.float32) if options.tiny else ("cuda", torch.bfloat16)
    model = found.build(tiny=options.tiny, device=device, dtype=dtype)
    grid = tuple(options.grid or (found.tiny_grid if options.tiny else found.grid))
    latent = found.arguments(model, grid, tiny=options.tiny)["z"]
    where = {**today(torch.device(device)), "grid": times(grid)}
    expected: Tensor | None = None
    for name in options.ways:
        gc.collect()
        torch.cuda.empty_cache()
        row, video = measure(model, latent, name, options.repeats, expected)
        if expected is None and video is not None:
            expected = video.cpu()
        size = times(expected.shape[2:]) if expected is not None else ""
        del video
        append_rows(options.table, COLUMNS, [rounded({**where, "video": size, **row})])


if __name__ == "__main__":
    main()
