"""What was measured, as rows of one CSV schema."""

from __future__ import annotations

import csv
import datetime
import io
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from vicinal._files import write_whole
from vicinal.errors import InvalidProblem

PACKAGES = ("torch", "triton", "natten", "flash-attn", "diffusers")


@dataclass(frozen=True)
class Measurement:
    """A row: one contender on one pass of one case. `None` where there is nothing to say.

    Args:
        date, device, driver, versions: when, on what, with what.
        case, backend, pass_: who did what; the column is called `pass`.
        milliseconds: median time on the device.
        spread: the range of the middle half of the times, as a share of the median.
        host_milliseconds: median time until the call came back; on CPUs the same.
        useful_tflops_per_s: arithmetic inside the windows over that time.
        predicted_milliseconds: what the backend's cost model says, or without one the simulator.
        error: the largest, as a share of what is allowed (twice plain PyTorch's own). Above 1 the answer
            is wrong, and no time is given. `None` for dense attention, which answers another question.
    """

    date: str
    device: str
    driver: str
    versions: str
    case: str
    backend: str
    pass_: str
    milliseconds: float | None
    spread: float | None
    host_milliseconds: float | None
    useful_tflops_per_s: float | None
    predicted_milliseconds: float | None
    error: float | None

    @property
    def is_red(self) -> bool:
        """Whether the answer was wrong; NaN is."""
        return self.error is not None and not self.error <= 1


COLUMNS = tuple(field.name.rstrip("_") for field in fields(Measurement))
NUMBERS = COLUMNS[COLUMNS.index("milliseconds") :]


def today(device: torch.device) -> dict[str, str]:
    """The first columns of every row measured now."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(device),
        "driver": _driver(device),
        "versions": " ".join([f"python {platform.python_version()}", *_versions()]),
    }


def device_name(device: torch.device) -> str:
    """As its maker calls it; for a CPU with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        model = found[1].strip() if found else model
    except OSError:  # not on Linux
        pass
    return f"{model}, {torch.get_num_threads()} threads"


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return f"{platform.system()} {platform.release()}"
    question = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(question, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _versions() -> list[str]:
    found: list[str] = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return found


def path_of(rows: list[Measurement], folder: Path) -> Path:
    """`<folder>/<device>/<date>.csv`"""
    name = re.sub(r"[^a-z0-9]+", "-", rows[0].device.lower()).strip("-")
    return folder / name / f"{rows[0].date}.csv"


def save(rows: list[Measurement], folder: Path | str) -> Path:
    """Add rows to `<folder>/<device>/<date>.csv`. The file is replaced as a whole, or left as it was.

    Of the same case, backend and pass the last row counts; older ones of that day are dropped.
    """
    path = path_of(rows, Path(folder))
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = (load(path) if path.exists() else []) + rows
    latest = {(row.device, row.case, row.backend, row.pass_): row for row in everything}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([_text(getattr(row, field.name)) for field in fields(row)] for row in latest.values())
    write_whole(path, lambda file: file.write(text.getvalue().encode()))
    return path


def check_appendable(path: Path | str, columns: Sequence[str]) -> str:
    """What a table holds to which rows of these columns can be added; nothing if it has yet to be begun.

    Raises:
        InvalidProblem: if it is no file, no text, has other columns, or its folder is missing.
    """
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise InvalidProblem(f"the table must be a file in a folder that exists, got {str(path)!r}")
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise InvalidProblem(f"{path} is no table; name another file") from None
    if before and before.splitlines()[0].split(",") != list(columns):
        raise InvalidProblem(f"{path} holds other columns; name another file")
    return before


def append_rows(path: Path | str, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a table of any columns, or begin one; whole or not at all.

    Raises:
        InvalidProblem: if it holds other columns.
    """
    path = Path(path)
    before = check_appendable(path, columns)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if not before:
        writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write((before + text.getvalue()).encode()))


def load(path: Path | str) -> list[Measurement]:
    """The rows of a file that `save` wrote.

    Raises:
        InvalidProblem: if it is not such a file.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise InvalidProblem(f"{path} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
            return [_row(row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, ValueError) as problem:
        if isinstance(problem, InvalidProblem):
            raise
        raise InvalidProblem(f"{path} cannot be read as a table of measurements: {problem}") from None


def _row(texts: dict[str, str]) -> Measurement:
    values: dict[str, Any] = {}
    for name, text in texts.items():
        number = float(text) if name in NUMBERS and text else None
        values["pass_" if name == "pass" else name] = number if name in NUMBERS else text
    return Measurement(**values)


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
