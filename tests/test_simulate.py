"""The simulator reproduces the paper's numbers, agrees with dense masks, and keeps its own inequalities."""

import time
from itertools import product
from math import ceil, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicinal.errors import InvalidProblem
from vicinal.hardware import Hardware
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.simulate import Estimate, end_to_end, simulate
from vicinal.tiling import Tiling

B200 = Hardware.named("b200")
H100 = Hardware.named("h100-sxm")


def estimate(shape, kernel_size, stride=1, q_tile=None, kv_tile=None, kv_origin="grid", hardware=B200, **fields):
    problem = Problem.grid(shape, kernel_size, stride=stride, **fields)
    return simulate(make_plan(problem, Tiling(q_tile, kv_tile, kv_origin)), hardware)


# The paper's models: grid, window, query and KV tiles, attention's share end to end, dense and all steps.
# The share is the product of two numbers of the paper, attention's part of the transformer and the
# transformer's of the whole; their product as printed (60.7% and 51.8%) has a digit too few.
# Source: Generalized Neighborhood Attention, arXiv 2504.16922, sections 3.2 and 4.
MODELS = {
    "flux-90%": ((256, 256), (80, 80), (16, 16), (16, 8), 0.568 * 0.912, (9, 28)),
    "cosmos-56%": ((16, 44, 80), (16, 32, 48), (8, 4, 8), (4, 4, 8), 0.587, (12, 35)),
    "cosmos-89%": ((16, 44, 80), (16, 24, 16), (8, 4, 8), (4, 4, 8), 0.587, (12, 35)),
    "hunyuan-58%": ((30, 48, 80), (30, 40, 40), (2, 16, 8), (2, 8, 8), 0.654 * 0.928, (15, 50)),
    "hunyuan-91%": ((30, 48, 80), (18, 24, 24), (4, 8, 8), (2, 8, 8), 0.654 * 0.928, (15, 50)),
}

# model, stride, simulated speed-up of the operation, as printed with two digits.
OPERATIONS = [
    ("hunyuan-91%", (1, 1, 1), "3.27"),
    ("hunyuan-91%", (2, 1, 1), "3.60"),
    ("hunyuan-91%", (1, 1, 8), "5.45"),
    ("hunyuan-91%", (2, 1, 8), "6.00"),
    ("hunyuan-91%", (1, 8, 8), "9.09"),
    ("hunyuan-91%", (2, 8, 8), "10.00"),
    ("hunyuan-91%", (16, 8, 8), "11.11"),
    ("hunyuan-91%", (18, 24, 24), "6.67"),
    ("cosmos-89%", (1, 1, 1), "5.24"),
    ("cosmos-89%", (1, 8, 1), "6.11"),
    ("cosmos-89%", (1, 1, 16), "7.86"),
    ("cosmos-89%", (1, 8, 16), "9.17"),
    ("cosmos-56%", (1, 1, 1), "1.75"),
    ("cosmos-56%", (1, 8, 1), "1.96"),
    ("cosmos-56%", (1, 1, 16), "2.04"),
    ("cosmos-56%", (1, 8, 16), "2.29"),
    ("flux-90%", (1, 1), "6.10"),
    ("flux-90%", (16, 1), "8.53"),
    ("flux-90%", (16, 16), "10.24"),
    ("hunyuan-58%", (1, 1, 1), "1.43"),
    ("hunyuan-58%", (1, 1, 8), "2.00"),
    ("hunyuan-58%", (1, 32, 8), "2.40"),
    ("hunyuan-58%", (30, 40, 40), "2.00"),
]

BOUNDS = [
    ("hunyuan-91%", "11.11"),
    ("cosmos-89%", "9.17"),
    ("cosmos-56%", "2.29"),
    ("flux-90%", "10.24"),
    ("hunyuan-58%", "2.40"),
]

