"""Named problems and where they come from. Tests, tuner and benchmarks share them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vicinal.errors import InvalidProblem
from vicinal.problem import Problem

FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward+backward"


@dataclass(frozen=True)
class Spec:
    """A problem with a name.

    Args:
        name: unique in its suite.
        problem: what is asked.
        source: whose problem it is.
        passes: what is timed.
        over_dense: for each pass the speed-up over dense attention that we are after, if we said so.
        goal_milliseconds: of the first of them, if we said so.
    """

    name: str
    problem: Problem
    source: str
    passes: tuple[str, ...] = (FORWARD,)
    over_dense: tuple[float, ...] = ()
    goal_milliseconds: float | None = None


def _cpu(name: str, shape: tuple[int, ...], window: int, stride: int, heads: int, *over_dense: float) -> Spec:
    problem = Problem.grid(shape, window, stride=stride, heads=heads, head_dim=64, dtype="float32")
    return Spec(name, problem, "goals of the foundation, blocked backend", (FORWARD, BOTH), over_dense)


CPU = (
    _cpu("64x64 w16 s16", (64, 64), 16, 16, 8, 10, 8),
    _cpu("64x64 w16 s1", (64, 64), 16, 1, 8, 6, 4),
    _cpu("16x24x40 w8 s8", (16, 24, 40), 8, 8, 4, 16, 12),
    _cpu("16x24x40 w8 s1", (16, 24, 40), 8, 1, 4, 7, 5),
    _cpu("16384 w256 s1", (16384,), 256, 1, 4, 25, 18),
)

SMOKE = (
    Spec("24x20 w7", Problem.grid((24, 20), 7, heads=2, head_dim=32, dtype="float32"), "harness", (FORWARD, BOTH)),
    Spec("5x9x14 w3 s2", Problem.grid((5, 9, 14), 3, stride=2, heads=2, head_dim=32, dtype="float32"), "harness"),
)


def _h100(
    name: str,
    source: str,
    goal: float | None,
    shape: tuple[int, ...],
    window: Any,
    heads: int,
    head_dim: int,
    **more: Any,
) -> Spec:
    problem = Problem.grid(shape, window, heads=heads, head_dim=head_dim, dtype="bfloat16", **more)
    return Spec(name, problem, source, goal_milliseconds=goal)


_HUNYUAN, _WAN = "HunyuanVideo, GNA paper (arXiv 2504.16922)", "Wan 2.1 14B, 720p"
_FLUX, _COSMOS = "FLUX.1 4K, GNA paper", "Cosmos-7B, GNA paper"
_PREDICT, _LTX = "Cosmos-Predict2-2B", "LTX-2.5 decoder"
_IN_TIME = (True, False, False)
_LONG, _DINAT = "long 1-D sequences", "DiNAT (arXiv 2209.15001), 64 images"

H100_FORWARD = (
    _h100("dense 30x48x80", _HUNYUAN, 258, (30, 48, 80), -1, 24, 128),
    _h100("HunyuanVideo s16x8x8", _HUNYUAN, 22.8, (30, 48, 80), (18, 24, 24), 24, 128, stride=(16, 8, 8)),
    _h100("HunyuanVideo s1", _HUNYUAN, 35, (30, 48, 80), (18, 24, 24), 24, 128),
    _h100("HunyuanVideo 33x45x80 s1", _HUNYUAN, 39, (33, 45, 80), (18, 24, 24), 24, 128),
    _h100("Wan s1", _WAN, 29, (21, 45, 80), (12, 24, 24), 40, 128),
    _h100("FLUX 4K s16", _FLUX, 7.9, (256, 256), 80, 24, 128, stride=16),
    _h100("FLUX 4K s1", _FLUX, 10, (256, 256), 80, 24, 128),
    _h100("Cosmos-7B s1", _COSMOS, 11.5, (16, 44, 80), (16, 24, 16), 32, 128),
    _h100("Cosmos-7B s1x8x16", _COSMOS, 9.0, (16, 44, 80), (16, 24, 16), 32, 128, stride=(1, 8, 16)),
    _h100("Predict2 w24x12x24 s1x4x8", _PREDICT, 7.6, (24, 44, 80), (24, 12, 24), 16, 128, stride=(1, 4, 8)),
    _h100("Predict2 w24x20x40 s1x4x8", _PREDICT, 20.5, (24, 44, 80), (24, 20, 40), 16, 128, stride=(1, 4, 8)),
    _h100("Predict2 w24x4x16 d1x11x5", _PREDICT, 1.9, (24, 44, 80), (24, 4, 16), 16, 128, dilation=(1, 11, 5)),
    _h100(
        "Predict2 w24x12x16 s1x4x1 d1x1x5", _PREDICT, 5.2,
        (24, 44, 80), (24, 12, 16), 16, 128, stride=(1, 4, 1), dilation=(1, 1, 5),
    ),
    _h100("LTX stage 1", _LTX, 0.40, (18, 34, 60), (3, 7, 7), 32, 64),
    _h100("LTX stage 3", _LTX, 0.55, (35, 68, 120), (3, 5, 5), 8, 64),
    _h100("LTX stage 4", _LTX, 4.8, (69, 136, 240), (3, 5, 5), 8, 64),
    _h100("LTX stage 5", _LTX, 125, (121, 272, 480), 11, 4, 64),
    _h100("65536 w2048", _LONG, 0.95, (65536,), 2048, 8, 128),
    _h100("65536 w2048 causal", _LONG, 0.95, (65536,), 2048, 8, 128, is_causal=True),
    _h100("65536 w2048 s2048", _LONG, 0.9, (65536,), 2048, 8, 128, stride=2048),
    _h100("HunyuanVideo causal in time", _HUNYUAN, 30, (30, 48, 80), (18, 24, 24), 24, 128, is_causal=_IN_TIME),
    _h100("DiNAT 56x56", _DINAT, 0.20, (56, 56), 7, 2, 64, batch=64),
    _h100("DiNAT 56x56 d8", _DINAT, 0.25, (56, 56), 7, 2, 64, batch=64, dilation=8),
    _h100("DiNAT 28x28 d4", _DINAT, 0.20, (28, 28), 7, 4, 64, batch=64, dilation=4),
    _h100("DiNAT 56x56, heads of 32", _DINAT, None, (56, 56), 7, 4, 32, batch=64),
    _h100("DiNAT 56x56 d8, heads of 32", _DINAT, None, (56, 56), 7, 4, 32, batch=64, dilation=8),
    _h100("DiNAT 28x28 d4, heads of 32", _DINAT, None, (28, 28), 7, 8, 32, batch=64, dilation=4),
)  # fmt: skip


def _portable(
    name: str,
    shape: tuple[int, ...],
    window: Any,
    heads: int,
    head_dim: int,
    goal: float | None = None,
    passes: tuple[str, ...] = (FORWARD, BACKWARD),
    **more: Any,
) -> Spec:
    problem = Problem.grid(shape, window, heads=heads, head_dim=head_dim, **{"dtype": "bfloat16", **more})
    return Spec(name, problem, "goals of the portable backend", passes, goal_milliseconds=goal)


_IMAGES = (64, 64), 13, 8

H100_PORTABLE = (
    _portable("HunyuanVideo s16x8x8", (30, 48, 80), (18, 24, 24), 24, 128, stride=(16, 8, 8)),
    _portable("HunyuanVideo s1", (30, 48, 80), (18, 24, 24), 24, 128),
    _portable("FLUX 4K s16", (256, 256), 80, 24, 128, stride=16),
    _portable("FLUX 4K s1", (256, 256), 80, 24, 128),
    _portable("Cosmos-7B s1", (16, 44, 80), (16, 24, 16), 32, 128),
    _portable("65536 w2048", (65536,), 2048, 8, 128),
    # Half of NATTEN's times.
    _portable("LTX stage 1", (18, 34, 60), (3, 7, 7), 32, 64, 1.54),
    _portable("LTX stage 3", (35, 68, 120), (3, 5, 5), 8, 64, 2.94),
    _portable("LTX stage 4", (69, 136, 240), (3, 5, 5), 8, 64, 23.9),
    _portable("LTX stage 5", (121, 272, 480), 11, 4, 64, 327, (FORWARD,)),
    _portable("DiNAT 56x56", (56, 56), 7, 2, 64, 0.37, batch=64),
    _portable("DiNAT 56x56 d8", (56, 56), 7, 2, 64, 0.645, batch=64, dilation=8),
    _portable("DiNAT 28x28 d4", (28, 28), 7, 4, 64, 0.415, batch=64, dilation=4),
    _portable("DiNAT 28x28 d4, heads of 32", (28, 28), 7, 8, 32, batch=64, dilation=4),
    _portable("float32", *_IMAGES, 64, batch=4, dtype="float32"),
    _portable("float16", *_IMAGES, 64, batch=4, dtype="float16"),
    *(_portable(f"heads of {n}", *_IMAGES, n, batch=4) for n in (40, 80, 96, 128, 256)),
    _portable("values of 32", *_IMAGES, 64, batch=4, head_dim_v=32),
    _portable("4 heads to a key head", *_IMAGES, 64, batch=4, heads_kv=2),
    _portable("causal on axis 0", *_IMAGES, 64, batch=4, is_causal=(True, False)),
    _portable("256 additional keys", *_IMAGES, 64, batch=4, additional=256),
    _portable("position bias", *_IMAGES, 64, batch=4, position_bias=True),
)

_TINY = "layers of DiNAT-Tiny (arXiv 2209.15001), 128 images of 224 pixels"


def _layer(side: int, heads: int, dilation: int) -> Spec:
    problem = Problem.grid(
        (side, side), 7, dilation=dilation, heads=heads, head_dim=32, batch=128, dtype="bfloat16", position_bias=True
    )
    return Spec(f"{side}x{side} d{dilation}", problem, _TINY, (FORWARD, BACKWARD))


H100_DINAT = tuple(
    _layer(side, heads, dilation)
    for side, heads, dilations in ((56, 2, (1, 8)), (28, 4, (1, 4)), (14, 8, (1, 2)), (7, 16, (1,)))
    for dilation in dilations
)


def _backward(name: str, source: str, goal: float | None, *args: Any, **more: Any) -> Spec:
    return replace(_h100(name, source, goal, *args, **more), passes=(BACKWARD,))


H100_BACKWARD = (
    _backward("HunyuanVideo s16x8x8", _HUNYUAN, 70, (30, 48, 80), (18, 24, 24), 24, 128, stride=(16, 8, 8)),
    _backward("HunyuanVideo s1", _HUNYUAN, 115, (30, 48, 80), (18, 24, 24), 24, 128),
    _backward("Wan s1", _WAN, 88, (21, 45, 80), (12, 24, 24), 40, 128),
    _backward("FLUX 4K s16", _FLUX, 24, (256, 256), 80, 24, 128, stride=16),
    _backward("FLUX 4K s1", _FLUX, 31, (256, 256), 80, 24, 128),
    _backward("60x136x240 w11", _LTX + ", stage 5, an eighth", 65, (60, 136, 240), 11, 4, 64),
    _backward("35x68x240 w3x5x5", _LTX + ", stage 4, half", 7, (35, 68, 240), (3, 5, 5), 8, 64),
    _backward("32x64x96 w11", _LTX, 6, (32, 64, 96), 11, 4, 64),
    _backward("32x64x96 w3x7x7", _LTX, 1.6, (32, 64, 96), (3, 7, 7), 4, 64),
    _backward("65536 w2048", _LONG, 2.5, (65536,), 2048, 8, 128),
    _backward("DiNAT 56x56", _DINAT, 0.6, (56, 56), 7, 2, 64, batch=64),
    _backward("dense 16384, heads of 128", "dense attention", 9.3, (16384,), -1, 16, 128),
    _backward("dense 16384, heads of 64", "dense attention", 5.5, (16384,), -1, 16, 64),
)

SUITES: dict[str, tuple[Spec, ...]] = {
    "smoke": SMOKE,
    "cpu": CPU,
    "h100-forward": H100_FORWARD,
    "h100-backward": H100_BACKWARD,
    "h100-portable": H100_PORTABLE,
    "h100-dinat": H100_DINAT,
}


def suite(name: str) -> tuple[Spec, ...]:
    """The problems of that suite.

    Example:
        >>> [spec.problem.pairs for spec in suite("smoke")]
        [23520, 17010]
    """
    if name not in SUITES:
        raise InvalidProblem(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    return SUITES[name]
