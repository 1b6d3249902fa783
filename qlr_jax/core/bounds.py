"""Upper bounds on tr(E H Eᵀ), evaluated: rank-constrained regression, LDLQ, rounded factors, and the three together.

LDLQ turns the error A = W − Q into rounding errors η alone: A H Aᵀ = η D ηᵀ, D the diagonal of H = (I + F) D (I + F)ᵀ (the
squared diagonal of its Cholesky factor). The bounds hold for *dithered* scalar quantizers (`Dither`: stochastic rounding) in
expectation over the dither, and where nothing saturates: every value that is rounded, LDLQ's feedback included, lies in the
quantizer's range. float64 numpy: all this is for people.

What is used of η, and no more: rows are dithered independently; E[η_ij | columns already rounded] = 0; E η_ij² ≤ Δ²/4.

The solver rounds to nearest, with no dither, and the paper's preset rounds to a lattice: of what the solver makes, `ldlq_bound`,
`lplr_bound` and `alternation_bound` are therefore no bounds; they are the paper's theory, and are not shown with a solution.
`covering_bound` is what `Solution.stats` carries: for rounding to nearest, in tiles, and it holds surely, not in expectation.
`nearest_bound` is its case of single columns. Trellises are outside: what a sequence of weights can miss has no bound but the one
measured. Source: CALDERA, arXiv 2405.18886, section 4; the proofs here are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from qlr_jax.core.objective import checked_hessian, checked_weight
from qlr_jax.errors import QLRError


@dataclass(frozen=True)
class Dither:
    """A uniform grid of 2^bits levels on [−reach, reach], each value rounded up or down at random so that its mean is kept.

    Example:
        >>> Dither(bits=2, reach=3.0).step, Dither(2, 3.0).variance
        (2.0, 1.0)
    """

    bits: float
    reach: float

    def __post_init__(self) -> None:
        if not (self.bits > 0 and math.isfinite(self.bits)):
            raise QLRError(f"{self.bits} bits make no grid; pass a number above 0, e.g. 4")
        if not (self.reach > 0 and math.isfinite(self.reach)):
            raise QLRError(f"reach={self.reach} is no range; pass the largest magnitude that is rounded, above 0")

    @property
    def step(self) -> float:
        """Δ = 2 reach / (2^bits − 1)."""
        return 2.0 * self.reach / (2.0**self.bits - 1.0)

    @property
    def variance(self) -> float:
        """Δ²/4, the error's largest variance: that of a value halfway between two levels."""
        return self.step**2 / 4.0


@dataclass(frozen=True)
class Bound:
    """What `alternation_bound` returns.

    Attributes:
        error: bound on E tr(E H Eᵀ): tail + factors.
        relative: √(error / tr(W H Wᵀ)), a bound on the mean relative error (Jensen); infinite where W H Wᵀ is zero.
        tail: the backbone's part, Σ_{i>r} E λ_i(η D ηᵀ) (`ldlq_bound`).
        factors: what rounding L and R adds.
        full: the tail at rank 0, (Δ²/4) m tr(D).
        closed_form: the paper's, (4/π) m n λ_max(H) (reach / (2^bits − 1))² (1 − r/2m)², of the backbone's part alone;
            H damped.
    """

    error: float
    relative: float
    tail: float
    factors: float
    full: float
    closed_form: float


def rank_constrained_error(matrix: ArrayLike, hessian: ArrayLike | None, rank: int) -> float:
    """What the best rank-r Z leaves of A: min tr((A − Z) H (A − Z)ᵀ) = Σ_{i>r} λ_i(A H Aᵀ); exact, any semi-definite H.

    Args:
        matrix: A, (m, n).
        hessian: H, (n, n); None: the identity.
        rank: r, 0 to min(m, n).

    Raises:
        QLRError: non-finite input, shapes that do not fit, an indefinite H, a rank out of range.

    Source: arXiv 2405.18886, lemma 4.2.

    Example:
        >>> rank_constrained_error([[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]], 1)
        4.0
    """
    return float(np.sum(_spectrum(*_checked(matrix, hessian, rank))[rank:]))


def ldl_diagonal(hessian: ArrayLike) -> np.ndarray:
    """D of H = (I + F) D (I + F)ᵀ, F strictly lower: (n,); LDLQ of single columns, last to first, has tr(E H Eᵀ) = tr(η D ηᵀ).

    Raises:
        QLRError: a Hessian that is not positive definite.

    Example:
        >>> ldl_diagonal([[4.0, 2.0], [2.0, 2.0]]).tolist()
        [4.0, 1.0]
    """
    h = np.atleast_2d(np.asarray(hessian, np.float64))
    checked_hessian(h, len(h))
    try:
        return np.square(np.diagonal(np.linalg.cholesky((h + h.T) / 2)))
    except np.linalg.LinAlgError:
        raise QLRError("the Hessian is singular; pass a damped one, H + d·I (d as in the solver: 0.01 mean(diag H))") from None


