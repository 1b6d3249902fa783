"""The compressed model as it is trained: decoded once, with its small parts as arrays of their own.

Every matrix is held in the form in which it is stored, so that what training moves can be put on a grid again:

    W = ρ · (B + c · Uᵀ L diag(σ) R V)      B = g · Uᵀ Q V (m, n), decoded once;  L (m, k), R (k, n) in the rotated basis

and applied as y = ρ · (x Bᵀ + (x R'ᵀ) L'ᵀ) with (L', R') = (c UᵀL diag(σ), R V), which costs k (m + n) products a token. Sign
vectors that are real numbers are those of the seed times a (m,) and b (n,): diag(a) W diag(b), and y = a ∘ W (b ∘ x). An embedding
is held as u · T, u a power of two near its size; a tied one is one array with two uses. A trained backbone is held as B / g in real
numbers, and beside them what rounding adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qlr_jax.adaptation.config import FRESH_GRID
from qlr_jax.core import hadamard
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.core.spec import Spec
from qlr_jax.core.typing import Array, Float, Int
from qlr_jax.errors import QLRError
from qlr_jax.models.llama import Llama, Product, exact_product
from qlr_jax.models.llama import dense as as_array

Values = dict[str, dict[str, Array]]
"""Name of a matrix or a norm -> its arrays by name; one tree holds what is trained and what is not."""

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
RELAXED = ("rows", "columns")
NEW_SIZE = 0.1  # of fresh factors' product in units of g: about what a 2-bit backbone leaves to correct


@dataclass(frozen=True)
class Site:
    """One matrix: how it is stored, and how much of it is held apart.

    Attributes:
        rank: how many components, from the first, are held as factors; the rest is in B.
        groups: whether the backbone is held as codes and scales.
        on_grid: (L, R), whether a factor is held in units of a grid that it was stored on, and rounded in the same units.
    """

    layout: Layout
    rank: int = 0
    groups: bool = False
    on_grid: tuple[bool, bool] = (False, False)

    @property
    def spec(self) -> Spec:
        """How what is held as factors is stored: the matrix's spec, at their rank."""
        spec = Spec.parse(self.layout.spec)
        return replace(spec, rank=self.rank) if self.rank else spec

    @property
    def rotated(self) -> bool:
        return Spec.parse(self.layout.spec).rotated

    @property
    def sides(self) -> tuple[tuple[np.ndarray, int], tuple[np.ndarray, int]]:
        """Those of the seed; what stored signs are times them is `rows` and `columns` among the values."""
        return hadamard.rotations(self.layout.shape, self.layout.seed, self.layout.rotation_block)


@dataclass(frozen=True)
class Student:
    """The model without what is trained, and where that goes; a static description with `base` beside it."""

    sites: Mapping[str, Site]
    norms: tuple[str, ...]
    tables: tuple[str, ...] = ()


def packed_matrices(model: Llama) -> dict[str, QLRMatrix]:
    """The packed matrices of a model by the names of their linear layers; those kept in bf16 are not among them."""
    found = {name: linear.weight.get_value() for name, linear in model.linears().items()}
    found = {name: value for name, value in found.items() if isinstance(value, QLRMatrix) and value.spec.has_scale}
    if not found:
        raise QLRError("the model holds no compressed matrix to adapt; give one that `qlr compress` wrote")
    return found


