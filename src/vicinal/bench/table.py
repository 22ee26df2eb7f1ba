"""Tables from measurements: the README's are made here, never by hand."""

from __future__ import annotations

from vicinal.bench.results import Measurement

RED = "wrong"


def table(rows: list[Measurement], *, against: str = "dense") -> tuple[list[str], list[list[str]]]:
    """Head and body: a line per case and pass, per backend its time, and in brackets its speed-up.

    No speed-up is given to a backend whose answer was wrong, over one that was, or in a line where any
    of the compared times is missing.

    Args:
        rows: measured on one device.
        against: the backend that speed-ups are over.
    """
    backends = list(dict.fromkeys(row.backend for row in rows))
    lines: dict[tuple[str, str], dict[str, Measurement]] = {}
    for row in rows:
        lines.setdefault((row.case, row.pass_), {})[row.backend] = row
    body = [
        [case, what, *(_cell(found.get(name), found.get(against)) for name in backends)]
        for (case, what), found in lines.items()
    ]
    return ["case", "pass", *(f"{name}, ms" for name in backends)], body


def _cell(row: Measurement | None, base: Measurement | None) -> str:
    if row is None:
        return ""
    if row.is_red:
        return f"{RED}: {row.error:.3g} times the error allowed"
    if row.milliseconds is None:
        return ""
    digits = f"{row.milliseconds:.3g}" if row.milliseconds < 999.5 else f"{row.milliseconds:.0f}"
    text = f"{digits} ± {(row.spread or 0.0) / 2:.0%}"
    gain = speedup(row, base)
    return text if gain is None or row is base else f"{text} ({gain:.1f}x)"


def speedup(row: Measurement, base: Measurement | None) -> float | None:
    """How many times faster than `base`, or `None` where it may not be said."""
    if base is None or row.is_red or base.is_red or not row.milliseconds or not base.milliseconds:
        return None
    return base.milliseconds / row.milliseconds


def markdown(rows: list[Measurement], *, against: str = "dense") -> str:
    """The table for a README, with the machine below it."""
    head, body = table(rows, against=against)
    lines = [head, ["---", "---", *["---:"] * (len(head) - 2)], *body]
    text = [f"| {' | '.join(line)} |" for line in lines]
    machine = dict.fromkeys(f"{row.device}, {row.driver}, {row.versions}, {row.date}" for row in rows)
    note = f"Medians, ± half the range of the middle half of the times; in brackets the speed-up over {against}."
    return "\n".join([*text, "", f"{note} {'; '.join(machine)}."])
