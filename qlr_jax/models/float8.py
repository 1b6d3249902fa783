"""Weights that are stored as float8 beside their scales: W = q · s, as transformers dequantizes them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from qlr_jax.errors import QLRError
from qlr_jax.models.checkpoint import Reader

BLOCKS, PLAIN = ".weight_scale_inv", ".weight_scale"
"""The scale's name in place of ".weight": of blocks (DeepSeek's, a factor in spite of its name), or of a matrix or its rows."""

# What float8 checkpoints also store for products with float8 activations; here activations are not rounded.
_OF_ACTIVATIONS = (".input_scale", ".activation_scale", ".input_scale_inv", ".activation_scale_inv", ".input_scale_ub")
_TYPES = ("float8_e4m3fn", "float8_e5m2")


def is_understood(quantization: Any) -> bool:
    """Whether a `quantization_config` means float8 weights with scales whose meaning is certain.

    Example:
        >>> is_understood({"quant_method": "fp8", "weight_block_size": [128, 128]}), is_understood({"quant_method": "gptq"})
        (True, False)
    """
    if not isinstance(quantization, dict):
        return False
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        plain = quantization.get("format") in ("float-quantized", "naive-quantized")
        others = (quantization.get(name) for name in ("kv_cache_scheme", "transform_config", "sparsity_config"))
        return plain and not any(others)
    return method in ("fp8", "fbgemm_fp8") and quantization.get("expert_dtype", "fp8") == "fp8"


def dequantized(readers: Mapping[str, Reader], block: Any = None) -> tuple[dict[str, Reader], list[str]]:
    """Readers of what float8 weights with scales stand for, in float32, in place of theirs; all others as they are.

    W[i, j] = q[i, j] · s[i // b, j // c]

    Args:
        readers: of a checkpoint's tensors.
        block: (b, c), `weight_block_size` of the config; None: what divides the matrix evenly.

    Returns:
        The readers without those of scales, and the names of the weights that have one.

    Example:
        >>> import ml_dtypes
        >>> stored = {"a.weight": np.ones((2, 4), ml_dtypes.float8_e4m3fn), "a.weight_scale": np.float32([3])}
        >>> found, names = dequantized({name: lambda array=array: array for name, array in stored.items()})
        >>> names, found["a.weight"]().sum()
        (['a.weight'], np.float32(24.0))
    """
    out, scaled = dict(readers), []
    for name in readers:
        stem = name.removesuffix(".weight")
        scale = next((stem + end for end in (BLOCKS, PLAIN) if stem + end in readers), None)
        if stem == name or scale is None:
            continue
        scaled.append(name)
        out[name] = lambda name=name, scale=scale: _product(name, readers[name](), readers[scale](), block)
        for end in (BLOCKS, PLAIN, *_OF_ACTIVATIONS):
            out.pop(stem + end, None)
    return out, scaled


def _product(name: str, codes: np.ndarray, scale: np.ndarray, block: Any) -> np.ndarray:
    if codes.dtype.name not in _TYPES:
        raise QLRError(f"{name} has a scale beside it and type {codes.dtype}; only float8 weights are read with one")
    if scale.dtype == np.uint8:  # the exponent of ue8m0 as a plain byte
        scale = np.ldexp(np.float32(1), scale.astype(np.int32) - 127)
    weight, scale = codes.astype(np.float32), scale.astype(np.float32)
    if scale.size == 1:
        return weight * scale.reshape(1, 1)
    if scale.shape in ((weight.shape[0],), (weight.shape[0], 1)):
        return weight * scale.reshape(-1, 1)
    sizes = _block(weight.shape, scale.shape, block)
    if sizes is None:
        given = f"blocks of {block}" if block else "no weight_block_size"
        raise QLRError(f"{name}: scales of shape {scale.shape} do not divide a weight of shape {weight.shape} ({given})")
    rows, columns = (np.arange(n) // b for n, b in zip(weight.shape, sizes, strict=True))
    return weight * scale[rows[:, None], columns[None, :]]


def _block(shape: tuple[int, ...], scales: tuple[int, ...], block: Any) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where the shapes do not tell."""
    if len(shape) != 2 or len(scales) != 2:
        return None
    (m, n), (rows, columns) = shape, scales
    if block is not None:
        b, c = block
        return (b, c) if (-(-m // b), -(-n // c)) == scales else None
    return (m // rows, n // columns) if rows and columns and m % rows == n % columns == 0 else None