def take_apart(
    model: Llama,
    train: Iterable[str],
    rank: int | None,
    fresh: Mapping[str, Array],
    grid: str | None = None,
    fresh_grid: str | None = None,
) -> tuple[Student, Values, Llama]:
    """A compressed model as what is trained and what is not.

    Args:
        rank: components of each matrix that become factors; None: all.
        fresh: R (k, n), rotated basis, of components that matrices are given: their L starts at 0, so the model is unchanged.
        grid: of the factors as they will be stored; None: as each matrix has it.
        fresh_grid: that of the matrices in `fresh`; None: as each has it, FRESH_GRID where it has none.

    Raises:
        QLRError: `rank` cuts the components that a matrix's grid stores together.

    Returns:
        The description, all values, and the model with B in place of its matrices.
    """
    sites: dict[str, Site] = {}
    values: Values = {}
    frame: Llama = jax.tree.map(lambda leaf: leaf, model)
    linears = frame.linears()
    for name, matrix in packed_matrices(model).items():
        sites[name], values[name], base = _part(name, matrix, rank, fresh.get(name), fresh_grid if name in fresh else grid, train)
        linears[name].weight.set_value(base)
    for linear in linears.values():  # a matrix kept in bf16 is decoded as well
        if hasattr(value := linear.weight.get_value(), "dense"):
            linear.weight.set_value(value.dense())
    norms = tuple(name for name in frame.tensors() if name.endswith("norm.weight"))
    values |= {name: {"norm": frame.tensors()[name].get_value().astype(jnp.float32)} for name in norms}
    tables = tuple(name for name in TABLES if name in frame.tensors()) if "embeddings" in train else ()
    for name in tables:
        weight = as_array(frame.tensors()[name].get_value(), jnp.float32)
        size = jnp.sqrt(jnp.mean(jnp.square(weight)))
        # a power of two, so that a row that is not trained comes back to the bit
        unit = jnp.exp2(jnp.round(jnp.log2(jnp.where(size > 0, size, 1.0))))
        values[name] = {"table": weight / unit, "unit": unit}
    return Student(sites, norms, tables), values, frame


def _part(
    name: str, matrix: QLRMatrix, rank: int | None, fresh: Array | None, grid: str | None, train: Iterable[str]
) -> tuple[Site, dict[str, Array], Array]:
    layout, spec = matrix.layout, matrix.spec
    held = spec.rank if rank is None else min(spec.rank, rank)
    added = 0 if fresh is None else len(fresh)
    body = "backbone" in train and spec.backbone not in ("bf16", "none") and float(matrix.arrays["scale"][0]) != 0  # 0: all is zero
    if body and "factors" not in train:
        held = 0  # multiplied out: a step need not go through factors that stay
    elif held < spec.rank:
        tiles = [q.tile for q in spec.factor_quantizers()]
        if not held or [q.tile for q in replace(spec, rank=held).factor_quantizers()] != tiles:
            raise QLRError(f"{name}: rank {rank} cuts the components that {spec} stores together; pass a multiple of {tiles[0][0]}")
    if added or (grid and spec.rank):
        layout = with_factors(layout, spec.rank + added, grid)
    groups = "scales" in train and "backbone.scales" in matrix.arrays and not body  # codes are found for scales as they are
    values: dict[str, Array] = {"gain": jnp.ones(())}
    if spec.rotated and ("signs" in train or layout.signs):
        layout = replace(layout, signs=True)
        of_seed = hadamard.rotations(layout.shape, layout.seed, layout.rotation_block)
        values |= {
            name: jnp.asarray(now * was) for name, (now, _), (was, _) in zip(RELAXED, matrix.rotations, of_seed, strict=True)
        }
    left, right = (f.astype(jnp.float32) for f in matrix.factors()) if spec.rank else (None, None)
    on_grid = (False, False)
    if held:
        # a grid without scales is kept where the factor stays on it, so that what does not move is rounded to itself
        if not added and Spec.parse(layout.spec).factor_quantizers() == spec.factor_quantizers():
            on_grid = tuple(quantizer.unit_scale for quantizer in spec.factor_quantizers())
        # R's rows of size 1; what they lose is L's
        size = jnp.ones((held,)) if on_grid[1] else _sizes(right[:held], axis=1)
        scaled = left[:, :held].T * size[:, None]
        if on_grid[0]:
            unit = matrix.arrays["scale"][0] * matrix.arrays["component_scale"][:held].astype(jnp.float32) * size
            unit = jnp.where(unit != 0, unit, 1.0)
        else:  # one unit a matrix keeps the components' sizes to each other
            unit = jnp.full((held,), _sizes(scaled))
        values |= {"left": scaled / unit[:, None], "right": right[:held] / size[:, None], "unit": unit}
    if added:
        size = jnp.abs(matrix.arrays["scale"][0]) * NEW_SIZE / added**0.5
        rows = {"left": jnp.zeros((added, matrix.shape[0])), "right": jnp.asarray(fresh, jnp.float32)}
        rows["unit"] = jnp.full((added,), values["unit"][0] if held else size)
        values |= {k: jnp.concatenate([values[k], v]) if held else v for k, v in rows.items()}
        held += added
    if held:
        values["component"] = jnp.ones((held,))
    site = Site(layout, held, groups, on_grid)
    rest = left[:, held:] @ right[held:] if spec.rank > held else jnp.zeros(())  # in the rotated basis
    if groups:
        values |= {"groups": jnp.ones(matrix.arrays["backbone.scales"].shape), "rest": _unrotate(rest, site) if rest.ndim else rest}
        values |= {f"backbone.{k}": jnp.asarray(v) for k, v in matrix.part("backbone").items()}
        values["scale"] = jnp.asarray(matrix.arrays["scale"], jnp.float32)
        return site, values, jnp.zeros((0, 0))
    if body:
        scale = jnp.asarray(matrix.arrays["scale"][0], jnp.float32)
        values |= {"body": _unrotate(matrix.backbone() / scale, site), "scale": scale}
        values["rest"] = _unrotate(rest, site) if rest.ndim else rest
        return site, values, jnp.zeros((0, 0))
    return site, values, _unrotate(matrix.backbone() + rest, site)


