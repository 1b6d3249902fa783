"""The E8 lattice: 8 weights at a time to the nearest of 65,536 points at 2 bits, with a second stage at 3 and 4.

`e8-2`: E8 + ¼ in the ball where it matters. A point is σ ∘ a ± ¼: a one of 256 vectors of positive half-odd numbers (all 227 with
|a|² ≤ 10 and 29 of the 56 with five 3/2 and three ½, |a|² = 12), σ signs such that the sum of σ ∘ a is even. Eight bits name a,
seven the signs (the last follows), one the shift: 16 bits, with no table but the 256 vectors. What is left over goes to a
second stage: at 3 bits to the nearest of 256 points of E8 itself (0, its 240 roots and 15 points of norm 4), at 4 bits to the
same 65,536 points again, made smaller. Each stage finds its nearest point exactly.

Source: QuIP#, arXiv 2402.04396, section 4 (the codebook E8P) and section 4.3 (residual stages); the search, the choice of the 29
and of the 15, and the scales are ours.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qlr_jax.core.quantizers.base import Arrays, QParams, Quantizer, SearchCost, Traced
from qlr_jax.core.typing import Array, Float
from qlr_jax.errors import QLRError

SIZE = 8  # weights a point
_DIGITS = re.compile("[0-9]+")
# bits -> scale of the first stage, and of the second within it: of least squared error on a unit Gaussian. All are short
# binary fractions, so that every value is exact in float32: it is the same in whatever order a runtime computes it.
SCALES = {2: (247 / 256, 0.0), 3: (65 / 64, 31 / 64), 4: (9 / 8, 33 / 128)}


@lru_cache
def magnitudes() -> np.ndarray:
    """The 256 vectors |point ∓ ¼|, (256, 8): sorted by norm, then in the order of their digits.

    Example:
        >>> np.square(magnitudes()).sum(1)[[0, 226, 227, 255]].tolist()
        [2.0, 10.0, 12.0, 12.0]
    """
    inner = [v for v in itertools.product((1, 3, 5), repeat=SIZE) if sum(x * x for x in v) <= 40]
    inner.sort(key=lambda v: (sum(x * x for x in v), v))
    outer = [v for v in itertools.product((1, 3), repeat=SIZE) if sum(v) == 18]
    return np.array(inner + outer[::2] + outer[1:2], np.float32) / 2  # every second one: spread evenly over the coordinates


@lru_cache
def roots() -> np.ndarray:
    """The 256 points of E8 of the second stage at 3 bits, (256, 8): 0, the 240 of norm 2, 15 of the norm-4 ones ± 2 e_i.

    Example:
        >>> np.square(roots()).sum(1)[[0, 1, 240, 241]].tolist()
        [0.0, 2.0, 2.0, 4.0]
    """
    points = [np.zeros(SIZE)]
    for i, j in itertools.combinations(range(SIZE), 2):
        for a, b in itertools.product((1.0, -1.0), repeat=2):
            points.append(a * np.eye(SIZE)[i] + b * np.eye(SIZE)[j])
    points += [np.array(s) for s in itertools.product((0.5, -0.5), repeat=SIZE) if sum(s) % 2 == 0]
    points += [a * np.eye(SIZE)[i] for i in range(SIZE) for a in (2.0, -2.0)]
    return np.array(points[:256], np.float32)


@partial(jax.jit, static_argnames="scale")  # a dozen small programs for every shape else, where a matrix is decoded
def shifted_points(codes: Array, scale: float = 1.0) -> Array:
    """scale · points of E8 + ¼ for 16-bit codes, (*b,) -> (*b, 8).

    Bits 0-7 name |point ∓ ¼|, 8-14 are the signs of coordinates 0-6, bit 15 is set for + ¼.

    Args:
        codes: integers in [0, 2^16), shape (*b,).
        scale: factor of the points.

    Returns:
        float32 (*b, 8).

    Example:
        >>> shifted_points(jnp.array([0, 0x8100])).tolist()[1]
        [-0.25, 0.75, 0.75, 0.75, 0.75, 0.75, 0.75, -0.25]
    """
    codes = codes.astype(jnp.int32)
    size = jnp.asarray(scale * magnitudes())[codes & 255]
    negative = (codes[..., None] >> (8 + jnp.arange(SIZE - 1))) & 1
    last = (jnp.sum(negative, axis=-1) + jnp.asarray(_odd_sums())[codes & 255]) % 2
    sign = 1.0 - 2.0 * jnp.concatenate([negative, last[..., None]], axis=-1).astype(jnp.float32)
    return size * sign + jnp.where(codes >> 15 == 1, scale / 4, -scale / 4)[..., None]


def _odd_sums() -> np.ndarray:
    """1 where the coordinates of a magnitude add up to an odd number: then an odd number of signs is negative."""
    return (magnitudes().sum(1) % 2).astype(np.int32)


def nearest_shifted(x: Float[Array, "8 vectors"]) -> Array:
    """16-bit codes of the nearest points of E8 + ¼, (vectors,) int32, for vectors in columns.

    For a magnitude a and a shift s, the best signs are those of y = x − s; where their number has the wrong parity, the one
    that costs least, min 2 aᵢ|yᵢ|, is turned. So |x − point|² = |y|² − 2 (a·|y| − |a|²/2 − [wrong parity] 2 min aᵢ|yᵢ|), and
    the two shifts differ by |y|² = |x|² − 2 s Σ xᵢ + ½.

    Args:
        x: vectors in columns, (8, vectors), in units of the lattice.

    Returns:
        int32 (vectors,), as `shifted_points` reads them.

    Example:
        >>> point = shifted_points(jnp.array([0x8100]))
        >>> nearest_shifted(point.T + 0.1).tolist() == [0x8100]
        True
    """
    table, odd_sums = magnitudes(), _odd_sums() == 1
    y = x[None] - jnp.array([-0.25, 0.25])[:, None, None]
    size, odd = jnp.abs(y), jnp.sum(y < 0, axis=1) % 2 == 1  # (2, 8, vectors), (2, vectors)

    def compare(best: tuple[Array, Array], entry: tuple[Array, Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        magnitude, half_norm, odd_sum, name = entry
        terms = [magnitude[i] * size[:, i] for i in range(SIZE)]
        total, least = terms[0], terms[0]
        for term in terms[1:]:
            total, least = total + term, jnp.minimum(least, term)
        gain = total - half_norm - jnp.where(odd == odd_sum, 0.0, 2.0 * least)
        better = gain > best[0]
        return (jnp.where(better, gain, best[0]), jnp.where(better, name, best[1])), None

    entries: Any = (table, np.square(table).sum(1) / 2, odd_sums, np.arange(256, dtype=np.int32))
    start = (jnp.full(odd.shape, -jnp.inf), jnp.zeros(odd.shape, jnp.int32))
    (gain, name), _ = lax.scan(compare, start, entries, unroll=4)
    up = gain[1] - gain[0] > -0.5 * jnp.sum(x, axis=0)  # + ¼ is nearer
    name, odd, y = (jnp.where(up, of[1], of[0]) for of in (name, odd, y))
    wrong = odd != jnp.asarray(odd_sums)[name]
    turned = jnp.argmin(jnp.asarray(table)[name].T * jnp.abs(y), axis=0)
    negative = (y < 0) ^ (wrong & (jnp.arange(SIZE)[:, None] == turned))
    signs = jnp.sum(negative[: SIZE - 1].astype(jnp.int32) << jnp.arange(SIZE - 1)[:, None], axis=0)
    return name | (signs << 8) | (up.astype(jnp.int32) << 15)


def nearest_root(x: Float[Array, "8 vectors"]) -> Array:
    """Names, (vectors,) int32, of the nearest of the 256 points of `roots`, for vectors in columns.

    Args:
        x: (8, vectors), in units of the lattice.

    Example:
        >>> nearest_root(jnp.asarray(roots()[[3, 200]]).T + 0.1).tolist()
        [3, 200]
    """

    def compare(best: tuple[Array, Array], entry: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], None]:
        point, half_norm, name = entry
        gain = jnp.sum(point[:, None] * x, axis=0) - half_norm
        better = gain > best[0]
        return (jnp.where(better, gain, best[0]), jnp.where(better, name, best[1])), None

    table = roots()
    entries: Any = (table, np.square(table).sum(1) / 2, np.arange(256, dtype=np.int32))
    start = (jnp.full(x.shape[1], -jnp.inf), jnp.zeros(x.shape[1], jnp.int32))
    return lax.scan(compare, start, entries, unroll=4)[0][1]


@dataclass(frozen=True)
class Lattice(Quantizer):
    """`e8-2`, `e8-3`, `e8-4`: 2, 3 or 4 bytes for every 8 weights of a row.

    Attributes:
        width: 2, 3 or 4 bits a weight.

    Raises:
        QLRError: a width that is not offered.

    Source: QuIP#, arXiv 2402.04396, sections 4 and 4.3.

    Example:
        >>> code = Lattice(2)
        >>> values, codes = code.round_block(jnp.full((1, 8), 0.7), (jnp.ones((1, 1)),), (), False)
        >>> codes.shape, bool(jnp.abs(values - 0.7).max() < 0.1)
        ((1, 1), True)
    """

    width: int

    examples = ("e8-2", "e8-3", "e8-4")
    usage = "e8-<2..4>"
    unit_scale = True
    always_rotated = True

    def __post_init__(self) -> None:
        if self.width not in SCALES:
            raise QLRError(f"e8-{self.width} is not offered; pass e8-2, e8-3 or e8-4")

    @classmethod
    def parse(cls, text: str) -> Lattice | None:
        bits = text.partition("-")[2]
        return cls(int(bits)) if _DIGITS.fullmatch(bits) else None

    @property
    def name(self) -> str:
        return f"e8-{self.width}"

    @property
    def bits(self) -> float:
        return float(self.width)

    @property
    def tile(self) -> tuple[int, int]:
        return 1, SIZE

    @property
    def search_cost(self) -> SearchCost:
        return SearchCost(time=0.03)

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {"codes": ((rows, -(-cols // SIZE), self.width), np.dtype(np.uint8))}

    def covering_radius(self, qparams: QParams, cols: int) -> Array:
        """What 8 weights can be off inside the code: E8's covering radius is 1, that of E8 + ¼ made smaller at 4 bits.

        At 3 bits the second stage leaves no more than the first, since 0 is among its points.
        """
        gain, inner = SCALES[self.width]
        return qparams[0] * (gain * inner if self.width == 4 else gain)

    def round_block(
        self, x: Array, qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        scale = qparams[0]
        aligned = x / jnp.where(scale > 0, scale * SCALES[self.width][0], 1.0)
        aligned = jnp.swapaxes(aligned, -1, -2) if transposed else aligned
        vectors = aligned.reshape(*aligned.shape[:-1], -1, SIZE)
        codes = self._search(vectors.reshape(-1, SIZE).T)
        values = self._values(codes).reshape(aligned.shape)
        codes = codes.astype(jnp.uint16).reshape(*vectors.shape[:-1], -1)  # (*b, stored rows, vectors a row, stages)
        if transposed:
            values, codes = jnp.swapaxes(values, -1, -2), jnp.swapaxes(codes, -2, -3)
        return values * scale, codes.reshape(*codes.shape[:-2], -1)  # one axis for a block's codes, as `ldlq` gathers them

    def _search(self, vectors: Array) -> Array:
        """Codes (vectors, stages) of vectors in columns, in units of the first stage."""
        first = nearest_shifted(vectors)
        if self.width == 2:
            return first[:, None]
        left_over = (vectors - shifted_points(first).T) / SCALES[self.width][1]
        return jnp.stack([first, (nearest_root if self.width == 3 else nearest_shifted)(left_over)], axis=-1)

    def _values(self, codes: Array) -> Array:
        """(*b, stages) -> (*b, 8)."""
        gain, inner = SCALES[self.width]
        points = shifted_points(codes[..., 0], gain)
        if self.width == 3:
            return points + jnp.asarray(gain * inner * roots())[codes[..., 1]]
        return points + shifted_points(codes[..., 1], gain * inner) if self.width == 4 else points

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        codes = np.asarray(codes).reshape(len(codes), -1, 1 if self.width == 2 else 2)
        parts = [codes[..., 0] & 255, codes[..., 0] >> 8]
        parts += [codes[..., 1] & 255] if self.width > 2 else []
        parts += [codes[..., 1] >> 8] if self.width > 3 else []
        return {"codes": np.stack(parts, axis=-1).astype(np.uint8)}

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        stored = jnp.asarray(arrays["codes"]).astype(jnp.int32)
        codes = [stored[..., 0] | (stored[..., 1] << 8)]
        if self.width > 2:
            codes.append(stored[..., 2] | (stored[..., 3] << 8 if self.width > 3 else 0))
        return self._values(jnp.stack(codes, axis=-1)).reshape(rows, -1)[:, :cols]
