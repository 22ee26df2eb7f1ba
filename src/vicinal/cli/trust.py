"""`check`, `tune`, `bench`, `doctor`: does it work here, how fast, and what is here."""

import math
import os
import platform
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vicinal.cli._console import Json, progress, say, say_json, table
from vicinal.cli._options import Backend, takes_problem
from vicinal.errors import InvalidProblem, Unsupported

if TYPE_CHECKING:
    from vicinal.problem import Problem

PACKAGES = ("torch", "triton", "numpy", "pillow", "typer", "rich", "matplotlib", "scikit-image", "nibabel", "diffusers")
"""What the library or its commands use, required or not."""


def check(
    backend: Backend = None,
    device: Annotated[str, typer.Option(help="Where the tensors lie: cpu, cuda, cuda:1, ...")] = "cpu",
    fuzz: Annotated[int, typer.Option(metavar="N", help="Instead of the laws, try N random problems.")] = 0,
    seed: Annotated[int, typer.Option(help="The first random problem's.")] = 0,
    jobs: Annotated[int, typer.Option(help="Processes that share the random problems.")] = 1,
    seconds: Annotated[
        float, typer.Option(help="Begin no random problem after that many, for each backend.")
    ] = math.inf,
    as_json: Json = False,
) -> None:
    """Try on this machine every law that a backend must obey, or random problems. Exit code 1 if one is broken."""
    from vicinal.cli._machine import torch_device
    from vicinal.testing import check_backend

    if fuzz < 0 or seed < 0 or jobs < 1:
        raise InvalidProblem(f"fuzz and seed must be at least 0 and jobs 1, got {fuzz}, {seed} and {jobs}")
    if seed + fuzz > 2**63:
        raise InvalidProblem(f"seed must be below 2**63, got {seed}")
    if not seconds > 0:
        raise InvalidProblem(f"seconds must be more than 0, got {seconds:g}")
    place = torch_device(device)
    candidates, declined = _candidates(backend, place)
    if not as_json:
        for who, why in declined:
            say(f"{who} does not run here: {why}")
    if fuzz:
        _fuzz(candidates, place, fuzz, seed, jobs, seconds, as_json)
        return
    with progress("checking") as update:
        reports = [
            check_backend(
                candidate,
                device=place,
                progress=lambda law, i, n, who=candidate.name: update(i, n, f"{who}: {law.name}"),
            )
            for candidate in candidates
        ]
    if as_json:
        say_json([_report_facts(report) for report in reports])
    else:
        for report in reports:
            rows = [
                (finding.law.name, "holds" if finding.holds else "BROKEN", finding.ran, f"{finding.time_s:.1f}")
                for finding in report.findings
            ]
            table(f"{report.backend} on {report.device}", ("law", "", "problems", "s"), rows, numbers=(2, 3))
            for finding in report.findings:
                if not finding.holds:
                    say(finding)
        say("every law holds" if all(report.holds for report in reports) else "some laws are broken")
    if not all(report.holds for report in reports):
        raise typer.Exit(1)


def _candidates(backend: str | None, place: Any) -> tuple[list[Any], list[tuple[str, str]]]:
    """The backends to check, and those that run nothing on that device, with the reasons.

    Raises:
        Unsupported: if that is the one named.
    """
    from vicinal.backends import ALL, named, present
    from vicinal.testing.cases import SMALL, variants

    hardware = present(place)
    willing: list[Any] = []
    declined: list[tuple[str, str]] = []
    for candidate in (named(backend),) if backend else ALL:
        refusals = [candidate.why_not(variant, hardware) for problem in SMALL for variant in variants(problem)]
        if all(refusals):  # what every problem was refused for comes first, and is what matters
            always = [why for why in refusals[0] if all(why in refusal for refusal in refusals)]
            declined.append((candidate.name, "; ".join(always or refusals[0])))
        else:
            willing.append(candidate)
    if backend and declined:
        raise Unsupported(f"backend {backend!r} runs nothing on {hardware.name}: {declined[0][1]}")
    return willing, declined


def _fuzz(candidates: Any, place: Any, count: int, seed: int, jobs: int, seconds: float, as_json: bool) -> None:
    from dataclasses import asdict

    from vicinal.testing import fuzz

    with progress("checking") as update:
        found = [
            fuzz(
                candidate,
                count,
                device=place,
                first=seed,
                jobs=jobs,
                seconds=seconds,
                progress=lambda done, total, _, who=candidate.name: update(done, total, f"{who}: random problems"),
            )
            for candidate in candidates
        ]
    if as_json:
        say_json([{**asdict(each), "holds": each.holds} for each in found])
    else:
        for each in found:
            say(each)
    if not all(each.holds for each in found):
        raise typer.Exit(1)


