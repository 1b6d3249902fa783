"""Rotations: orthogonal at every size, by formula, the same in every language."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core import hadamard
from qlr_jax.core.hadamard import INPUT, OUTPUT, block_size, rotate, rotate_hessian, signs, transform, unrotate

SIZES = (1, 2, 3, 32, 48, 96, 101)


def matrix(size, seed, block):
    """V as a float64 matrix, by its definition: K diag(sign), K = I ⊗ (H_{2^k} ⊗ O_q)."""
    odd = block
    while odd % 2 == 0:
        odd //= 2
    walsh = np.ones((1, 1))
    while len(walsh) * odd < block:
        walsh = np.kron(np.array([[1, 1], [1, -1]]) / np.sqrt(2), walsh)
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    mix = np.kron(walsh, (np.cos(angle) + np.sin(angle)) / np.sqrt(odd))
    return np.kron(np.eye(size // block), mix) * python_signs(seed, INPUT, size)


def python_signs(seed, salt, size):
    """The hash in Python integers, as another language would write it."""
    out = []
    for i in range(size):
        x = (i * 0x9E3779B1 + ((seed * 2 + salt) & 0xFFFFFFFF) * 0x85EBCA6B + 0x27D4EB2F) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        out.append(-1.0 if (x ^ (x >> 16)) >> 31 else 1.0)
    return np.array(out)


@pytest.mark.parametrize(
    ("seed", "salt", "size"), [(0, INPUT, 300), (0, OUTPUT, 300), (7, INPUT, 64), (2**31 - 1, OUTPUT, 64), (-3, INPUT, 64)]
)
def test_signs_are_the_hash(seed, salt, size):
    found = signs(seed, salt, size)
    np.testing.assert_array_equal(found, python_signs(seed, salt, size))
    assert abs(found.mean()) < 0.35  # neither side dominates
    np.testing.assert_array_equal(found[:20], signs(seed, salt, 20))  # of a coordinate, not of the size


def test_signs_differ_by_seed_and_side():
    rows = np.array([signs(seed, salt, 512) for seed in range(4) for salt in (INPUT, OUTPUT)])
    assert np.abs(np.corrcoef(rows) - np.eye(8)).max() < 0.2


@pytest.mark.parametrize(("size", "block"), [*((s, 0) for s in SIZES), (96, 32), (96, 64), (768, 0)])
def test_rotation_is_the_formula(size, block):
    sign, used = signs(5, INPUT, size), block_size(size, block)
    v = np.asarray(rotate(jnp.eye(size), sign, used), np.float64).T  # rows of the result are V e_i
    np.testing.assert_allclose(v, matrix(size, 5, used), atol=3e-6)
    np.testing.assert_allclose(v @ v.T, np.eye(size), atol=3e-6)
    if size > 3 and not block:  # mixes: no entry of V stands out
        assert np.abs(v).max() < 3 / np.sqrt(size)


@pytest.mark.parametrize("size", [3, 48, 101])
def test_involution_and_inverse(size):
    x = np.random.default_rng(0).standard_normal((5, size)).astype(np.float32)
    sign = signs(1, INPUT, size)
    np.testing.assert_allclose(transform(transform(x, size), size), x, atol=5e-6)
    np.testing.assert_allclose(unrotate(rotate(x, sign, size), sign, size), x, atol=5e-6)
    np.testing.assert_allclose(rotate(unrotate(x, sign, size), sign, size), x, atol=5e-6)


@pytest.mark.parametrize("size", [48, 101])
def test_hessian_is_rotated_on_both_sides(size, activations):
    h = activations(size)
    found = np.asarray(rotate_hessian(jnp.asarray(h, jnp.float32), signs(2, INPUT, size), size))
    v = matrix(size, 2, size)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, v @ h @ v.T, atol=2e-6 * np.linalg.norm(h))


def test_blocks_do_not_mix():
    sign = signs(0, INPUT, 96)
    v = np.asarray(rotate(jnp.eye(96), sign, 32)).T
    outside = np.arange(96)[:, None] // 32 != np.arange(96) // 32
    assert (v[outside] == 0).all() and (v[~outside] != 0).all()


@pytest.mark.parametrize(
    ("size", "block", "used"), [(768, 0, 768), (768, 128, 128), (768, 512, 256), (96, 64, 32), (48, 64, 48), (101, 64, 101)]
)
def test_block_size(size, block, used):
    assert hadamard.block_size(size, block) == used
