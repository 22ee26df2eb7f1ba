"""What tuning measures, remembers and refuses; that nothing tunes unless asked."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vicinal import backends, tuned, tuning
from vicinal.backends import blocked, hopper
from vicinal.backends import triton as portable
from vicinal.backends.base import Gradients, Inputs, Output
from vicinal.backends.triton.cost import best_cut, choice_of, cut_as, cuts, open_cuts, room_of, smem_bytes
from vicinal.bench.specs import SUITES
from vicinal.errors import InvalidProblem
from vicinal.functional import neighborhood_attention
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling
from vicinal.tuned import Choice, Entry, fingerprint

H100 = Hardware.named("h100-sxm")
PROBLEM = Problem.grid((14, 22), (5, 7), heads=2, head_dim=16, dtype="float32")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of its own, and nothing remembered."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(tuning.VARIABLE, raising=False)
    tuned.forget()
    yield tmp_path / "cache"
    tuned.forget()


@dataclass
class Paced:
    """The blocked backend, with a pass of gradients that has choices. Its time is what we say, its calls are listed."""

    pace: dict[Choice, float]
    name: str = "paced"
    gradient_passes: tuple[str, ...] = ("keys",)
    calls: list[str] = field(default_factory=list)
    clock: float = 0.0

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        return ()

    def tilings(self, problem: Problem, hardware: Hardware) -> Iterable[Tiling]:
        return [choice.tiling for choice in self.pace]

    def choices(self, what: str, problem: Problem, hardware: Hardware) -> Iterable[Choice]:
        return list(self.pace)

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        self.calls.append("forward")
        self.clock += next(time for choice, time in self.pace.items() if choice.tiling == plan.tiling)
        return blocked.backend.forward(plan, inputs)

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        self.calls.append("backward")
        chosen = tuned.pick(self.name, "keys", plan.problem, backends.present(CPU))
        self.clock += self.pace[chosen or next(iter(self.pace))]
        return blocked.backend.backward(plan, inputs, output, grad_out, grad_lse, into)


SLOW, FAST, SAME = Choice((4, 4), (4, 8)), Choice((4, 8), (4, 8)), Choice((8, 8), (4, 4))


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Paced:
    backend = Paced({SLOW: 2.0, FAST: 1.0, SAME: 1.995})

    def clock(step: Any, device: torch.device) -> float:
        before = backend.clock
        step()
        return backend.clock - before

    monkeypatch.setattr(tuning, "_clock", clock)
    monkeypatch.setattr(backends, "ALL", (backend, *backends.ALL))
    return backend


def test_the_fastest_is_found_remembered_and_used(paced: Paced, folder: Path) -> None:
    found = tuning.tune(PROBLEM, device="cpu", backend="paced")
    assert [(finding.what, finding.entry.choice) for finding in found] == [("forward", FAST), ("keys", FAST)]
    assert "50% less" in str(found[0]) and "best of 3" in str(found[0])
    hardware = backends.present(CPU)
    assert tuned.path_of(hardware.name).parent == folder
    tuned.forget()  # what another process would know
    assert tuned.pick("paced", "keys", PROBLEM, hardware) == FAST
    assert backends.settle(PROBLEM, CPU, "paced", None)[1].tiling == FAST.tiling
    assert backends.settle(replace(PROBLEM, heads=4), CPU, "paced", None)[1].tiling == SLOW.tiling
    insisted = backends.settle(PROBLEM, CPU, "paced", SAME.tiling)
    assert insisted[1].tiling == SAME.tiling


def test_noise_decides_nothing(paced: Paced) -> None:
    paced.pace.pop(FAST)
    found = tuning.tune(PROBLEM, device="cpu", backend="paced", keep=False)
    assert [finding.entry.choice for finding in found] == [SLOW, SLOW]
    assert not tuned.path_of(backends.present(CPU).name).exists()


def test_what_calls_keep_of_a_choice_is_made_before_the_clock_starts(
    paced: Paced, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[bool] = []
    last: list[int] = []
    clock, forward = tuning._clock, paced.forward

    def watched(call: Any, device: torch.device) -> float:
        met.append(last[-1] == tuned.epoch)
        return clock(call, device)

    def noted(plan: Plan, inputs: Inputs) -> Output:
        last.append(tuned.epoch)
        return forward(plan, inputs)

    monkeypatch.setattr(tuning, "_clock", watched)
    monkeypatch.setattr(paced, "forward", noted)
    tuning.tune(PROBLEM, device="cpu", backend="paced", gradients=False, keep=False)
    assert met and all(met)


def tensors(heads: int = 2) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, 1, 14, 22, heads, 16))


def test_no_call_tunes_unless_asked(paced: Paced, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    neighborhood_attention(*tensors(), kernel_size=(5, 7), backend="paced")
    assert paced.calls == ["forward"] and not folder.exists()
    with tuning.tuning():
        neighborhood_attention(*tensors(), kernel_size=(5, 7), backend="paced")
        tuned_with = len(paced.calls)
        assert tuned_with > 10 and folder.exists()
        neighborhood_attention(*tensors(), kernel_size=(5, 7), backend="paced")  # remembered
        assert len(paced.calls) == tuned_with + 1
    neighborhood_attention(*tensors(4), kernel_size=(5, 7), backend="paced")
    assert len(paced.calls) == tuned_with + 2
    monkeypatch.setenv(tuning.VARIABLE, "1")
    tuned.changed()  # the call above is remembered as settled
    neighborhood_attention(*tensors(4), kernel_size=(5, 7), backend="paced")
    assert len(paced.calls) > tuned_with + 10


def test_gradients_are_tuned_where_they_are_needed(paced: Paced) -> None:
    query, key, value = (tensor.requires_grad_() for tensor in tensors())
    with tuning.tuning():
        out = neighborhood_attention(query, key, value, kernel_size=(5, 7), backend="paced")
    assert "backward" in paced.calls
    out.sum().backward()
    assert tuned.pick("paced", "keys", PROBLEM, backends.present(CPU)) == FAST


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 1, "versions": VERSIONS, "backends": {"b": {"forward": {"x": {"choice": '
        '{"rows": [0], "columns": [1], "warps": 1, "stages": 1}, "milliseconds": 1, "untuned_milliseconds": 1}}}}}',
        "null",
        '{"format": 1}',
        '{"format": 2, "versions": "", "backends": {}}',
        '{"format": 1, "versions": VERSIONS, "backends": {"triton": {"forward": {"x": {"choice": 5}}}}}',
        '{"format": 1, "versions": VERSIONS, "backends": 3}',
        '{"format": 1, "versions": VERSIONS, "backends": {"triton": {"forward": {"x": {"choice": {"rows": ["a"]}}}}}}',
    ],
)
def test_a_bad_file_costs_one_warning_and_is_left_alone(text: str) -> None:
    hardware = backends.present(CPU)
    path = tuned.path_of(hardware.name)
    path.parent.mkdir()
    path.write_text(text.replace("VERSIONS", json.dumps(tuned.versions())))
    with pytest.warns(UserWarning, match=r"cannot be read as results of tuning \(.*delete it"):
        neighborhood_attention(*tensors(), kernel_size=(5, 7))
    neighborhood_attention(*tensors(4), kernel_size=(5, 7))  # warnings are errors here
    assert tuned.pick("blocked", "forward", PROBLEM, hardware) is None
    with pytest.raises(InvalidProblem, match="delete it"):
        tuned.remember(hardware.name, {})
    assert path.read_text() == text.replace("VERSIONS", json.dumps(tuned.versions()))


def test_what_was_found_with_other_versions_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(FAST, 1.0, 2.0)
    path = tuned.remember("some card", {("paced", "forward", fingerprint(PROBLEM)): entry})
    assert tuned.load(path) == {("paced", "forward", fingerprint(PROBLEM)): entry}
    monkeypatch.setattr(tuned, "versions", lambda: "others")
    assert tuned.load(path) == {} and len(tuned.load(path, whatever_version=True)) == 1


def test_fingerprints_tell_apart_what_takes_another_time() -> None:
    changes: tuple[dict[str, Any], ...] = (
        {"batch": 2},
        {"heads": 4},
        {"head_dim_v": 32},
        {"dtype": "float16"},
        {"additional": 3},
        {"position_bias": True},
        {"axes": Problem.grid((22, 14), (5, 7)).axes},
        {"axes": Problem.grid((14, 22), (7, 5)).axes},
        {"axes": Problem.grid((14, 22), (5, 7), stride=(1, 2)).axes},
        {"axes": Problem.grid((14, 22), (5, 7), dilation=(2, 1)).axes},
        {"axes": Problem.grid((14, 22), (5, 7), is_causal=(True, False)).axes},
    )
    words = {fingerprint(replace(PROBLEM, **change)) for change in changes}
    assert len(words | {fingerprint(PROBLEM)}) == len(changes) + 1
    assert fingerprint(replace(PROBLEM, scale=0.7)) == fingerprint(PROBLEM)


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"HOME": "/h"}, "/h/.cache/vicinal"),
        ("linux", {"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/vicinal"),
        ("darwin", {"HOME": "/h"}, "/h/Library/Caches/vicinal"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/vicinal"),
        ("linux", {"VICINAL_CACHE": "/mine", "XDG_CACHE_HOME": "/x"}, "/mine"),
    ],
)
def test_files_lie_where_the_system_keeps_caches(
    monkeypatch: pytest.MonkeyPatch, platform: str, variables: dict[str, str], expected: str
) -> None:
    for name in (tuned.VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", platform)
    assert tuned.cache_folder().as_posix() == expected


def test_a_user_without_a_folder_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (tuned.VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(Path, "home", no_home)
    assert tuned.cache_folder() == Path(tempfile.gettempdir()) / ".cache" / "vicinal"


@pytest.mark.parametrize("what", ["forward", *portable.backend.gradient_passes])
def test_portable_choices_fit_and_are_used_when_remembered(what: str) -> None:
    problem = Problem.grid((30, 48, 80), (18, 24, 24), heads=24, head_dim=128)
    choices = tuning.choices(portable.backend, what, problem, H100)
    assert len(set(choices)) == len(choices) > 3
    assert choices[0] == choice_of(best_cut(what, problem, H100)) == choice_of(cuts(what, problem, H100)[0])
    assert all(smem_bytes(what, problem, cut.shape) <= room_of(H100) for cut in open_cuts(what, problem, H100))
    for choice in choices:
        tuned.remember(H100.name, {("triton", what, fingerprint(problem)): Entry(choice, 1.0, 1.0)})
        assert choice_of(best_cut(what, problem, H100)) == choice
        if what == "forward":
            assert backends.preferred(portable.backend, problem, H100) == choice.tiling


@pytest.mark.parametrize(
    "choice",
    [
        Choice((4, 4), (4, 16), 4, 2),  # of another rank
        Choice((4, 4, 5), (4, 4, 4), 4, 2),
        Choice((4, 4, 4), (2, 4, 4), 4, 9),
        Choice((4, 4, 4), (2, 4, 4), 3, 2),
        Choice((16, 16, 16), (4, 4, 4), 4, 2),
    ],
    ids=str,
)
def test_a_remembered_choice_that_cannot_be_is_passed_over(choice: Choice) -> None:
    problem = Problem.grid((30, 48, 80), (18, 24, 24), heads=24, head_dim=128)
    assert cut_as("keys", problem, H100, choice) is None
    for what in ("forward", "keys"):
        tuned.remember(H100.name, {("triton", what, fingerprint(problem)): Entry(choice, 1.0, 1.0)})
        assert best_cut(what, problem, H100) == cuts(what, problem, H100)[0]
    assert backends.preferred(portable.backend, problem, H100) in portable.backend.tilings(problem, H100)


def test_a_choice_that_is_none_cannot_be_made() -> None:
    with pytest.raises(InvalidProblem, match="q_tile must be a tuple of integers of at least 1"):
        Choice((0, 4), (4, 4))
    with pytest.raises(InvalidProblem, match="warps and stages must be at least 0, got -1 and 2"):
        Choice((4, 4), (4, 4), -1, 2)


def test_the_package_s_table_is_used() -> None:
    path = tuned.path_of("h100-sxm", Path(str(files("vicinal") / "data")))
    entries = tuned.load(path, whatever_version=True)
    problems = {fingerprint(spec.problem): spec.problem for suite in SUITES.values() for spec in suite}
    assert {"hopper", "triton"} == {backend for backend, _, _ in entries}
    for (backend, what, words), entry in entries.items():
        assert entry.milliseconds < 0.99 * entry.untuned_milliseconds
        assert tuned.pick(backend, what, problems[words], H100) == entry.choice
        if backend == "triton":
            assert choice_of(best_cut(what, problems[words], H100)) == entry.choice
        else:
            assert backends.preferred(hopper.backend, problems[words], H100) == entry.choice.tiling


def test_the_user_s_file_comes_after_the_package_s_table(folder: Path) -> None:
    (key, entry), *_ = tuned.known("h100-sxm").items()
    own = replace(entry, choice=replace(entry.choice, rows=entry.choice.columns))
    tuned.remember("h100-sxm", {key: own})
    tuned.forget()
    assert tuned.known("h100-sxm")[key] == own
    assert len(tuned.known("h100-sxm")) > 1 == len(tuned.load(tuned.path_of("h100-sxm")))
