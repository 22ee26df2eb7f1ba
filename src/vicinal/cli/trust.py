"""`check`, `bench`, `doctor`: does it work here, how fast, and what is here."""

import platform
import sys
from typing import Annotated, Any

import typer

from vicinal.cli._console import Json, progress, say, say_json, table
from vicinal.cli._options import Backend

PACKAGES = ("torch", "triton", "numpy", "pillow", "typer", "rich", "matplotlib", "scikit-image", "nibabel")
"""What the library or its commands use, required or not."""


def check(
    backend: Backend = None,
    device: Annotated[str, typer.Option(help="Where the tensors lie: cpu, cuda, cuda:1, ...")] = "cpu",
    as_json: Json = False,
) -> None:
    """Try on this machine every law that a backend must obey. Exit code 1 if one is broken."""
    from vicinal.backends import ALL, named
    from vicinal.cli._machine import torch_device
    from vicinal.testing import check_backend

    place = torch_device(device)
    reports: list[Any] = []
    with progress("checking") as update:
        for candidate in (named(backend),) if backend else ALL:
            reports.append(
                check_backend(
                    candidate,
                    device=place,
                    progress=lambda law, i, n, who=candidate.name: update(i, n, f"{who}: {law.name}"),
                )
            )
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

    found = {
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


def bench() -> None:
    """Run a suite."""
