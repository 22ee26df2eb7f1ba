"""The Hopper backend's gradients on a card: those of the definition, in every way that PyTorch asks for them.

`VICINAL_FUZZ=2000 pytest tests/hopper/test_gradients_on_card.py` runs that many random problems; few by default.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from problems import Case, check_gradients, draw, kind_of_cut
from torch.utils.checkpoint import checkpoint

from vicinal import neighborhood_attention
from vicinal.backends import hopper
from vicinal.backends.base import Gradients, Inputs
from vicinal.backends.hopper import backward
from vicinal.backends.hopper.cost import ranked_tilings
from vicinal.backends.hopper.cost_backward import HEAD_DIMS, Cut, ranked_cuts
from vicinal.errors import Unsupported
from vicinal.functional import attention_with_lse
from vicinal.plan import make_plan
from vicinal.problem import Problem
from vicinal.testing.tolerance import assert_as_good_as_eager
from vicinal.testing.truth import truth_and_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU (sm_90)",
    ),
]

PROBLEM = Problem.grid((5, 14, 22), (3, 5, 7), heads=2, head_dim=64)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def leaves(problem: Problem, count: int = 3) -> list[torch.Tensor]:
    shape = problem.batch, *problem.shape, problem.heads, problem.head_dim
    return [noise(*shape).requires_grad_() for _ in range(count)]


def drawn(seed: int) -> Case:
    """`draw`, but of head dims that have gradients."""
    case = draw(seed)
    while case.problem.head_dim not in HEAD_DIMS:
        seed += 100_000
        case = draw(seed)
    return case


@pytest.mark.parametrize("seed", range(int(os.environ.get("VICINAL_FUZZ", "40"))))
def test_random_problem(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward, "ranked_cuts", partial(kind_of_cut, seed))
    hopper.forget()
    check_gradients(drawn(seed), hopper.backend, has_grad_lse=seed % 3 > 0)
    hopper.forget()


@pytest.mark.parametrize("problem", [
    Problem.grid((8, 16, 16), (8, 8, 8), stride=(1, 8, 8), heads=4, heads_kv=2, head_dim=128, additional=70),
    Problem.grid((32, 48), 16, stride=16, heads=2, head_dim=128),
    Problem.grid((1280,), -1, heads=2, head_dim=128),
    Problem.grid((1500,), 30, heads=2, head_dim=128),
    Problem.grid((40, 52), (3, 9), dilation=(1, 2), heads=2, head_dim=128, additional=33),
    Problem.grid((3, 18, 40), (2, 3, 17), is_causal=(True, False, False), heads=2, head_dim=128),
], ids=str)  # fmt: skip
def test_two_warpgroups(problem: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large problems are cut: late products where nothing is masked, and boxes passed by on each axis."""

    def cuts(kernel: str, problem: Problem) -> list[Cut]:
        ranked = ranked_cuts(kernel, problem, 10_000)
        found = [cut for cut in ranked if cut.variant.stack == stack and (cut.variant.is_late or cut.variant.skips)]
        assert found
        return found

    monkeypatch.setattr(backward, "ranked_cuts", cuts)
    for stack in range(3 - problem.rank, 3):
        hopper.forget()
        check_gradients(Case(problem, ranked_tilings(problem)[0], "fused", False, stack), hopper.backend, True)
    hopper.forget()


def solve(tensors: list[torch.Tensor], **more: object) -> torch.Tensor:
    return neighborhood_attention(*tensors, PROBLEM.kernel_size, backend="hopper", **more)  # type: ignore[arg-type]


