"""Grids of single weights with a stored scale a group, and the search for the scale of least squared error."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import lax

from qlr_jax.core.packing import pack_stream, stream_bytes, unpack_stream
from qlr_jax.core.quantizers.base import Arrays, QParams, Quantizer, Traced
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError
from qlr_jax.native.product import Format, Kind

_NAME = re.compile(r"[a-z0-9]+-(?P<width>[0-9]+)(?:g(?P<group>[0-9]+))?(?P<asymmetric>a)?")


class ScalarGrid(Quantizer):
    """Codes of `width` bits, each weight by itself, and one scale a group of weights of a row.

    A grid is a frozen dataclass with `width`, `group`, `name` and the two functions between weights and codes, `to_codes` and
    `from_codes`; `top` and `shrinks` say which scales are tried. One with a zero point too overrides `candidates`, `stored`,
    `pack` and `stored_qparams`: see `integer.Integer`.

    Attributes:
        width: bits of a code.
        scale_dtype: type of the stored scales.
        top: the level that the largest weight of a group falls on at shrink 1.
        shrinks: scales that are tried for every group, as fractions of that one.
    """

    scale_dtype: ClassVar[Any] = np.float16
    width: int

    @property
    def top(self) -> float:
        return 1.0

    @property
    def shrinks(self) -> np.ndarray:
        return np.linspace(0.35, 1.0, 27)

    @property
    def bits(self) -> float:
        return float(self.width)

    @property
    def scales(self) -> str:
        return "scales"

    @abstractmethod
    def to_codes(self, x: Array, *qparams: Array) -> Array:
        """Codes, whole numbers of any type, of the levels nearest to x."""

    @abstractmethod
    def from_codes(self, codes: Array, *qparams: Array) -> Array:
        """The values of codes."""

    def cast_scales(self, scales: Any) -> Any:
        return scales.astype(self.scale_dtype)

    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        return {
            "codes": ((rows, stream_bytes(cols, self.width)), np.dtype(np.uint8)),
            "scales": ((rows, group_count(cols, self.group)), np.dtype(self.scale_dtype)),
        }

    def candidates(self, parts: Array) -> tuple[QParams, Callable[[Array], QParams]]:
        """Qparams of the shapes (*b, rows, groups) that a shrink gives, and the function that gives them.

        Args:
            parts: the weights in groups, (*b, rows, groups, size).
        """
        full = jnp.abs(parts).max(-1)
        full = full if self.top == 1 else full / self.top
        return (full,), lambda shrink: (self.cast_scales(full * shrink).astype(jnp.float32),)

    def fit_qparams(self, x: Array, per_row: bool, unit: Array | None = None) -> QParams:
        whole = super().fit_qparams(x, per_row, unit)
        return *whole, *self._fit(divided(x, *whole) if whole else x)

    def _fit(self, x: Array) -> QParams:
        parts = split(x, self.group)
        start, at = self.candidates(parts)

        def attempt(shrink: Array) -> tuple[Array, QParams]:
            qparams = at(shrink)
            own = tuple(q[..., None] for q in qparams)
            return self.from_codes(self.to_codes(parts, *own), *own), qparams

        return least_error(parts, start, self.shrinks, attempt)

    def broadcast_qparams(self, qparams: QParams, cols: int) -> QParams:
        unit, own = (qparams[:1], qparams[1:]) if self.unit_scale else ((), qparams)
        return *unit, *(spread(q, self.group, cols) for q in own)

    def round_block(
        self, x: Array, qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        if not self.unit_scale:
            codes = self.to_codes(x, *qparams)
            return self.from_codes(codes, *qparams), codes.astype(jnp.uint8)
        unit, *own = qparams
        codes = self.to_codes(divided(x, unit), *own)
        return self.from_codes(codes, *own) * unit, codes.astype(jnp.uint8)

    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        return {
            "codes": pack_stream(np.asarray(codes), self.width),
            "scales": np.asarray(self.cast_scales(np.asarray(qparams[0]))),
        }

    def stored_qparams(self, arrays: Arrays, shape: tuple[int, int]) -> QParams:
        return (jnp.asarray(arrays["scales"]).astype(jnp.float32),)

    def grouped_format(self, kind: Kind, cols: int, **others: Any) -> Format | None:
        """`native_format` of codes in a stream a row.

        Args:
            kind: of the codes.
            cols: of the matrix.
            others: fields of `Format`.
        """
        if self.group % 16:
            return None
        return Format(kind, self.width, stream_bytes(cols, self.width), self.group, **others)

    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        codes = unpack_stream(arrays["codes"], self.width, cols)
        return self.from_codes(codes, *(spread(q, self.group, cols) for q in self.stored_qparams(arrays, (rows, cols))))


def grid_name(kind: str, width: int, group: int, asymmetric: bool = False) -> str:
    """`<kind>-<width>[g<group>][a]`.

    Args:
        kind: what the name begins with.
        width: bits of a code.
        group: weights that share a scale; 0: a row, and not written.
        asymmetric: whether a zero point is stored.

    Example:
        >>> grid_name("int", 3, 128, True)
        'int-3g128a'
    """
    return f"{kind}-{width}" + (f"g{group}" if group else "") + ("a" if asymmetric else "")


def parse_grid_name(text: str) -> tuple[int, int, bool] | None:
    """(width, group, asymmetric) of a name that `grid_name` makes; None for another.

    Example:
        >>> parse_grid_name("int-3g128a"), parse_grid_name("int-2.5")
        ((3, 128, True), None)
    """
    match = _NAME.fullmatch(text)
    return (int(match["width"]), int(match["group"] or 0), bool(match["asymmetric"])) if match else None


def nearest_level(x: Array, levels: np.ndarray) -> Array:
    """Index of the nearest of some levels, which ascend; halfway the lower one."""
    return jnp.searchsorted(jnp.asarray((levels[1:] + levels[:-1]) / 2), x, method="compare_all")


def divided(x: Array, scale: Array) -> Array:
    """x / scale, and x itself where the scale is 0."""
    return x / jnp.where(scale > 0, scale, 1.0)


def check_group(group: int) -> None:
    """Refuse a group size that is not offered; 0 stands for a scale a row."""
    if group and not 16 <= group <= 256:
        raise QLRError(f"a group of {group} is not offered; pass 16 to 256 weights, or none for a scale a row")


def group_count(cols: int, group: int) -> int:
    """Groups in a row of `cols` weights."""
    return -(-cols // group) if group else 1


def split(x: Array, group: int) -> Array:
    """(*b, rows, cols) -> (*b, rows, groups, size); a partial group is filled with its own last weight: its range stays."""
    cols, size = x.shape[-1], group or x.shape[-1]
    groups = group_count(cols, group)
    missing = groups * size - cols
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)], mode="edge").reshape(*x.shape[:-1], groups, size)


def spread(per_group: Array, group: int, cols: int) -> Array:
    """(*b, rows, groups) -> (*b, rows, cols).

    Args:
        per_group: one value a group.
        group: weights of a group; 0: a row.
        cols: of the matrix; the last group may be cut.

    Example:
        >>> spread(jnp.array([[1.0, 2.0]]), 2, 3).tolist()
        [[1.0, 1.0, 2.0]]
    """
    of: Any = np if isinstance(per_group, np.ndarray) else jnp  # numpy's stay on the host
    return of.repeat(per_group, group or cols, axis=-1)[..., :cols]


def least_error(parts: Array, start: QParams, shrinks: np.ndarray, attempt: Callable[[Array], tuple[Array, QParams]]) -> QParams:
    """Of the qparams that `attempt(shrink)` gives, with the values it rounds `parts` to, those of least squared error a group.

    Args:
        parts: (*b, groups, size).
        start: qparams of the right shapes and types.
        shrinks: candidates, fractions of the scale that just covers a group.
    """

    def compare(best: tuple[Array, QParams], shrink: Array) -> tuple[tuple[Array, QParams], None]:
        values, qparams = attempt(shrink)
        error = jnp.sum(jnp.square(values - parts), axis=-1)
        better = error < best[0]
        kept = tuple(jnp.where(better, a, b) for a, b in zip(qparams, best[1], strict=True))
        return (jnp.where(better, error, best[0]), kept), None

    # a scan, not an unrolled loop: that one takes XLA minutes to compile
    worst = jnp.full(parts.shape[:-1], jnp.inf, parts.dtype)
    (_, found), _ = lax.scan(compare, (worst, start), jnp.asarray(shrinks, jnp.float32))
    return found
