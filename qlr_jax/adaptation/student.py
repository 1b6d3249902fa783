"""The compressed model as it is trained: decoded once, with its small parts as arrays of their own.

Every matrix is kept in the form in which it is stored, so that what training moves can be put on a grid again:

    W = ρ · (B + c · Uᵀ L diag(σ) R V)      B = g · Uᵀ Q V (m, n), decoded once;  L (m, k), R (k, n) in the rotated basis

and applied as y = ρ · (x Bᵀ + (x R'ᵀ) L'ᵀ) with (L', R') = (c UᵀL diag(σ), R V), which costs k (m + n) products a token. Sign
vectors that are real numbers are those of the seed times a (m,) and b (n,): diag(a) W diag(b), and y = a ∘ W (b ∘ x). An embedding
is u · T, u a power of two near its size; a tied one is one array with two uses. A trained backbone is B / g in real numbers, and
beside them what quantization adds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from qlr_jax.adaptation.config import ADDED_GRID
from qlr_jax.core import hadamard
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array, Float
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama, shallow_copy
from qlr_jax.models.products import dense

ParameterTree = dict[str, dict[str, Array]]
"""Name of a matrix, norm or embedding -> its arrays by name; one tree has what is trained and what is not."""

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
SIGNS = ("rows", "columns")
ADDED_SIZE = 0.1  # of added components' product in units of g: about what a 2-bit backbone leaves to correct


@dataclass(frozen=True)
class StudentMatrix:
    """How one matrix is stored, and how much of it is factored.

    Attributes:
        layout: as it will be stored.
        rank: how many components, from the first, are factors; the rest is in B.
        groups: whether the backbone is codes and scales.
        on_grid: (L, R), whether a factor is in units of a grid that it was stored on, and quantized in the same units.
    """

    layout: Layout
    rank: int = 0
    groups: bool = False
    on_grid: tuple[bool, bool] = (False, False)

    @property
    def spec(self) -> Spec:
        """How the factors are stored: the matrix's spec, at their rank."""
        spec = Spec.parse(self.layout.spec)
        return replace(spec, rank=self.rank) if self.rank else spec

    @property
    def rotated(self) -> bool:
        """Whether Q, L and R are in a rotated basis."""
        return Spec.parse(self.layout.spec).rotated

    @property
    def rotations(self) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
        """Those of the seed; stored signs are these times `rows` and `columns` among the parameters."""
        return hadamard.rotations(self.layout.shape, self.layout.seed, self.layout.rotation_block)


@dataclass(frozen=True)
class Student:
    """A static description of the model that is trained: which matrices, norms and embeddings have parameters of their own.

    Attributes:
        matrices: by the name of the linear layer.
        norms: names of their tensors.
        embeddings: names of the trained ones' tensors.
    """

    matrices: Mapping[str, StudentMatrix]
    norms: tuple[str, ...]
    embeddings: tuple[str, ...] = ()


def packed_matrices(model: Llama) -> dict[str, QLRMatrix]:
    """The packed matrices of a model by the names of their linear layers, without those kept in bf16.

    Raises:
        QLRError: there are none.
    """
    weights = {name: linear.weight.get_value() for name, linear in model.linears().items()}
    packed = {name: value for name, value in weights.items() if isinstance(value, QLRMatrix) and value.spec.has_scale}
    if not packed:
        raise QLRError("the model holds no compressed matrix to adapt; give one that `qlr compress` wrote")
    return packed


def take_apart(
    model: Llama,
    train: Iterable[str],
    rank: int | None,
    added: Mapping[str, Array],
    grid: str | None = None,
    added_grid: str | None = None,
) -> tuple[Student, ParameterTree, Llama]:
    """A compressed model as what is trained and what is not; an embedding or head that is packed is not.

    Args:
        model: packed.
        train: names of TRAINABLE.
        rank: components of each matrix that become factors; None: all.
        added: R (k, n), rotated basis, of components that matrices are given: their L starts at 0, so the model is unchanged.
        grid: of the factors as they will be stored; None: as each matrix has it.
        added_grid: that of the matrices in `added`; None: as each has it, ADDED_GRID where it has none.

    Returns:
        The description, all parameters, and the model with B in place of its matrices.

    Raises:
        QLRError: `rank` cuts the components that a matrix's grid stores together.
    """
    matrices: dict[str, StudentMatrix] = {}
    values: ParameterTree = {}
    frame = shallow_copy(model)
    linears = frame.linears()
    for name, matrix in packed_matrices(model).items():
        own = added_grid if name in added else grid
        matrices[name], values[name], base = split_matrix(name, matrix, train, rank, added.get(name), own)
        linears[name].weight.set_value(base)
    packed = {name for name, param in frame.tensors().items() if isinstance(param.get_value(), QLRMatrix)}
    for matrix in frame.matrices().values():  # one kept in bf16, a packed embedding and a packed head are decoded as well
        if hasattr(value := matrix.weight.get_value(), "dense"):
            matrix.weight.set_value(value.dense())
    norms = tuple(name for name in frame.tensors() if name.endswith("norm.weight"))
    values |= {name: {"norm": frame.tensors()[name].get_value().astype(jnp.float32)} for name in norms}
    plain = tuple(name for name in EMBEDDINGS if name in frame.tensors() and name not in packed)
    embeddings = plain if "embeddings" in train else ()
    for name in embeddings:
        weight = dense(frame.tensors()[name].get_value(), jnp.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(weight)))
        # a power of two, so that a row that is not trained comes back to the bit
        unit = jnp.exp2(jnp.round(jnp.log2(jnp.where(size > 0, size, 1.0))))
        values[name] = {"table": weight / unit, "unit": unit}
    return Student(matrices, norms, embeddings), values, frame


