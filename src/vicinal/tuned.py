"""What was measured to be fastest, remembered: a JSON file per device in the user's cache directory, or in the package.

A cost model ranks the ways to cut a problem, and leaves a few of them open. `vicinal.tuning` measures those and
remembers the best here; `pick` looks it up. Nothing is ever measured in here, and a file that cannot be read costs
one warning: choices then are the cost model's, as they are without it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

from vicinal._files import write_whole
from vicinal._tuples import times
from vicinal.errors import InvalidProblem
from vicinal.hardware import Hardware
from vicinal.problem import Problem
from vicinal.tiling import Tiling

VARIABLE = "VICINAL_CACHE"
"""Names the folder of the user's files; by default `vicinal` in the system's folder for caches."""

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to cut and run a pass. Like a `Tiling` it changes the time, never the answer.

    Args:
        rows, columns: tokens of a tile and of the boxes that it walks, per axis; queries and keys in a forward pass.
        warps, stages: warps of a block, and boxes in flight; 0 leaves them to the backend.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    warps: int = 0
    stages: int = 0

    def __post_init__(self) -> None:
        if self.tiling and min(self.warps, self.stages) < 0:
            raise InvalidProblem(f"warps and stages must be at least 0, got {self.warps} and {self.stages}")

    @property
    def tiling(self) -> Tiling:
        return Tiling(self.rows, self.columns)

    def __str__(self) -> str:
        how = f", {self.warps} warps, {self.stages} stages" if self.warps else ""
        return f"{times(self.rows)} by {times(self.columns)}{how}"


@dataclass(frozen=True)
class Entry:
    """What was found for one pass of one problem: the best choice, its time, and that of the cost model's first."""

    choice: Choice
    milliseconds: float
    untuned_milliseconds: float


Key = tuple[str, str, str]
"""Backend, pass, and `fingerprint` of a problem."""


@lru_cache(maxsize=4096)
def fingerprint(problem: Problem) -> str:
    """All of a problem that its time depends on, as words.

    Example:
        >>> fingerprint(Problem.grid((30, 48), 7, stride=(1, 2), heads=4, head_dim=32))
        '30x48 window 7x7 stride 1x2 dilation 1x1 causal 0x0 batch 1 heads 4/4 dims 32/32 bfloat16'
    """
    causal = times(tuple(int(flag) for flag in problem.is_causal))
    words = (
        f"{times(problem.shape)} window {times(problem.kernel_size)} stride {times(problem.stride)} "
        f"dilation {times(problem.dilation)} causal {causal} batch {problem.batch} "
        f"heads {problem.heads}/{problem.heads_kv} dims {problem.head_dim}/{problem.head_dim_v} {problem.dtype}"
    )
    words += f" additional {problem.additional}" if problem.additional else ""
    return words + (" position bias" if problem.position_bias else "")


@lru_cache(maxsize=1)
def versions() -> str:
    """Of what the times depend on: this library and the kernels' compiler."""
    found: list[str] = []
    for package in ("vicinal", "triton"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


def cache_folder() -> Path:
    """Where the user's files lie: `VICINAL_CACHE`, or `vicinal` in the folder that the system has for caches."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or _home() / ".cache"
    return Path(base) / "vicinal"


def _home() -> Path:
    """The user's folder, or that of temporary files for a user without one, as some containers have."""
    try:
        return Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())


def path_of(device: str, folder: Path | None = None) -> Path:
    """The file of a device.

    Example:
        >>> path_of("NVIDIA A30", Path("there")).as_posix()
        'there/tuned-nvidia-a30.json'
    """
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return (folder or cache_folder()) / f"tuned-{name}.json"


def load(path: Path, *, whatever_version: bool = False) -> dict[Key, Entry]:
    """The entries of a file that `save` wrote, if they are of these versions.

    Args:
        path: the file.
        whatever_version: take those of others, too: the package's own table is better than nothing.

    Raises:
        InvalidProblem: if it is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, this library writes {FORMAT}")
        return _entries(found) if whatever_version or found["versions"] == versions() else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InvalidProblem(f"{path} cannot be read as results of tuning ({reason}); delete it") from None


def _entries(found: dict[str, Any]) -> dict[Key, Entry]:
    entries: dict[Key, Entry] = {}
    for backend, passes in found["backends"].items():
        for what, problems in passes.items():
            for words, fields in problems.items():
                choice = fields["choice"]
                rows, columns = (tuple(int(n) for n in choice[side]) for side in ("rows", "columns"))
                made = Choice(rows, columns, int(choice["warps"]), int(choice["stages"]))
                times_ms = float(fields["milliseconds"]), float(fields["untuned_milliseconds"])
                entries[backend, what, words] = Entry(made, *times_ms)
    return entries


def save(path: Path, device: str, entries: dict[Key, Entry]) -> None:
    """Write a file, whole or not at all."""
    backends: dict[str, dict[str, dict[str, Any]]] = {}
    for (backend, what, words), entry in sorted(entries.items()):
        fields = {**asdict(entry), "milliseconds": round(entry.milliseconds, 5)}
        fields["untuned_milliseconds"] = round(entry.untuned_milliseconds, 5)
        backends.setdefault(backend, {}).setdefault(what, {})[words] = fields
    text = json.dumps({"format": FORMAT, "device": device, "versions": versions(), "backends": backends}, indent=1)
    text = re.sub(r"\[[\d,\s]+\]", lambda sizes: " ".join(sizes[0].split()), text)  # for people: boxes in one line
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda file: file.write(text.encode() + b"\n"))


_known: dict[str, dict[Key, Entry]] = {}
"""By device: what files say, read when the device is first asked for."""

_insisted: dict[Key, Choice] = {}
"""What is being measured right now."""


def known(device: str) -> dict[Key, Entry]:
    """What is remembered of a device: the package's table, and the user's file over it.

    Warns:
        UserWarning: once, if a file cannot be read; it counts as empty.
    """
    if device not in _known:
        _known[device] = {}
        for path, is_ours in ((path_of(device, Path(str(files("vicinal") / "data"))), True), (path_of(device), False)):
            try:
                _known[device] |= load(path, whatever_version=is_ours) if path.exists() else {}
            except (InvalidProblem, OSError) as error:
                warnings.warn(str(error), stacklevel=2)
    return _known[device]


def remember(device: str, entries: dict[Key, Entry]) -> Path:
    """Add entries to the user's file of a device, and use them from now on.

    Raises:
        InvalidProblem: if there is a file that cannot be read; it stays as it is.
    """
    path = path_of(device)
    save(path, device, (load(path) if path.exists() else {}) | entries)
    known(device).update(entries)
    changed()
    return path


def forget() -> None:
    """Read files again when they are next needed."""
    _known.clear()
    changed()


epoch = 0
"""Counts changes: whoever keeps what was picked looks whether it still is the same."""


def changed() -> None:
    global epoch
    epoch += 1


@contextmanager
def insist(choices: dict[Key, Choice]) -> Generator[None]:
    """Let `pick` answer these choices, so that they can be measured."""
    before = dict(_insisted)
    _insisted.update(choices)
    changed()
    try:
        yield
    finally:
        _insisted.clear()
        _insisted.update(before)
        changed()


def pick(backend: str, what: str, problem: Problem, hardware: Hardware) -> Choice | None:
    """The choice remembered for a pass of a problem, if there is one; whoever asks must see whether he can use it."""
    key = backend, what, fingerprint(problem)
    if key in _insisted:
        return _insisted[key]
    entry = known(hardware.name).get(key)
    return None if entry is None else entry.choice
