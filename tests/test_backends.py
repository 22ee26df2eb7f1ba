"""Every backend obeys every law; the laws bite; and a choice explains itself."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from vicinal import backends
from vicinal.backends import blocked, reference
from vicinal.backends.base import Backend, Gradients, Inputs, Output
from vicinal.backends.blocked import chunks
from vicinal.backends.blocked.backward import by_heads
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.functional import attention_with_lse
from vicinal.hardware import Hardware
from vicinal.plan import Plan, make_plan
from vicinal.problem import Axis, Problem
from vicinal.testing import LAWS, Law, check_backend
from vicinal.testing.cases import make_inputs, make_output_gradients, random_problem
from vicinal.testing.laws import Trial, equals_the_oracle, random_tiling
from vicinal.testing.strategies import problems, seeds
from vicinal.tiling import Tiling

CPU = torch.device("cpu")
SLACK = 8.0
"""For drawn problems, which may hold a single number: its error may by luck be far above plain PyTorch's."""


KINDS = {"hopper": ("cuda",), "fused": ("cpu",)}
"""Where backends that are made for one kind of device run; the others run, or say why not, on both."""

PLACES = [
    pytest.param(backend, torch.device(kind), id=f"{kind}-{backend.name}", marks=[pytest.mark.gpu] * (kind == "cuda"))
    for backend in backends.ALL
    for kind in KINDS.get(backend.name, ("cpu", "cuda"))
]


