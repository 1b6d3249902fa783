"""Rounding with linear feedback: the half-step that finds Q, and rounds the factors in their own metrics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.linalg import solve_triangular

from qlr_jax.core.quantizers import Quantizer
from qlr_jax.core.quantizers.base import QParams, Traced
from qlr_jax.core.sharding import by_rows, sharded
from qlr_jax.core.typing import Array, Float

EXACT = 256
ROW_GROUPS = 16  # groups of rows, at most, that feed back each other's errors; within a group rows are rounded side by side
GROUP = 64  # columns that are rounded, at most, between two products with all of the error so far


@partial(jax.jit, static_argnames=("block",))
def feedback(hessian: Float[Array, "*b n n"], block: int) -> tuple[Float[Array, "*b n n"], Float[Array, "*b blocks"]]:
    """F and tr(D_k) of the block LDLᵀ factor: H = (I + F) D (I + F)ᵀ, F strictly block-lower, D block-diagonal, D_k its blocks.

    If column blocks are rounded from last to first, each as W_b + Σ_{c > b} E_c F_cb with E = W − Ŵ, then
    tr(E H Eᵀ) = tr(η D ηᵀ), η the rounding errors alone (QuIP, arXiv 2307.13304, section 3; in blocks: QuIP#, section 4.1).

    Args:
        hessian: positive definite (damp it first).
        block: columns a block; n must be a multiple of it.

    Example:
        >>> f, traces = feedback(jnp.array([[1.0, 0.0], [0.5, 1.0]]) @ jnp.array([[1.0, 0.5], [0.0, 1.0]]), 1)
        >>> f.tolist(), traces.tolist()
        ([[0.0, 0.0], [0.5, 0.0]], [1.0, 1.0])
    """
    return unit_blocks(jnp.linalg.cholesky(hessian), block)


def unit_blocks(lower: Float[Array, "*b n n"], block: int) -> tuple[Float[Array, "*b n n"], Float[Array, "*b blocks"]]:
    """`feedback` of a Hessian whose Cholesky factor is known.

    Args:
        lower: C, lower triangular, H = C Cᵀ.
        block: columns a block; n must be a multiple of it.
    """
    n = lower.shape[-1]
    count = n // block
    lead = lower.shape[:-2]
    tiles = lower.reshape(*lead, count, block, count, block)
    corner = jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)  # (*b, count, block, block)
    traces = jnp.sum(jnp.square(corner), axis=(-2, -1))
    # C · blockdiag(C_bb)⁻¹, a column block at a time: solve X C_bb = C_:b
    columns = jnp.moveaxis(lower.reshape(*lead, n, count, block), -2, -3)  # (*b, count, n, block)
    if block == 1:
        unit = columns / corner
    else:
        unit = jnp.swapaxes(solve_triangular(jnp.swapaxes(corner, -1, -2), jnp.swapaxes(columns, -1, -2), lower=False), -1, -2)
    factor = jnp.moveaxis(unit, -3, -2).reshape(*lead, n, n)
    index = jnp.arange(n) // block
    return jnp.where(index[:, None] > index[None, :], factor, 0.0), traces


@partial(sharded, factors=True)
@jax.jit
def noise_gain(factor: Float[Array, "*b n n"]) -> Float[Array, "*b"]:
    """φ = ‖I − (I + F)⁻¹‖² / n: how much of the rounding noise the feedback adds to what is rounded.

    The targets are W + E F = W + η − E with E = η (I + F)⁻¹, so noise of variance D v on targets of variance v gives
    v = var(W) + φ D v, hence v = var(W) / (1 − φ D).

    Example:
        >>> float(noise_gain(jnp.zeros((4, 4))))
        0.0
    """
    n = factor.shape[-1]
    # up to EXACT columns every unit vector is a probe; beyond, as many random sign vectors (Hutchinson)
    probe = np.eye(n) * n**0.5 if n <= EXACT else np.random.default_rng(0).choice([-1.0, 1.0], (n, EXACT))
    probes = jnp.broadcast_to(jnp.asarray(probe, factor.dtype), (*factor.shape[:-2], *probe.shape))
    solved = solve_triangular(factor + jnp.eye(n, dtype=factor.dtype), probes, lower=True, unit_diagonal=True)
    return jnp.sum(jnp.square(probes - solved), axis=(-2, -1)) / (n * probe.shape[1])


def variance_gain(error: float, gain: np.ndarray | float) -> np.ndarray:
    """1 / (1 − φ D): variance of what is rounded over that of W, for a grid of mean squared error D on a unit Gaussian."""
    return 1.0 / (1.0 - np.minimum(error * np.asarray(gain, np.float64), 0.7))


def _columns(array: Array, start: Array | int, width: int) -> Array:
    return array if array.shape[-1] == 1 else lax.dynamic_slice_in_dim(array, start, width, axis=-1)


def column_block(quantizer: Quantizer, transposed: bool = False) -> int:
    """Columns that the feedback treats as one block for this grid: a tile's width, or single columns."""
    height, width = quantizer.tile
    return height if transposed else width


@partial(jax.jit, static_argnames=("static", "transposed"))
def ldlq(
    weight: Float[Array, "*b m n"],
    factor: Float[Array, "*b n n"],
    qparams: QParams,
    traced: Traced,
    static: Quantizer,
    transposed: bool = False,
    warm: Array | None = None,
) -> tuple[Float[Array, "*b m n"], Array]:
    """Round `weight` on a grid with feedback F (from `feedback`, at `column_block` columns a block).

    Args:
        weight: whole tiles of the quantizer.
        factor: F.
        qparams: scale and zero point of every weight, broadcastable to `weight`.
        traced, static: parameters of the quantizer, and its static configuration: one compilation serves all that share it.
        transposed: the quantizer stores the transpose of `weight`.
        warm: of every weight what the search for its code may start from (`Quantizer.warm_start`); None: nothing is known.

    Returns:
        values on the grid, and the codes as `pack` takes them.
    """
    n, lead = weight.shape[-1], weight.ndim - 1
    width, count = column_block(static, transposed), len(qparams)
    given = qparams if warm is None else (*qparams, warm)
    group = next(w for w in range(width * max(GROUP // width, 1), 0, -width) if n % w == 0)

    def round_group(error: Array, number: Array) -> tuple[Array, tuple[Array, Array]]:
        start = number * group
        into = lax.dynamic_slice_in_dim(factor, start, group, axis=-1)
        original = lax.dynamic_slice_in_dim(weight, start, group, axis=-1)
        # `error` is still zero in this group and before it
        target = original + jnp.matmul(error, into, precision="highest")
        within = lax.dynamic_slice_in_dim(into, start, group, axis=-2)
        local = tuple(_columns(g, start, group) for g in given)

        def round_block(missed: Array, block: Array) -> tuple[Array, tuple[Array, Array]]:
            at = block * width
            part = lax.dynamic_slice_in_dim(within, at, width, axis=-1)
            aim = lax.dynamic_slice_in_dim(target, at, width, axis=-1) + jnp.matmul(missed, part, precision="highest")
            own = tuple(_columns(g, at, width) for g in local)
            value, code = static.round_block(aim, own[:count], traced, transposed, *own[count:])
            new = lax.dynamic_slice_in_dim(original, at, width, axis=-1) - value
            return lax.dynamic_update_slice_in_dim(missed, new, at, axis=-1), (value, code)

        missed, (values, codes) = lax.scan(round_block, jnp.zeros_like(target), jnp.arange(group // width - 1, -1, -1))
        return lax.dynamic_update_slice_in_dim(error, missed, start, axis=-1), (values[::-1], codes[::-1])

    _, (values, codes) = lax.scan(round_group, jnp.zeros_like(weight), jnp.arange(n // group - 1, -1, -1))
    values, codes = (a[::-1].reshape(-1, *a.shape[2:]) for a in (values, codes))  # groups × blocks -> blocks
    values = jnp.moveaxis(values, 0, -2).reshape(weight.shape)
    codes = jnp.moveaxis(codes, 0, lead)  # (*b, m / height, blocks, codes a tile)
    codes = codes.reshape(weight.shape) if static.tile == (1, 1) else codes
    return values, jnp.swapaxes(codes, lead - 1, lead) if transposed else codes


def row_group(rows: int, height: int) -> int:
    """Rows that are rounded side by side under feedback among the outputs: whole tiles, at least 64 rows where there are.

    Example:
        >>> row_group(256, 64), row_group(4096, 64), row_group(48, 1), row_group(96, 32)
        (64, 256, 48, 96)
    """
    least = max(64, rows // ROW_GROUPS)
    return next((g for g in range(height, rows, height) if rows % g == 0 and g >= least), rows)


# one piece: what the inner functions slice belongs to one schedule of row groups and column groups
@partial(jax.jit, static_argnames=("static",))
def ldlq_rows(
    weight: Float[Array, "b m n"],
    factor: Float[Array, "*b n n"],
    rows: Float[Array, "*b m m"],
    qparams: QParams,
    traced: Traced,
    static: Quantizer,
    warm: Array | None = None,
) -> tuple[Float[Array, "b m n"], Array]:
    """`ldlq` with feedback among the rows as well: for tr(G E H Eᵀ), G = (I + F_G) D_G (I + F_G)ᵀ.

    Groups of rows are rounded from last to first, each as W_i + Σ_{r > i} F_G[r, i]ᵀ E_r with E = W − Q, by feedback F along its
    columns. Then (I + F_G)ᵀ E (I + F) = η, the rounding errors alone, and tr(G E H Eᵀ) = tr(D_G η D ηᵀ). A group of rows needs of
    those after it only the columns that it has come to, so each follows the next by one group of columns, and nearly all are
    rounded side by side. Two-sided rounding is YAQA's idea (arXiv 2505.22988, section 3); this form and its order are ours.
    Where several devices hold the arrays, each takes its share of the groups that are under way, what is fed into them included,
    one group of columns at a time, and gathers what the others did: one exchange between devices a step.

    Args:
        weight: whole tiles of the quantizer.
        factor: F, one a matrix or one for all.
        rows: F_G at `row_group` columns a block, padded to the rows of `weight`.
        qparams, traced, static: the quantizer, as for `ldlq`.

    Returns:
        as `ldlq`.
    """
    (b, m, n), width = weight.shape, column_block(static)
    high = row_group(m, static.tile[0])
    if high == m:
        return ldlq(weight, factor, qparams, traced, static, warm=warm)
    count, wide = m // high, _column_group(n, width, m // high)
    ahead = n // wide  # groups of columns

    def grouped(array: Array) -> Array:
        """(b, groups of rows from last to first, rows of a group, n)."""
        if array.shape[-2] == 1:
            return array[:, None]
        return array.reshape(len(array), count, high, array.shape[-1])[:, ::-1]

    own, scales = grouped(weight), tuple(grouped(g) for g in (qparams if warm is None else (*qparams, warm)))
    # F_G[r, i] for every group i, its rows r in the order of `own`
    into = jnp.moveaxis(grouped(rows).reshape(len(rows), m, count, high)[:, :, ::-1], 2, 1)

    def window(array: Array, start: Array) -> Array:
        """Of every group of rows its own columns: (b, count, ..., wide) of (b, count or 1, ..., n)."""
        if array.shape[-1] == 1:
            return array
        shared = array.shape[1] == 1
        cut = jax.vmap(lambda a, s: lax.dynamic_slice_in_dim(a, s, wide, axis=-1), in_axes=(None if shared else 1, 0), out_axes=1)
        return cut(array[:, 0] if shared else array, start)

    # Errors and targets are columns first here, (..., columns, rows): products are then with rows that lie side by side, and a
    # group of columns is one piece.
    def round_columns(
        original: Array, live: Array, fed_back: Array, into: Array, after: Array, columns: Array, within: Array, *local: Array
    ) -> tuple[Array, Array, Array]:
        """Of some groups of rows one group of columns each, all (b, groups, ...): what was missed, values, codes."""
        groups = original.shape[1]
        aims = jnp.swapaxes(original, -1, -2) + jnp.einsum("biwr,birg->biwg", after, into, precision="highest")
        # zeros where a group is not under way: a search in C++ is soon done with them
        target = jnp.where(live, aims + jnp.einsum("binw,bing->biwg", columns, fed_back, precision="highest"), 0.0)

        def round_block(missed: Array, block: Array) -> tuple[Array, tuple[Array, Array]]:
            here = block * width
            part = lax.dynamic_slice_in_dim(within, here, width, axis=-1)
            aim = lax.dynamic_slice_in_dim(target, here, width, axis=2) + jnp.einsum(
                "biwk,biwg->bikg", part, missed, precision="highest"
            )
            flat = jnp.swapaxes(aim, -1, -2).reshape(b * groups, high, width)
            sizes = tuple(
                jnp.broadcast_to(_columns(g, here, width), (b, groups, *g.shape[-2:-1], min(width, g.shape[-1]))) for g in local
            )
            given = tuple(g.reshape(b * groups, *g.shape[2:]) for g in sizes)
            value, code = static.round_block(flat, given[: len(qparams)], traced, False, *given[len(qparams) :])
            value = jnp.swapaxes(value.reshape(b, groups, high, width), -1, -2)
            new = jnp.where(live, lax.dynamic_slice_in_dim(aims, here, width, axis=2) - value, 0.0)
            return lax.dynamic_update_slice_in_dim(missed, new, here, axis=2), (value, code)

        missed, (values, codes) = lax.scan(round_block, jnp.zeros_like(target), jnp.arange(wide // width - 1, -1, -1))
        codes = codes[::-1].reshape(len(codes), b, groups, *codes.shape[2:])  # blocks, b, groups, rows or tile rows, ...
        return missed, jnp.moveaxis(values[::-1], 0, 2).reshape(target.shape), jnp.moveaxis(codes, 0, 3)

    itself = jnp.eye(count, dtype=bool)[None, :, None, :, None]

    def advance(carry: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        # W − Q of the groups before each one, in the columns that it has come to; of all its columns what F feeds on
        after, feed = carry
        at = step - jnp.arange(count)
        live = ((at >= 0) & (at < ahead))[None, :, None, None]
        start = (ahead - 1 - jnp.clip(at, 0, ahead - 1)) * wide
        original = window(own, start)
        columns = window(factor[:, None], start)
        within = jax.vmap(lambda f, s: lax.dynamic_slice_in_dim(f, s, wide, axis=-2), in_axes=(1, 0), out_axes=1)(columns, start)
        local = tuple(window(g, start) for g in scales)

        everything = (original, live, feed, into, after.reshape(b, count, wide, m), columns, within, *local)
        missed, values, codes = by_rows(round_columns, everything)

        error = (jnp.swapaxes(original, -1, -2) - values)[:, :, :, None]
        # in the next step each group comes to the columns of the group before it, and needs the same errors and that group's own
        passed = jnp.where(itself, error, after)[:, :-1]
        for group in range(count):  # groups that are not under way write where nothing is read any more, or not yet
            feed = lax.dynamic_update_slice(feed, missed[:, group : group + 1], (0, group, start[group], 0))
        return (jnp.pad(passed, [(0, 0), (1, 0), *[(0, 0)] * 3]), feed), (values, codes)

    nothing = jnp.zeros((b, count, wide, count, high), weight.dtype), jnp.zeros((b, count, n, high), weight.dtype)
    _, (values, codes) = lax.scan(advance, nothing, jnp.arange(ahead + count - 1))
    # group i came to its j-th columns, from the last, at step i + j; both orders are reversed
    group, column = jnp.arange(count)[::-1, None], jnp.arange(ahead)[None, ::-1]
    values = values[group + column, :, group]  # (count, ahead, b, wide, high)
    values = jnp.transpose(values, (2, 0, 4, 1, 3)).reshape(weight.shape)
    codes = codes[group + column, :, group]  # (count, ahead, b, rows or tile rows, blocks, ...)
    codes = jnp.transpose(codes, (2, 0, 3, 1, 4, *range(5, codes.ndim)))
    if static.tile == (1, 1):
        return values, codes.reshape(weight.shape)
    return values, codes.reshape(b, codes.shape[1] * codes.shape[2], codes.shape[3] * codes.shape[4], *codes.shape[5:])


def _column_group(n: int, width: int, count: int) -> int:
    """Columns by which one group of rows follows another: few, so that most groups are under way, but not below 16 or a tile."""
    most = min(GROUP, max(16, n // (4 * count)))
    return next((w for w in range(width * max(most // width, 1), 0, -width) if n % w == 0), width)


def pad_to_tiles(array: Array, height: int, width: int) -> Array:
    """Zeros to whole tiles on the last two axes.

    Args:
        array: (..., rows, cols).
        height, width: of a tile.

    Example:
        >>> pad_to_tiles(jnp.ones((3, 5)), 2, 4).shape
        (4, 8)
    """
    rows, cols = array.shape[-2:]
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, -rows % height), (0, -cols % width)])


def pad_metric(metric: Float[Array, "*b n n"], width: int) -> Float[Array, "*b p p"]:
    """The metric of a padded matrix: padding costs nothing, so it gets an identity scaled to the rest, and no coupling."""
    n = metric.shape[-1]
    extra = -n % width
    if not extra:
        return metric
    scale = jnp.trace(metric, axis1=-2, axis2=-1)[..., None] / n
    padded = jnp.pad(metric, [(0, 0)] * (metric.ndim - 2) + [(0, extra), (0, extra)])
    filler = jnp.concatenate([jnp.zeros((n,)), jnp.ones((extra,))])
    return padded + (filler * scale)[..., None, :] * jnp.eye(n + extra)
