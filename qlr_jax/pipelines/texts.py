"""The texts of a job: what it is calibrated on, and what its figures are measured on."""

from __future__ import annotations

from dataclasses import dataclass

from qlr_jax import calibration
from qlr_jax.calibration import Corpus, Files
from qlr_jax.errors import QLRError

__all__ = ["Files", "Texts"]


@dataclass(frozen=True)
class Texts:
    """Contents, not paths.

    Attributes:
        calibration: what Hessians and sensitivity are measured on.
        held_out: for the report's figures; None for none.
        held_out_name: as the report calls it.
    """

    calibration: Corpus
    held_out: Corpus | None = None
    held_out_name: str = ""

    @classmethod
    def read(cls, calibration_files: Files, held_out_files: Files = None, chat: bool = False) -> Texts:
        """The texts of files.

        Args:
            calibration_files, held_out_files: what names them, as `calibration.files.read_part` takes it.
            chat: apply the tokenizer's chat template to both.

        Raises:
            QLRError: no calibration text, or a file that cannot be read.
        """
        if not calibration_files:
            raise QLRError("no calibration text was given; pass one or more text files that resemble what the model will read")
        held_out = Corpus.read(held_out_files, chat) if held_out_files else None
        return cls(Corpus.read(calibration_files, chat), held_out, ", ".join(held_out.names) if held_out else "")

    @classmethod
    def standard_library(cls) -> Texts:
        """Modules of this machine's Python standard library, some of them held out: the bundled model's own kind of text."""
        calibrated, held_out = (Corpus.of(calibration.standard_library(split)) for split in ("calibration", "heldout"))
        return cls(calibrated, held_out, "held-out modules of Python's standard library")

    @property
    def notes(self) -> list[str]:
        """What was changed on reading, a sentence each."""
        return [*self.calibration.notes, *(self.held_out.notes if self.held_out else ())]
