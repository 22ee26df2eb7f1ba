"""What a plan will cost before it runs: tiles, arithmetic, traffic, time, and speed-up over dense attention."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from vicinal._tuples import ceil_div
from vicinal.errors import InvalidProblem
from vicinal.hardware import Hardware
from vicinal.plan import AxisPlan, Plan
from vicinal.problem import Problem


@dataclass(frozen=True, slots=True)
class Speedup:
    """How much faster than dense attention, counted in four ways.

    Args:
        worst_tile: tile pairs that dense attention visits, over those visited if every query tile
            had as many KV tiles as the worst. This is the number that the paper reports:
            `prod ceil(L / T_KV) / prod max n`.
        mean_tile: the same with the tile pairs really visited. Never below `worst_tile`.
        roofline: dense time over time, both from the roofline.
        flop_wise: FLOPs of dense attention over useful FLOPs: the bound of a kernel that computes
            nothing outside the windows.
    """

    worst_tile: float
    mean_tile: float
    roofline: float
    flop_wise: float


@dataclass(frozen=True)
class Estimate:
    """What one forward pass of a plan costs on a device. Prints itself as a table.

    Tiles are counted per batch row and head; FLOPs, bytes, blocks and time are of the whole problem.

    Args:
        plan, hardware: what was asked.
        visited, full, masked: pairs of tiles inside the grid. Additional keys are not among them.
        most_visited: KV tiles of the query tile that has most of them.
        mean_visited: KV tiles of a query tile, on average.
        additional_tiles: tiles of additional keys, which every query tile visits on top of that.
        query_padding: slots in query tiles that hold no query.
        key_padding: slots in visited KV tiles that hold no key, counted once for each query tile that visits them.
        useful_flops: `2 * pairs * (D + Dv) * heads * batch`; pairs inside windows and with additional keys.
        performed_flops: the same of all pairs of slots in visited tiles.
        least_bytes: traffic with memory if every tensor crosses once; log-sum-exp (float32) included.
        most_bytes: traffic with memory if no cache ever helps and each block reads the tiles that it visits.
        blocks: query tiles of all heads and batch rows, each the work of one unit of the device.
        waves: rounds that the units need for them, one block per unit and round.
        time_s: roofline, a lower bound for any kernel that follows this plan.
        is_memory_bound: whether traffic rather than arithmetic sets that time.
        dense_time_s: the roofline of dense attention with tiles of the same shape.
        speedup: over dense attention.
        end_to_end: the same for the model around it; `None` unless attention's share was given.

    Example:
        >>> from vicinal.plan import make_plan
        >>> from vicinal.tiling import Tiling
        >>> plan = make_plan(Problem.grid((64, 96), 16, stride=8), Tiling((8, 8), (8, 8)))
        >>> found = simulate(plan, Hardware.named("h100-sxm"))
        >>> found.visited, found.masked, found.waste, found.speedup.worst_tile
        (384, 0, 1.0, 24.0)
    """

    plan: Plan
    hardware: Hardware
    visited: int
    full: int
    masked: int
    most_visited: int
    mean_visited: float
    additional_tiles: int
    query_padding: int
    key_padding: int
    useful_flops: int
    performed_flops: int
    least_bytes: int
    most_bytes: int
    blocks: int
    waves: int
    time_s: float
    is_memory_bound: bool
    dense_time_s: float
    speedup: Speedup
    end_to_end: Speedup | None = None

    @property
    def problem(self) -> Problem:
        return self.plan.problem

    @property
    def waste(self) -> float:
        """FLOPs performed for each useful one: 1 exactly if the plan is block-sparse."""
        return _ratio(self.performed_flops, self.useful_flops)

    @property
    def is_perfect(self) -> bool:
        """Whether the plan is perfectly block-sparse in the paper's sense.

        No visited tile needs a mask, and even the worst query tile reaches the FLOP-wise bound. Unlike
        `Plan.is_block_sparse` it lets query tiles stick out of the grid, as those of dense attention do.
        """
        return self.masked == 0 and self.speedup.worst_tile >= self.speedup.flop_wise * (1 - 1e-12)

    @property
    def sparsity(self) -> float:
        """Share of the (query, key) pairs of the grid that lie outside windows: 0 for dense attention."""
        return 1 - self.problem.pairs / self.problem.tokens**2

    def __str__(self) -> str:
        plan, bound = self.plan, "memory" if self.is_memory_bound else "arithmetic"
        tiles = plan.q_tiles * plan.kv_tiles
        key_slots = self.visited * prod(plan.tiling.kv_tile)
        query_slots = plan.q_tiles * prod(plan.tiling.q_tile)
        extra = f", and {self.additional_tiles:,} of additional keys" if self.additional_tiles else ""
        rows = [
            ("tile pairs", f"{self.visited:,} of {tiles:,} visited: {self.full:,} full, {self.masked:,} masked"),
            ("per query tile", f"at most {self.most_visited:,} KV tiles, {self.mean_visited:,.2f} on average{extra}"),
            (
                "padding",
                f"{_percent(self.query_padding, query_slots)} of query slots, "
                f"{_percent(self.key_padding, key_slots)} of key slots",
            ),
            (
                "arithmetic",
                f"{_si(self.useful_flops, 'FLOP')} useful, {_si(self.performed_flops, 'FLOP')} performed "
                f"({self.waste:.2f}x)",
            ),
            ("memory traffic", f"{_si(self.least_bytes, 'B')} at least, {_si(self.most_bytes, 'B')} without caches"),
            ("blocks", f"{self.blocks:,} in {self.waves:,} waves on {self.hardware.units} units"),
            ("roofline", f"{readable_time(self.time_s)}, bound by {bound}; dense {readable_time(self.dense_time_s)}"),
        ]
        lines = [f"{plan.problem}; {plan.tiling}; {self.hardware.name}"]
        lines += [f"  {name:<15} {text}" for name, text in rows]
        lines.append(f"  {'':<15} {'worst tile':>10} {'mean tile':>10} {'roofline':>10} {'FLOP-wise':>10}")
        for name, speedup in (("speed-up", self.speedup), ("end to end", self.end_to_end)):
            if speedup is not None:
                numbers = (speedup.worst_tile, speedup.mean_tile, speedup.roofline, speedup.flop_wise)
                lines.append(f"  {name:<15} " + " ".join(f"{number:>9.2f}x" for number in numbers))
        return "\n".join(lines)


def readable_time(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> readable_time(0.0123456)
        '12.3 ms'
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size * 0.9995:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def end_to_end(attention_share: float, speedup: float, *, dense_steps: int = 0, steps: int = 1) -> float:
    """Speed-up of a whole model whose attention gets faster: Amdahl's law.

        1 / (1 - share * f * (1 - 1 / speedup)),   f = (steps - dense_steps) / steps

    Args:
        attention_share: part of the dense model's time that is spent in attention, in `[0, 1]`.
        speedup: of attention, over dense attention.
        dense_steps: denoising steps (or layers) that keep dense attention, out of `steps`.
        steps: steps (or layers) in all.

    Raises:
        InvalidProblem: if a number is out of range.

    Source: Generalized Neighborhood Attention, arXiv 2504.16922, section 4 ("#SA steps" are the dense ones).

    Example:
        >>> round(end_to_end(0.518, 10.2), 2), round(end_to_end(0.518, 10.2, dense_steps=9, steps=28), 2)
        (1.88, 1.46)
    """
    if not 0 <= attention_share <= 1:
        raise InvalidProblem(
            f"attention_share must lie in [0, 1], as a part of the model's time, got {attention_share}"
        )
    if not speedup > 0:
        raise InvalidProblem(f"speedup must be above 0, got {speedup}")
    if steps < 1 or not 0 <= dense_steps <= steps:
        raise InvalidProblem(
            f"dense_steps must lie in [0, steps] and steps be at least 1, got {dense_steps} of {steps}"
        )
    sparse = (steps - dense_steps) / steps
    return 1 / (1 - attention_share * sparse * (1 - 1 / speedup))


def simulate(
    plan: Plan,
    hardware: Hardware,
    *,
    attention_share: float | None = None,
    dense_steps: int = 0,
    steps: int = 1,
) -> Estimate:
    """Predict one forward pass of a plan. Exact where it counts, a bound where it times.

    Time is a roofline with waves. A block runs on one of `U` units at `1 / U` of the device's peak
    rate, so a last, partly filled wave takes as long as a full one:

        time = max(performed FLOPs / peak * (waves * U / blocks),  least bytes / bandwidth)
        waves = ceil(blocks / U),   blocks = batch * heads * query tiles

    Exponentials, masks, launches and imperfect overlap come on top: real kernels reach part of it.
    Additional keys are cut into tiles of `prod(kv_tile)` which every query tile visits. The dense
    attention compared with sees the same additional keys and uses tiles of the same shape
    on the undilated grid.

    Args:
        plan: what would run.
        hardware: on what.
        attention_share: part of a model's time that dense attention takes; gives `end_to_end`.
        dense_steps, steps: of the model's steps or layers, how many keep dense attention.

    Raises:
        InvalidProblem: if the hardware has no rate for the problem's dtype, a share is out of range, or steps come
            without one.

    Source: arXiv 2504.16922, section 3.2 and appendix B.1, for the tile counts and speed-ups.

    Example:
        >>> from vicinal.plan import make_plan
        >>> from vicinal.tiling import Tiling
        >>> problem = Problem.grid((30, 48, 80), (18, 24, 24), stride=(16, 8, 8), heads=24, head_dim=128)
        >>> plan = make_plan(problem, Tiling((4, 8, 8), (2, 8, 8), kv_origin="grid"))
        >>> print(simulate(plan, Hardware.named("b200"), attention_share=0.607))
        30x48x80 grid, window 18x24x24, stride 16x8x8; query tiles 4x8x8, KV tiles 2x8x8, grid origin; b200
          tile pairs      38,880 of 432,000 visited: 38,880 full, 0 masked
          per query tile  at most 81 KV tiles, 81.00 on average
          padding         6.2% of query slots, 0.0% of key slots
          arithmetic      14.7 TFLOP useful, 15.7 TFLOP performed (1.07x)
          memory traffic  2.84 GB at least, 62.6 GB without caches
          blocks          11,520 in 78 waves on 148 units
          roofline        6.97 ms, bound by arithmetic; dense 77.5 ms
                          worst tile  mean tile   roofline  FLOP-wise
          speed-up            11.11x     11.11x     11.11x     11.11x
          end to end           2.23x      2.23x      2.23x      2.23x
    """
    if attention_share is None and (dense_steps, steps) != (0, 1):
        raise InvalidProblem("dense_steps and steps need attention_share, without which no whole model is predicted")
    problem = plan.problem
    heads = problem.batch * problem.heads
    tile_pairs, per_pair = plan.tile_pairs, 2 * (problem.head_dim + problem.head_dim_v) * heads
    extra = ceil_div(problem.additional, prod(plan.tiling.kv_tile))
    q_tiles, visited = plan.q_tiles, plan.visited
    dense_q, dense_kv = _dense_tiles(plan)
    dense_pairs = dense_q * (dense_kv + extra)
    useful = problem.pairs + problem.tokens * problem.additional
    performed = (visited + q_tiles * extra) * tile_pairs
    least = _least_bytes(problem)
    time_s, is_memory_bound = _roofline(problem, hardware, performed * per_pair, least, q_tiles * heads)
    dense_time_s, _ = _roofline(problem, hardware, dense_pairs * tile_pairs * per_pair, least, dense_q * heads)
    speedup = Speedup(
        worst_tile=dense_pairs / (q_tiles * (plan.most_visited + extra)),
        mean_tile=dense_pairs / (visited + q_tiles * extra),
        roofline=_ratio(dense_time_s, time_s),
        flop_wise=problem.tokens * (problem.tokens + problem.additional) / useful,
    )
    return Estimate(
        plan=plan,
        hardware=hardware,
        visited=visited,
        full=plan.full,
        masked=plan.masked,
        most_visited=plan.most_visited,
        mean_visited=visited / q_tiles,
        additional_tiles=extra,
        query_padding=q_tiles * prod(plan.tiling.q_tile) - problem.tokens,
        key_padding=visited * prod(plan.tiling.kv_tile) - prod(_real_keys(axis) for axis in plan.axes),
        useful_flops=useful * per_pair,
        performed_flops=performed * per_pair,
        least_bytes=least,
        most_bytes=_most_bytes(plan, visited + q_tiles * extra),
        blocks=q_tiles * heads,
        waves=ceil_div(q_tiles * heads, hardware.units),
        time_s=time_s,
        is_memory_bound=is_memory_bound,
        dense_time_s=dense_time_s,
        speedup=speedup,
        end_to_end=None if attention_share is None else _whole_model(speedup, attention_share, dense_steps, steps),
    )


def _dense_tiles(plan: Plan) -> tuple[int, int]:
    """Query tiles and KV tiles of dense attention: the whole grid, undilated, in tiles of the same shape."""
    shape, tiling = plan.problem.shape, plan.tiling
    return (
        prod(ceil_div(length, tile) for length, tile in zip(shape, tiling.q_tile, strict=True)),
        prod(ceil_div(length, tile) for length, tile in zip(shape, tiling.kv_tile, strict=True)),
    )


def _real_keys(axis: AxisPlan) -> int:
    """Keys that exist in the visited tiles of one axis, summed over its query tiles."""
    lengths = [sub.length for sub in axis.axis.subaxes()]
    return sum(min(span.origin + span.visited * axis.kv_tile, lengths[span.group]) - span.origin for span in axis.spans)


def _least_bytes(problem: Problem) -> int:
    """Query, key, value, additional keys and values in; output and log-sum-exp out; each once."""
    head = problem.head_dim + problem.head_dim_v
    queries = problem.tokens * problem.heads * (head * problem.itemsize + 4)
    keys = (problem.tokens + problem.additional) * problem.heads_kv * head * problem.itemsize
    return problem.batch * (queries + keys)


def _most_bytes(plan: Plan, tiles: int) -> int:
    problem = plan.problem
    head = problem.head_dim + problem.head_dim_v
    queries = problem.tokens * (head * problem.itemsize + 4)
    return problem.batch * problem.heads * (queries + tiles * prod(plan.tiling.kv_tile) * head * problem.itemsize)


def _roofline(problem: Problem, hardware: Hardware, flops: int, least: int, blocks: int) -> tuple[float, bool]:
    """Time in seconds, and whether memory sets it."""
    memory_s = least / hardware.bandwidth_bytes_per_s
    rounds = ceil_div(blocks, hardware.units) * hardware.units
    arithmetic_s = flops / hardware.peak(problem.dtype) * (rounds / blocks if blocks else 1)
    return max(arithmetic_s, memory_s), memory_s > arithmetic_s


def _whole_model(speedup: Speedup, share: float, dense_steps: int, steps: int) -> Speedup:
    def amdahl(gain: float) -> float:
        return end_to_end(share, gain, dense_steps=dense_steps, steps=steps)

    return Speedup(
        worst_tile=amdahl(speedup.worst_tile),
        mean_tile=amdahl(speedup.mean_tile),
        roofline=amdahl(speedup.roofline),
        flop_wise=amdahl(speedup.flop_wise),
    )


def _ratio(above: float, below: float) -> float:
    """A quotient that is 1 for an empty batch, where both are 0: nothing is gained and nothing wasted."""
    return above / below if below else 1.0


def _percent(part: int, whole: int) -> str:
    return f"{_ratio(part, whole) if whole else 0:.1%}"


def _si(number: float, unit: str) -> str:
    """Three digits and a prefix: 1234567 -> "1.23 MFLOP"."""
    power = 0
    while number >= 999.5 and power < len(_PREFIXES) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.3g} {_PREFIXES[power]}{unit}"


_PREFIXES = ("", "k", "M", "G", "T", "P", "E")