# model, stride, whether some steps stay dense, end-to-end speed-up FLOP-wise and simulated, as printed.
END_TO_END = [
    ("flux-90%", (1, 1), False, "1.88", "1.76"),
    ("flux-90%", (16, 1), False, "1.88", "1.84"),
    ("flux-90%", (16, 16), False, "1.88", "1.88"),
    ("flux-90%", (1, 1), True, "1.46", "1.42"),
    ("flux-90%", (16, 1), True, "1.46", "1.45"),
    ("flux-90%", (16, 16), True, "1.46", "1.46"),
    ("cosmos-56%", (1, 1, 1), False, "1.50", "1.35"),
    ("cosmos-56%", (1, 8, 1), False, "1.50", "1.42"),
    ("cosmos-56%", (1, 1, 16), False, "1.50", "1.42"),
    ("cosmos-56%", (1, 8, 16), False, "1.50", "1.50"),
    ("cosmos-56%", (1, 1, 1), True, "1.28", "1.21"),
    ("cosmos-56%", (1, 8, 1), True, "1.28", "1.24"),
    ("cosmos-56%", (1, 1, 16), True, "1.28", "1.24"),
    ("cosmos-56%", (1, 8, 16), True, "1.28", "1.28"),
    ("cosmos-89%", (1, 1, 1), False, "2.10", "1.90"),
    ("cosmos-89%", (1, 8, 1), False, "2.10", "1.96"),
    ("cosmos-89%", (1, 1, 16), False, "2.10", "2.05"),
    ("cosmos-89%", (1, 8, 16), False, "2.10", "2.10"),
    ("cosmos-89%", (1, 1, 1), True, "1.52", "1.45"),
    ("cosmos-89%", (1, 8, 1), True, "1.52", "1.48"),
    ("cosmos-89%", (1, 1, 16), True, "1.52", "1.51"),
    ("cosmos-89%", (1, 8, 16), True, "1.52", "1.52"),
    ("hunyuan-58%", (1, 1, 1), False, "1.55", "1.21"),
    ("hunyuan-58%", (1, 1, 8), False, "1.55", "1.44"),
    ("hunyuan-58%", (1, 32, 8), False, "1.55", "1.55"),
    ("hunyuan-58%", (30, 40, 40), False, "1.55", "1.44"),
    ("hunyuan-58%", (1, 1, 1), True, "1.33", "1.14"),
    ("hunyuan-58%", (1, 1, 8), True, "1.33", "1.27"),
    ("hunyuan-58%", (1, 32, 8), True, "1.33", "1.33"),
    ("hunyuan-91%", (1, 1, 1), False, "2.23", "1.73"),
    ("hunyuan-91%", (2, 1, 1), False, "2.23", "1.78"),
    ("hunyuan-91%", (1, 1, 8), False, "2.23", "1.99"),
    ("hunyuan-91%", (2, 1, 8), False, "2.23", "2.02"),
    ("hunyuan-91%", (1, 8, 8), False, "2.23", "2.17"),
    ("hunyuan-91%", (2, 8, 8), False, "2.23", "2.20"),
    ("hunyuan-91%", (16, 8, 8), False, "2.23", "2.23"),
    ("hunyuan-91%", (1, 1, 1), True, "1.63", "1.42"),
    ("hunyuan-91%", (2, 1, 1), True, "1.63", "1.44"),
    ("hunyuan-91%", (1, 1, 8), True, "1.63", "1.53"),
    ("hunyuan-91%", (2, 1, 8), True, "1.63", "1.55"),
    ("hunyuan-91%", (1, 8, 8), True, "1.63", "1.61"),
    ("hunyuan-91%", (2, 8, 8), True, "1.63", "1.62"),
    ("hunyuan-91%", (16, 8, 8), True, "1.63", "1.63"),
]


def of_model(name: str, stride) -> Estimate:
    shape, kernel_size, q_tile, kv_tile, _, _ = MODELS[name]
    return estimate(shape, kernel_size, stride, q_tile, kv_tile)


@pytest.mark.parametrize(("name", "stride", "printed"), OPERATIONS)
def test_worst_tile_speedup_is_the_paper_s(name, stride, printed):
    assert f"{of_model(name, stride).speedup.worst_tile:.2f}" == printed


@pytest.mark.parametrize(("name", "printed"), BOUNDS)
def test_flop_wise_bound_is_the_paper_s(name, printed):
    assert f"{of_model(name, 1).speedup.flop_wise:.2f}" == printed


