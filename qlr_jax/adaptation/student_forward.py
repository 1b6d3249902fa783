"""The forward pass of the model that is trained, and of its teacher: hidden states and logits."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax

from qlr_jax.adaptation.student import ParameterTree, Student, StudentMatrix, backbone, embedding, factors
from qlr_jax.core.typing import Array, Float, Int
from qlr_jax.models.llama import Llama, shallow_copy
from qlr_jax.models.products import Product


def student_forward(
    student: Student, frame: Llama, values: ParameterTree, tokens: Int[Array, "batch time"], product: Product, remat: bool = False
) -> tuple[list[Float[Array, "batch time n"]], Float[Array, "batch time vocab"]]:
    """The hidden states that leave the student's blocks, (batch, time, n) each, and its logits (batch, time, vocab).

    Args:
        student, frame, values: as `take_apart` gives them.
        tokens: (batch, time).
        product: x wᵀ.
        remat: whether a block's activations are computed again in the backward pass.
    """
    rope, states = frame.rope(tokens.shape[1]), []

    def run(block: Any, x: Array, own: ParameterTree, prefix: str) -> Array:
        block = shallow_copy(block)
        for name, param in block.tensors().items():
            if name.endswith("norm.weight"):
                param.set_value(own[f"{prefix}{name}"]["norm"])
        for path, linear in block.linears().items():
            name = f"{prefix}{path}"
            linear.product = partial(_apply, student.matrices.get(name), own.get(name, {}), product)
        return block(x, rope)

    frame = shallow_copy(frame)
    for name in student.embeddings:
        frame.tensors()[name].set_value(embedding(values[name]))
    x = frame.embed(tokens)
    for i, block in enumerate(frame.model.layers):
        prefix = f"model.layers.{i}."
        own = {name: part for name, part in values.items() if name.startswith(prefix)}
        call = partial(run, prefix=prefix)
        x = (jax.checkpoint(call) if remat else call)(block, x, own)
        states.append(x)
    frame.product = product
    frame.model.norm.weight.set_value(values["model.norm.weight"]["norm"])
    return states, frame.head(x)


def teacher_forward(
    teacher: Llama, tokens: Int[Array, "batch time"], product: Product
) -> tuple[list[Float[Array, "batch time n"]], Float[Array, "batch time vocab"]]:
    """The same of a whole model, beside which the student is trained.

    Args:
        teacher: the original.
        tokens: (batch, time).
        product: x wᵀ.
    """
    teacher, rope, states = shallow_copy(teacher), teacher.rope(tokens.shape[1]), []
    for linear in teacher.linears().values():
        linear.product = product
    teacher.product = product
    x = teacher.embed(tokens)
    for block in teacher.model.layers:
        x = block(x, rope)
        states.append(x)
    return states, teacher.head(x)


def _apply(matrix: StudentMatrix | None, values: Mapping[str, Array], product: Product, x: Array, base: Array) -> Array:
    if matrix is None:
        return product(x, base)
    if "columns" in values:
        x = x * values["columns"]
    y = product(x, backbone(matrix, values, base))
    if matrix.rank:
        left, right = factors(matrix, values)
        y = y + product(product(x, right), left)
    return values["gain"] * (values["rows"] * y if "rows" in values else y)
