"""The harness: right before fast, everyone in one table, one schema, whole files."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vicinal.backends.base import Inputs
from vicinal.bench import run as harness
from vicinal.bench.contender import Call, Contender
from vicinal.bench.contenders import MOST_DENSE_OPERATIONS, Dense, contenders
from vicinal.bench.flex import BLOCK, FlexTiled, block_mask, mask_mod, sorted_tokens, tiled_block_mask, tiles
from vicinal.bench.results import COLUMNS, Measurement, load, save
from vicinal.bench.run import Effort, run, useful_flops
from vicinal.bench.specs import BOTH, FORWARD, SUITES, Spec, suite
from vicinal.bench.table import markdown, speedup
from vicinal.errors import InvalidProblem
from vicinal.problem import Problem
from vicinal.testing.truth import mask

QUICK = Effort(rounds=2, most=2, seconds=0)
SPEC = Spec("tiny", Problem.grid((7, 9), 3, stride=2, heads=2, head_dim=8, dtype="float32"), "here", (FORWARD, BOTH))


class Cheat:
    """Dense attention that calls itself something else; fast and wrong."""

    name, is_dense = "cheat", False

    def why_not(self, problem: Problem, device: torch.device, what: str) -> tuple[str, ...]:
        return ()

    def prepare(self, problem: Problem, inputs: Inputs) -> Any:
        return Dense().prepare(problem, inputs)


class CheatBackward(Cheat):
    """Right forward, but half the gradient of the values."""

    name = "cheat backward"

    def prepare(self, problem: Problem, inputs: Inputs) -> Any:
        right = contenders(("blocked",))[0].prepare(problem, inputs)

        def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return right(query, key, (value + value.detach()) / 2)

        return Call(call)


class Broken(Cheat):
    """Another library that does not work here."""

    name = "broken"

    def prepare(self, problem: Problem, inputs: Inputs) -> Any:
        raise OSError("no such kernel\nand a long story")


def test_a_run_measures_every_pass_of_everyone_asked_for():
    seen: list[tuple[str, int, int]] = []
    rows = run((SPEC,), only=("blocked", "dense"), effort=QUICK, progress=lambda *step: seen.append(step))
    assert [(row.backend, row.pass_) for row in rows] == [
        ("blocked", FORWARD), ("dense", FORWARD), ("blocked", BOTH), ("dense", BOTH),
    ]  # fmt: skip
    assert seen == [("tiny, forward", 0, 2), ("tiny, forward+backward", 1, 2)]
    for row in rows:
        assert row.milliseconds is not None
        assert row.milliseconds > 0
        assert row.host_milliseconds == row.milliseconds
        assert (row.error is None) == (row.backend == "dense")
        assert not row.is_red
        assert row.useful_tflops_per_s == pytest.approx(useful_flops(SPEC.problem, row.pass_) / row.milliseconds / 1e9)


@pytest.mark.parametrize("cheat", [Cheat(), CheatBackward()], ids=lambda cheat: cheat.name)
def test_who_is_wrong_gets_no_time_and_no_speedup(cheat: Contender, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "contenders", lambda only=(): (cheat, *contenders(("blocked", "dense"))))
    rows = run((SPEC,), effort=QUICK)
    wrong = next(row for row in rows if row.backend == cheat.name and row.pass_ == BOTH)
    assert wrong.is_red
    assert wrong.milliseconds is None
    assert wrong.error is not None
    assert wrong.error > 1
    assert "wrong: " in markdown(rows)
    base = next(row for row in rows if row.backend == "dense")
    assert speedup(wrong, base) is None
    assert speedup(replace(wrong, milliseconds=1.0), base) is None
    assert speedup(base, replace(wrong, milliseconds=1.0)) is None


def test_a_peer_that_fails_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "contenders", lambda only=(): (Broken(), *contenders(("blocked",))))
    with pytest.warns(UserWarning, match=r"^broken is left out of tiny, forward.*: OSError: no such kernel$"):
        rows = run((SPEC,), effort=QUICK)
    assert [row.backend for row in rows] == ["blocked", "blocked"]


def test_each_pass_is_recorded_as_soon_as_it_is_measured():
    recorded: list[list[Measurement]] = []
    steps: list[int] = []
    rows = run(
        (SPEC,),
        only=("blocked",),
        effort=QUICK,
        progress=lambda *step: steps.append(len(recorded)),
        record=recorded.append,
    )
    assert steps == [0, 1]
    assert [row for some in recorded for row in some] == rows


def test_dense_attention_is_not_asked_for_what_takes_seconds():
    asked = {
        spec.name: not contender.why_not(spec.problem, torch.device("cuda"), FORWARD)
        for contender in contenders(("dense",))
        for spec in suite("h100-forward")
    }
    assert [name for name, runs in asked.items() if not runs] == ["LTX stage 4", "LTX stage 5"]
    million = Problem.grid((10**6,), 5, heads=8)
    reasons = ("all pairs of 1000000 tokens take 2.0e+15 operations",)
    assert Dense().why_not(million, torch.device("cpu"), FORWARD) == reasons
    assert MOST_DENSE_OPERATIONS < 2.0e15


def test_nan_is_wrong():
    row = Measurement("d", "cpu", "x", "v", "c", "b", FORWARD, 1.0, 0.1, 1.0, 0.1, None, math.nan)
    assert row.is_red
    assert "wrong" in markdown([row])


def test_threads_are_given_back():
    before = torch.get_num_threads()
    run((SPEC,), only=("blocked",), effort=replace(QUICK, threads=before + 1))
    assert torch.get_num_threads() == before


def test_unknown_names_are_refused():
    with pytest.raises(InvalidProblem, match=r"backends must be among .*dense.*, got fast"):
        run((SPEC,), only=("fast", "blocked"))
    with pytest.raises(
        InvalidProblem,
        match="suite must be one of smoke, cpu, h100-forward, h100-backward, h100-portable, h100-dinat, got 'gpu'",
    ):
        suite("gpu")
    with pytest.raises(InvalidProblem, match=r"no contender runs tiny .* natten: .*CUDA devices only"):
        run((SPEC,), only=("natten",))


def test_every_suite_has_names_of_its_own_and_a_source_each():
    for specs in SUITES.values():
        assert len({spec.name for spec in specs}) == len(specs)
        for spec in specs:
            assert spec.source
            assert spec.passes
            assert not spec.over_dense or len(spec.over_dense) == len(spec.passes)


@pytest.mark.parametrize("problem", [
    Problem.grid((300,), 40, stride=7),
    Problem.grid((19, 20), (5, 6), dilation=(3, 1), is_causal=(False, True)),
    Problem.grid((4, 9, 8), (2, 3, 8), stride=(1, 2, 1), is_causal=(True, False, False)),
])  # fmt: skip
def test_flex_gets_the_same_mask(problem: Problem):
    dense, n = mask(problem), problem.tokens
    token = torch.arange(n)
    mod = mask_mod(problem)(torch.tensor(0), torch.tensor(0), token[:, None], token[None, :])
    assert torch.equal(mod, dense)
    blocks = block_mask(problem, torch.device("cpu"))
    padded = torch.zeros(-(-n // BLOCK) * BLOCK, -(-n // BLOCK) * BLOCK, dtype=torch.bool)
    padded[:n, :n] = dense
    tiles = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    partial_, full = tiles.any(2) & ~tiles.all(2), tiles.all(2)
    for counts, indices, wanted in (
        (blocks.kv_num_blocks, blocks.kv_indices, partial_),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, full),
    ):
        for row in range(len(wanted)):
            assert sorted(indices[0, 0, row, : counts[0, 0, row]].tolist()) == wanted[row].nonzero()[:, 0].tolist()


SORTED = [
    Problem.grid((300,), 40, stride=7),
    Problem.grid((19, 37), (5, 6), dilation=(3, 1), is_causal=(False, True)),
    Problem.grid((4, 9, 31), (2, 3, 8), stride=(1, 2, 1), dilation=(1, 1, 3), is_causal=(True, False, False)),
]


@pytest.mark.parametrize("problem", SORTED, ids=str)
def test_sorted_tokens_get_the_same_mask(problem: Problem):
    order = sorted_tokens(problem, tiles(problem), torch.device("cpu"))
    assert torch.equal(order.tokens[order.places], torch.arange(problem.tokens))
    blocks, n = tiled_block_mask(order), len(order.tokens)
    token = torch.arange(n)
    seen = blocks.mask_mod(torch.tensor(0), torch.tensor(0), token[:, None], token[None, :])
    firsts: dict[int, int] = {}
    for place, at in enumerate(order.tokens.tolist()):
        firsts.setdefault(at, place)  # copies of a token that fill a tile come after it
    real = torch.tensor([firsts[at] for at in range(problem.tokens)])
    padding = torch.ones(n, dtype=torch.bool)
    padding[real] = False
    assert not seen[:, padding].any()
    assert torch.equal(seen[real][:, real], mask(problem))
    assert torch.equal(seen[order.places][:, real], mask(problem))
    found = seen.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2).flatten(2)
    for counts, indices, wanted in (
        (blocks.kv_num_blocks, blocks.kv_indices, found.any(2) & ~found.all(2)),
        (blocks.full_kv_num_blocks, blocks.full_kv_indices, found.all(2)),
    ):
        for row in range(len(wanted)):
            assert sorted(indices[0, 0, row, : counts[0, 0, row]].tolist()) == wanted[row].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("problem", SORTED, ids=str)
def test_sorting_is_undone_and_not_timed(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """What enters and leaves unchanged comes back in place."""
    monkeypatch.setattr("vicinal.bench.flex.attention", lambda problem, blocks: lambda query, key, value: value)
    value = torch.randn(1, *problem.shape, 2, 8)
    call = FlexTiled().prepare(problem, Inputs(value, value, value))
    assert torch.equal(call(value, value, value), value)


def test_rows_survive_the_file(tmp_path: Path):
    rows = run((SPEC,), only=("blocked", "dense"), effort=QUICK)
    path = save(rows, tmp_path)
    assert path.parent.parent == tmp_path
    assert path.name == f"{rows[0].date}.csv"
    assert path.read_text().splitlines()[0] == (
        "date,device,driver,versions,case,backend,pass,milliseconds,spread,host_milliseconds,"
        "useful_tflops_per_s,predicted_milliseconds,error"
    )
    again = load(path)
    close = partial(pytest.approx, rel=1e-4, nan_ok=True)
    for one, two in zip(rows, again, strict=True):
        assert (one.case, one.backend, one.pass_, one.versions) == (two.case, two.backend, two.pass_, two.versions)
        assert two.milliseconds == close(one.milliseconds)
        assert two.error == (close(one.error) if one.error else one.error)
    assert len(load(save([replace(rows[0], milliseconds=7.0)], tmp_path))) == len(rows)  # the latest counts
    assert load(path)[0].milliseconds == 7.0
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = run((SPEC,), only=("blocked",), effort=QUICK)
    path = save(rows, tmp_path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save([*rows, replace(rows[0], case=Unprintable())], tmp_path)  # pyright: ignore
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


class Unprintable(str):
    def __new__(cls) -> Unprintable:
        return super().__new__(cls, "x")

    def __str__(self) -> str:
        raise TypeError("no text")


def test_a_file_of_something_else_is_refused(tmp_path: Path):
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(InvalidProblem, match=f"must have the columns {', '.join(COLUMNS)}"):
        load(other)
    with pytest.raises(InvalidProblem, match="cannot be read"):
        load(tmp_path / "missing.csv")
