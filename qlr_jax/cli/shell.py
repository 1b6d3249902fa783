"""The application, and what all commands share: errors as one sentence, results as text or as JSON."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from qlr_jax.errors import QLRError

app = typer.Typer(
    name="qlr",
    help="Compress a Llama model as Q + L R: rank and bits of every matrix are chosen together under a memory budget.\n\n"
    "Start with: qlr demo",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class MixtureCommand(TyperCommand):
    """A command whose --calibration takes several weighted texts at once: `--calibration a.txt:2 b.txt:1`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, spread(args))


def spread(args: list[str]) -> list[str]:
    """Arguments with --calibration before each of the weighted texts that follow one another.

    Example:
        >>> spread(["m", "--calibration", "a.txt:2", "b.txt:1", "out"])
        ['m', '--calibration', 'a.txt:2', '--calibration', 'b.txt:1', 'out']
    """
    option, found, mixing = "--calibration", [], False
    for at, arg in enumerate(args):
        weighted = re.search(r".:\d*\.?\d+$", arg) is not None and (not arg.startswith("-") or arg.startswith(f"{option}="))
        own = arg.startswith(f"{option}=") or (at > 0 and args[at - 1] == option)
        if mixing and weighted and not own:
            found.append(option)
        mixing = weighted and (own or mixing)
        found.append(arg)
    return found


@contextmanager
def clear_errors(as_json: bool) -> Iterator[None]:
    """A user's mistake becomes one sentence on stderr and status 1, an interruption status 130; bugs keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        fail("interrupted; nothing more is running", as_json, 130)
    except ValueError as error:
        from allocators.errors import AllocationError

        if not isinstance(error, QLRError | AllocationError):
            raise
        fail(str(error), as_json, 1)


@contextmanager
def computing(as_json: bool, compile_cache: str | None = None) -> Iterator[None]:
    """`clear_errors` for a command that computes with JAX, which is prepared for it (`settings.host.prepare`)."""
    with clear_errors(as_json):
        from qlr_jax.settings.host import prepare

        if note := prepare(compile_cache):
            typer.echo(f"qlr: {note}", err=True)
        yield


def fail(sentence: str, as_json: bool, status: int) -> None:
    """End the command.

    Args:
        sentence: what was wrong, for stderr.
        as_json: also as an object on stdout.
        status: of the exit.
    """
    typer.echo(f"qlr: {sentence}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": sentence}))
    raise typer.Exit(status)


def show(result: Mapping[str, Any], as_json: bool, text: Callable[[Any], str]) -> None:
    """Print what a command found.

    Args:
        result: its values.
        as_json: as one JSON object, not as text.
        text: what makes text of `result`.
    """
    typer.echo(json.dumps(plain(result), ensure_ascii=False) if as_json else text(result))


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: numpy scalars become numbers, paths text, NaN and infinity null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def command() -> str:
    """What was typed, as a shell takes it."""
    return shlex.join(["qlr", *sys.argv[1:]])


def text_of(path: Path | None) -> str | None:
    """A path as a recipe has it."""
    return None if path is None else str(path)