@pytest.mark.parametrize(("name", "printed"), [("hunyuan-91%", "5.24"), ("flux-90%", "7.06"), ("cosmos-89%", "6.09")])
def test_mean_tile_speedup_of_sliding_windows(name, printed):
    assert f"{of_model(name, 1).speedup.mean_tile:.2f}" == printed


@pytest.mark.parametrize(("name", "stride", "some_dense", "flop_wise", "simulated"), END_TO_END)
def test_end_to_end_speedup_is_the_paper_s(name, stride, some_dense, flop_wise, simulated):
    speedup = of_model(name, stride).speedup
    assert f"{paper_end_to_end(name, speedup.flop_wise, some_dense):.2f}" == flop_wise
    assert f"{paper_end_to_end(name, speedup.worst_tile, some_dense):.2f}" == simulated


def paper_end_to_end(name: str, speedup: float, some_dense: bool) -> float:
    """Amdahl's law on the operation's speed-up as the paper prints it: with two digits, and then with one.

    Only Cosmos 56% at stride 1 can tell: 1.746 becomes 1.75 and then 1.8, and only 1.8 gives the table's 1.35.
    """
    *_, share, (dense_steps, steps) = MODELS[name]
    printed = round(round(speedup, 2), 1)
    return end_to_end(share, printed, dense_steps=dense_steps if some_dense else 0, steps=steps)


def test_one_number_of_the_paper_is_not_reproduced():
    # Hunyuan 91% as blocked (window-shifted) attention: the paper prints 2.06. Its speed-up of the operation, 6.67,
    # gives 2.07 rounded or not; 2.06 needs 6.6. No share of attention fits both this and the other strides.
    speedup = of_model("hunyuan-91%", (18, 24, 24)).speedup.worst_tile
    assert f"{paper_end_to_end('hunyuan-91%', speedup, False):.2f}" == "2.07"
    assert f"{end_to_end(0.654 * 0.928, speedup):.2f}" == "2.07"
    assert f"{paper_end_to_end('hunyuan-91%', 6.6, False):.2f}" == "2.06"


@pytest.mark.parametrize(
    ("name", "stride"),
    [("flux-90%", (16, 16)), ("cosmos-56%", (1, 8, 16)), ("cosmos-89%", (1, 8, 16)), ("hunyuan-58%", (1, 32, 8)),
     ("hunyuan-91%", (16, 8, 8))],
)  # fmt: skip
def test_the_paper_s_perfectly_block_sparse_cases_are(name, stride):
    assert of_model(name, stride).is_perfect
    assert not of_model(name, 1).is_perfect


def test_estimate_carries_the_whole_model():
    plan = of_model("hunyuan-91%", (16, 8, 8)).plan
    whole = simulate(plan, B200, attention_share=0.607, dense_steps=15, steps=50).end_to_end
    assert whole is not None
    assert whole.worst_tile == pytest.approx(end_to_end(0.607, 100 / 9, dense_steps=15, steps=50))
    assert whole.worst_tile == pytest.approx(whole.flop_wise)
    assert simulate(plan, B200).end_to_end is None


# Against dense masks built from the published rule, token by token and pair by pair.


