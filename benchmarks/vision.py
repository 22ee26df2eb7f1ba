"""Images a second of DiNAT, Swin and ConvNeXt on one GPU: `vision.py TABLE.csv CASE ...`.

A case is a size, pixels, what is timed and who takes part: `tiny-224-training:dinat,dinat-unbiased,swin,convnext`. Each
contender is a process of its own: all build and compile at once, and then measure one after another, alone on the
machine. Weights are random: times do not depend on them. Before any time is taken, all ways to compute DiNAT
that take part must agree.
"""

from __future__ import annotations

import argparse
import re
import statistics
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from vicinal.bench import flex
from vicinal.bench.results import append_rows, today
from vicinal.models import create_model
from vicinal.models.layers import PaddedNeighborhoodAttention2D
from vicinal.problem import Problem

BATCH = {("tiny", 224): 256, ("tiny", 512): 64, ("large", 224): 128, ("large", 512): 32}
COLUMNS = (
    "date", "device", "driver", "versions",
    "case", "contender", "parameters", "batch", "mode", "images_per_s", "spread", "ms", "gib",
)  # fmt: skip
MODES = ("eager", "graph", "compiled", "compiled-graph")


class FlexWindows(PaddedNeighborhoodAttention2D):
    """The same layer by compiled FlexAttention over tokens sorted into tiles, which is timed too."""

    masks: dict[Any, tuple[Any, ...]] = {}  # noqa: RUF012
    compiled: Any = None

    def attend(self, x: Tensor) -> Tensor:
        batch, *shape, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        window, table = self.windows(tuple(shape)), self.table(tuple(shape))
        key = (tuple(shape), str(window), self.num_heads)
        if key not in self.masks:
            problem = Problem.of(q[:1], k[:1], v[:1], **window)
            order = flex.sorted_tokens(problem, flex.tiles(problem), x.device)
            self.masks[key] = (order, flex.tiled_block_mask(order), problem)
        order, mask, problem = self.masks[key]
        (dy, dx), (ky, kx), width = (a.dilation for a in problem.axes), (a.kernel_size for a in problem.axes), shape[1]
        tokens = order.tokens

        def bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            a, c = tokens[query], tokens[key]
            row = ((c // width - a // width) // dy + ky - 1).clamp(0, 2 * ky - 2)
            column = ((c % width - a % width) // dx + kx - 1).clamp(0, 2 * kx - 2)
            return score + table[h, row, column]

        entered = [t.flatten(1, 2)[:, tokens].transpose(1, 2) for t in (q, k, v)]
        out = self.kernel()(*entered, score_mod=bias, block_mask=mask, kernel_options=flex.SMALL)
        out = out.transpose(1, 2)[:, order.places].reshape(batch, *shape, -1)
        return self.proj(out)

    def kernel(self) -> Any:
        if FlexWindows.compiled is None:
            from torch.nn.attention.flex_attention import flex_attention

            torch._dynamo.config.cache_size_limit = 64
            FlexWindows.compiled = torch.compile(flex_attention, dynamic=False)
        return FlexWindows.compiled

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        least = [size * step for size, step in zip(self.kernel_size, self.dilation, strict=True)]
        below, right = (max(n - length, 0) for n, length in zip(least, (height, width), strict=True))
        return self.attend(nn.functional.pad(x, (0, 0, 0, right, 0, below)))[:, :height, :width]


def ours(size: str, px: int) -> nn.Module:
    """DiNAT as published, with its position bias."""
    return create_model(f"dinat_{size}", drop_path_rate=0.0)


def unbiased(size: str, px: int) -> nn.Module:
    """DiNAT without position bias, as NATTEN trains it since 0.20."""
    model = ours(size, px)
    for layer in model.modules():
        if isinstance(layer, PaddedNeighborhoodAttention2D):
            layer.rpb = None
    return model


def by_flex(size: str, px: int) -> nn.Module:
    model = ours(size, px)
    for layer in model.modules():
        if isinstance(layer, PaddedNeighborhoodAttention2D):
            layer.__class__ = FlexWindows
    return model


def swin(size: str, px: int) -> nn.Module:
    import timm

    return timm.create_model(f"swin_{size}_patch4_window7_224", img_size=px, drop_path_rate=0.0)


def convnext(size: str, px: int) -> nn.Module:
    import timm

    return timm.create_model(f"convnext_{size}", drop_path_rate=0.0).to(memory_format=torch.channels_last)


CONTENDERS: dict[str, Callable[[str, int], nn.Module]] = {
    "dinat": ours,
    "dinat-unbiased": unbiased,
    "dinat-flex": by_flex,
    "swin": swin,
    "convnext": convnext,
}


def batch_of(size: str, px: int, what: str) -> int:
    return BATCH[size, px] // (1 if what == "inference" else 2)


WAYS = {"dinat": ("triton",), "dinat-unbiased": ("hopper", "triton"), "dinat-flex": ("flex",)}
"""How a contender's layers can compute."""


def check(name: str, size: str, px: int, what: str) -> None:
    """All ways to compute a contender give its logits and gradients in bfloat16 as well as plain PyTorch does.

    Held against float32: the norm of the error may be twice that of plain PyTorch in bfloat16. FlexAttention is asked
    in the batch that is timed, since it is compiled for it.
    """
    torch.manual_seed(0)
    model = CONTENDERS["dinat-unbiased" if name == "dinat-unbiased" else "dinat"](size, px).cuda().eval()
    images = torch.randn(2, 3, px, px, device="cuda")
    layers = [layer for layer in model.modules() if isinstance(layer, PaddedNeighborhoodAttention2D)]
    keys = ("rpb", "qkv.weight") if what == "training" else ()
    watched = [parameter for path, parameter in model.named_parameters() if any(key in path for key in keys)]

    def solved(way: str, autocast: bool = True) -> list[Tensor]:
        for layer in layers:
            layer.backend = None if way == "flex" else way
            layer.__class__ = FlexWindows if way == "flex" else PaddedNeighborhoodAttention2D
        times = batch_of(size, px, what) // len(images) if way == "flex" else 1
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast), torch.set_grad_enabled(what == "training"):
            logits = model(images.repeat(times, 1, 1, 1))[: len(images)].float()
        return [logits, *(torch.autograd.grad(logits.square().sum(), watched) if watched else ())]

    truth = solved("reference", False)
    plain = [float((a - b).detach().norm()) for a, b in zip(solved("reference"), truth, strict=True)]
    for way in WAYS[name]:
        errors = [float((a - b).detach().norm()) for a, b in zip(solved(way), truth, strict=True)]
        worst = max(error / max(allowed, 1e-30) for error, allowed in zip(errors, plain, strict=True))
        apart = errors[0] / float(truth[0].detach().norm())
        print(f"{name} by {way}: logits off by {apart:.1e}, at most {worst:.2f} times PyTorch's error", flush=True)
        assert worst < 2, (errors, plain)


def graphed(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same as a CUDA graph: no time of the host is left in it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median milliseconds, and half the range of the middle half over it."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2 / middle


def inference(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    model.eval().to(torch.bfloat16)
    images = images.to(torch.bfloat16)

    @torch.no_grad()
    def run() -> None:
        model(images)

    return run


def training(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """Mixed precision, all of a step: forward, backward, AdamW."""
    model.train()
    labels = torch.arange(len(images), device="cuda") % 1000
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)

    def run() -> None:
        # Without a cache of weights: a graph could not keep it, and to forget it would compile models anew.
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()  # a graph keeps the gradients that it has made where they are
        loss.backward()
        optimizer.step()

    return run


def prepared(name: str, size: str, px: int, what: str, modes: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is known of a contender, and a function to time for each mode, run twice already."""
    model = CONTENDERS[name](size, px).cuda()
    batch = batch_of(size, px, what)
    images = torch.randn(batch, 3, px, px, device="cuda")
    if name == "convnext":
        images = images.to(memory_format=torch.channels_last)
    count = sum(parameter.numel() for parameter in model.parameters())
    facts = {"case": f"{size} {px} {what}", "contender": name, "parameters": count, "batch": batch}
    runs: dict[str, Any] = {}
    for kind in ("eager", "compiled"):
        if not any(mode.startswith(kind) or (kind, mode) == ("eager", "graph") for mode in modes):
            continue
        called = model if kind == "eager" else torch.compile(model)
        run = (inference if what == "inference" else training)(called, images)
        for _ in range(2):
            run()
        torch.cuda.synchronize()
        runs |= {kind: run, "graph" if kind == "eager" else "compiled-graph": run}
    torch.cuda.empty_cache()
    return facts, {mode: runs[mode] for mode in MODES if mode in modes}


def measured(facts: dict[str, Any], mode: str, run: Callable[[], Any]) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    ms, spread = timed(graphed(run) if mode.endswith("graph") else run, 12)
    found = {"images_per_s": f"{facts['batch'] / ms * 1e3:.5g}", "spread": f"{spread:.3f}", "ms": f"{ms:.4g}"}
    gib = f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"
    return today(torch.device("cuda")) | facts | found | {"mode": mode, "gib": gib}


def contend(
    rank: int, case: str, names: list[str], modes: list[str], table: str, where: str, barrier: Any, alone: Any
) -> None:
    """One contender: prepares beside the others, then measures when its turn comes."""
    name, (size, px, what) = names[rank], case.split("-")
    facts, runs, label = {}, {}, f"{name} {case}"
    try:
        if name in WAYS:
            with alone:  # plain PyTorch holds all pairs of a large picture's tokens
                check(name, size, int(px), what)
                torch.cuda.empty_cache()
        facts, runs = prepared(name, size, int(px), what, modes)
    except Exception as error:
        print(label, "failed:", repr(error)[:300])
        traceback.print_exc(limit=3)
    for turn in range(len(names)):
        barrier.wait()
        for mode, run in runs.items() if turn == rank else ():
            try:
                row = measured(facts, mode, run)
            except Exception as error:
                print(label, mode, "failed:", repr(error)[:300], flush=True)
                continue
            append_rows(table, COLUMNS, [row])
            print(f"{label} {mode}: {row['images_per_s']} images/s, {row['ms']} ms, {row['gib']} GiB", flush=True)
        for mode in ("eager", "compiled") if turn == rank and where else ():
            if mode in runs:
                Path(where, f"kernels-{case}-{name}-{mode}.txt").write_text(profile(runs[mode]))
        torch.cuda.empty_cache()
    barrier.wait()


def profile(run: Callable[[], Any]) -> str:
    """Where the device's time goes, kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return seen.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", help="a CSV to append to")
    parser.add_argument("cases", nargs="+", help="such as large-512-inference:dinat,swin")
    parser.add_argument("--modes", default="eager,graph", help=f"of {', '.join(MODES)}")
    parser.add_argument("--kernels", default="", help="a folder for what each kernel took")
    asked = parser.parse_args()
    sizes = "|".join(f"{size}-{px}" for size, px in BATCH)
    for each in asked.cases:
        if not re.fullmatch(rf"({sizes})-(inference|training):[\w-]+(,[\w-]+)*", each):
            parser.error(f"cases are such as large-512-inference:dinat,swin, of sizes {sizes}, got {each!r}")
    if strange := set(asked.modes.split(",")) - set(MODES):
        parser.error(f"modes must be of {', '.join(MODES)}, got {', '.join(sorted(strange))}")
    if not torch.cuda.is_available():
        parser.error("this needs an accelerator that PyTorch calls cuda")
    for each in asked.cases:
        case, names = each.split(":")
        contenders = names.split(",")
        context = torch.multiprocessing.get_context("spawn")
        given = (case, contenders, asked.modes.split(","), asked.table, asked.kernels)
        given = (*given, context.Barrier(len(contenders)), context.Lock())
        spawn(contend, given, nprocs=len(contenders))


if __name__ == "__main__":
    main()
