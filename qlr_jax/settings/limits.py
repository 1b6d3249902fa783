"""Limits that a job keeps to on one machine, and how much memory that machine has."""

from __future__ import annotations

import os

OUTPUTS_SHARE = 0.4  # of the machine's memory that output Hessians may take
WEIGHTS_SHARE = 0.5  # of it that weights in float32 may take, before they stay on disk
REFERENCE_BYTES = 4_000_000_000  # that the original's log-probabilities may take


def machine_memory() -> int:
    """Bytes of memory that this machine has.

    Example:
        >>> machine_memory() > 2**30
        True
    """
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
