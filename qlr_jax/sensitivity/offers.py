"""What is on offer: the specs that a matrix may get, and their exact bytes, as allocators.OptionTable; nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np

from allocators import ModelFacts, Option, OptionTable, Row
from qlr_jax.core.quantizers import parse_quantizer
from qlr_jax.core.spec import Spec, expand_backbones
from qlr_jax.errors import QLRError
from qlr_jax.models import LlamaConfig, shape_of, tensor_names

Bytes = Callable[[Spec, tuple[int, int]], int]
"""(spec, shape) -> bytes in the format at hand."""


def options(
    backbones: Sequence[str],
    ranks: Sequence[int],
    factors: Sequence[str],
    shape: tuple[int, int],
    nbytes: Bytes = Spec.nbytes,
    holds: Callable[[Spec, tuple[int, int]], bool] = lambda spec, shape: True,
) -> list[str]:
    """The specs that a matrix of `shape` may get: every backbone, with factors of every rank that it can have and every grid,
    as far as that saves bytes and the format holds it; and the matrix as it is, where that is listed.

    Args:
        backbones: as a recipe lists them, ranges of rates among them ("trellis-1..4").
        ranks: of L R.
        factors: grids of L and R, "<grid>" or "<grid of L>,<grid of R>".
        shape: (out, in) of the matrix.
        nbytes: (spec, shape) -> bytes in the format at hand.
        holds: (spec, shape) -> whether that format can hold it.

    Example:
        >>> options(["int-4", "none"], [8], ["bf16"], (64, 64))
        ['int-4', 'int-4+r8@bf16', 'none+r8@bf16']
    """
    offered = []
    for backbone in expand_backbones(backbones):
        endings = [f"+r{rank}@{grids}" for rank in ranks if 0 < rank < min(shape) for grids in factors]
        endings = endings if parse_quantizer(backbone.partition("/")[0]).empty else ["", *endings]
        specs = [Spec.parse(backbone + ending) for ending in endings]
        offered += [
            str(spec) for spec in specs if holds(spec, shape) and _saves(spec, nbytes(spec, shape), 2 * shape[0] * shape[1])
        ]
    return list(dict.fromkeys(offered))


def _saves(spec: Spec, nbytes: int, original: int) -> bool:
    return nbytes < original or (not spec.has_scale and nbytes == original)


def vocabulary_options(
    grids: Sequence[str], shape: tuple[int, int], holds: Callable[[Spec, tuple[int, int]], bool] = lambda spec, shape: True
) -> list[str]:
    """The specs that an embedding or a head of `shape` (rows, columns) may get: those grids that the format holds.

    Args:
        grids: as a recipe lists them, ranges of rates among them ("trellis-2..4/rows").
        shape: (rows, columns).
        holds: (spec, shape) -> whether the format can hold it.

    Example:
        >>> vocabulary_options(["bf16", "trellis-3..3.125/rows"], (512, 64))
        ['bf16', 'trellis-3/rows', 'trellis-3.0625/rows', 'trellis-3.125/rows']
    """
    return [text for text in expand_backbones(grids) if holds(Spec.parse(text), shape)]


def price(
    config: LlamaConfig,
    shapes: Mapping[str, tuple[int, int]],
    specs: Callable[[tuple[int, int]], Sequence[str]],
    nbytes: Bytes = Spec.nbytes,
    vocabulary: Mapping[str, Sequence[str]] | None = None,
) -> OptionTable:
    """The table with its exact bytes and no damage yet: enough to tell whether a budget can be met, before anything is computed.

    Args:
        config: of the model.
        shapes: name -> (out, in) of the matrices to compress.
        specs: the options of a shape, e.g. `options` with a recipe's settings.
        nbytes: (spec, shape) -> bytes in the format at hand.
        vocabulary: name -> options of the embedding and of the head, whose rows do not count toward bits per weight.

    Raises:
        QLRError: where a matrix has no option.
    """
    offered = {shape: specs(shape) for shape in dict.fromkeys(shapes.values())}
    for name, shape in shapes.items():
        if not offered[shape]:
            raise QLRError(f"none of the backbones fits {name} {shape}; exclude it (--exclude '{name}'), or offer other backbones")
    priced = {shape: tuple(Option(s, nbytes(Spec.parse(s), shape), 0.0) for s in listed) for shape, listed in offered.items()}
    rows = [Row(name, shape[0] * shape[1], priced[shape]) for name, shape in shapes.items()]
    for name, texts in (vocabulary or {}).items():
        shape = shape_of(config, name)
        own = tuple(Option(text, nbytes(Spec.parse(text), shape), 0.0) for text in texts)
        rows.append(Row(name, shape[0] * shape[1], own, counted=False))
    return OptionTable(tuple(rows), model=facts(config, [row.name for row in rows]))


def facts(config: LlamaConfig, compressed: Container[str]) -> ModelFacts:
    """What byte and device budgets must know: tensors that stay as they are (bf16), and the shape of the KV cache.

    Args:
        config: of the model.
        compressed: names of the matrices to compress; their bytes are the table's.
    """
    kept = [shape for name, shape in tensor_names(config).items() if name.removesuffix(".weight") not in compressed]
    fixed = sum(2 * int(np.prod(shape)) for shape in kept)
    return ModelFacts(fixed, config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
