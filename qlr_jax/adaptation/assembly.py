"""The adapted model as it is stored: packed matrices in place, norms and embeddings as bf16 holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.adaptation.rounding import QuantizedFactors
from qlr_jax.adaptation.student import SIGNS, ParameterTree, Student, StudentMatrix, embedding
from qlr_jax.core.factors import Factors, pack_factors
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.requantize import Requantizer
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array
from qlr_jax.models.llama import Llama, shallow_copy


def assemble_model(
    model: Llama,
    student: Student,
    values: ParameterTree,
    quantized: QuantizedFactors,
    requantizers: Mapping[str, Requantizer],
    train: tuple[str, ...],
) -> Llama:
    """A copy of the compressed model with what was trained in it.

    Args:
        model: as it was, packed.
        student, values: its description and parameters after training.
        quantized: codes and scales of the trained factors.
        requantizers: of the trained backbones.
        train: names of TRAINABLE.
    """
    adapted = shallow_copy(model)
    linears, tensors = adapted.linears(), adapted.tensors()
    for name, matrix in student.matrices.items():
        packed = pack_matrix(
            linears[name].weight.get_value(), matrix, values[name], quantized.get(name, {}), requantizers.get(name)
        )
        linears[name].weight.set_value(jax.tree.map(jnp.asarray, packed))
    for name in student.norms if "norms" in train else ():
        dtype = tensors[name].get_value().dtype
        tensors[name].set_value(values[name]["norm"].astype(jnp.bfloat16).astype(dtype))
    for name in student.embeddings:
        dtype = tensors[name].get_value().dtype
        tensors[name].set_value(embedding(values[name]).astype(jnp.bfloat16).astype(dtype))
    return adapted


def pack_matrix(
    before: QLRMatrix,
    matrix: StudentMatrix,
    values: Mapping[str, Array],
    quantized: Mapping[str, Array],
    requantizer: Requantizer | None = None,
) -> QLRMatrix:
    """One matrix as it is saved: Q's codes, byte for byte where it was not trained, new scales, and the quantized factors.

    Args:
        before: the matrix as it was.
        matrix, values: its description and parameters after training.
        quantized: codes and scales of its factors; empty where they were not trained.
        requantizer: of a trained backbone.
    """
    scale = float(np.asarray(before.arrays["scale"])[0])
    arrays: dict[str, Any] = {k: v for k, v in before.arrays.items() if k.startswith("backbone.")}
    if requantizer is not None:
        arrays |= requantizer.pack(requantizer.round(values["body"])[1])
    arrays["scale"] = np.array([scale * float(values["gain"])], np.float32)
    if matrix.groups:
        quantizer = before.spec.quantizer()
        key = f"backbone.{quantizer.scales}"
        scales: Any = np.asarray(before.arrays[key], np.float32) * np.asarray(values["groups"])
        arrays[key] = np.asarray(quantizer.cast_scales(scales))
    if matrix.layout.signs:
        for name, relaxed, (sign, _) in zip(("output_signs", "input_signs"), SIGNS, matrix.rotations, strict=True):
            arrays[name] = (sign * np.asarray(values[relaxed])).astype(np.float16)
    if not Spec.parse(matrix.layout.spec).rank:
        return QLRMatrix(arrays, matrix.layout)
    kept = {k: np.asarray(v) for k, v in before.arrays.items() if k.startswith(("left.", "right.", "component"))}
    if not quantized:
        # not trained, or only s: the component scales are all that may differ
        size = np.asarray(values["component"]) if matrix.rank else np.ones(0)
        arrays |= _rescaled(kept, size)
        return QLRMatrix(arrays, matrix.layout)
    packed = _packed_factors(matrix, values, quantized, scale)
    if before.spec.rank > matrix.rank:  # the components that were left alone follow, byte for byte
        for name, array in packed.items():
            count = len(array) if name != "component_scale" else matrix.rank
            packed[name] = np.concatenate([array, kept[name][count:]])
    arrays |= packed
    return QLRMatrix(arrays, matrix.layout)


def _packed_factors(
    matrix: StudentMatrix, values: Mapping[str, Array], quantized: Mapping[str, Array], scale: float
) -> dict[str, np.ndarray]:
    left, right = (tuple(quantized[k] for k in sorted(quantized) if k.startswith(f"{side}.scales")) for side in ("left", "right"))
    component: Any = np.asarray(values["unit"]) * np.asarray(values["component"])
    unused: Any = np.zeros(())  # packing reads codes and scales
    factors = Factors(unused, unused, component, quantized["left.codes"], quantized["right.codes"], left, right)
    return pack_factors(factors, matrix.spec, matrix.layout.state_bits, scale)


def _rescaled(kept: dict[str, np.ndarray], size: np.ndarray) -> dict[str, np.ndarray]:
    """Factors as they were, the first components resized in s."""
    if "component_scale" in kept and len(size):
        new = kept["component_scale"].astype(np.float32)
        new[: len(size)] *= size
        kept["component_scale"] = new.astype(np.float16)
    return kept
