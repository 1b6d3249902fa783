"""What measured models are called beside the curve of size against damage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from allocators.strategies import CONTROL, STRATEGIES


def point_name(row: Mapping[str, Any]) -> str:
    """What a measured model is called: its label, with kinds as people write them."""
    return str(row.get("label") or row.get("kind")).replace(CONTROL, STRATEGIES[CONTROL].label)
