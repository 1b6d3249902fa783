"""How benchmarks show what they found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlr_jax.report.terminal.columns import columns


def show(title: str, facts: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Print a table, and write it as JSON where a path is given.

    Args:
        title: machine, versions and what was asked.
        facts: a row each, all with the same keys; numbers are printed to three digits.
        path: of the JSON file, or None.
    """
    print(title)
    print(columns(list(facts[0]), [[v if isinstance(v, str) else f"{v:.3g}" for v in line.values()] for line in facts]))
    if path:
        path.write_text(json.dumps(list(facts), indent=1) + "\n", encoding="utf-8")
