"""The forward's cost model beside what an H100 took."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

from vicinal.backends.hopper.cost import predicted_ms, ranked_tilings
from vicinal.bench.results import load
from vicinal.bench.specs import suite
from vicinal.plan import make_plan

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "nvidia-h100-80gb-hbm3"


def measured() -> dict[str, float]:
    """Milliseconds of the cases of the newest run that has all of them."""
    runs = sorted(path for path in RESULTS.glob("*.csv") if re.fullmatch(r"\d{4}-\d\d-\d\d", path.stem))
    rows = [row for path in runs for row in load(path) if row.backend == "hopper" and row.pass_ == "forward"]
    return {row.case: row.milliseconds for row in rows if row.milliseconds is not None}


def test_predicted_times_are_those_measured() -> None:
    times = measured()
    predicted = {spec.name: predicted_ms(make_plan(spec.problem, ranked_tilings(spec.problem)[0]))
                 for spec in suite("h100-forward")}  # fmt: skip
    assert predicted.keys() <= times.keys()
    off = {case: abs(ms / times[case] - 1) for case, ms in predicted.items()}
    assert median(off.values()) < 0.08, off
    assert sum(share < 0.15 for share in off.values()) >= 24, off