def ldlq_bound(diagonal: ArrayLike, rows: int, variance: float, rank: int = 0) -> float:
    """Backbone and exact rank-r factors: Σ_{i>r} E λ_i(η D ηᵀ) ≤ v min_{a+b=r} (m − a) Σ_{b<j≤n−a} D_(j), D_(1) ≥ D_(2) ≥ ….

    The tail is the least squared error of a rank-r fit to X = η D^½. Fit the b columns of largest D exactly, then a rows, and
    every other row x by P x, P the projection on the span of those a (filled up to rank a with fixed directions): P does not
    depend on x, so E‖x − P x‖² = Σ_j E η_ij² D_j (1 − E P_jj), with weights in [0, 1] that sum to n − b − a: at worst they sit
    on the largest D. At r = 0 this is v m tr(D); for equal D, v (m − r)(n − r) D.

    The tail of an η of variance v everywhere (random signs; the Marchenko-Pastur law) is an estimate and no bound: a tail can
    fall as variances grow. With m = n = 3, r = 2, H = I, and only W's diagonal off the grid, halfway between levels, it is v,
    which meets the bound, while random signs everywhere leave (3/8) v.

    Args:
        diagonal: D, (n,), from `ldl_diagonal`.
        rows: m.
        variance: v = Δ²/4, of `Dither.variance`.
        rank: r.

    Raises:
        QLRError: a negative D or variance, a rank out of range.

    Source: arXiv 2405.18886, theorem 4.1, which leaves the tail as an expectation.

    Example:
        >>> ldlq_bound([4.0, 1.0], rows=3, variance=0.25), ldlq_bound([4.0, 1.0], 3, 0.25, rank=1)
        (3.75, 0.75)
    """
    ordered = np.sort(np.asarray(diagonal, np.float64).ravel())[::-1]
    if not (len(ordered) and np.isfinite(ordered).all() and ordered[-1] >= 0):
        raise QLRError(f"D = {ordered} is not the diagonal of an LDLᵀ factor; pass ldl_diagonal(H)")
    if not 0 <= variance < math.inf:
        raise QLRError(f"variance={variance} is not finite and at least 0; pass Dither(bits, reach).variance")
    _check_rank(rank, rows, len(ordered))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    b = np.arange(rank + 1)
    return float(variance * np.min((rows - rank + b) * (sums[len(ordered) - rank + b] - sums[b])))


def lplr_bound(matrix: ArrayLike, hessian: ArrayLike | None, rank: int, left: Dither, right: Dither) -> float:
    """Rounded factors of a given A: E tr((A − L̂ R̂) H (A − L̂ R̂)ᵀ) ≤ Σ_{i>r} λ_i + v_L m Σ_{i≤r} λ_i + v_R tr(H) r (1 + v_L m).

    λ_i are the eigenvalues of A H Aᵀ, U (m, r) its leading eigenvectors, L̂ = U + η_L and R̂ = S + η_R with S = Uᵀ A. The error
    is (A − U S) − η_L S − L̂ η_R: zero means leave no cross terms, S H Sᵀ = diag(λ_1..λ_r), and E‖L̂‖² ≤ r + v_L m r. The bound
    stays where R̂ rounds the least-squares (L̂ᵀL̂)⁻¹ L̂ᵀ A instead of S (the best R for L̂ in any H), and where the best pair of
    more rounds is kept; where R is rounded with feedback in H, tr(D) replaces tr(H).

    Args:
        matrix: A, (m, n).
        hessian: H, (n, n); None: the identity.
        rank: r.
        left: of L, in units of U; reach 1 always suffices.
        right: of R; its reach must hold what it rounds, S or the least-squares R.

    Raises:
        QLRError: as `rank_constrained_error`.

    Source: arXiv 2405.18886, section 4 (there: bits that grow as the logarithm of the sizes hold the excess below any ε); LPLR,
        arXiv 2310.11028.

    Example:
        >>> lplr_bound([[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], 1, Dither(8, 1.0), Dither(8, 3.0)) < 1.001
        True
    """
    a, h = _checked(matrix, hessian, rank)
    values = _spectrum(a, h)
    spread = left.variance * len(a)
    return float(values[rank:].sum() + spread * values[:rank].sum() + right.variance * np.trace(h) * rank * (1.0 + spread))


