"""A spec: in one short string, how a matrix is stored.

<backbone>[/rot | /rows][+r<rank>@<factors>[,<factors of R>]]

trellis-2.25      trellis-2+r32@trellis-4      e8-2+r256@e8-4      int-4g32+r16@bf16      nf-4g64/rot      none+r64@int-8,bf16
nvfp4             nvfp4/rot+r16@nvfp4        trellis-3/rows             trellis-2.25w+r8@trellis-2
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from qlr_jax.core.quantizers import DEFAULT_STATE_BITS, Quantizer, parse_quantizer, stored_bytes
from qlr_jax.errors import QLRError

_PATTERN = re.compile(
    r"(?P<backbone>[^/+@,]+)(?P<rot>/rot|/rows)?(?:\+r(?P<rank>[0-9]+)@(?P<left>[^/+@,]+)(?:,(?P<right>[^/+@,]+))?)?"
)
SCALE_BYTES = 4  # g, one float32 a matrix
COMPONENT_BYTES = 2  # one float16 a component, where a factor's grid has no scale of its own
ROW_BYTES = 2  # one float16 a row, where each is read by itself


@dataclass(frozen=True)
class Spec:
    """How W ≈ g · Uᵀ (Q + L diag(s) R) V is stored: the grids of Q, L and R, the rank, and whether U, V rotate.

    With `/rows` it is W ≈ diag(g) Q V: inputs alone are rotated and each row has a scale of its own, so that any row is read
    without the others, as the lookup of an embedding does. It is for backbones whose grid has one scale of the whole, at rank 0.

    Attributes:
        backbone: name of Q's quantizer, as `Quantizer.name` gives it.
        rotated: whether Q is the quantized matrix of U W Vᵀ.
        rank: columns of L and rows of R; 0 where there are none.
        left, right: names of the quantizers of L and R; "" at rank 0.
        by_rows: whether it is diag(g) Q V, as `/rows` says.

    Example:
        >>> str(Spec.parse("trellis-2.0+r32@trellis-4,trellis-4"))
        'trellis-2+r32@trellis-4'
        >>> Spec.parse("trellis-2").bits((4096, 4096))
        2.000001907348633
    """

    backbone: str
    rotated: bool
    rank: int = 0
    left: str = ""
    right: str = ""
    by_rows: bool = False

    @classmethod
    def parse(cls, text: str | Spec) -> Spec:
        """The spec that a text means; a Spec is given back as it is.

        Args:
            text: <backbone>[/rot | /rows][+r<rank>@<factors>[,<factors of R>]].

        Raises:
            QLRError: for text that is not a spec, naming the part that is wrong.

        Example:
            >>> Spec.parse("int-4g32/rot+r16@int-8,bf16").right
            'bf16'
        """
        if isinstance(text, Spec):
            return text
        match = _PATTERN.fullmatch(text.strip())
        if not match:
            raise QLRError(f"{text!r} is not a spec; pass <backbone>[/rot][+r<rank>@<factors>], e.g. trellis-2+r32@trellis-4")
        backbone = parse_quantizer(match["backbone"])
        always = backbone.always_rotated
        rank = int(match["rank"] or 0)
        if match["rot"] == "/rows":
            if match["rank"]:
                raise QLRError(f"{text!r}: /rows has no factors; leave +r out")
            if backbone.follows_metric:
                raise QLRError(f"{text!r}: /rows has one rate for all columns; leave w out")
            if not backbone.unit_scale:
                raise QLRError(f"{text!r}: its rows are read one by one as it is; leave /rows out")
            return cls(backbone.name, False, by_rows=True)
        if always and match["rot"]:
            raise QLRError(f"{text!r}: {backbone.name} is rotated always; leave /rot out")
        if match["rank"] and rank == 0:
            raise QLRError(f"{text!r}: rank 0 is written by leaving +r out")
        if rank == 0:
            if backbone.empty:
                raise QLRError(f"{text!r} keeps nothing of the matrix; give it factors, e.g. none+r64@int-8")
            return cls(backbone.name, always or bool(match["rot"]))
        left, right = parse_quantizer(match["left"]), parse_quantizer(match["right"] or match["left"])
        if left.empty or right.empty:
            raise QLRError(f"{text!r}: factors cannot be none; leave +r out for rank 0")
        if left.follows_metric or right.follows_metric:
            raise QLRError(f"{text!r}: a factor has one rate; leave w out of {left.name if left.follows_metric else right.name}")
        return cls(backbone.name, always or bool(match["rot"]), rank, left.name, right.name)

    def __str__(self) -> str:
        ending = "/rot" if self.rotated and not self.quantizer().always_rotated else ""
        text = self.backbone + ("/rows" if self.by_rows else ending)
        if self.rank:
            text += f"+r{self.rank}@{self.grids}"
        return text

    @property
    def grids(self) -> str:
        """The factors' grids as the spec writes them, e.g. `trellis-4` or `int-8,bf16`; empty at rank 0."""
        return self.left + (f",{self.right}" if self.right != self.left else "")

    def quantizer(self, state_bits: int = DEFAULT_STATE_BITS, shape: tuple[int, int] | None = None) -> Quantizer:
        """The quantizer of Q.

        Args:
            state_bits: of a trellis.
            shape: (out, in) of the matrix, where its tiles matter.
        """
        return _backbone(self.backbone, state_bits, shape)

    def factor_quantizers(self, state_bits: int = DEFAULT_STATE_BITS) -> tuple[Quantizer, Quantizer]:
        """The grids of Lᵀ (rank, m) and R (rank, n)."""
        return _factor(self.left, self.rank, state_bits), _factor(self.right, self.rank, state_bits)

    @property
    def component_scales(self) -> bool:
        """Whether s is stored: where L's or R's grid has no scale of its own."""
        return self.rank > 0 and any(q.unit_scale for q in self.factor_quantizers())

    @property
    def has_scale(self) -> bool:
        """Whether g is one number that is stored: always, but for weights that are kept as they are, and scales of rows."""
        return self.rank > 0 or not (self.quantizer().plain or self.by_rows)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of all that is stored for a matrix: codes, scales, factors, padding.

        Args:
            shape: (out, in).

        Raises:
            QLRError: the rank is larger than the matrix allows.

        Example:
            >>> Spec.parse("int-4g32").nbytes((2, 64))   # 64 bytes of codes, 4 float16 scales, one float32 for the matrix
            76
        """
        rows, cols = shape
        if self.rank > min(shape):
            raise QLRError(f"{self}: rank {self.rank} is larger than the {rows} × {cols} matrix allows; pass at most {min(shape)}")
        total = (
            stored_bytes(self.quantizer(shape=shape), rows, cols) + SCALE_BYTES * self.has_scale + ROW_BYTES * rows * self.by_rows
        )
        if self.rank:
            left, right = self.factor_quantizers()
            total += stored_bytes(left, self.rank, rows) + stored_bytes(right, self.rank, cols)
            total += COMPONENT_BYTES * self.rank * self.component_scales
        return total

    def bits(self, shape: tuple[int, int]) -> float:
        """Average bits per weight of a matrix of `shape` (out, in), everything stored counted."""
        return 8 * self.nbytes(shape) / (shape[0] * shape[1])


@lru_cache(maxsize=4096)
def _backbone(name: str, state_bits: int, shape: tuple[int, int] | None) -> Quantizer:
    """Asked for several times an option, of which a table has tens of thousands."""
    return parse_quantizer(name).for_backbone(shape, state_bits)


@lru_cache(maxsize=4096)
def _factor(name: str, rank: int, state_bits: int) -> Quantizer:
    return parse_quantizer(name).for_factor(rank, state_bits)


def expand_backbones(backbones: Sequence[str]) -> list[str]:
    """Backbones with ranges written out: `trellis-1.5..4` is every sixteenth from 1.5 to 4, `trellis-1.5..4w` the same with w.

    Args:
        backbones: names as a recipe writes them.

    Returns:
        Canonical names, each once, in the order given.

    Raises:
        QLRError: for a name that is no backbone, or a range that has no numbers.

    Example:
        >>> expand_backbones(["trellis-2..2.125", "int-4g32"])
        ['trellis-2', 'trellis-2.0625', 'trellis-2.125', 'int-4g32']
    """
    out: list[str] = []
    for text in backbones:
        head, dots, last = text.partition("..")
        last, slash, ending = last.partition("/")
        last, w = last.removesuffix("w"), "w" * last.endswith("w")
        kind, _, first = head.rpartition("-")
        if not dots:
            # `none` is a backbone for those who give it factors; alone it is no spec
            out.append(text if text == "none" else str(Spec.parse(text)))
            continue
        try:
            steps = range(int(Fraction(first) * 16), int(Fraction(last) * 16) + 1)
        except ValueError:
            raise QLRError(f"{text!r} is not a range of backbones; write trellis-<from>..<to>, e.g. trellis-1.5..4") from None
        out += [str(Spec.parse(f"{kind}-{s / 16:g}{w}{slash}{ending}")) for s in steps]
    return list(dict.fromkeys(out))
