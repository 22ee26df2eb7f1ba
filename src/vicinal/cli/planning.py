"""`explain`, `plan`, `simulate`, `suggest`: questions that are answered on paper."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vicinal._tuples import times
from vicinal.cli._console import Json, say, say_json, table
from vicinal.cli._options import (
    Backend,
    Device,
    Grid,
    KVOrigin,
    KVTile,
    QTile,
    grid_of,
    here,
    takes_problem,
    tiling_of,
)
from vicinal.errors import Unsupported

if TYPE_CHECKING:
    from vicinal.plan import Plan
    from vicinal.problem import Problem
    from vicinal.simulate import Estimate


@takes_problem
def explain(problem: "Problem", hardware: Device = None, backend: Backend = None, as_json: Json = False) -> None:
    """Say which backend would run a problem, and why the others would not. Runs nothing."""
    from vicinal.backends import explain
    from vicinal.hardware import Hardware

    device = Hardware.named(hardware) if hardware else here()
    found = explain(problem, device, backend)
    if as_json:
        backends = [{"name": name, "runs": not why, "reasons": why} for name, why in found.reasons]
        say_json({"problem": facts(problem), "hardware": device.name, "chosen": found.chosen, "backends": backends})
    else:
        say(f"{problem}, {problem.dtype}, on {device.name}")
        say(found)
    if found.chosen is None:
        who = f"backend {backend!r} declines" if backend else "no backend runs this problem"
        raise Unsupported(f"{who} on {device.name}")


@takes_problem
def plan(
    problem: "Problem",
    q_tile: QTile = None,
    kv_tile: KVTile = None,
    kv_origin: KVOrigin = "free",
    as_json: Json = False,
) -> None:
    """Cut a problem into tiles, and show which of them are full, masked and empty."""
    from vicinal.plan import make_plan

    made = make_plan(problem, tiling_of(problem, q_tile, kv_tile, kv_origin, None))
    if as_json:
        say_json(plan_facts(made))
    else:
        say(made)


@takes_problem
def simulate(
    problem: "Problem",
    hardware: Device = "h100-sxm",
    q_tile: QTile = None,
    kv_tile: KVTile = None,
    kv_origin: KVOrigin = "free",
    attention_share: Annotated[
        float | None, typer.Option(help="Part of a model's time that dense attention takes, for its speed-up.")
    ] = None,
    dense_steps: Annotated[int, typer.Option(help="Of --steps, how many keep dense attention.")] = 0,
    steps: Annotated[int, typer.Option(help="Steps or layers of the model.")] = 1,
    as_json: Json = False,
) -> None:
    """Predict tiles, arithmetic, traffic, time and speed-up on a device that need not be here."""
    from vicinal.hardware import Hardware
    from vicinal.plan import make_plan
    from vicinal.simulate import simulate

    device = Hardware.named(hardware or "h100-sxm")
    made = make_plan(problem, tiling_of(problem, q_tile, kv_tile, kv_origin, device))
    estimate = simulate(made, device, attention_share=attention_share, dense_steps=dense_steps, steps=steps)
    if as_json:
        say_json(estimate_facts(estimate))
    else:
        say(estimate)


def suggest(
    grid: Grid,
    sparsity: Annotated[float | None, typer.Option(help="Share of (query, key) pairs to leave out: 0.9.")] = None,
    speedup: Annotated[float | None, typer.Option(help="Speed-up over dense attention: 8.")] = None,
    hardware: Device = "h100-sxm",
    count: Annotated[int, typer.Option("--count", "-n", help="Rows to show.")] = 10,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    heads: Annotated[int, typer.Option(help="Heads.")] = 1,
    head_dim: Annotated[int, typer.Option(help="Elements per head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float16, bfloat16, float32 or float64.")] = "bfloat16",
    as_json: Json = False,
) -> None:
    """Rank windows, strides and tilings near a wanted sparsity or speed-up."""
    from vicinal.hardware import Hardware
    from vicinal.simulate import readable_time
    from vicinal.suggest import suggest

    found = suggest(
        grid_of(grid),
        Hardware.named(hardware or "h100-sxm"),
        sparsity=sparsity,
        speedup=speedup,
        count=count,
        batch=batch,
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
    )
    if as_json:
        say_json([estimate_facts(estimate) for estimate in found])
        return
    rows = [
        (
            *(times(shape) for shape in (estimate.problem.kernel_size, estimate.problem.stride)),
            *(times(shape) for shape in (estimate.plan.tiling.q_tile, estimate.plan.tiling.kv_tile)),
            f"{estimate.sparsity:.1%}",
            # Dense attention may pad its tiles even more; that part of a speed-up is nothing to show.
            f"{min(estimate.speedup.worst_tile, estimate.speedup.flop_wise):.2f}x",
            f"{estimate.speedup.flop_wise:.2f}x",
            readable_time(estimate.time_s),
            "yes" if estimate.is_perfect else "",
        )
        for estimate in found
    ]
    columns = ("window", "stride", "query tile", "KV tile", "sparsity", "speed-up", "bound", "roofline", "block-sparse")
    table(found.wish, columns, rows, numbers=(4, 5, 6, 7))


def facts(problem: "Problem") -> dict[str, Any]:
    """A problem as JSON knows it."""
    return {
        "grid": problem.shape,
        "kernel_size": problem.kernel_size,
        "stride": problem.stride,
        "dilation": problem.dilation,
        "is_causal": problem.is_causal,
        "batch": problem.batch,
        "heads": problem.heads,
        "heads_kv": problem.heads_kv,
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "dtype": problem.dtype,
        "scale": problem.scale,
        "additional": problem.additional,
        "position_bias": problem.position_bias,
    }


def plan_facts(plan: "Plan") -> dict[str, Any]:
    """A plan as JSON knows it."""
    return {
        "problem": facts(plan.problem),
        "tiling": asdict(plan.tiling),
        "q_tiles": plan.q_tiles,
        "kv_tiles": plan.kv_tiles,
        "visited": plan.visited,
        "full": plan.full,
        "masked": plan.masked,
        "most_visited": plan.most_visited,
        "is_block_sparse": plan.is_block_sparse,
    }


def estimate_facts(estimate: "Estimate") -> dict[str, Any]:
    """An estimate as JSON knows it."""
    names = (
        "mean_visited additional_tiles query_padding key_padding useful_flops performed_flops least_bytes most_bytes "
        "blocks waves time_s is_memory_bound dense_time_s sparsity waste is_perfect"
    )
    return {
        **plan_facts(estimate.plan),
        "hardware": estimate.hardware.name,
        **{name: getattr(estimate, name) for name in names.split()},
        "speedup": asdict(estimate.speedup),
        "end_to_end": None if estimate.end_to_end is None else asdict(estimate.end_to_end),
    }
