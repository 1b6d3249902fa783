"""Specs: their text, their exact bytes, and what is refused."""

import pytest

from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError

# as written -> canonical
WRITTEN = {
    "trellis-2": "trellis-2",
    "trellis-2.0": "trellis-2",
    "trellis-1.0625": "trellis-1.0625",
    " trellis-2.25 ": "trellis-2.25",
    "trellis-2+r32@trellis-4,trellis-4": "trellis-2+r32@trellis-4",
    "int-4g32+r16@bf16": "int-4g32+r16@bf16",
    "int-04": "int-4",
    "int-3g128a/rot": "int-3g128a/rot",
    "int-2a/rot+r8@int-8g16,trellis-3.5": "int-2a/rot+r8@int-8g16,trellis-3.5",
    "none+r64@int-8,bf16": "none+r64@int-8,bf16",
    "none/rot+r4@trellis-3": "none/rot+r4@trellis-3",
    "e8-2+r256@e8-4": "e8-2+r256@e8-4",  # the paper's
    "e8-03+r4@e8-4,e8-4": "e8-3+r4@e8-4",
    "nf-4g64+r16@bf16": "nf-4g64+r16@bf16",
    "nf-3/rot": "nf-3/rot",
    "nf-2g32/rot+r8@e8-2,nf-4": "nf-2g32/rot+r8@e8-2,nf-4",
    "nvfp4+r4@nvfp4,int-8": "nvfp4+r4@nvfp4,int-8",
    "nvfp4/rot": "nvfp4/rot",
    "bf16": "bf16",
    "bf16/rot": "bf16/rot",
}


@pytest.mark.parametrize(("text", "canonical"), WRITTEN.items())
def test_text_round_trip(text, canonical):
    spec = Spec.parse(text)
    assert str(spec) == canonical
    assert Spec.parse(canonical) == spec == Spec.parse(spec)
    assert spec.rotated == (canonical.startswith(("trellis", "e8")) or "/rot" in canonical)


# spec, (out, in), bytes by hand
BYTES = [
    ("trellis-2", (16, 16), 64 + 4),  # one walk of 256 weights; g
    ("trellis-2", (17, 33), 1 * 5 * 64 + 4),  # edges fill whole walks
    ("trellis-2.25", (32, 48), 6 * 72 + 4),
    ("trellis-1.0625", (16, 32), 2 * 34 + 4),
    ("int-4", (5, 7), 5 * 4 + 5 * 2 + 4),  # 28 bits a row are 4 bytes; a scale a row
    ("int-3g16", (5, 33), 5 * 13 + 5 * 3 * 2 + 4),  # 99 bits a row; 3 groups a row
    ("int-3g16a", (5, 33), 5 * 13 + 5 * 3 * 3 + 4),  # a zero a group beside its scale
    ("int-1/rot", (3, 9), 3 * 2 + 3 * 2 + 4),
    ("bf16", (3, 5), 30),
    ("none+r2@bf16", (3, 5), 2 * (3 + 5) * 2 + 4),
    ("int-4+r2@int-8", (3, 5), 3 * 3 + 3 * 2 + 4 + 2 * (3 + 2) + 2 * (5 + 2)),
    ("trellis-2+r8@trellis-4", (16, 32), 128 + 4 + 2 * 128 + 2 * 128 + 8 * 2),  # 4 × 64 weights a walk; s
    ("trellis-2+r8@trellis-4", (33, 65), 3 * 5 * 64 + 4 + 2 * 128 + 4 * 128 + 8 * 2),
    ("trellis-2+r3@trellis-4", (16, 32), 128 + 4 + 3 * 128 + 3 * 128 + 3 * 2),  # 3 has no power of two: walks of one component
    ("nf-4g64", (3, 100), 3 * 50 + 3 * 2 * 2 + 4),  # codes; 2 groups a row
    ("nf-3/rot", (5, 7), 5 * 3 + 5 * 2 + 4),  # 21 bits a row; a scale a row
    ("e8-2", (5, 8), 5 * 2 + 4),  # 2 bytes for 8 weights; g
    ("e8-3", (5, 9), 5 * 2 * 3 + 4),  # 9 weights fill two eights
    ("e8-2+r6@e8-4", (16, 33), 16 * 5 * 2 + 4 + 6 * 2 * 4 + 6 * 5 * 4 + 6 * 2),  # Lᵀ (6, 16), R (6, 33); s
    ("nf-4g16+r4@e8-3,nf-2", (16, 32), 16 * 16 + 16 * 2 * 2 + 4 + 4 * 2 * 3 + 4 * 8 + 4 * 2 + 4 * 2),
    ("nvfp4", (5, 33), 5 * 17 + 5 * 3 + 4),  # 33 codes of half a byte; a byte for 16; g
    ("nvfp4/rot+r4@nvfp4", (5, 33), 5 * 17 + 5 * 3 + 4 + 4 * 3 + 4 * 1 + 4 * 17 + 4 * 3 + 4 * 2),
    ("int-4+r4@bf16,trellis-2", (64, 64), 64 * 32 + 64 * 2 + 4 + 4 * 64 * 2 + 1 * 64 + 4 * 2),
]


