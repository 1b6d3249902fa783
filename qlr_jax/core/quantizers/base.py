"""What every quantizer offers; the solver and the matrix know no more than this."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.core.typing import Array
from qlr_jax.native.product import Format

Arrays = Mapping[str, Array]
QParams = tuple[Array, ...]  # scale, and zero point where there is one
Traced = tuple[Array, ...]
DEFAULT_STATE_BITS = 14  # of a trellis


@dataclass(frozen=True)
class SearchCost:
    """What finding the codes of a weight costs; by default what rounding to the nearest of a few levels does.

    Attributes:
        time: over that of a trellis search with 12 state bits.
        shared: the part of that time which all cores work at.
        steps: of the search that run one after another, a column of the matrix.
        states: that a dynamic programme keeps, 0 where there is none.
    """

    time: float = 0.005
    shared: float = 0.0
    steps: float = 1.0
    states: int = 0


class Quantizer(ABC):
    """A grid for matrices (rows, cols), with its codes, its scales and its stored bytes.

    `fit_qparams` chooses scales for a batch (*b, rows, cols); `broadcast_qparams` spreads them so that they broadcast against
    it and can be sliced along columns; `round_block` rounds some columns; `pack` turns one matrix's codes and scales into the
    arrays that are stored, `decode` reads them. Factors are stored one row a component, so L is rounded as the transpose of
    what is stored: there `round_block` is given transposed=True and transposed qparams.

    Attributes:
        examples: names of it, which the tests run every property of a quantizer on.
        usage: the form of its names, as messages show it.
        unit_scale: it decodes in units of one scale of the whole that it does not store: the matrix keeps that of a backbone,
            a component its own. That scale is then the first of the qparams, before those that are stored.
        always_rotated: a backbone of it is rotated without saying so; all rates of it then err alike (`sensitivity.predict`).
        plain: it stores the weights themselves, as the original model has them.
        empty: it stores nothing; factors must carry everything.
        follows_metric: some of its qparams are `metric_qparams`: it is for backbones, which have metrics, and not for `/rows`.
        decodes_on_host: `decode` computes with numpy what lies on the host: for codes whose programs would be too many.
        group: weights that share a scale, 0 where a row does or nothing is shared.
        runtime_version: of the first PyTorch runtime that reads it.
    """

    examples: ClassVar[tuple[str, ...]]
    usage: ClassVar[str]
    unit_scale: ClassVar[bool] = False
    always_rotated: ClassVar[bool] = False
    plain: ClassVar[bool] = False
    empty: ClassVar[bool] = False
    follows_metric: ClassVar[bool] = False
    decodes_on_host: ClassVar[bool] = False
    runtime_version: ClassVar[int] = 5
    group: int = 0

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """The quantizer of this name, its kind known to be this one; None where the rest of the name makes no sense.

        Raises:
            QLRError: for a name of the right form that is not offered, e.g. too many bits.
        """

    @property
    @abstractmethod
    def name(self) -> str:
        """As a spec writes it, e.g. `int-4g32`."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits a weight, side data not counted."""

    @property
    def needs_runtime(self) -> int:
        """`runtime_version`, or a later one where this name came later; a folder records that of its newest quantizer."""
        return self.runtime_version

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, cols) that are rounded together; whole tiles are stored, so edges are padded."""
        return 1, 1

    def with_settings(self, tile_rows: int | None = None, state_bits: int = DEFAULT_STATE_BITS) -> Quantizer:
        """It with what a name does not say; itself, where there is nothing to set.

        Args:
            tile_rows: rows of a trellis sequence; None: as it is.
            state_bits: of a trellis.
        """
        return self

    def for_backbone(self, shape: tuple[int, int] | None = None, state_bits: int = DEFAULT_STATE_BITS) -> Quantizer:
        """It with the settings of a backbone of `shape` (out, in): itself, where there is nothing to set."""
        return self

    def for_factor(self, rank: int, state_bits: int = DEFAULT_STATE_BITS) -> Quantizer:
        """It with the settings of a factor of `rank` rows: itself, where there is nothing to set."""
        return self

    @abstractmethod
    def stored(self, rows: int, cols: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name -> (shape, dtype) of every array that is stored for a matrix: its exact bytes."""

    def fit_qparams(self, x: Array, per_row: bool, unit: Array | None = None) -> QParams:
        """Scales of least error for a batch.

        Args:
            x: (*b, rows, cols).
            per_row: asks a `unit_scale` quantizer for one scale a row instead of one a matrix.
            unit: that scale, (*b, 1 or rows, 1), where it is given; None: it is chosen.
        """
        if not self.unit_scale:
            return ()
        return (self.unit_of(x, per_row) if unit is None else unit,)

    def unit_of(self, x: Array, per_row: bool) -> Array:
        """The scale of the whole that a `unit_scale` quantizer chooses for a batch, (*b, 1 or rows, 1)."""
        return root_mean_square(x, per_row)

    def metric_qparams(self, spread: np.ndarray) -> QParams:
        """The stored qparams that H decides before anything is rounded; none, for most grids.

        Args:
            spread: tr(D_j) of the blocks of H's LDLᵀ factor, one a column of tiles, (b, across): what rounding noise there costs.

        Returns:
            In place of the last ones that `fit_qparams` gives, (b, ...).
        """
        return ()

    def relative_gain(self, spread: np.ndarray) -> float:
        """The error that `metric_qparams` leaves over that of qparams which no metric decides, for one matrix.

        Args:
            spread: as for `metric_qparams`, (across,).
        """
        return 1.0

    def broadcast_qparams(self, qparams: QParams, cols: int) -> QParams:
        """The qparams of every weight: each (*b, rows or 1, cols or 1)."""
        return qparams

    def covering_radius(self, qparams: QParams, cols: int) -> Array | None:
        """How far the nearest value of a tile can be inside the code, (rows or 1, cols or 1): solutions then carry a bound.

        Args:
            qparams: of one matrix.
            cols: its columns.

        Returns:
            None where no such radius is known.
        """
        return None

    def static(self) -> Quantizer:
        """The quantizer less what `traced` carries: hashable, a static argument of the compiled functions."""
        return self

    def traced(self) -> Traced:
        """The parameters that differ where `static` agrees, as arrays: one compilation serves all their values."""
        return ()

    @abstractmethod
    def round_block(
        self, x: Array, qparams: QParams, traced: Traced, transposed: bool, warm: Array | None = None
    ) -> tuple[Array, Array]:
        """Round some columns.

        Args:
            x: (*b, rows, c), c whole tiles.
            qparams: those of `broadcast_qparams`, of these columns.
            traced: of `traced`.
            transposed: what is stored is the transpose of x.
            warm: of every weight the entry of its tile in `warm_start`; None: nothing is known.

        Returns:
            The values (*b, rows, c), and their codes.
        """

    def warm_start(self, rows: int, cols: int, codes: Array | None = None) -> np.ndarray | None:
        """What a search of the codes may start from, an entry a tile (down, across); None where a search starts from nothing.

        Args:
            codes: of a rounding before, as `round_block` gives them for whole matrices; None: the entries say "not known".
        """
        return None

    @abstractmethod
    def pack(self, codes: np.ndarray, qparams: QParams) -> dict[str, np.ndarray]:
        """The arrays that are stored for one matrix, as `stored` describes them.

        Args:
            codes: of all of it.
            qparams: those that are stored, not broadcast.
        """

    def stored_qparams(self, arrays: Arrays, shape: tuple[int, int]) -> QParams:
        """The qparams that are stored, as `fit_qparams` gives them; the scale of a `unit_scale` quantizer is none.

        Args:
            arrays: that are stored.
            shape: (rows, cols) of the matrix.
        """
        return ()

    @abstractmethod
    def decode(self, arrays: Arrays, rows: int, cols: int) -> Array:
        """The float32 matrix (rows, cols) that the stored arrays mean.

        Args:
            arrays: by the names of `stored`.
            rows, cols: of the matrix, without padding.
        """

    def native_format(self, rows: int, cols: int) -> Format | None:
        """How the library of qlr_jax.native reads the stored arrays of a matrix; None where it cannot."""
        return None

    @property
    def scales(self) -> str | None:
        """Name of the stored array of scales that training may change, codes being as they are; None where there is none."""
        return None

    def cast_scales(self, scales: Any) -> Any:
        """Scales as they are stored: rounded to the type of the array `scales` names, kept within its range."""
        raise NotImplementedError

    @property
    def search_cost(self) -> SearchCost:
        return SearchCost()

    def gaussian_error(self) -> float:
        """Mean squared error on a unit Gaussian, measured on 16,384 samples with a scale a row."""
        return _measured(self)


@lru_cache
def _measured(quantizer: Quantizer) -> float:
    def rounded(x: Array) -> Array:
        qparams = quantizer.broadcast_qparams(quantizer.fit_qparams(x, per_row=True), 256)
        return quantizer.round_block(x, qparams, quantizer.traced(), False)[0]

    x = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    return float(np.mean(np.square(x - np.asarray(jax.jit(rounded)(x)))))


def root_mean_square(x: Array, per_row: bool) -> Array:
    """Of every row (*b, rows, 1), or of the whole (*b, 1, 1)."""
    return jnp.sqrt(jnp.mean(jnp.square(x), axis=(-1,) if per_row else (-2, -1), keepdims=True))


@lru_cache(maxsize=2**16)  # a table asks again and again: every spec of every shape has factors of a few kinds
def stored_bytes(quantizer: Quantizer, rows: int, cols: int) -> int:
    """Bytes of everything that is stored for a matrix, padding included.

    Args:
        quantizer: of the matrix.
        rows, cols: of the matrix as it is stored.

    Example:
        >>> from qlr_jax.core.quantizers import parse_quantizer
        >>> stored_bytes(parse_quantizer("int-4g32"), 2, 64)
        72
    """
    return sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in quantizer.stored(rows, cols).values())
