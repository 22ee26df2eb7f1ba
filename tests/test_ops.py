"""The operator as PyTorch sees it."""

import subprocess
import sys
import textwrap
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import vicinal
from vicinal import _calls, ops, tuning
from vicinal.backends.base import Gradients, Output


def tensors(*shape, dtype=torch.float32, grad=True, heads=4, heads_kv=2, head_dim=8, head_dim_v=6):
    batch, *grid = shape
    widths = ((heads, head_dim), (heads_kv, head_dim), (heads_kv, head_dim_v))
    return [torch.randn(batch, *grid, *width, dtype=dtype, requires_grad=grad) for width in widths]


def strided(*shape):
    """Slices of one fused projection, as a layer makes them."""
    batch, *grid = shape
    fused = torch.randn(batch, *grid, 3, 2, 8)
    return [fused[..., i, :, :].requires_grad_() for i in range(3)]


@pytest.mark.parametrize("case", ["plain", "strided", "additional", "no gradient", "tiled", "bias", "everything"])
def test_opcheck(case):
    q, k, v = strided(2, 5, 7) if case == "strided" else tensors(2, 5, 7, grad=case != "no gradient")
    extra = [None, None, None]
    if case in ("additional", "everything"):
        extra = [torch.randn(2, 3, 2, 8, requires_grad=True), torch.randn(2, 3, 2, 6, requires_grad=True)]
        extra.append(torch.tensor([1, 3]))
    tiling = [2, 3, 4, 5, 0] if case == "tiled" else []
    bias = torch.randn(4, 5, 3, requires_grad=True) if case in ("bias", "everything") else None
    arguments = [q, k, v, *extra, bias, [3, 2], [1, 2], [1, 3], [True, False], 0.3, "", tiling, True]
    checks = opcheck(ops.attention, arguments)
    assert set(checks.values()) == {"SUCCESS"}


