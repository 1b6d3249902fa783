"""The commands of `qlr`: they parse, call and print; what is heavy loads inside them."""

from __future__ import annotations

import json
import sys

from qlr_jax.cli import making, choosing, using, serving  # isort: skip  in the order in which --help shows their commands
from qlr_jax.cli.shell import app

__all__ = ["app", "choosing", "main", "making", "serving", "using"]


def main() -> None:
    """The console script `qlr`: a usage error is one sentence (an object with --json) and status 2."""
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        message, show = getattr(error, "format_message", None), getattr(error, "show", None)
        if message is None or show is None:  # no usage error of typer's
            raise
        if "--json" in sys.argv:
            print(json.dumps({"error": message()}))
        show()
        status = getattr(error, "exit_code", 2)
    sys.exit(status)