def _report_facts(report: Any) -> dict[str, Any]:
    findings = [
        {
            "law": finding.law.name,
            "holds": finding.holds,
            "error": finding.error,
            "problems": finding.ran,
            "skipped": finding.skipped,
            "s": finding.time_s,
        }
        for finding in report.findings
    ]
    return {"backend": report.backend, "device": report.device, "holds": report.holds, "laws": findings}


def doctor(as_json: Json = False) -> None:
    """Print versions, devices and which backends run here: the first lines of a bug report."""
    from vicinal.cli._machine import devices, versions

    found: dict[str, Any] = {
        "versions": versions(PACKAGES),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "devices": devices(),
    }
    if as_json:
        say_json(found)
        return
    table(
        "versions",
        ("package", "version"),
        [("python", found["python"]), ("platform", found["platform"]), *found["versions"].items()],
    )
    for device in found["devices"]:
        rows = [(name, "yes" if not why else "no", "; ".join(why)) for name, why in device["backends"].items()]
        table(f"{device['device']}: {device['name']}", ("backend", "runs", "why not"), rows)


@takes_problem
def tune(
    problem: "Problem",
    backend: Backend = None,
    device: Annotated[str, typer.Option(help="Where to run: cuda, cuda:1, cpu, ...")] = "cuda",
    gradients: Annotated[bool, typer.Option(help="Tune the backward pass too.")] = True,
    as_json: Json = False,
) -> None:
    """Measure the ways to cut a problem, and remember the best for later calls on this machine."""
    from dataclasses import asdict

    from vicinal import tuned, tuning
    from vicinal.backends import present
    from vicinal.cli._machine import torch_device

    place = torch_device(device)
    path = tuned.path_of(present(place).name)
    _check_cache(path)
    with progress("tuning") as update:
        found = tuning.tune(
            problem,
            device=place,
            backend=backend,
            gradients=gradients,
            progress=lambda text, step, steps: update(step, steps, text),
        )
    if as_json:
        say_json({"file": path, "found": [asdict(finding) for finding in found]})
        return
    for finding in found:
        say(finding)
    say(f"wrote {path}" if found else "nothing is left open: the backend cuts this problem in one way only")


def _check_cache(path: Path) -> None:
    """Refuse a file of tuned choices that cannot be added to, before anything is measured."""
    from vicinal import tuned

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidProblem(
            f"the folder of tuned choices cannot be made: {error}; name another in {tuned.VARIABLE}"
        ) from None
    if not os.access(path.parent, os.W_OK):
        raise InvalidProblem(f"{str(path.parent)!r} cannot be written to; name another folder in {tuned.VARIABLE}")
    if path.exists():
        tuned.load(path)


def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="Problems: smoke (seconds), cpu, h100-forward, h100-backward, h100-portable, h100-dinat (minutes)."
        ),
    ] = "smoke",
    backend: Annotated[
        list[str] | None, typer.Option("--backend", "-b", help="Only this backend or peer; may be repeated.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, ...")] = "cpu",
    seconds: Annotated[float, typer.Option(help="Time to spend on each case and pass, at least.")] = 4.0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    save: Annotated[
        Path | None, typer.Option(help="Folder for a CSV, replaced after each case; plot benchmark draws it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a suite: everyone in turn, answers checked before any time is taken."""
    from dataclasses import asdict

    from vicinal.bench import results, run, specs
    from vicinal.bench.table import table as in_rows
    from vicinal.cli._machine import torch_device

    if not 0 < seconds < math.inf or threads < 1:
        raise InvalidProblem(f"seconds must be above 0 and finite, threads at least 1, got {seconds:g} and {threads}")
    if save is not None and save.exists() and not save.is_dir():
        raise InvalidProblem(f"save must be a folder, got the file {str(save)!r}")
    problems, place = specs.suite(suite), torch_device(device)
    effort = run.Effort(seconds=seconds, threads=threads)
    record = None if save is None else partial(results.save, folder=save)
    with progress(f"measuring {suite}") as update:
        rows = run.run(
            problems,
            device=place,
            only=tuple(backend or ()),
            effort=effort,
            progress=lambda text, step, steps: update(step, steps, text),
            record=record,
        )
    if as_json:
        say_json([{name.rstrip("_"): value for name, value in asdict(row).items()} for row in rows])
    else:
        head, body = in_rows(rows)
        table(f"suite {suite} on {rows[0].device}: medians; speed-ups are over dense attention", head, body)
    if save is not None and not as_json:
        say(f"wrote {results.path_of(rows, save)}")
    if any(row.is_red for row in rows):
        raise typer.Exit(1)