def run_fresh(code: str) -> str:
    """Run code as a program of its own and return what it prints."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_operator_needs_nothing_private():
    """Gradients, compiled and by the operator, are those of eager calls where PyTorch has lost what speeds it up."""
    printed = run_fresh("""
        import builtins
        usual = builtins.__import__
        def without(name, names=None, *rest):
            if name == "torch._library.autograd" and (names or {}).get("__name__") == "vicinal.ops":
                raise ImportError(name)
            return usual(name, names, *rest)
        builtins.__import__ = without
        import torch, vicinal
        from vicinal import ops

        builtins.__import__ = usual
        assert ops.make_autograd_impl is None
        tensors = [torch.randn(2, 6, 9, 2, 8, requires_grad=True) for _ in range(3)]
        call = lambda q, k, v: vicinal.neighborhood_attention(q, k, v, (3, 5)).sin().sum()
        plain = torch.autograd.grad(call(*tensors), tensors)
        for a, b in zip(torch.autograd.grad(torch.compile(call, fullgraph=True)(*tensors), tensors), plain):
            torch.testing.assert_close(a, b)
        with torch.no_grad():
            more = None, None, None, None, [3, 5], [1, 1], [1, 1], [False, False], 0.3, "", [], False
            out, _ = ops.attention(*tensors, *more)
        assert out.shape == tensors[0].shape
        print("fine")
    """)
    assert "fine" in printed


def test_compiling_is_a_fine_first_call_and_other_batch_sizes_reuse_it():
    printed = run_fresh("""
        import torch, vicinal
        from torch._dynamo.utils import counters

        call = torch.compile(lambda q, k, v: vicinal.neighborhood_attention(q, k, v, (3, 5)).sin(), fullgraph=True)
        def compare(batch):
            q, k, v = (torch.randn(batch, 6, 9, 2, 8, requires_grad=True) for _ in range(3))
            out, eager = call(q, k, v), vicinal.neighborhood_attention(q, k, v, (3, 5)).sin()
            torch.testing.assert_close(out, eager)
            for ours, theirs in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, eager)), strict=True):
                torch.testing.assert_close(ours, theirs)
        compare(2)
        compare(3)  # the first other size makes the batch symbolic
        before = counters["stats"]["unique_graphs"]
        for batch in (4, 5, 11):
            compare(batch)
        print(before, counters["stats"]["unique_graphs"])
    """)
    before, after = printed.split()
    assert before == after


def test_compiled_calls_learn_a_bias():
    table = torch.randn(4, 5, 9, requires_grad=True)
    leaves = [*tensors(2, 6, 9), table]
    call = lambda q, k, v, t: vicinal.neighborhood_attention(q, k, v, (3, 5), position_bias=t * 2).sin()  # noqa: E731
    found = [function(*leaves) for function in (torch.compile(call, fullgraph=True, backend="aot_eager"), call)]
    torch.testing.assert_close(*found)
    gradients = [torch.autograd.grad(out.sum(), leaves) for out in found]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_symbolic_batch_never_recompiles():
    printed = run_fresh("""
        import torch, vicinal
        from torch._dynamo.utils import counters

        call = torch.compile(lambda q: vicinal.na1d(q, q, q, 3), fullgraph=True, dynamic=True)
        for batch in (5, 3, 7):  # PyTorch takes sizes that are equal in the first call for one
            call(torch.randn(batch, 9, 2, 8))
        print(counters["stats"]["unique_graphs"])
    """)
    assert printed.split() == ["1"]


def test_importing_is_light():
    printed = run_fresh("""
        import sys, torch
        before = set(sys.modules)
        import vicinal
        heavy = {"triton", "matplotlib", "typer", "rich", "PIL", "skimage", "hypothesis", "torch._dynamo"}
        print(sorted(heavy & (set(sys.modules) - before)))
    """)
    assert printed.strip() == "[]"


def test_importing_takes_under_a_second_beyond_torch():
    printed = run_fresh("""
        import torch, time
        start = time.perf_counter()
        import vicinal
        print(time.perf_counter() - start)
    """)
    assert float(printed) < 1


def test_export_keeps_the_operator_and_its_answer():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return vicinal.neighborhood_attention(q, k, v, (3, 2), stride=(2, 1), scale=0.0) + 1

    inputs = tuple(tensors(2, 5, 7, grad=False))
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(Model(), inputs, dynamic_shapes=[{0: batch}] * 3)
    assert "vicinal.attention.default" in str(program.graph)
    other = tuple(tensors(6, 5, 7, grad=False))
    torch.testing.assert_close(program.module()(*other), Model()(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_inputs(dtype):
    q, k, v = tensors(1, 6, 5)
    with torch.autocast("cpu", dtype=dtype):
        out = vicinal.neighborhood_attention(q, k, v, 3)
    assert out.dtype == dtype
    table = torch.randn(4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        biased = vicinal.neighborhood_attention(q, k, v, 3, position_bias=table)
    (gradient,) = torch.autograd.grad(biased.sum(), table)
    assert gradient.dtype == torch.float32
    lowered = vicinal.neighborhood_attention(*(t.to(dtype) for t in (q, k, v)), 3)
    assert torch.equal(out, lowered)
    with torch.autocast("cpu", dtype=dtype):  # as in a layer, whose projections are lowered and whose table is not
        mixed = vicinal.neighborhood_attention(*(t.to(dtype) for t in (q, k, v)), 3, position_bias=table)
        with pytest.raises(vicinal.InvalidProblem, match=r"query must have one of the dtypes"):
            vicinal.neighborhood_attention(q.long(), k, v, 3)
    assert torch.equal(mixed, biased)
    out.sum().backward()
    assert {t.grad.dtype for t in (q, k, v)} == {torch.float32}
    with torch.autocast("cpu", dtype=dtype):
        doubled = vicinal.neighborhood_attention(*(t.double() for t in (q, k, v)), 3)
    assert doubled.dtype == torch.float64


def test_a_step_of_training_looks_at_tensors_of_a_kind_once(monkeypatch):
    calls = []
    of = ops.Problem.of
    monkeypatch.setattr(ops.Problem, "of", lambda *args, **more: calls.append(1) or of(*args, **more))
    table = torch.randn(4, 5, 5, requires_grad=True)
    for count, shape in ((2, (1, 17, 5)), (2, (1, 17, 5)), (4, (1, 5, 17))):
        q, k, v = tensors(*shape)
        with FlopCounterMode(display=False):  # which has to see the operator
            vicinal.neighborhood_attention(q, k, v, 3, position_bias=table).sum().backward()
        # Once as the caller names the window, once as the operator does.
        assert len(calls) == count


def test_the_operator_settles_a_call_once_and_goes_straight_to_the_backend(monkeypatch):
    """As compiled code calls it. Counted, since times on a busy machine say nothing."""
    settled, calls = [], []

    class Idle:
        """Computes nothing, so that what is counted is the way to it and back."""

        def forward(self, plan, inputs):
            return Output(inputs.query.clone(), inputs.query.sum(-1))

        def backward(self, plan, inputs, output, grad_out, grad_lse):
            return Gradients(*(t.clone() for t in inputs[:3]), position_bias=inputs.position_bias.clone())

    monkeypatch.setattr(tuning, "settle", lambda *args, **more: settled.append(1) or (Idle(), None))
    monkeypatch.setattr(_calls, "_known", {})
    arguments = [*tensors(2, 5, 19, grad=False), None, None, None, torch.zeros(4, 5, 5)]
    arguments += [[3, 3], [1, 1], [1, 1], [False, False], 0.3, "", [], True]

    def on_call(frame, event, _):
        if event == "call":
            calls.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")

    for _ in range(2):
        calls.clear()
        sys.setprofile(on_call)
        try:
            with torch.no_grad():
                out, lse = torch.ops.vicinal.attention(*arguments)
                torch.ops.vicinal.attention_backward(out, None, out, lse, *arguments)
        finally:
            sys.setprofile(None)
    assert len(settled) == 1
    assert not [call for call in calls if "torch/_library" in call or "_dynamo" in call]
    assert len(calls) <= 57, calls


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, lambda: FlopCounterMode(display=False)])
def test_what_was_right_before_does_not_let_through_what_is_wrong(mode):
    q, k, v = tensors(1, 9, 5)
    with mode():
        for good, bad, message in ((1, True, "kernel_size"), (3, 3.0, "kernel_size")):
            vicinal.neighborhood_attention(q, k, v, good)
            with pytest.raises(vicinal.InvalidProblem, match=message):
                vicinal.neighborhood_attention(q, k, v, bad)
        vicinal.neighborhood_attention(q, k, v, 3, is_causal=True)
        with pytest.raises(vicinal.InvalidProblem, match="is_causal"):
            vicinal.neighborhood_attention(q, k, v, 3, is_causal=1)
        with pytest.raises(vicinal.InvalidProblem, match="key and query must share one dtype"):
            vicinal.neighborhood_attention(q, k.double(), v, 3)


@pytest.mark.parametrize("dilation", [1, 3])
def test_the_flop_counter_counts_pairs_inside_windows(dilation):
    q, k, v = tensors(2, 10, 12)
    more = [torch.randn(2, 5, 2, 8), torch.randn(2, 5, 2, 6)]
    with FlopCounterMode(display=False) as counter:
        out = vicinal.neighborhood_attention(
            q, k, v, (3, 4), dilation=dilation, additional_keys=more[0], additional_values=more[1]
        )
        out.sum().backward()
    pairs = 2 * 4 * 10 * 12 * (3 * 4 + 5)
    counts = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert counts == {
        "vicinal.attention": 2 * pairs * (8 + 6),
        "vicinal.attention_backward": 2 * pairs * (3 * 8 + 2 * 6),
    }


def test_a_counter_made_before_the_first_call_counts_it():
    printed = run_fresh("""
        import torch, vicinal
        from torch.utils.flop_counter import FlopCounterMode
        q = torch.randn(1, 8, 1, 4)
        with FlopCounterMode(display=False) as counter:
            vicinal.na1d(q, q, q, 3)
        print(counter.get_total_flops())
    """)
    assert int(printed) == 2 * 8 * 3 * (4 + 4)


def test_derivatives_that_are_not_offered_are_refused_in_words():
    q, k, v = tensors(1, 6, 5, dtype=torch.float64)
    out = vicinal.neighborhood_attention(q, k, v, 3)
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(vicinal.Unsupported, match="second derivative of neighborhood attention is not offered"):
        gradient.sum().backward()
    with pytest.raises(vicinal.Unsupported, match=r"forward-mode derivatives \(jvp\)"):
        torch.func.jvp(lambda t: vicinal.neighborhood_attention(t, k, v, 3), (q.detach(),), (q.detach(),))


def test_retained_graphs_give_the_same_gradient_twice():
    q, k, v = tensors(1, 6, 5)
    out, lse = vicinal.attention_with_lse(q, k, v, 3)
    loss = out.square().sum() + lse.sum()
    first = torch.autograd.grad(loss, (q, k, v), retain_graph=True)
    second = torch.autograd.grad(loss, (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_checkpointing_gives_the_same_gradients():
    q, k, v = tensors(1, 6, 5)
    call = lambda *t: vicinal.neighborhood_attention(*t, 3).sin()  # noqa: E731
    plain = torch.autograd.grad(call(q, k, v).sum(), (q, k, v))
    saved = torch.utils.checkpoint.checkpoint(call, q, k, v, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(saved.sum(), (q, k, v)), strict=True))


def test_vmap_equals_a_loop():
    q, k, v = tensors(3, 6, 5, grad=False)
    stacked = torch.stack([q, q + 1])
    mapped = torch.vmap(lambda t: vicinal.neighborhood_attention(t, k, v, 3))(stacked)
    looped = torch.stack([vicinal.neighborhood_attention(t, k, v, 3) for t in stacked])
    torch.testing.assert_close(mapped, looped)


def test_bad_arguments_are_named_when_compiling_too():
    call = torch.compile(lambda q: vicinal.na1d(q, q, q, 9), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"kernel_size \* dilation = 9 \* 1 = 9 > axis length 6"):
        call(torch.randn(1, 6, 2, 4))


@pytest.mark.parametrize("wants_grad", [False, True])
def test_a_traced_layer_takes_other_grids_and_gives_gradients(wants_grad: bool):
    layer = vicinal.nn.NeighborhoodAttention2D(
        32, 4, (3, 5), is_causal=(True, False), position_bias=True, rotary=True, qk_norm=True
    )
    with warnings.catch_warnings(), torch.set_grad_enabled(wants_grad):
        warnings.simplefilter("ignore")  # tracing is deprecated, and tells of shapes that are checked
        traced = torch.jit.trace(layer, torch.randn(2, 6, 9, 32))
    x = torch.randn(3, 8, 7, 32, requires_grad=True)
    out, expected = traced(x), layer(x)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(y.square().sum(), [x, layer.rpb]) for y in (out, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_halves_are_traced():
    q, k, v = torch.randn(3, 1, 6, 9, 2, 8)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        weights = vicinal.neighborhood_scores(q, k, (3, 5), is_causal=(True, False)).softmax(-1)
        return vicinal.neighborhood_aggregate(weights, v, (3, 5), is_causal=(True, False))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(attend, (q, k, v))
    torch.testing.assert_close(traced(v, q, k), attend(v, q, k))


def test_what_was_exported_without_gradients_has_them():
    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return vicinal.neighborhood_attention(q, k, v, (3, 5))

    inputs = [torch.randn(1, 6, 9, 2, 8) for _ in range(3)]
    with torch.no_grad():
        program = torch.export.export(Attend(), tuple(inputs)).module()
    inputs = [each.requires_grad_() for each in inputs]
    found, expected = (torch.autograd.grad(f(*inputs).square().sum(), inputs) for f in (program, Attend()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