@pytest.mark.parametrize(("text", "shape", "nbytes"), BYTES)
def test_bytes_and_bits(text, shape, nbytes):
    spec = Spec.parse(text)
    assert spec.nbytes(shape) == nbytes
    assert spec.bits(shape) == 8 * nbytes / (shape[0] * shape[1])


REFUSED = {
    "": "is not a spec",
    "trellis-2+r8": "is not a spec; pass <backbone>",
    "trellis-2+r-8@bf16": "is not a spec",
    "e9-2": "'e9-2' is not a quantizer; pass bf16",
    "int-4+r8@float": "'float' is not a quantizer",
    "int-2.5": "'int-2.5' is not a quantizer",
    "trellis-2g32": "'trellis-2g32' is not a quantizer",
    "trellis-2..5": "'trellis-2..5' is not a quantizer",
    "int-9": "int-9 is not offered; pass 1 to 8 bits",
    "int-4g8": "a group of 8 is not offered; pass 16 to 256",
    "trellis-2.03": r"trellis-2\.03 is not a rate; pass 1 to 6 bits in sixteenths",
    "trellis-0.5": r"trellis-0\.5 is not a rate",
    "trellis-6.0625": r"trellis-6\.0625 is not a rate",
    "e8-5": "e8-5 is not offered; pass e8-2, e8-3 or e8-4",
    "e8-2.5": r"'e8-2\.5' is not a quantizer",
    "e8-2g32": "'e8-2g32' is not a quantizer",
    "nf-8": "nf-8 is not offered; pass 2 to 4 bits",
    "nf-4a": "'nf-4a' is not a quantizer",
    "nvfp4-4": "'nvfp4-4' is not a quantizer",
    "nvfp4g16": "'nvfp4g16' is not a quantizer; pass bf16, none, .*, nvfp4, ",
    "e8-2/rot": "e8-2 is rotated always; leave /rot out",
    "trellis-2/rot": "trellis-2 is rotated always; leave /rot out",
    "trellis-2+r0@bf16": r"rank 0 is written by leaving \+r out",
    "none": "keeps nothing of the matrix; give it factors",
    "none/rot": "keeps nothing of the matrix",
    "int-4+r8@none": "factors cannot be none",
    "int-4+r8@bf16,none": "factors cannot be none",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items())
def test_refused(text, message):
    with pytest.raises(QLRError, match=message):
        Spec.parse(text)


def test_rank_too_large():
    spec = Spec.parse("int-4+r9@bf16")
    assert spec.nbytes((9, 20)) > 0
    with pytest.raises(QLRError, match="rank 9 is larger than the 20 × 8 matrix allows; pass at most 8"):
        spec.nbytes((20, 8))


def test_padding_shrinks_with_size():
    """Bits fall to the rate as edges and side data thin out, and never below it."""
    bits = [Spec.parse("trellis-2.25").bits((n, n)) for n in (17, 100, 1000, 4096)]
    assert bits == sorted(bits, reverse=True) and 2.25 < bits[-1] < 2.2501
