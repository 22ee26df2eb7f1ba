"""Many random problems against the definition, on a card with sm_90, in several processes.

    PYTHONPATH=src:tests/hopper python tests/hopper/fuzz.py 2000
    compute-sanitizer python tests/hopper/fuzz.py --each

Most of the time goes into compiling, so that problems come in families of sixteen which share what is compiled. The
same numbers give the same problems. Ends with status 1 if some answer differs, and names its seed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field

FAMILY = 16


@dataclass
class Report:
    """What one process, or all of them, found."""

    ran: int = 0
    variants: set[str] = field(default_factory=set)
    worst_out: float = 0.0
    worst_lse: float = 0.0
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.ran += other.ran
        self.variants |= other.variants
        self.worst_out = max(self.worst_out, other.worst_out)
        self.worst_lse = max(self.worst_lse, other.worst_lse)
        self.failures += other.failures


def search(families: range, deadline: float, pairs: bool) -> Report:
    """Run families of problems until all are done or time is up."""
    import torch
    from problems import draw, errors

    from vicinal.backends import hopper
    from vicinal.backends.hopper import launch
    from vicinal.backends.hopper.variant import variant_of
    from vicinal.plan import make_plan

    torch.set_num_threads(1)
    by_itself, report = launch.heads_per_block, Report()
    for family in families:
        # Small problems would not share blocks by themselves.
        shares = family % 3 == 0
        launch.heads_per_block = (lambda p, v, *_: p.heads if v.shares_heads else v.abreast) if shares else by_itself
        hopper.forget()
        for seed in range(family * FAMILY, (family + 1) * FAMILY):
            if time.time() > deadline:
                return report
            case = draw(seed, family=family, pairs=pairs)
            try:
                out, lse = errors(case, hopper.backend)
            except Exception as error:  # the next seeds may still tell something
                report.failures.append(f"seed {seed}: {type(error).__name__}: {str(error)[:300]} ({case})")
                if "CUDA" in str(error):
                    return report
                continue
            report.ran += 1
            report.variants.add(repr(variant_of(make_plan(case.problem, case.tiling))))
            if out <= 1 and lse <= 1:  # not so for NaN
                report.worst_out, report.worst_lse = max(report.worst_out, out), max(report.worst_lse, lse)
            else:
                report.failures.append(f"seed {seed}: errors {out:.2f} and {lse:.2f} times what is allowed ({case})")
    return report


def one_of_each() -> Report:
    """A small problem for each kind of kernel and of mask, in this process: few enough for a sanitizer."""
    from problems import draw, errors

    from vicinal.backends import hopper
    from vicinal.backends.hopper.variant import variant_of
    from vicinal.plan import make_plan

    report, seen = Report(), set[tuple[object, ...]]()
    for seed in range(300):
        case = draw(seed, most_tokens=300)
        variant = variant_of(make_plan(case.problem, case.tiling))
        kinds = {
            (variant.head_dim, variant.consumers),
            ("mask", min(variant.consumers, 2), variant.mask, variant.is_causal),
            ("additional", min(variant.consumers, 2), variant.has_additional, case.has_lengths),
            ("empty slots", variant.empty > 0, variant.has_additional),
        }
        if kinds <= seen:
            continue
        seen |= kinds
        out, lse = errors(case, hopper.backend)
        report.add(Report(1, {repr(variant)}, out, lse, [] if out <= 1 and lse <= 1 else [f"seed {seed}: {case}"]))
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", type=int, nargs="?", default=2000, help="how many; rounded up to whole families")
    parser.add_argument("--each", action="store_true", help="instead, one of each kind, in one process")
    parser.add_argument("--pairs", action="store_true", help="only such as let two heads of 32 share a box")
    parser.add_argument("--first", type=int, default=0, help="first family")
    parser.add_argument("--processes", type=int, default=max((os.cpu_count() or 2) - 2, 1))
    parser.add_argument("--seconds", type=float, default=3600, help="stop after that many")
    options = parser.parse_args()
    start, count = time.time(), -(-options.problems // FAMILY)
    families = range(options.first, options.first + count)
    total = one_of_each() if options.each else Report()
    if not options.each:
        work = [
            (families[i :: options.processes], start + options.seconds, options.pairs) for i in range(options.processes)
        ]
        with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
            for report in pool.starmap(search, work, chunksize=1):
                total.add(report)
    print(
        f"{total.ran} problems, {'one of each kind' if options.each else f'of {families} times {FAMILY}'}, "
        f"{len(total.variants)} variants, "
        f"{len(total.failures)} failures, {time.time() - start:.0f} s; worst errors as shares of what is allowed: "
        f"{total.worst_out:.3f} out, {total.worst_lse:.3f} lse"
    )
    for failure in total.failures[:10]:
        print(failure)
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
