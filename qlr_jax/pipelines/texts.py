"""The texts of a job: what it is calibrated on, and what its figures are measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qlr_jax import calibration
from qlr_jax.errors import QLRError

Files = Sequence[str | Path] | str | Path | None
"""Text files, one, or none."""


@dataclass(frozen=True)
class Texts:
    """Contents, not paths.

    Attributes:
        calibration: what Hessians and sensitivity are measured on.
        held_out: for the report's figures; "" for none.
        held_out_name: as the report calls it.
    """

    calibration: str
    held_out: str = ""
    held_out_name: str = ""

    @classmethod
    def read(cls, calibration_files: Files, held_out_files: Files = None) -> Texts:
        """The texts of files.

        Raises:
            QLRError: no calibration text, or a file that cannot be read.
        """
        if not calibration_files:
            raise QLRError("no calibration text was given; pass one or more text files that resemble what the model will read")
        files = [held_out_files] if isinstance(held_out_files, str | Path) else held_out_files or ()
        held_out = calibration.read_text(held_out_files) if held_out_files else ""
        return cls(calibration.read_text(calibration_files), held_out, ", ".join(map(str, files)))

    @classmethod
    def standard_library(cls) -> Texts:
        """Modules of this machine's Python standard library, some of them held out: the bundled model's own kind of text."""
        splits = calibration.standard_library("calibration"), calibration.standard_library("heldout")
        return cls(*splits, "held-out modules of Python's standard library")