def alternation_bound(
    weight: ArrayLike,
    hessian: ArrayLike | None,
    rank: int,
    backbone: Dither,
    left: Dither | None = None,
    right: Dither | None = None,
    *,
    damping: float = 0.0,
) -> Bound:
    """W ≈ Q + L R, Q ← LDLQ(W), then the factors of W − Q, best iterate kept: E tr(E H Eᵀ) ≤ tail + factors.

    `ldlq_bound` at rank r, t, and at rank 0, T; then with c = v_L m `lplr_bound` averages to at most
    max(1 − c, 0) t + c T + v_R tr(H) r (1 + c). The best iterate is no worse than the first, so it needs `start="backbone"`.
    Every field is a bound at every size. The closed form, which the paper gives as approximate (its constants are those of
    Marchenko-Pastur at m = n: √(x (4 − x)) ≤ 2 and a quantile ≤ (2 − r/m)²), needs no such limit: a tail is at most 1 − r/m of
    its trace, that is at most (1 − r/2m)², D_j ≤ λ_max(H), and 4/π is to spare.

    Args:
        weight: W, (m, n).
        hessian: H, (n, n), positive definite once damped; None: the identity.
        rank: r.
        backbone, left, right: the grids of Q, L and R; None: a factor kept exactly. Each grid's reach must hold all it rounds.
        damping: fraction of mean(diag H) that LDLQ adds to H's diagonal; the error is still that in H.

    Raises:
        QLRError: as `rank_constrained_error`; a singular H without damping.

    Source: arXiv 2405.18886, theorem 4.1.

    Example:
        >>> bound = alternation_bound(np.eye(2), np.eye(2), 1, Dither(4, 1.5))
        >>> round(bound.tail, 6), round(bound.full, 6), round(bound.closed_form, 6), bound.factors
        (0.01, 0.04, 0.028648, 0.0)
    """
    w, h = _checked(weight, hessian, rank)
    if not 0 <= damping < math.inf:
        raise QLRError(f"damping={damping} is no fraction; pass 0 or more, e.g. 0.01")
    rows, cols = w.shape
    metric = h + damping * np.trace(h) / cols * np.eye(cols)
    diagonal = ldl_diagonal(metric)
    tail, full = (ldlq_bound(diagonal, rows, backbone.variance, r) for r in (rank, 0))
    spread = left.variance * rows if left and rank else 0.0
    error = max(1.0 - spread, 0.0) * tail + spread * full
    error += right.variance * np.trace(h) * rank * (1.0 + spread) if right else 0.0
    energy = float(np.sum((w @ h) * w))
    top = float(np.linalg.eigvalsh(metric)[-1])
    closed = 4 / math.pi * rows * cols * top * backbone.variance * (1 - rank / (2 * rows)) ** 2
    return Bound(float(error), math.sqrt(error / energy) if energy > 0 else math.inf, tail, float(error) - tail, full, closed)


def nearest_bound(steps: ArrayLike, diagonal: ArrayLike, rank: int = 0, overshoot: ArrayLike = 0.0) -> float:
    """Scalar LDLQ rounded to nearest, surely: tr(E H Eᵀ) ≤ (1 − r / min(m, n)) Σ_ij (Δ_ij/2 + o_ij)² D_j.

    |η_ij| ≤ Δ_ij/2 within the grid, and o_ij more beyond its end. Feedback does carry targets there, about one in a hundred at
    4 bits; o is known once Q is: max(|η_ij| − Δ_ij/2, 0) with η = (W − Q)(I + F), F of the H that D is of. η D ηᵀ has
    min(m, n) eigenvalues above zero at most, so those after the first r hold no more than that fraction of its trace. D of a
    damped H serves: the error in H is no larger than in H + d I.

    Args:
        steps: Δ, (m, n) or (m, 1), in the weight's units: an integer grid's scales, spread over their groups.
        diagonal: D, (n,), from `ldl_diagonal`.
        rank: r of exact factors fitted to W − Q afterwards; 0: Q alone.
        overshoot: o, (m, n) or one for all; 0: nothing saturates.

    Raises:
        QLRError: steps that are not (m, n) or (m, 1); a negative step or overshoot; a rank out of range.

    Source: the LDLQ identity is QuIP's, arXiv 2307.13304, section 3.

    Example:
        >>> nearest_bound([[0.5], [1.0]], [4.0, 1.0]), nearest_bound([[1.0], [1.0]], [4.0, 1.0], overshoot=0.5)
        (1.5625, 10.0)
    """
    delta, d, beyond = (np.asarray(x, np.float64) for x in (steps, diagonal, overshoot))
    if delta.ndim != 2 or delta.shape[1] not in (1, d.size) or not len(delta):
        raise QLRError(f"the steps have shape {delta.shape}; pass (rows, {d.size}) or (rows, 1)")
    if beyond.shape not in ((), (len(delta), d.size)):
        raise QLRError(f"the overshoot has shape {beyond.shape}; pass one number or ({len(delta)}, {d.size})")
    for name, array in (("steps", delta), ("overshoot", beyond)):
        if not (np.isfinite(array).all() and (array >= 0).all()):
            raise QLRError(f"the {name} holds {array.min()}; pass finite numbers of at least 0")
    _check_rank(rank, len(delta), d.size)
    return float(np.sum(np.square(delta / 2.0 + beyond) * d.ravel()) * (1.0 - rank / min(len(delta), d.size)))