def gradients(tensors: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(solve(tensors), tensors, grad)


def assert_equal(ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_200_runs_are_bitwise_equal() -> None:
    tensors, grad = leaves(PROBLEM), noise(*leaves(PROBLEM, 1)[0].shape)
    first = gradients(tensors, grad)
    for _ in range(200):
        assert_equal(gradients(tensors, grad), first)


def test_deterministic_mode_is_kept() -> None:
    tensors, grad = leaves(PROBLEM), noise(*leaves(PROBLEM, 1)[0].shape)
    first = gradients(tensors, grad)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(gradients(tensors, grad), first)
    finally:
        torch.use_deterministic_algorithms(False)


def test_compiled_checkpointed_and_retained() -> None:
    tensors, grad = leaves(PROBLEM), noise(*leaves(PROBLEM, 1)[0].shape)
    plain = gradients(tensors, grad)
    compiled = torch.compile(solve, fullgraph=True)(tensors)
    assert_equal(torch.autograd.grad(compiled, tensors, grad), plain)
    again = checkpoint(lambda *leaf: solve(list(leaf)), *tensors, use_reentrant=False)
    assert_equal(torch.autograd.grad(again, tensors, grad), plain)
    out = solve(tensors)
    first = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    assert_equal(first, plain)
    assert_equal(torch.autograd.grad(out, tensors, grad), plain)


@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_thread_may_begin_with_us(is_prepared: bool) -> None:
    """A thread has no CUDA context until something gives it one: autograd's threads may begin with our kernels."""
    tensors, grad = leaves(PROBLEM), noise(*leaves(PROBLEM, 1)[0].shape)
    given = [tensor.detach() for tensor in tensors]
    plan = make_plan(PROBLEM, ranked_tilings(PROBLEM)[0])
    found: list[Gradients] = []

    def derive() -> None:
        output = hopper.backend.forward(plan, Inputs(*given))
        found.append(hopper.backend.backward(plan, Inputs(*given), output, grad, None))

    hopper.forget()
    if is_prepared:
        derive()
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(derive).result()
    assert_equal(found[-1][:3], gradients(tensors, grad))


def test_an_output_used_twice_adds_up() -> None:
    tensors, grad = leaves(PROBLEM), noise(*leaves(PROBLEM, 1)[0].shape)
    once = gradients(tensors, 2 * grad)
    out = solve(tensors)
    assert_equal(torch.autograd.grad([out, out], tensors, [grad, grad]), once)  # doubling is exact


def test_mixed_precision() -> None:
    layer = torch.nn.Linear(128, 3 * 128, device="cuda")
    x = torch.randn(2, *PROBLEM.shape, 128, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        query, key, value = layer(x).unflatten(-1, (3, 2, 64)).unbind(-3)
        out = neighborhood_attention(query, key, value, PROBLEM.kernel_size, backend="hopper")
        assert out.dtype == torch.bfloat16
        out.float().square().mean().backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().max() > 0


def test_replays_in_a_graph() -> None:
    inputs = Inputs(*(leaf.detach() for leaf in leaves(PROBLEM)))
    plan = make_plan(PROBLEM, ranked_tilings(PROBLEM)[0])
    grad = noise(*inputs.query.shape)

    def both() -> Gradients:
        output = hopper.backend.forward(plan, inputs)
        return hopper.backend.backward(plan, inputs, output, grad, None)

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    for _ in range(3):
        inputs.query.copy_(noise(*inputs.query.shape))
        grad.copy_(noise(*grad.shape))
        for tensor in captured[:3]:
            tensor.fill_(float("nan"))
        graph.replay()
        assert_equal(captured[:3], both()[:3])


def test_a_second_derivative_is_refused_in_words() -> None:
    tensors = leaves(PROBLEM)
    grads = torch.autograd.grad(solve(tensors).float().square().sum(), tensors, create_graph=True)
    with pytest.raises(Unsupported, match="second derivative"):
        grads[0].float().sum().backward()


def test_keeps_no_more_than_outputs_and_their_sums() -> None:
    """A backward pass allocates the gradients, and two float32 numbers per query and head."""
    problem = replace(PROBLEM, batch=8, heads=4, heads_kv=4)
    inputs = Inputs(*(leaf.detach() for leaf in leaves(problem)))
    plan = make_plan(problem, ranked_tilings(problem)[0])
    output = hopper.backend.forward(plan, inputs)
    grad = noise(*inputs.query.shape)
    hopper.backend.backward(plan, inputs, output, grad, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = hopper.backend.backward(plan, inputs, output, grad, None)
    grown = torch.cuda.max_memory_allocated() - before
    wanted = sum(tensor.nbytes for tensor in found[:3]) + 2 * output.lse.nbytes
    assert grown <= wanted + 8 * 512  # the allocator's rounding


def test_more_elements_than_32_bits_count() -> None:
    """The last tokens, whose elements lie past number 2^31, against the same tokens alone."""
    heads, length, window = 8, 2**21 + 640, 129
    free, _ = torch.cuda.mem_get_info()
    if free < 9 * 2 * length * heads * 128:
        pytest.skip("needs 39 GB of free memory on the card")
    whole = [noise(1, length, heads, 128).requires_grad_() for _ in range(3)]
    grad = noise(1, length, heads, 128)
    assert grad.numel() > 2**31

    def solved(tensors: list[torch.Tensor], grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = neighborhood_attention(*tensors, window, backend="hopper")  # type: ignore[arg-type]
        return torch.autograd.grad(out, tensors, grad)

    found = [gradient[:, -3072:].clone() for gradient in solved(whole, grad)]
    ends, grad = [tensor.detach()[:, -4096:].contiguous() for tensor in whole], grad[:, -4096:].contiguous()
    del whole
    problem = Problem.of(*ends, kernel_size=window)
    truth, eager = truth_and_eager(problem, Inputs(*ends), grad_out=grad, grad_lse=torch.zeros_like(grad[..., 0]))
    for name, ours in zip(("query", "key", "value"), found, strict=True):
        # Windows of the first tokens of the shorter grid end at its edge; what they see reaches no further than 256.
        wanted, plain = (answer.gradients[name][:, -3072:] for answer in (truth, eager))
        assert_as_good_as_eager(ours, plain, wanted, summed=truth.summed[name], what=f"the gradient of {name}")


def test_grouped_heads_sum_over_their_queries() -> None:
    problem = replace(PROBLEM, heads=6, heads_kv=2)
    shape = (2, *problem.shape)
    query = noise(*shape, 6, 64).requires_grad_()
    key, value = (noise(*shape, 2, 64).requires_grad_() for _ in range(2))
    grad = noise(*query.shape)
    out, _ = attention_with_lse(query, key, value, problem.kernel_size, backend="hopper")
    grouped = torch.autograd.grad(out, (query, key, value), grad)
    wide = [tensor.detach().repeat_interleave(3, -2).requires_grad_() for tensor in (key, value)]
    out, _ = attention_with_lse(query, *wide, problem.kernel_size, backend="hopper")
    repeated = torch.autograd.grad(out, (query, *wide), grad)
    assert torch.equal(grouped[0], repeated[0])
    for ours, theirs in zip(grouped[1:], repeated[1:], strict=True):
        summed = theirs.float().unflatten(-2, (2, 3)).sum(-2)
        torch.testing.assert_close(ours.float(), summed, rtol=2e-2, atol=2e-2)
