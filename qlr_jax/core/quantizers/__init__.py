"""The table of quantizers: one name each, as a spec writes it."""

from functools import lru_cache

from qlr_jax.core.quantizers.base import DEFAULT_STATE_BITS, Quantizer, SearchCost, stored_bytes
from qlr_jax.core.quantizers.e8 import Lattice
from qlr_jax.core.quantizers.exact import BFloat16, Nothing
from qlr_jax.core.quantizers.integer import Integer
from qlr_jax.core.quantizers.normal_float import NormalFloat
from qlr_jax.core.quantizers.nvfp4 import NVFP4
from qlr_jax.core.quantizers.scalar import ScalarGrid
from qlr_jax.core.quantizers.segmented import SegmentedTrellis
from qlr_jax.core.quantizers.trellis import Trellis
from qlr_jax.errors import QLRError

QUANTIZERS: dict[str, type[Quantizer]] = {
    "bf16": BFloat16,
    "none": Nothing,
    "int": Integer,
    "nf": NormalFloat,
    "nvfp4": NVFP4,
    "e8": Lattice,
    "trellis": Trellis,
    "trellis-w": SegmentedTrellis,
}
"""What a name begins with, up to the first "-", and with "-w" where it ends so -> its class.

A row more is a quantizer more: docs/add-a-quantizer.md.
"""


def parse_quantizer(text: str, *, tile_rows: int | None = None, state_bits: int = DEFAULT_STATE_BITS) -> Quantizer:
    """The quantizer that a spec names.

    Args:
        text: e.g. `trellis-2.25`, `int-4g32`, `bf16`, `none`.
        tile_rows, state_bits: settings of a trellis; the others have none.

    Raises:
        QLRError: for a name that is not in the table.

    Example:
        >>> parse_quantizer("int-3g128a").bits
        3.0
    """
    kind = QUANTIZERS.get(text.partition("-")[0] + ("-w" if text.endswith("w") else ""))
    quantizer = _parsed(kind, text) if kind else None
    if quantizer is None:
        raise QLRError(f"{text!r} is not a quantizer; pass {usage()}")
    return quantizer.with_settings(tile_rows, state_bits)


@lru_cache(maxsize=4096)
def _parsed(kind: type[Quantizer], text: str) -> Quantizer | None:
    """An option table has the same few names many thousand times."""
    return kind.parse(text)


def usage() -> str:
    """The forms of all names, as messages show them.

    Example:
        >>> usage().startswith("bf16, none, int-<1..8>[g<group>][a]")
        True
    """
    *first, last = dict.fromkeys(kind.usage for kind in QUANTIZERS.values())
    return f"{', '.join(first)} or {last}"


KINDS = usage()  # another name of the same, for callers outside of this library

__all__ = [
    "DEFAULT_STATE_BITS",
    "KINDS",
    "NVFP4",
    "QUANTIZERS",
    "BFloat16",
    "Integer",
    "Lattice",
    "NormalFloat",
    "Nothing",
    "Quantizer",
    "ScalarGrid",
    "SearchCost",
    "SegmentedTrellis",
    "Trellis",
    "parse_quantizer",
    "stored_bytes",
    "usage",
]