@pytest.mark.parametrize(("backend", "device"), PLACES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_backend_obeys(backend: Backend, law: Law, device: torch.device):
    hardware = backends.present(device)
    if all(backend.why_not(problem, hardware) for problem in (Problem.grid((64,), 7), Problem.grid((4, 8, 9), 3))):
        pytest.skip(f"{backend.name}: {'; '.join(backend.why_not(Problem.grid((64,), 7), hardware))}")
    law(backend, device)


@pytest.mark.parametrize("backend", [blocked.backend, reference.backend], ids=lambda backend: backend.name)
@given(problem=problems(most_tokens=80), seed=seeds())
def test_any_problem_equals_the_oracle(backend: Backend, problem: Problem, seed: int):
    equals_the_oracle(Trial(backend, problem, CPU, backends.present(CPU), seed, slack=SLACK))


def test_random_problems_with_random_tilings_equal_the_oracle(seed: int):
    rng = random.Random(seed)
    for number in range(30):
        problem = random_problem(rng, most_tokens=200)
        tiling = random_tiling(problem, rng)

        @dataclass(frozen=True)
        class Cut(blocked.Blocked):
            def tilings(self, problem: Problem, hardware: Hardware, tiling: Any = tiling) -> Any:
                return (tiling,)

        try:
            equals_the_oracle(Trial(Cut(), problem, CPU, backends.present(CPU), number, slack=SLACK))
        except AssertionError as error:
            raise AssertionError(f"problem {number} of seed {seed}: {problem!r}, {tiling}: {error}") from error


@dataclass(frozen=True)
class Broken:
    """The reference backend with a mistake in it."""

    mistake: Callable[[Output, Inputs, Plan], Output] | None = None
    wrong_plan: Callable[[Plan], Plan] | None = None
    wrong_gradients: Callable[[Gradients, Inputs], Gradients] | None = None
    refuses: tuple[str, ...] = ()
    no_gradients: tuple[str, ...] = ()
    name: str = "broken"

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return self.refuses

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return self.no_gradients

    def tilings(self, problem: Problem, hardware: Hardware) -> Any:
        return blocked.backend.tilings(problem, hardware)

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        output = reference.backend.forward(self.wrong_plan(plan) if self.wrong_plan else plan, inputs)
        return self.mistake(output, inputs, plan) if self.mistake else output

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        plan = self.wrong_plan(plan) if self.wrong_plan else plan
        gradients = reference.backend.backward(plan, inputs, output, grad_out, grad_lse, into)
        return self.wrong_gradients(gradients, inputs) if self.wrong_gradients else gradients


def forgets_where(gradients: Gradients, inputs: Inputs) -> Gradients:
    return gradients._replace(value=gradients.value.contiguous())


def writes_around(gradients: Gradients, inputs: Inputs) -> Gradients:
    if gradients.query._base is not None:
        gradients.query._base.zero_()
    return gradients


def on_axis(change: Callable[[Axis], Axis]) -> Callable[[Plan], Plan]:
    """Solve another problem: with the last axis changed, where that is still a window."""

    def wrong(plan: Plan) -> Plan:
        *rest, last = plan.problem.axes
        try:
            last = change(last)
        except InvalidProblem:
            return plan
        return make_plan(replace(plan.problem, axes=(*rest, last)), plan.tiling)

    return wrong


def in_16_bits(output: Output, inputs: Inputs, plan: Plan) -> Output:
    return output._replace(out=output.out.bfloat16().to(output.out.dtype))


def depends_on_the_plan(output: Output, inputs: Inputs, plan: Plan) -> Output:
    return output._replace(out=output.out * (1 + 1e-2 * (plan.tiling.q_tile[0] == 1)))


def drifting() -> Callable[[Output, Inputs, Plan], Output]:
    """Adds a little more in every run, as a race would."""
    calls = itertools.count()
    return lambda o, i, p: o._replace(lse=o.lse + next(calls) * torch.finfo(o.lse.dtype).eps * 4)


def reads_the_memory_around(output: Output, inputs: Inputs, plan: Plan) -> Output:
    query = inputs.query
    whole = query.as_strided((query.untyped_storage().nbytes() // query.itemsize,), (1,), 0)
    return output._replace(out=output.out + 0 * whole.sum())


def forgets_strides(output: Output, inputs: Inputs, plan: Plan) -> Output:
    value = inputs.value
    if value.is_contiguous():
        return output
    flat = torch.as_strided(value, value.shape, torch.empty(value.shape, device="meta").stride())
    return reference.backend.forward(plan, inputs._replace(value=flat))


def forgets_group_order(output: Output, inputs: Inputs, plan: Plan) -> Output:
    """Query head h reads head h % Hkv instead of h // group."""
    group = plan.problem.heads // plan.problem.heads_kv
    key, value = (t.repeat(*[1] * (t.dim() - 2), group, 1) for t in (inputs.key, inputs.value))
    problem = replace(plan.problem, heads_kv=plan.problem.heads, additional=0)
    if plan.problem.additional:
        return output
    return reference.backend.forward(make_plan(problem, plan.tiling), Inputs(inputs.query, key, value))


def on_bias(change: Callable[[Tensor, Plan], Tensor]) -> Callable[[Output, Inputs, Plan], Output]:
    """Solve it with another table of position bias."""

    def wrong(output: Output, inputs: Inputs, plan: Plan) -> Output:
        if inputs.position_bias is None:
            return output
        table = change(inputs.position_bias, plan)
        return reference.backend.forward(plan, inputs._replace(position_bias=table))

    return wrong


def halved(table: Tensor | None) -> Tensor | None:
    return None if table is None else table / 2


MISTAKES: dict[str, tuple[Broken, str]] = {
    "window one key too large": (
        Broken(wrong_plan=on_axis(lambda a: replace(a, kernel_size=a.kernel_size + 1))),
        "counts_its_keys",
    ),
    "window one key too small": (
        Broken(wrong_plan=on_axis(lambda a: replace(a, kernel_size=a.kernel_size - 1))),
        "the_window_is_complete",
    ),
    "window lets a key in": (
        Broken(wrong_plan=on_axis(lambda a: replace(a, kernel_size=a.kernel_size + 1))),
        "nothing_leaks_in",
    ),
    "stride forgotten": (
        Broken(wrong_plan=on_axis(lambda a: replace(a, stride=1))),
        "strided_window_is_blocked_attention",
    ),
    "dilation forgotten": (Broken(wrong_plan=on_axis(lambda a: replace(a, dilation=1))), "nothing_leaks_in"),
    "causality forgotten": (Broken(wrong_plan=on_axis(lambda a: replace(a, is_causal=False))), "counts_its_keys"),
    "whole axis made causal": (
        Broken(wrong_plan=on_axis(lambda a: replace(a, is_causal=True))),
        "whole_window_is_dense_attention",
    ),
    "output lost its precision": (Broken(mistake=in_16_bits), "equals_the_oracle"),
    "lse in base 2": (Broken(mistake=lambda o, i, p: o._replace(lse=o.lse * 1.4427)), "counts_its_keys"),
    "lse off by little": (Broken(mistake=lambda o, i, p: o._replace(lse=o.lse + 1e-4)), "merged_halves_are_the_whole"),
    "lse in the wrong dtype": (Broken(mistake=lambda o, i, p: o._replace(lse=o.lse.half())), "equals_the_oracle"),
    "output not contiguous": (
        Broken(mistake=lambda o, i, p: o._replace(out=o.out.mT.contiguous().mT)),
        "equals_the_oracle",
    ),
    "one NaN": (
        Broken(mistake=lambda o, i, p: o._replace(out=o.out.index_fill(0, torch.tensor(0), torch.nan))),
        "equals_the_oracle",
    ),
    "all zero": (Broken(mistake=lambda o, i, p: o._replace(out=o.out * 0)), "equals_the_oracle"),
    "gradient of lse dropped": (Broken(wrong_gradients=lambda g, i: g._replace(key=g.key * 0.99)), "equals_the_oracle"),
    "gradient of the extra values dropped": (
        Broken(wrong_gradients=lambda g, i: g._replace(additional_values=None)),
        "equals_the_oracle",
    ),
    "gradients of query and key swapped in scale": (
        Broken(wrong_gradients=lambda g, i: g._replace(query=g.query * 2)),
        "gradient_without_lse",
    ),
    "position bias forgotten": (
        Broken(mistake=on_bias(lambda table, plan: table * 0)),
        "equals_the_oracle",
    ),
    "position bias read the other way round": (
        Broken(mistake=on_bias(lambda table, plan: table.flip(*range(1, table.dim())))),
        "equals_the_oracle",
    ),
    "position bias on the wrong heads": (
        Broken(mistake=on_bias(lambda table, plan: table.roll(1, 0))),
        "strided_window_is_blocked_attention",
    ),
    "position bias multiplied by the scale": (
        Broken(mistake=on_bias(lambda table, plan: table * plan.problem.scale)),
        "whole_window_is_dense_attention",
    ),
    "gradient of the bias dropped": (
        Broken(wrong_gradients=lambda g, i: g._replace(position_bias=None)),
        "equals_the_oracle",
    ),
    "gradient of the bias of one batch row": (
        Broken(wrong_gradients=lambda g, i: g._replace(position_bias=halved(g.position_bias))),
        "gradient_without_lse",
    ),
    "heads grouped the wrong way": (Broken(mistake=forgets_group_order), "batch_and_heads_permute"),
    "second batch row copies the first": (
        Broken(mistake=lambda o, i, p: o._replace(out=o.out[:1].expand_as(o.out).contiguous())),
        "batch_and_heads_permute",
    ),
    "reads the memory around": (Broken(mistake=reads_the_memory_around), "memory_around_is_not_read"),
    "strides ignored": (Broken(mistake=forgets_strides), "memory_around_is_not_read"),
    "a gradient put elsewhere than wanted": (
        Broken(wrong_gradients=forgets_where),
        "gradients_go_where_they_are_wanted",
    ),
    "writes around a gradient": (Broken(wrong_gradients=writes_around), "gradients_go_where_they_are_wanted"),
    "a race": (Broken(mistake=drifting()), "two_runs_are_bitwise_equal"),
    "empty batch made up": (
        Broken(mistake=lambda o, i, p: o if len(o.out) else o._replace(out=o.out.new_zeros(1, *o.out.shape[1:]))),
        "an_empty_batch_is_answered",
    ),
    "answer depends on the tiling": (Broken(mistake=depends_on_the_plan), "the_plan_does_not_change_the_answer"),
    "refuses everything": (Broken(refuses=("is tired",)), "equals_the_oracle"),
}
"""A mistake, and the law that must catch it."""


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_law_catches(mistake: str):
    broken, name = MISTAKES[mistake]
    law = next(law for law in LAWS if law.name == name)
    with pytest.raises(AssertionError, match=f"^{name}: "):
        law(broken)


def test_every_law_has_a_mistake_that_it_catches():
    assert {name for _, name in MISTAKES.values()} == {law.name for law in LAWS}


def test_a_report_tells_what_broke_and_goes_on():
    def crash(output: Output, inputs: Inputs, plan: Plan) -> Output:
        raise RuntimeError("out of paper")

    seen: list[tuple[str, int, int]] = []
    laws = LAWS[-2:]
    report = check_backend(Broken(mistake=crash), laws=laws, progress=lambda law, i, n: seen.append((law.name, i, n)))
    assert not report.holds
    assert seen == [(laws[0].name, 0, 2), (laws[1].name, 1, 2)]
    assert "2 of 2 laws are broken" in str(report)
    assert "RuntimeError: out of paper" in str(report)
    assert "seed" in str(report)
    good = check_backend(blocked.backend, laws=laws)
    assert good.holds
    assert str(good).endswith("every law holds")


def test_a_name_is_that_one_or_an_error():
    query = torch.zeros(1, 8, 2, 4)
    with pytest.raises(InvalidProblem, match=r"backend must be one of .*blocked, reference.*, got 'fast'"):
        attention_with_lse(query, query, query, kernel_size=3, backend="fast")


def test_a_refusal_gives_every_reason(monkeypatch: pytest.MonkeyPatch):
    picky = Broken(refuses=("needs sm_90, this is a cpu", "computes in 16 bits only, got float32"))
    monkeypatch.setattr(backends, "ALL", (picky, blocked.backend))
    problem, hardware = Problem.grid((8,), 3, dtype="float32"), backends.present(CPU)
    text = str(backends.explain(problem, hardware))
    assert "broken" in text
    assert "no" in text
    assert "needs sm_90, this is a cpu; computes in 16 bits only, got float32" in text
    assert re.search(r"blocked +yes +<- chosen", text)
    assert backends.choose(problem, hardware).name == "blocked"
    with pytest.raises(Unsupported, match=r"(?s)backend 'broken' declines.*needs sm_90.*16 bits"):
        backends.choose(problem, hardware, "broken")
    monkeypatch.setattr(backends, "ALL", (picky,))
    with pytest.raises(Unsupported, match=r"(?s)no backend runs.*needs sm_90"):
        backends.choose(problem, hardware)


def test_a_backend_without_gradients_is_chosen_only_where_none_are_needed(monkeypatch: pytest.MonkeyPatch):
    forward_only = Broken(no_gradients=("computes no gradients yet",), name="forward only")
    monkeypatch.setattr(backends, "ALL", (forward_only, blocked.backend))
    problem, hardware = Problem.grid((8,), 3, dtype="float32"), backends.present(CPU)
    assert backends.choose(problem, hardware).name == "forward only"
    assert backends.choose(problem, hardware, needs_grad=True).name == "blocked"
    with pytest.raises(Unsupported, match=r"(?s)'forward only' declines.*computes no gradients yet"):
        backends.choose(problem, hardware, "forward only", needs_grad=True)
    query = torch.randn(1, 8, 2, 4, requires_grad=True)
    attention_with_lse(query, query, query, 3, backend="blocked").out.sum().backward()
    assert query.grad is not None
    with pytest.raises(Unsupported, match="computes no gradients yet"):
        attention_with_lse(query, query, query, 3, backend="forward only")
    with torch.no_grad():
        attention_with_lse(query, query, query, 3, backend="forward only")


@pytest.mark.parametrize(("batch", "heads_kv", "dilation"), [(3, 2, 1), (1, 1, 1), (1, 3, 2)])
def test_workers_change_nothing_and_leave_the_thread_count_alone(batch: int, heads_kv: int, dilation: int):
    problem = Problem.grid(
        (13, 22), (5, 4), batch=batch, heads=2 * heads_kv, heads_kv=heads_kv, head_dim=8, additional=3,
        position_bias=True, dtype="float32",
    )  # fmt: skip
    inputs = make_inputs(problem, CPU, 1)
    leaves = [tensor.requires_grad_() for tensor in (*inputs[:5], inputs.position_bias) if tensor is not None]
    grads = make_output_gradients(problem, CPU, 1)

    def solve(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        output = attention_with_lse(
            *leaves[:3],
            (5, 4),
            dilation=(1, dilation),
            additional_keys=leaves[3],
            additional_values=leaves[4],
            additional_lengths=inputs.additional_lengths,
            position_bias=leaves[5],
            backend="blocked",
        )
        found = *output, *torch.autograd.grad(output, leaves, grads)
        assert torch.get_num_threads() == threads
        return found

    try:
        one = solve(1)
        for threads in (2, 3, 7):
            many = solve(threads)
            for ours, theirs in zip(many, one, strict=True):
                torch.testing.assert_close(ours, theirs)
            assert all(torch.equal(a, b) for a, b in zip(many, solve(threads), strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_inference_and_training_take_turns(backend: str, threads: int):
    tensor = torch.randn(2, 12, 14, 4, 8)

    def infer() -> Tensor:
        with torch.inference_mode():
            return attention_with_lse(tensor, tensor, tensor, 5, backend=backend).out

    def train() -> Tensor:
        leaf = tensor.clone().requires_grad_()
        out = attention_with_lse(leaf, leaf, leaf, 5, backend=backend).out
        out.sum().backward()
        assert leaf.grad is not None
        return out.detach()

    torch.set_num_threads(threads)
    try:
        chunks._KEPT.clear()  # so that each is once the first to make buffers
        first = [infer(), train(), infer()]
        chunks._KEPT.clear()
        second = [train(), infer(), train()]
    finally:
        torch.set_num_threads(1)
    for out in [*first, *second]:
        torch.testing.assert_close(out.clone(), second[0])


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@given(drawn=problems())
def test_no_two_workers_add_to_one_head(workers: int, drawn: Problem):
    cut = make_plan(drawn, blocked.backend.tilings(drawn, backends.present(CPU))[0])
    with pytest.MonkeyPatch.context() as patch:
        # Budgets so small that every unit falls into several chunks.
        patch.setattr(chunks, "SCORES", 8)
        patch.setattr(chunks, "KEYS", 64)
        walked = list(blocked.Forward(cut, make_inputs(drawn, CPU, 0)).walk(workers))
    for part in walked:
        owners: dict[tuple[int, int], int] = {}
        jobs = by_heads(part)
        assert sum(map(len, jobs)) == len(part)
        for number, job in enumerate(jobs):
            for _, chunk in job:
                rows, heads = (range(piece.start, piece.stop) for piece in (chunk.units[0], chunk.units[-1]))
                for head in itertools.product(rows, heads):
                    assert owners.setdefault(head, number) == number


@pytest.mark.parametrize("kernel_size", [31, 83])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_are_batched_only_where_they_are_alike(kernel_size: int, bias: bool):
    """One long column of one unit: inside, rows move on with their keys; where the window is the axis, beside them."""
    shape = Problem.grid((83,), kernel_size, heads=1, head_dim=8, dtype="float64", position_bias=bias)
    inputs = make_inputs(shape, CPU, seed=3)
    grads = make_output_gradients(shape, CPU, seed=3)
    cut = make_plan(shape, Tiling((4,), (83,)))
    bands = [[len(band.rows) for band in c.bands] for part in blocked.Forward(cut, inputs).walk() for _, c in part]
    assert max(max(lengths) for lengths in bands) == (1 if bias else 7 if kernel_size == 31 else 11)
    backward = [b.backward(cut, inputs, b.forward(cut, inputs), *grads) for b in (blocked.backend, reference.backend)]
    for name, ours, theirs in zip(backward[0]._fields, *backward, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_the_environment_names_a_backend_and_a_call_overrules_it(monkeypatch: pytest.MonkeyPatch):
    problem, hardware = Problem.grid((8,), 3), backends.present(CPU)
    monkeypatch.setenv(backends.VARIABLE, "reference")
    assert backends.choose(problem, hardware).name == "reference"
    assert backends.choose(problem, hardware, "blocked").name == "blocked"
    monkeypatch.setenv(backends.VARIABLE, "fast")
    with pytest.raises(InvalidProblem, match="got 'fast'"):
        backends.choose(problem, hardware)


def test_tensors_of_a_seed_are_the_same_again():
    problem = Problem.grid((9, 4), 3, additional=5, position_bias=True, dtype="float32")
    for one, two in zip(make_inputs(problem, CPU, 7), make_inputs(problem, CPU, 7), strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)
    assert torch.equal(*(make_output_gradients(problem, CPU, 7)[1] for _ in range(2)))


@pytest.mark.parametrize("backend", ["fused", "blocked"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_expanded_tensors_are_read_right(backend: str, axis: int):
    """With steps of 0 in memory along an axis, which no product can read in place."""
    query = torch.randn(2, 53, 3, 8)
    key, value = (torch.randn_like(query).narrow(axis, 0, 1).expand_as(query) for _ in range(2))
    ours, theirs = (attention_with_lse(query, key, value, 9, backend=name) for name in (backend, "reference"))
    torch.testing.assert_close(ours, theirs)
