"""Images a second of DiNAT, Swin and ConvNeXt on one GPU: `vision.py TABLE.csv [SECONDS [WORD ...]]`.

Every contender of a size and resolution is measured in one run: the pyramid with our windows, the same with compiled
FlexAttention, timm's Swin and ConvNeXt. Only cases with all WORDs in their name run. Weights are random: times do not
depend on them.
"""

from __future__ import annotations

import csv
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicinal.bench import flex
from vicinal.models import create_model
from vicinal.models.layers import PaddedNeighborhoodAttention2D
from vicinal.problem import Problem

BATCH = {("tiny", 224): 256, ("tiny", 512): 64, ("large", 224): 128, ("large", 512): 32}
COLUMNS = ("case", "contender", "parameters", "batch", "mode", "images_per_s", "spread", "ms", "gib")


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


def check(px: int = 224) -> None:
    """All ways to compute DiNAT give the same logits and gradients, to what bfloat16 loses."""
    torch.manual_seed(0)
    model = ours("tiny", px).cuda().eval()
    images = torch.randn(2, 3, px, px, device="cuda")
    results: dict[str, list[Tensor]] = {}
    for name, kind in (("blocked", "blocked"), ("triton", None), ("flex", "flex")):
        for layer in model.modules():
            if isinstance(layer, PaddedNeighborhoodAttention2D):
                layer.backend = kind if kind == "blocked" else None
                layer.__class__ = FlexWindows if kind == "flex" else PaddedNeighborhoodAttention2D
        with torch.autocast("cuda", torch.bfloat16, enabled=kind != "blocked"):
            logits = model(images)
        table = model.levels[0].blocks[1].attn.rpb
        results[name] = [
            logits,
            *torch.autograd.grad(logits.float().square().sum(), [table, model.patch_embed.proj[0].weight]),
        ]
    for name, found in results.items():
        errors = [
            float((a.float() - b.float()).norm() / b.float().norm())
            for a, b in zip(found, results["blocked"], strict=True)
        ]
        print(f"{name}: logits, gradients of a table of bias and of the stem differ by", [f"{e:.1e}" for e in errors])
        assert max(errors) < 0.1, errors


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
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=not torch.cuda.is_current_stream_capturing()):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=False)  # where gradients lie does not change: a graph needs that
        loss.backward()
        optimizer.step()

    return run


def measure(name: str, size: str, px: int, what: str) -> list[dict[str, Any]]:
    model = CONTENDERS[name](size, px).cuda()
    batch = BATCH[size, px] // (1 if what == "inference" else 2)
    images = torch.randn(batch, 3, px, px, device="cuda")
    if name == "convnext":
        images = images.to(memory_format=torch.channels_last)
    count = sum(parameter.numel() for parameter in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    run = (inference if what == "inference" else training)(model, images)
    rows: list[dict[str, Any]] = []
    for mode in ("eager", "graph"):
        ms, spread = timed(graphed(run) if mode == "graph" else run, 12)
        facts = (
            f"{size} {px} {what}",
            name,
            count,
            batch,
            mode,
            f"{batch / ms * 1e3:.5g}",
            f"{spread:.3f}",
            f"{ms:.4g}",
        )
        rows.append(dict(zip(COLUMNS, (*facts, f"{torch.cuda.max_memory_allocated() / 2**30:.1f}"), strict=True)))
    return rows


def profile(name: str, size: str, px: int, what: str) -> str:
    """Where the device's time goes, kernel by kernel."""
    model = CONTENDERS[name](size, px).cuda()
    batch = BATCH[size, px] // (1 if what == "inference" else 2)
    run = (inference if what == "inference" else training)(model, torch.randn(batch, 3, px, px, device="cuda"))
    for _ in range(2):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return seen.key_averages().table(sort_by="self_device_time_total", row_limit=18, max_name_column_width=60)


def main(table: str, seconds: float = 1e9, *words: str) -> None:
    begin = time.perf_counter()
    cases = [
        (s, p, w, n)
        for p in (224, 512)
        for s in ("tiny", "large")
        for w in ("inference", "training")
        for n in CONTENDERS
    ]
    with Path(table).open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for size, px, what, name in cases:
            label = f"{name} {size} {px} {what}"
            if not all(word in label if not word.startswith("-") else word[1:] not in label for word in words):
                continue
            if time.perf_counter() - begin > seconds:
                print("no time for", label)
                continue
            try:
                rows = measure(name, size, px, what)
            except Exception as error:
                print(label, "failed:", repr(error)[:300])
                traceback.print_exc(limit=3)
                rows = []
            writer.writerows(rows)
            file.flush()
            for row in rows:
                print(
                    f"{label} {row['mode']}: {row['images_per_s']} images/s, {row['ms']} ms, {row['gib']} GiB",
                    flush=True,
                )
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:3]), *sys.argv[3:])
