"""Times of a GPU that is not the current one are taken on that GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import vicinal
from vicinal import _clock, tuning
from vicinal.bench.run import Steps, _cuda_clock

SECOND = torch.device("cuda", 1)


class Event:
    """Knows the stream that it was recorded on, by default that of the current device, as CUDA's events do."""

    streams: list[Any]

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: str = "stream of cuda:0") -> None:
        self.streams.append(stream)

    def elapsed_time(self, end: Event) -> float:
        return 1.0


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    Event.streams = []
    nowhere = torch.empty(1)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device or 'cuda:0'}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch, "empty", lambda *size, **more: nowhere)
    return Event.streams


def test_the_tuner_measures_where_it_runs(streams: list[Any]) -> None:
    assert tuning._clock(lambda: None, SECOND) == 1.0
    assert streams == ["stream of cuda:1"] * 2


def test_benchmarks_measure_where_they_run(streams: list[Any]) -> None:
    assert _cuda_clock(SECOND)(Steps(lambda: None, lambda: None))[0] == 1e-3
    assert streams == ["stream of cuda:1"] * 2


def test_events_are_made_in_one_place() -> None:
    root = Path(vicinal.__file__).parent
    made = [path for path in root.rglob("*.py") if re.search(r"cuda\.Event\(", path.read_text(encoding="utf-8"))]
    assert made == [Path(_clock.__file__)]
