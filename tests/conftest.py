"""What holds for every test: a seed per test, memory that hurts, and no skip without a reason."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fast", max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("long", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("fast")  # choose with --hypothesis-profile


# The tensors here are small: on a busy machine threads that wait for each other cost more than they bring.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an accelerator that PyTorch calls cuda")
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # the summary prints every skip with its reason


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="this machine has no accelerator that PyTorch calls cuda"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    if reason.removeprefix("Skipped: ").strip() in ("", "unconditional skip"):
        report.outcome, report.longrepr = "failed", "a skip must state its reason"
    elif item.get_closest_marker("gpu") and torch.cuda.is_available():
        report.outcome, report.longrepr = "failed", f"the accelerator is here, and still this was skipped: {reason}"


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that depends on the test's name alone; pytest shows the line where a test fails."""
    number = zlib.crc32(request.node.nodeid.encode()) % 2**31
    random.seed(number)
    torch.manual_seed(number)
    print(f"seed {number}")
    return number


def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Fill with NaN what would otherwise hold whatever was there: often zeros, which hide mistakes."""

    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point() and not torch.compiler.is_compiling():
            with torch.no_grad():
                tensor.fill_(torch.nan)
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(where, name, poisoned(getattr(where, name)))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn."""
    return torch.device(request.param)
