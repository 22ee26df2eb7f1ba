"""The table of tuned choices that the package ships for a device: `tuned_table.py TABLE.json --suite h100-forward ...`.

Each problem of the suites is tuned for the backend that it would run on, as `vicinal tune` does, and what gains enough
is kept, beside what the file has already. Kernels are compiled before that by several processes, on the first GPU;
times are taken on the last one, which is left alone if there are two.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from vicinal import backends, tuned, tuning
from vicinal.backends.base import Backend, Inputs
from vicinal.bench import specs
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.hardware import Hardware
from vicinal.problem import Problem

PARTS = 4
"""Processes that compile for one problem."""


def gradients_of(problem: Problem, device: str) -> bool:
    """Whether the backend that runs a problem differentiates it, too."""
    hardware = backends.present(torch.device(device))
    return not backends.choose(problem, hardware, None).why_not_gradients(problem, hardware)


def prepared(problem: Problem, device: torch.device) -> tuple[Backend, Hardware, Inputs]:
    """Who runs a problem there, and random numbers for it."""
    hardware = backends.present(device)
    return backends.choose(problem, hardware, None), hardware, tuning._numbers(problem, device)


def compile_part(problem: Problem, device: str, gradients: bool, part: int) -> None:
    """Run a part of each pass's choices once: then their kernels lie in the compiler's cache."""
    torch.set_num_threads(1)
    place = torch.device(device)
    chosen, hardware, inputs = prepared(problem, place)
    for what in tuning._passes(chosen, gradients):
        for step in [*tuning._steps(chosen, what, problem, hardware, inputs).values()][part::PARTS]:
            try:
                step.run()
                tuning._wait(place)
            except Unsupported:
                continue
    if place.type == "cuda":
        torch.cuda.empty_cache()  # many processes share the device


def tensors_of(found: object) -> list[torch.Tensor]:
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]  # type: ignore[attr-defined]


def is_right(problem: Problem, device: str, finding: tuning.Finding) -> bool:
    """Whether the best choice gives the numbers of the cost model's first, but for rounding."""
    chosen, hardware, inputs = prepared(problem, torch.device(device))
    steps = tuning._steps(chosen, finding.what, problem, hardware, inputs)
    wanted, found = (tensors_of(steps[choice].run()) for choice in (next(iter(steps)), finding.entry.choice))
    errors = [float((a.float() - b.float()).norm() / a.float().norm()) for a, b in zip(wanted, found, strict=True)]
    return max(errors) <= 8 * torch.finfo(inputs.query.dtype).eps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--suite", action="append", required=True, help="of `vicinal bench`; may be repeated")
    parser.add_argument("--only", default="", help="names of cases, with | between them")
    parser.add_argument("--forward", action="store_true", help="leave the backward pass out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=14, help="processes that compile")
    parser.add_argument("--gain", type=float, default=0.01, help="the least that a choice must gain to be kept")
    parser.add_argument("--seconds", type=float, default=1e9, help="no problem is begun after that many")
    asked = parser.parse_args()
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this needs an accelerator that PyTorch calls cuda; --device cpu runs without")
    try:
        suites = [specs.suite(name) for name in asked.suite]
    except InvalidProblem as error:
        parser.error(str(error))
    count = torch.cuda.device_count() if asked.device == "cuda" else 0
    first, last = ("cuda:0", f"cuda:{count - 1}") if count else (asked.device, asked.device)
    names = asked.only.split("|")
    cases = [case for suite in suites for case in suite if not asked.only or case.name in names]
    if not cases:
        parser.error(f"none of the cases has a name that is among {names}")
    problems = {case.problem: not asked.forward and gradients_of(case.problem, last) for case in cases}
    kept = tuned.load(asked.table) if asked.table.exists() else {}
    began = time.time()
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        compiling = {
            problem: [pool.submit(compile_part, problem, first, gradients, part) for part in range(PARTS)]
            for problem, gradients in problems.items()
        }
        for problem, gradients in problems.items():
            if time.time() - began > asked.seconds:
                print(f"no time for {problem}", flush=True)
                continue
            for part in compiling[problem]:
                if part.exception() is not None:
                    print(f"{problem}: {part.exception()!r}"[:300], flush=True)
            for found in tuning.tune(problem, device=last, gradients=gradients, keep=False):
                print(f"{problem}: {found}", flush=True)
                if found.entry.milliseconds > (1 - asked.gain) * found.entry.untuned_milliseconds:
                    continue
                if not is_right(problem, last, found):
                    print(f"WRONG, not kept: {problem}: {found}", flush=True)
                else:
                    kept[found.backend, found.what, tuned.fingerprint(problem)] = found.entry
            tuned.save(asked.table, backends.present(torch.device(last)).name, kept)
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