def split_matrix(
    name: str, matrix: QLRMatrix, train: Iterable[str], rank: int | None = None, added: Array | None = None, grid: str | None = None
) -> tuple[StudentMatrix, dict[str, Array], Array]:
    """One matrix as its description, its parameters and B (m, n), empty where the backbone is among the parameters.

    Args:
        name: for the error.
        matrix: packed, (m, n).
        train, rank: as `take_apart` takes them.
        added: R (k, n) of added components, rotated basis; None: none.
        grid: of the factors as they will be stored; None: as they are.

    Raises:
        QLRError: `rank` cuts the components that the grid stores together.
    """
    layout, spec = matrix.layout, matrix.spec
    quantizer = spec.quantizer()
    coded = not (quantizer.plain or quantizer.empty)
    # a scale of 0: the matrix is zero
    trained = "backbone" in train and coded and float(matrix.arrays["scale"][0]) != 0
    # factors that stay beside a trained backbone are multiplied out: a step need not go through them
    factored = 0 if trained and "factors" not in train else _factored_rank(name, spec, rank)
    if added is not None or (grid and spec.rank):
        layout = with_factors(layout, spec.rank + (0 if added is None else len(added)), grid)
    groups = "scales" in train and quantizer.scales is not None and not trained  # codes are found for scales as they are
    values: dict[str, Array] = {"gain": jnp.ones(())}
    if spec.rotated and ("signs" in train or layout.signs):
        layout = replace(layout, signs=True)
        of_seed = hadamard.rotations(layout.shape, layout.seed, layout.rotation_block)
        values |= {name: jnp.asarray(now * was) for name, (now, _), (was, _) in zip(SIGNS, matrix.rotations, of_seed, strict=True)}
    rest, on_grid = jnp.zeros(()), (False, False)  # rest: components that are not trained, in the rotated basis
    if spec.rank:
        left, right = (f.astype(jnp.float32) for f in matrix.factors())
        if factored:
            if added is None and Spec.parse(layout.spec).factor_quantizers() == spec.factor_quantizers():
                on_left, on_right = spec.factor_quantizers()
                # with scales of its own a grid is fitted again
                on_grid = (on_left.unit_scale and not on_left.scales, on_right.unit_scale and not on_right.scales)
            values |= _factor_parameters(matrix, left[:, :factored], right[:factored], on_grid)
        if spec.rank > factored:
            rest = left[:, factored:] @ right[factored:]
    if added is not None:
        values |= _with_added(matrix, values, added)
        factored += len(added)
    if factored:
        values["component"] = jnp.ones((factored,))
    student = StudentMatrix(layout, factored, groups, on_grid)
    if not (groups or trained):
        return student, values, _unrotate(matrix.backbone() + rest, student)
    values["rest"] = _unrotate(rest, student) if rest.ndim else rest
    if groups:
        values |= {"groups": jnp.ones(matrix.arrays[f"backbone.{quantizer.scales}"].shape)}
        values |= {f"backbone.{k}": jnp.asarray(v) for k, v in matrix.part("backbone").items()}
        values["scale"] = jnp.asarray(matrix.arrays["scale"], jnp.float32)
    else:
        scale = jnp.asarray(matrix.arrays["scale"][0], jnp.float32)
        values |= {"body": _unrotate(matrix.backbone() / scale, student), "scale": scale}
    return student, values, jnp.zeros((0, 0))


def _factored_rank(name: str, spec: Spec, rank: int | None) -> int:
    """How many components become factors: whole tiles of their grids."""
    factored = spec.rank if rank is None else min(spec.rank, rank)
    if factored < spec.rank:
        tiles = [q.tile for q in spec.factor_quantizers()]
        if not factored or [q.tile for q in replace(spec, rank=factored).factor_quantizers()] != tiles:
            raise QLRError(f"{name}: rank {rank} cuts the components that {spec} stores together; pass a multiple of {tiles[0][0]}")
    return factored


