"""The command line: one small module per group of commands, and everything heavy imported inside them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vicinal.cli import figures, generative, pictures, planning, train, trust
from vicinal.errors import InvalidProblem, Unsupported

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells know it."""


class _OneLineErrors(TyperGroup):
    """Whatever goes wrong for a reason that the user can mend is one line on stderr and exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
            if code == INTERRUPTED:  # Some versions of typer turn an interrupt into this code, others raise.
                _complain("interrupted")
        except (InvalidProblem, Unsupported) as error:
            code = _complain(str(error))
        except (KeyboardInterrupt, typer.Abort):
            code = _complain("interrupted", INTERRUPTED)
        except MemoryError as error:
            code = _complain(f"out of memory: {error or 'use a smaller problem'}")
        except OSError as error:
            # A full disk, a reader that went away: the system's own words say it best.
            code = 1 if isinstance(error, BrokenPipeError) else _complain(str(error))
        except Exception as error:
            # Usage errors of typer, whose classes have no public name that all of its versions share.
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            context = getattr(error, "ctx", None)
            where = context.command_path if context is not None else "vicinal"
            code = _complain(f"{message()} (see: {where} --help)")
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str, code: int = 2) -> int:
    print(f"vicinal: {' '.join(message.split())}", file=sys.stderr)
    return code


app = typer.Typer(
    name="vicinal",
    cls=_OneLineErrors,
    help="Neighborhood attention: see it work, plan it, predict it, check it, measure it.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        import vicinal

        typer.echo(vicinal.__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command in (
    pictures.demo,
    pictures.denoise,
    planning.explain,
    planning.plan,
    planning.simulate,
    planning.suggest,
    trust.check,
    trust.tune,
    trust.bench,
    train.train,
    figures.plot,
    generative.e2e,
    generative.generate,
    generative.natten_kernel,
    trust.doctor,
):
    app.command()(_command)


def main() -> None:
    """The command `vicinal`."""
    app(prog_name="vicinal")