def _sizes(rows: Array, axis: int | None = None) -> Array:
    """Root mean squares; 1 where all is 0."""
    size = jnp.sqrt(jnp.mean(jnp.square(rows), axis=axis))
    return jnp.where(size > 0, size, 1.0)


def _unrotate(weight: Array, site: Site) -> Array:
    if not site.rotated:
        return weight
    (u, ub), (v, vb) = site.sides
    return hadamard.unrotate(hadamard.unrotate(weight, v, vb).T, u, ub).T


def factors(site: Site, values: Mapping[str, Array]) -> tuple[Float[Array, "m k"], Float[Array, "k n"]]:
    """(L', R') in the basis of W, L' with all scales but ρ."""
    left, right = (values[side] + values.get(f"{side}.shift", 0.0) for side in ("left", "right"))
    left = left * (values["unit"] * values["component"])[:, None]
    if site.rotated:
        (u, ub), (v, vb) = site.sides
        left, right = hadamard.unrotate(left, u, ub), hadamard.unrotate(right, v, vb)
    return left.T, right


def backbone(site: Site, values: Mapping[str, Array], base: Array) -> Array:
    """B (m, n); decoded anew where group scales are trained, and rounded where it is trained itself."""
    if "body" in values:
        return values["scale"] * (values["body"] + values.get("body.shift", 0.0)) + values["rest"]
    if not site.groups:
        return base
    arrays = {k.split(".", 1)[1]: v for k, v in values.items() if k.startswith("backbone.")}
    arrays["scales"] = arrays["scales"].astype(jnp.float32) * values["groups"]
    quantizer = Spec.parse(site.layout.spec).quantizer(site.layout.state_bits, site.layout.shape)
    return _unrotate(values["scale"][0] * quantizer.decode(arrays, *site.layout.shape), site) + values["rest"]


def dense(site: Site, values: Mapping[str, Array], base: Array) -> Float[Array, "m n"]:
    """W as it is being trained."""
    total = backbone(site, values, base)
    if site.rank:
        left, right = factors(site, values)
        total = total + jnp.matmul(left, right, precision="highest")
    total = values["gain"] * total
    return values["rows"][:, None] * total * values["columns"] if "rows" in values else total


def logits(
    student: Student, frame: Llama, values: Values, tokens: Int[Array, "batch time"], product: Product, remat: bool = False
) -> Float[Array, "batch time vocab"]:
    """The student's logits; `product` is x wᵀ."""
    return forward(student, frame, values, tokens, product, remat)[1]