def block_norms(hessian: ArrayLike, block: int = 1) -> np.ndarray:
    """λ_max(D_c) for the diagonal blocks D_c of H = (I + F) D (I + F)ᵀ, `block` columns each, the last one shorter if need be.

    Args:
        hessian: H, (n, n), positive definite.
        block: columns a block.

    Returns:
        (⌈n / block⌉,); for single columns D itself.

    Raises:
        QLRError: a Hessian that is not positive definite.

    Example:
        >>> block_norms([[4.0, 2.0], [2.0, 2.0]]).tolist(), block_norms([[4.0, 0.0], [0.0, 2.0]], 2).tolist()
        ([4.0, 1.0], [4.0])
    """
    diagonal = ldl_diagonal(hessian)
    if block == 1:
        return diagonal
    h = np.asarray(hessian, np.float64)
    lower = np.linalg.cholesky((h + h.T) / 2)
    return np.array([np.linalg.norm(lower[s : s + block, s : s + block], 2) ** 2 for s in range(0, len(h), block)])


def covering_bound(rounding: ArrayLike, radius: ArrayLike, norms: ArrayLike, block: int = 1) -> float:
    """LDLQ rounded to nearest in tiles, surely: tr(E H Eᵀ) ≤ Σ_ic λ_max(D_c) (ρ_ic + o_ic)², o_ic = max(‖η_ic‖ − ρ_ic, 0).

    tr(E H Eᵀ) = tr(η D ηᵀ) = Σ_ic η_ic D_c η_icᵀ for η = E (I + F), row i and column block c, whatever E is; and ‖η_ic‖ ≤ ρ, the
    code's covering radius, where a tile's target lies within the code's range and nothing has changed since it was rounded. What
    is farther off is known once the matrix is: o. At rank 0 it is what feedback carries beyond the code's ends. With factors it
    is also what their refit after Q adds, and what comes of rounding Q in the downdated metric: it stays a bound, which says the
    less the more of η lies beyond ρ.

    Args:
        rounding: η, (m, n).
        radius: ρ, (m, ⌈n / block⌉) or what broadcasts to it, in the weight's units: half a step of an integer grid.
        norms: λ_max(D_c) from `block_norms` of H, damped as F's H was: the error in H is no larger than in H + d I.
        block: columns a tile.

    Source: the identity is QuIP's, arXiv 2307.13304, section 3; in blocks: QuIP#, arXiv 2402.04396, section 4.1.

    Example:
        >>> covering_bound([[0.1, -0.5]], [[0.25, 0.25]], [4.0, 1.0])
        0.5
    """
    eta, rho = np.asarray(rounding, np.float64), np.asarray(radius, np.float64)
    if block > 1:
        filled = np.pad(eta, ((0, 0), (0, -eta.shape[1] % block))).reshape(len(eta), -1, block)
        eta = np.linalg.norm(filled, axis=-1)
    overshoot = np.maximum(np.abs(eta) - rho, 0.0)
    return float(np.sum(np.square(rho + overshoot) * np.asarray(norms, np.float64).ravel()))


def _checked(matrix: ArrayLike, hessian: ArrayLike | None, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrix and Hessian in float64, refused where the solver would refuse them, and a rank that fits."""
    rows, cols = checked_weight(matrix).shape
    checked_hessian(hessian, cols)
    _check_rank(rank, rows, cols)
    h = np.eye(cols) if hessian is None else np.asarray(hessian, np.float64)
    return np.asarray(matrix, np.float64), (h + h.T) / 2


def _check_rank(rank: int, rows: int, cols: int) -> None:
    if not 0 <= rank <= min(rows, cols):
        raise QLRError(f"rank {rank} does not fit a matrix of {rows} by {cols}; pass 0 to {min(rows, cols)}")


def _spectrum(matrix: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Eigenvalues of A H Aᵀ, largest first."""
    return np.maximum(np.linalg.eigvalsh(matrix @ hessian @ matrix.T)[::-1], 0.0)
