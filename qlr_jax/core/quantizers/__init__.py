"""The table of quantizers: one name each, as a spec writes it."""

import re
from fractions import Fraction

from qlr_jax.core.quantizers.base import Quantizer, stored_bytes
from qlr_jax.core.quantizers.e8 import Lattice
from qlr_jax.core.quantizers.exact import BFloat16, Nothing
from qlr_jax.core.quantizers.integer import Integer
from qlr_jax.core.quantizers.normal_float import NormalFloat
from qlr_jax.core.quantizers.trellis import DEFAULT_STATE_BITS, Trellis
from qlr_jax.errors import QLRError

KINDS = "bf16, none, int-<1..8>[g<group>][a], nf-<2..4>[g<group>], e8-<2..4> or trellis-<1..4 in sixteenths>"
_PATTERN = re.compile(r"(?P<kind>[a-z]+[a-z0-9]*?)-(?P<bits>[0-9.]+)(?:g(?P<group>[0-9]+))?(?P<asymmetric>a)?")


def parse_quantizer(text: str, *, tile_rows: int = 16, state_bits: int = DEFAULT_STATE_BITS) -> Quantizer:
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
    if text in ("bf16", "none"):
        return BFloat16() if text == "bf16" else Nothing()
    match = _PATTERN.fullmatch(text)
    kind = match["kind"] if match else ""
    if match and kind == "int" and match["bits"].isdigit():
        return Integer(int(match["bits"]), int(match["group"] or 0), bool(match["asymmetric"]))
    if match and kind == "nf" and match["bits"].isdigit() and not match["asymmetric"]:
        return NormalFloat(int(match["bits"]), int(match["group"] or 0))
    if match and kind == "e8" and match["bits"].isdigit() and not match["group"] and not match["asymmetric"]:
        return Lattice(int(match["bits"]))
    if match and kind == "trellis" and not match["group"] and not match["asymmetric"]:
        try:
            return Trellis(Fraction(match["bits"]), tile_rows, state_bits)
        except ValueError as error:
            raise error if isinstance(error, QLRError) else QLRError(f"{text!r} is not a quantizer; pass {KINDS}") from None
    raise QLRError(f"{text!r} is not a quantizer; pass {KINDS}")


__all__ = [
    "KINDS",
    "BFloat16",
    "Integer",
    "Lattice",
    "NormalFloat",
    "Nothing",
    "Quantizer",
    "Trellis",
    "parse_quantizer",
    "stored_bytes",
]