def _factor_parameters(matrix: QLRMatrix, left: Array, right: Array, on_grid: tuple[bool, bool]) -> dict[str, Array]:
    """L (m, k) and R (k, n) as parameters near 1.

    A grid without scales is kept where the factor stays on it, so that what does not move is quantized to itself.
    """
    count = len(right)
    # R's rows of size 1; what they lose is L's
    size = jnp.ones((count,)) if on_grid[1] else _sizes(right, axis=1)
    scaled = left.T * size[:, None]
    if on_grid[0]:
        unit = matrix.arrays["scale"][0] * matrix.arrays["component_scale"][:count].astype(jnp.float32) * size
        unit = jnp.where(unit != 0, unit, 1.0)
    else:  # one unit a matrix keeps the components' sizes to each other
        unit = jnp.full((count,), _sizes(scaled))
    return {"left": scaled / unit[:, None], "right": right / size[:, None], "unit": unit}


def _with_added(matrix: QLRMatrix, values: Mapping[str, Array], right: Array) -> dict[str, Array]:
    """`left`, `right` and `unit` with added components behind those that are there."""
    count = len(right)
    size = jnp.abs(matrix.arrays["scale"][0]) * ADDED_SIZE / count**0.5
    rows = {"left": jnp.zeros((count, matrix.shape[0])), "right": jnp.asarray(right, jnp.float32)}
    rows["unit"] = jnp.full((count,), values["unit"][0] if "unit" in values else size)
    return {k: jnp.concatenate([values[k], v]) if k in values else v for k, v in rows.items()}


def _sizes(rows: Array, axis: int | None = None) -> Array:
    """Root mean squares; 1 where all is 0."""
    size = jnp.sqrt(jnp.mean(jnp.square(rows), axis=axis))
    return jnp.where(size > 0, size, 1.0)


def _unrotate(weight: Array, matrix: StudentMatrix) -> Array:
    if not matrix.rotated:
        return weight
    (u, u_block), (v, v_block) = matrix.rotations
    return hadamard.unrotate(hadamard.unrotate(weight, v, v_block).T, u, u_block).T


def factors(matrix: StudentMatrix, values: Mapping[str, Array]) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    """(L', R') in the basis of W, L' with all scales but ρ."""
    left, right = (values[side] + values.get(f"{side}.shift", 0.0) for side in ("left", "right"))
    left = left * (values["unit"] * values["component"])[:, None]
    if matrix.rotated:
        (u, u_block), (v, v_block) = matrix.rotations
        left, right = hadamard.unrotate(left, u, u_block), hadamard.unrotate(right, v, v_block)
    return left.T, right


def backbone(matrix: StudentMatrix, values: Mapping[str, Array], base: Array) -> Float[Array, "m n"]:
    """B (m, n): decoded again where group scales are trained, quantized where it is trained itself, else `base`.

    Args:
        matrix: its description.
        values: its parameters.
        base: B where neither is so; unused else.
    """
    if "body" in values:
        return values["scale"] * (values["body"] + values.get("body.shift", 0.0)) + values["rest"]
    if not matrix.groups:
        return base
    arrays = {k.split(".", 1)[1]: v for k, v in values.items() if k.startswith("backbone.")}
    quantizer = Spec.parse(matrix.layout.spec).quantizer(matrix.layout.state_bits, matrix.layout.shape)
    assert quantizer.scales is not None  # or the backbone would have no groups
    arrays[quantizer.scales] = arrays[quantizer.scales].astype(jnp.float32) * values["groups"]
    return _unrotate(values["scale"][0] * quantizer.decode(arrays, *matrix.layout.shape), matrix) + values["rest"]


def embedding(values: Mapping[str, Array]) -> Float[Array, "vocab n"]:
    """An embedding or lm_head (vocab, n) as it is being trained."""
    return values["unit"] * values["table"]


def with_factors(layout: Layout, rank: int, grid: str | None) -> Layout:
    """The layout of a matrix whose factors have another rank, and another grid where one is given.

    Args:
        layout: of the matrix as it is.
        rank: of its factors.
        grid: of both factors; None: their own, ADDED_GRID where there are none.

    Example:
        >>> with_factors(Layout("trellis-2", (8, 8)), 4, None).spec, with_factors(Layout("int-2+r4@bf16", (8, 8)), 8, None).spec
        ('trellis-2+r4@trellis-4', 'int-2+r8@bf16')
    """
    spec = Spec.parse(layout.spec)
    left, right = (grid or own or ADDED_GRID for own in (spec.left, spec.right))
    return replace(layout, spec=str(replace(spec, rank=rank, left=left, right=right)))