def forward(
    student: Student, frame: Llama, values: Values, tokens: Int[Array, "batch time"], product: Product, remat: bool = False
) -> tuple[list[Float[Array, "batch time n"]], Float[Array, "batch time vocab"]]:
    """The hidden states that leave the student's blocks, and its logits; `product` is x wᵀ."""
    rope, states = frame.rope(tokens.shape[1]), []

    def run(block: Any, x: Array, own: Values, prefix: str) -> Array:
        block = jax.tree.map(lambda leaf: leaf, block)
        for name, param in block.tensors().items():
            if name.endswith("norm.weight"):
                param.set_value(own[f"{prefix}{name}"]["norm"])
        for path, linear in block.linears().items():
            name = f"{prefix}{path}"
            linear.product = partial(_apply, student.sites.get(name), own.get(name, {}), product)
        return block(x, rope)

    frame = jax.tree.map(lambda leaf: leaf, frame)
    for name in student.tables:
        frame.tensors()[name].set_value(table(values[name]))
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


def teaching(
    teacher: Llama, tokens: Int[Array, "batch time"], product: Product
) -> tuple[list[Float[Array, "batch time n"]], Float[Array, "batch time vocab"]]:
    """The same of a whole model, beside which the student is trained."""
    teacher, rope, states = jax.tree.map(lambda leaf: leaf, teacher), teacher.rope(tokens.shape[1]), []
    for linear in teacher.linears().values():
        linear.product = product
    teacher.product = product
    x = teacher.embed(tokens)
    for block in teacher.model.layers:
        x = block(x, rope)
        states.append(x)
    return states, teacher.head(x)


def table(values: Mapping[str, Array]) -> Float[Array, "vocab n"]:
    """An embedding or lm_head as it is being trained."""
    return values["unit"] * values["table"]


def _apply(site: Site | None, values: Mapping[str, Array], product: Product, x: Array, base: Array) -> Array:
    if site is None:
        return product(x, base)
    if "columns" in values:
        x = x * values["columns"]
    y = product(x, backbone(site, values, base))
    if site.rank:
        left, right = factors(site, values)
        y = y + product(product(x, right), left)
    return values["gain"] * (values["rows"] * y if "rows" in values else y)


def _fast(pattern: str, a: Array, b: Array) -> Array:
    return jnp.einsum(pattern, a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), preferred_element_type=jnp.float32)


@jax.custom_vjp
def bf16_product(x: Float[Array, "*batch n"], w: Float[Array, "m n"]) -> Float[Array, "*batch m"]:
    """x wᵀ, multiplied in bfloat16 and added in float32; its two gradients likewise."""
    return _fast("...n,mn->...m", x, w)


def _forward(x: Array, w: Array) -> tuple[Array, tuple[Array, ...]]:
    kinds = jnp.zeros((0,), x.dtype), jnp.zeros((0,), w.dtype)
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)  # half the memory of what the backward pass needs
    return bf16_product(x, w), (x, w, *kinds)


def _backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    x, w, of_x, of_w = saved
    g = g.astype(jnp.bfloat16)
    # XLA's product over the first axes of both takes 2.5 times one over the last and the first on a CPU, so gᵀ is written out
    across = jax.lax.optimization_barrier(g.reshape(-1, g.shape[-1]).T)
    flat = _fast("mt,tn->mn", across, x.reshape(-1, x.shape[-1]))
    return _fast("...m,mn->...n", g, w).astype(of_x.dtype), flat.astype(of_w.dtype)


bf16_product.defvjp(_forward, _backward)
PRODUCTS: Mapping[str, Callable[..., Array]] = {"float32": exact_product, "bf16": bf16_product}


def with_factors(layout: Layout, rank: int, grid: str | None) -> Layout:
    """The layout of a matrix whose factors have another rank, and another grid where one is given.

    Example:
        >>> with_factors(Layout("trellis-2", (8, 8)), 4, None).spec, with_factors(Layout("int-2+r4@bf16", (8, 8)), 8, None).spec
        ('trellis-2+r4@trellis-4', 'int-2+r8@bf16')
    """
    spec = Spec.parse(layout.spec)
    left, right = (grid or own or FRESH_GRID for own in (spec.left, spec.right))
    return replace(layout, spec=str(replace(spec, rank=rank, left=left, right=right)))