def allowed(i, j, length, kernel_size, stride, dilation, is_causal):
    """Whether query i sees key j on one axis; written from the rule's text, not from `window`."""
    if i % dilation != j % dilation:
        return False
    members = [token for token in range(length) if token % dilation == i % dilation]
    p, k = members.index(i), members.index(j)
    first_of_group = stride * (p // stride)
    if is_causal:
        leader = min(first_of_group + stride - 1, len(members) - 1)
        return k <= p and leader - k < kernel_size
    leader = min(first_of_group + stride // 2, len(members) - 1)
    left = leader - kernel_size // 2
    left = 0 if left < 0 else min(left, len(members) - kernel_size)
    return left <= k < left + kernel_size


def counted(plan):
    """Visited, full and useful counts of an undilated plan on the fixed grid, by looking at every pair."""
    problem, tiling = plan.problem, plan.tiling
    masks = [
        [[allowed(i, j, a.length, a.kernel_size, a.stride, 1, a.is_causal) for j in range(a.length)]
         for i in range(a.length)]
        for a in problem.axes
    ]  # fmt: skip
    q_boxes = product(*(range(ceil(n / t)) for n, t in zip(problem.shape, tiling.q_tile, strict=True)))
    visited, full, useful, most = 0, 0, 0, 0
    for q_box in q_boxes:
        mine = 0
        for kv_box in product(*(range(ceil(n / t)) for n, t in zip(problem.shape, tiling.kv_tile, strict=True))):
            # All pairs of slots of this pair of tiles; a slot outside the grid holds nothing.
            hits = 1
            complete = True
            for mask, a, b, q_tile, kv_tile in zip(masks, q_box, kv_box, tiling.q_tile, tiling.kv_tile, strict=True):
                rows = mask[a * q_tile : (a + 1) * q_tile]
                ones = sum(sum(row[b * kv_tile : (b + 1) * kv_tile]) for row in rows)
                hits *= ones
                complete = complete and ones == len(rows) * kv_tile
            visited, mine = visited + (hits > 0), mine + (hits > 0)
            full += complete
            useful += hits
        most = max(most, mine)
    return visited, full, useful, most


@st.composite
def plans(draw, max_length=13, kv_origins=("grid", "free"), max_dilation=3, causal=True):
    rank = draw(st.integers(1, 3))
    limit = max_length if rank < 3 else 7
    axes, q_tile, kv_tile = [], [], []
    for _ in range(rank):
        length = draw(st.integers(1, limit))
        dilation = draw(st.integers(1, min(max_dilation, length)))
        kernel_size = draw(st.integers(1, length // dilation))
        axes.append((length, kernel_size, draw(st.integers(1, kernel_size)), dilation, draw(st.booleans()) and causal))
        q_tile.append(draw(st.integers(1, 5)))
        kv_tile.append(draw(st.integers(1, 5)))
    shape, kernel_size, stride, dilation, is_causal = zip(*axes, strict=True)
    problem = Problem.grid(
        shape,
        kernel_size,
        stride=stride,
        dilation=dilation,
        is_causal=is_causal,
        batch=draw(st.integers(0, 2)),
        heads=draw(st.sampled_from([1, 3])),
        head_dim=draw(st.sampled_from([8, 24])),
        head_dim_v=draw(st.sampled_from([8, 40])),
        additional=draw(st.integers(0, 7)),
    )
    return make_plan(problem, Tiling(tuple(q_tile), tuple(kv_tile), draw(st.sampled_from(kv_origins))))


@settings(max_examples=60, deadline=None)
@given(plans(max_length=9, kv_origins=("grid",), max_dilation=1))
def test_counts_equal_those_of_a_dense_mask(plan):
    visited, full, useful, most = counted(plan)
    result = simulate(plan, H100)
    assert (result.visited, result.full, result.masked) == (visited, full, visited - full)
    assert result.most_visited == most
    problem = plan.problem
    pairs = useful + problem.tokens * problem.additional
    heads = problem.batch * problem.heads
    assert result.useful_flops == 2 * pairs * (problem.head_dim + problem.head_dim_v) * heads


@settings(max_examples=60, deadline=None)
@given(plans(max_length=10))
def test_useful_flops_count_the_pairs_of_the_published_rule(plan):
    problem = plan.problem
    pairs = prod(
        sum(
            allowed(i, j, a.length, a.kernel_size, a.stride, a.dilation, a.is_causal)
            for i in range(a.length)
            for j in range(a.length)
        )
        for a in problem.axes
    )
    flops = 2 * (pairs + problem.tokens * problem.additional) * (problem.head_dim + problem.head_dim_v)
    assert simulate(plan, H100).useful_flops == flops * problem.batch * problem.heads


@settings(max_examples=200, deadline=None)
@given(plans())
def test_inequalities_hold(plan):
    result, problem = simulate(plan, H100), plan.problem
    assert result.mean_visited <= result.most_visited
    assert result.speedup.worst_tile <= result.speedup.mean_tile * (1 + 1e-12)
    assert result.performed_flops >= result.useful_flops
    assert 0 <= result.query_padding < plan.q_tiles * prod(plan.tiling.q_tile)
    assert 0 <= result.key_padding < result.visited * prod(plan.tiling.kv_tile)
    assert result.waste >= 1
    assert result.time_s * H100.bandwidth_bytes_per_s >= result.least_bytes * (1 - 1e-12)
    assert result.time_s * H100.peak(problem.dtype) >= result.performed_flops * (1 - 1e-12)
    assert (result.waves - 1) * H100.units < max(result.blocks, 1)
    assert result.blocks <= result.waves * H100.units


@settings(max_examples=200, deadline=None)
@given(plans())
def test_all_work_is_useful_exactly_if_block_sparse(plan):
    result, problem = simulate(plan, H100), plan.problem
    no_slack = problem.additional % prod(plan.tiling.kv_tile) == 0
    if problem.batch:
        assert (result.performed_flops == result.useful_flops) == (plan.is_block_sparse and no_slack)
        assert (result.waste == 1) == (plan.is_block_sparse and no_slack)


@settings(max_examples=100, deadline=None)
@given(plans(max_dilation=1, causal=False))
def test_speedup_is_the_paper_s_formula_without_dilation(plan):
    problem = plan.problem
    if problem.additional == 0:
        dense = prod(ceil(n / t) for n, t in zip(problem.shape, plan.tiling.kv_tile, strict=True))
        assert simulate(plan, H100).speedup.worst_tile == pytest.approx(dense / plan.most_visited)


@settings(max_examples=60, deadline=None)
@given(plans(max_dilation=2))
def test_key_padding_counts_slots_without_a_key(plan):
    slots = 1
    for axis in plan.axes:
        lengths = [sub.length for sub in axis.axis.subaxes()]
        slots *= sum(
            sum(key < lengths[span.group] for key in range(span.origin, span.origin + span.visited * axis.kv_tile))
            for span in axis.spans
        )
    result = simulate(plan, H100)
    assert result.key_padding == result.visited * prod(plan.tiling.kv_tile) - slots
    assert result.query_padding == plan.q_tiles * prod(plan.tiling.q_tile) - plan.problem.tokens


def test_whole_window_gains_nothing():
    result = estimate((12, 20), -1, q_tile=(4, 5), kv_tile=(3, 4))
    assert (result.speedup.worst_tile, result.speedup.mean_tile) == (1, 1)
    assert (result.speedup.roofline, result.speedup.flop_wise) == (1, 1)
    assert result.sparsity == 0
    assert result.is_perfect


def test_dilation_pays_for_its_many_small_tiles():
    # 64 tokens in 16 groups of 4: 16 query tiles, each of 4 queries, instead of 4 full ones. Nothing is gained.
    result = estimate((64,), 4, dilation=16, q_tile=(16,), kv_tile=(16,))
    assert (result.visited, result.speedup.worst_tile, result.speedup.mean_tile) == (16, 1, 1)
    assert result.query_padding == 16 * 16 - 64
    assert result.speedup.flop_wise == 16


def test_additional_keys_are_counted_for_both():
    plain = estimate((24, 40), (8, 10), (4, 5), (4, 5), (4, 5), "free", head_dim=16)
    more = estimate((24, 40), (8, 10), (4, 5), (4, 5), (4, 5), "free", head_dim=16, additional=30)
    assert more.additional_tiles == 2
    assert more.useful_flops - plain.useful_flops == 2 * 960 * 30 * 32
    assert more.performed_flops - plain.performed_flops == 2 * 48 * 2 * 20 * 20 * 32
    assert more.speedup.worst_tile == (48 + 2) / (more.most_visited + 2)
    assert more.speedup.flop_wise == pytest.approx((960 + 30) / (80 + 30))
    assert more.least_bytes - plain.least_bytes == 30 * 32 * 2


def test_bytes_by_hand():
    # Grouped heads: keys and values of 2 heads, queries and outputs of 6; log-sum-exp in float32.
    result = estimate(
        (6, 10), (3, 5), (3, 5), (3, 5), (3, 5), "free", batch=2, heads=6, heads_kv=2, head_dim=8, head_dim_v=16
    )
    queries, keys = 60 * 6 * (24 * 2 + 4), 60 * 2 * 24 * 2
    assert result.least_bytes == 2 * (queries + keys)
    assert result.visited == 4
    assert result.most_bytes == 2 * 6 * (60 * (24 * 2 + 4) + 4 * 15 * 24 * 2)


def test_roofline_by_hand():
    result = estimate((16, 64, 64), (8, 16, 16), (8, 8, 8), (8, 4, 4), (8, 4, 4), "free", heads=3, head_dim=128)
    assert result.blocks == 512 * 3
    assert result.waves == 11
    flops = result.performed_flops
    assert flops == 4 * 512 * 16 * 128 * 128 * 128 * 3
    assert result.time_s == pytest.approx(flops / 2250e12 * (11 * 148) / (512 * 3))
    assert not result.is_memory_bound


def test_tiny_windows_are_bound_by_memory():
    result = estimate((4096, 128), 1, 1, (1, 16), (1, 16), "free", heads=8)
    assert result.is_memory_bound
    assert result.time_s == result.least_bytes / B200.bandwidth_bytes_per_s
    assert "bound by memory" in str(result)


def test_an_empty_batch_costs_nothing():
    result = estimate((6, 10), 3, 1, (2, 5), (2, 5), batch=0)
    assert (result.blocks, result.waves, result.time_s, result.useful_flops) == (0, 0, 0, 0)
    assert (result.waste, result.speedup.roofline) == (1, 1)
    assert "0 B at least" in str(result)


def test_prints_an_aligned_table():
    result = estimate((33, 45), (8, 10), (4, 5), (4, 5), (4, 5), "free", additional=3)
    title, *rows = str(simulate(result.plan, B200, attention_share=0.5)).splitlines()
    assert title.startswith("33x45 grid, window 8x10, stride 4x5, 3 additional keys; query tiles 4x5")
    assert [row[2:17].strip() for row in rows] == [
        "tile pairs", "per query tile", "padding", "arithmetic", "memory traffic", "blocks", "roofline", "",
        "speed-up", "end to end",
    ]  # fmt: skip
    assert all(row.startswith("  ") and row[17] == " " for row in rows)
    assert len({len(row) for row in rows[-3:]}) == 1, "the numbers stand below their headings"
    assert rows[1].endswith("and 1 of additional keys")
    assert "end to end" not in str(result)


def test_a_large_plan_takes_milliseconds():
    start = time.perf_counter()
    result = estimate((121, 272, 480), (11, 11, 11), 1, (2, 8, 8), (2, 8, 8), heads=4)
    assert result.visited > 10**6
    assert time.perf_counter() - start < 0.5


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(InvalidProblem, match="no peak rate is known for float16 on cpu; known: bfloat16, float32"):
        estimate((8, 12), 3, 1, (2, 2), (2, 2), hardware=Hardware.named("cpu"), dtype="float16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 2.0), r"attention_share must lie in \[0, 1\], as a part of the model's time, got 1.5"),
        ((-0.1, 2.0), r"attention_share must lie in \[0, 1\].*got -0.1"),
        ((float("nan"), 2.0), r"attention_share must lie in \[0, 1\].*got nan"),
        ((0.5, 0.0), "speedup must be above 0, got 0.0"),
        ((0.5, 2.0, 3, 2), r"dense_steps must lie in \[0, steps\] and steps be at least 1, got 3 of 2"),
        ((0.5, 2.0, -1, 2), "got -1 of 2"),
        ((0.5, 2.0, 0, 0), "got 0 of 0"),
    ],
)
def test_end_to_end_refuses_in_a_sentence(arguments, message):
    share, speedup, *steps = arguments
    with pytest.raises(InvalidProblem, match=message):
        end_to_end(share, speedup, **dict(zip(("dense_steps", "steps"), steps, strict=False)))


@given(st.floats(0, 1), st.floats(1, 100), st.integers(0, 9))
def test_a_model_gains_between_nothing_and_its_attention(share, speedup, dense_steps):
    whole = end_to_end(share, speedup, dense_steps=dense_steps, steps=9)
    assert whole >= 1 - 1e-12
    assert whole <= speedup * (1 + 1e-12)
    if dense_steps == 9:
        assert whole == 1
