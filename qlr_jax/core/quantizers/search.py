"""The search of the trellis codes: states of the closed sequence that is nearest to the weights, by Viterbi.

On a CPU it runs in C++ where that was built (qlr_jax/native), ten times faster, in 16-bit costs where that loses next to nothing;
elsewhere, and on other devices, in XLA, in float32.

Source: QTIP, arXiv 2406.11235, section 3 and its tail-biting search; the bounds of the 16-bit costs are ours.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from qlr_jax import native
from qlr_jax.core.typing import Array, Float, Int

LENGTH = 256  # weights a sequence
MULTIPLIER, ADDEND = 2847382671, 1201005453  # of the hash: the best of 130 random pairs by error at 12 state bits
MOST_BITS = 6  # a weight: the most new bits of a step of the search


def code_values(states: Array, gain: float | Array) -> Array:
    """gain · (sum of the four bytes of (a · state + c) mod 2³² − 510) / 147.8: mean 0 and variance near 1 over states."""
    # on the host numpy does it: op by op, JAX would compile every line for every shape
    of: Any = np if isinstance(states, np.ndarray) else jnp
    word = states.astype(of.uint32) * of.uint32(MULTIPLIER) + of.uint32(ADDEND)
    total = (word & 255) + ((word >> 8) & 255) + ((word >> 16) & 255) + (word >> 24)
    return (total.astype(of.float32) - 510.0) * (of.float32(gain) / 147.8)


@lru_cache
def has_native() -> bool:
    """Whether searches on a CPU run in C++."""
    return native.registered("qlr_search")


def _batch(sequences: int, state_bits: int) -> int:
    """Sequences searched at once: what suits a CPU's vectors and cache, or an accelerator with at most 1 GiB of predecessors."""
    if jax.default_backend() == "cpu":
        # measured: 16 or 64 take two to three times as long a sequence, 4 and 8 a third longer; of few 4 leave the fewest idle
        return 32 if sequences > 16 else 4 if sequences > 2 else sequences
    return min(2048, 2 ** (23 - state_bits), -(-sequences // 16) * 16)


def search(
    x: Float[Array, "sequences 256"],
    shifts: Int[Array, "*codes 256"],
    state_bits: int,
    gain: float | Array,
    ends: Int[Array, "sequences"] | None = None,
    codes: Int[Array, "groups"] | None = None,
) -> Int[Array, "sequences 256"]:
    """States of the nearest closed sequence for each row of x: two Viterbi passes.

    The first pass starts half a turn away and leaves its ends free; the tail-biting state that it passes through is
    imposed on both ends of the second. The shifts are traced, so one compilation serves every rate.

    Args:
        x: weights in units of the code.
        shifts: new bits of each weight, (256,); or of each of several codes, (codes, 256).
        state_bits: L.
        gain: of the code, or (codes,).
        ends: the tail-biting state of each sequence, its last, where it is known, which saves the first pass (half of the time;
            in XLA only where those of all sequences are); negative: it is not.
        codes: which of several codes each group of sequences has, the groups being of equal size; None: there is one.

    Example:
        >>> x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 256)), jnp.float32)
        >>> states = search_jit(x, jnp.full(256, 2), 8, 1.0)
        >>> bool(jnp.mean((code_values(states, 1.0) - x) ** 2) < 0.1)
        True
    """
    known = jnp.full(x.shape[:1], -1, jnp.int32) if ends is None else ends.astype(jnp.int32)
    of = jnp.zeros((0,), jnp.int32) if codes is None else jnp.repeat(codes.astype(jnp.int32), x.shape[0] // codes.shape[0])
    rates = jnp.asarray(shifts, jnp.int32).reshape(-1, LENGTH), jnp.asarray(gain, jnp.float32).reshape(-1)
    given = (x.astype(jnp.float32), *rates, known, of)
    return (_search if has_native() else _in_xla)(*given, state_bits=state_bits, free=ends is None)


_primitive = Primitive("trellis_search")
"""As `_in_xla`. `lax.platform_dependent` would trace that for a CPU too, only to leave it out, for every shape anew."""


@partial(jax.jit, static_argnames=("state_bits", "free"))
def _search(*given: Array, state_bits: int, free: bool) -> Array:
    return _primitive.bind(*given, state_bits=state_bits, free=free)


def _in_cpp(x: Array, shifts: Array, gain: Array, ends: Array, codes: Array, *, state_bits: int, free: bool) -> Array:
    call = jax.ffi.ffi_call("qlr_search", jax.ShapeDtypeStruct(x.shape, jnp.int32))
    return call(x, shifts, gain, ends, codes, state_bits=np.int64(state_bits), exact=False)


def _in_xla(x: Array, shifts: Array, gain: Array, ends: Array, codes: Array, *, state_bits: int, free: bool) -> Array:
    count = x.shape[0]
    size = max(1, _batch(count, state_bits))
    more = -count % size
    padded = jnp.pad(x, ((0, more), (0, 0))).reshape(-1, size, LENGTH)
    first = 0 if free else jnp.all(ends >= 0).astype(jnp.int32)  # of the two passes
    parts = (padded, jnp.pad(ends, (0, more)).reshape(-1, size))
    if codes.shape[0]:
        own = jnp.pad(codes, (0, more)).reshape(-1, size)
        states = lax.map(
            lambda part: _closed_sequence(part[0].T, shifts[part[2]].T, state_bits, gain[part[2]], part[1], first).T, (*parts, own)
        )
    else:
        states = lax.map(lambda part: _closed_sequence(part[0].T, shifts[0], state_bits, gain[0], part[1], first).T, parts)
    return states.reshape(-1, LENGTH)[:count]


_primitive.def_impl(_in_xla)  # where jit is disabled
_primitive.def_abstract_eval(lambda x, *_, **__: x.update(dtype=np.dtype(np.int32)))
mlir.register_lowering(_primitive, mlir.lower_fun(_in_xla, multiple_results=False))
mlir.register_lowering(_primitive, mlir.lower_fun(_in_cpp, multiple_results=False), platform="cpu")


def _closed_sequence(x: Array, shifts: Array, state_bits: int, gain: Array, known: Array, first: int | Array) -> Array:
    """Of sequences (256, count) that share their shifts (256,) and gain (), or each with its own, (256, count) and (count,).

    `known`: tail-biting states, negative where they are not; `first`: which pass is the first, 1 where all are.
    """
    values = code_values(jnp.arange(2**state_bits), 1.0)[:, None] * gain
    half = LENGTH // 2
    states = jnp.arange(2**state_bits)[:, None]
    forward = _forward if shifts.ndim == 1 else _forward_each

    def sweep(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        (end, _), (weights, steps, closed) = carry, jax.tree.map(lambda a: a[i], passes)
        start = jnp.where(closed & (states != end), jnp.float32(1e30), 0.0)
        cost, back = forward(weights, steps, values, start, state_bits)
        rows = steps if shifts.ndim == 1 else jnp.ones_like(steps)
        found = _trace(jnp.where(closed, end, jnp.argmin(cost, axis=0)), back, steps, rows, state_bits)
        return jnp.where(known >= 0, known, found[half - 1]), found

    # one loop of two sweeps rather than two calls: the search is compiled once
    passes = (
        jnp.stack([jnp.roll(x, -half, axis=0), x]),
        jnp.stack([jnp.roll(shifts, -half, axis=0), shifts]),
        jnp.array([False, True]),
    )
    return lax.fori_loop(first, 2, sweep, (known, jnp.zeros(x.shape, jnp.int32)))[1]


def _forward(x: Array, shifts: Array, values: Array, cost: Array, state_bits: int) -> tuple[Array, Array]:
    """Least cost to reach every state after every weight, and which predecessor gave it (its oldest bits)."""

    def branch(shift: int):
        def advance(cost: Array, weight: Array) -> tuple[Array, Array]:
            count = cost.shape[1]
            best, oldest = _tournament(cost.reshape(2**shift, -1, count))
            distance = jnp.square(weight[None, :] - values).reshape(-1, 2**shift, count)
            grown = (best[:, None, :] + distance).reshape(cost.shape)
            return grown, jnp.pad(oldest, ((0, 2 ** (state_bits - 1) - oldest.shape[0]), (0, 0)))

        return advance

    branches = [branch(shift) for shift in range(1, MOST_BITS + 1)]
    return lax.scan(lambda c, step: lax.switch(step[1] - 1, branches, c, step[0]), cost, (x, shifts))


def _forward_each(x: Array, shifts: Array, values: Array, cost: Array, state_bits: int) -> tuple[Array, Array]:
    """`_forward` where each sequence has shifts of its own, (256, count).

    Halving the states k times leaves the least of 2^k predecessors. Doubled back up, each sequence joins at its own k, so both
    ways together touch every state about twice. The predecessors of a state s stand at s >> 1.
    """

    def branch(most: int):
        def advance(cost: Array, weight: Array, shift: Array) -> tuple[Array, Array]:
            count, halved = cost.shape[1], [(cost, jnp.zeros((2**state_bits, 1), jnp.uint8))]
            for _ in range(most):
                (low, high), (before, after) = (a.reshape(2, -1, a.shape[1]) for a in halved[-1])
                later = high < low
                halved.append((jnp.where(later, high, low), jnp.where(later, after, before) << 1 | later.astype(jnp.uint8)))
            found = halved.pop()
            for k in range(most - 1, 0, -1):
                found = tuple(jnp.where(shift == k, own, jnp.repeat(a, 2, axis=0)) for own, a in zip(halved[k], found, strict=True))
            least, oldest = found
            distance = jnp.square(weight[None, :] - values).reshape(-1, 2, count)
            return (least[:, None, :] + distance).reshape(cost.shape), oldest

        return advance

    branches = [branch(most) for most in range(1, MOST_BITS + 1)]
    return lax.scan(lambda c, step: lax.switch(jnp.max(step[1]) - 1, branches, c, *step), cost, (x, shifts))


def _tournament(costs: Array) -> tuple[Array, Array]:
    """Minimum and its first index over the leading axis, pairwise: argmin does not vectorise on a CPU.

    Of more than eight by reductions: XLA fuses the pairs into what follows and so repeats them for every successor.
    """
    if costs.shape[0] > 8:
        least = jnp.min(costs, axis=0)
        numbers = jnp.arange(costs.shape[0], dtype=jnp.int32)[:, None, None]
        return least, jnp.min(jnp.where(costs == least, numbers, costs.shape[0]), axis=0).astype(jnp.uint8)
    value, index = list(costs), [jnp.uint8(i) for i in range(costs.shape[0])]
    while len(value) > 1:
        later = [b < a for a, b in zip(value[::2], value[1::2], strict=True)]
        index = [jnp.where(w, b, a) for w, a, b in zip(later, index[::2], index[1::2], strict=True)]
        value = [jnp.where(w, b, a) for w, a, b in zip(later, value[::2], value[1::2], strict=True)]
    return value[0], index[0]


def _trace(last: Array, back: Array, shifts: Array, rows: Array, state_bits: int) -> Array:
    """The states of the path that ends in `last`; the predecessor of a state s stands in row s >> `rows` of a step's `back`."""

    def retreat(state: Array, step: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        oldest, shift, row = step
        top = jnp.take_along_axis(oldest, (state >> row)[None, :], axis=0)[0].astype(state.dtype)
        return state >> shift | (top << (state_bits - shift)), state

    return lax.scan(retreat, last.astype(jnp.int32), (back, shifts.astype(jnp.int32), rows.astype(jnp.int32)), reverse=True)[1]


search_jit = partial(jax.jit, static_argnames=("state_bits",))(search)
