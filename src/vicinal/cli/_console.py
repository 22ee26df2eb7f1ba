"""What all commands print with: results on stdout, progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def say(text: object) -> None:
    """Plain text, never wrapped: what the library prints about itself is aligned already."""
    typer.echo(str(text))


def say_json(value: Any) -> None:
    """One JSON value. Whatever JSON does not know becomes its text."""
    typer.echo(json.dumps(value, indent=2, default=str, ensure_ascii=False))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], numbers: Sequence[int] = ()) -> None:
    """A table; columns whose index is in `numbers` are aligned on the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        grid.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # Nobody's window: let lines be as long as they are, so that a file or a pipe gets them whole.
        console.width = 200
    console.print(grid)


@contextmanager
def progress(label: str) -> Generator[Callable[..., None]]:
    """A bar on stderr with the time it took, gone when done; nothing where stderr is no terminal.

    What it yields is called with steps done, steps in all and, if it changes, what is being done.
    Until the first call the bar only shows that something happens.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task(label, total=None)

        def update(done: int, total: int, now: str = label) -> None:
            bars.update(task, completed=done, total=total, description=now)

        yield update
