"""What other formats can represent: which specs, in how many bytes, and which matrices must share a backbone.

A target represents a backbone exactly, or not at all; factors become an adapter in bf16 beside it.

    compressed-tensors   int codes of 2, 3, 4, 8 bits, unrotated, a scale a group of 32, 64, 128 or a row; bf16  vLLM, transformers
    gguf                 int-4g32 = Q4_0, int-8g32 = Q8_0, int-3g256 = Q3_K, int-2g256 = Q2_K, or bf16         llama.cpp
    adapter              factors of any quantizer on a given backbone, whose own bytes are not counted         qlr_jax, peft
    qlr                  every spec; the packed folder                                                         qlr_jax, transformers
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.models.sites import BY_KIND, shared_inputs

Shape = tuple[int, int]

# By GGUF's name: the backbone that its blocks represent exactly, weights a block, bytes a block.
GGUF_BLOCKS = {
    "Q8_0": ("int-8g32", 32, 34),
    "Q4_0": ("int-4g32", 32, 18),
    "Q3_K": ("int-3g256", 256, 110),
    "Q2_K": ("int-2g256", 256, 84),
}
CT_BITS, CT_GROUPS = (2, 3, 4, 8), (32, 64, 128, 0)
# The backbones that compressed-tensors packs -> (bits, group).
CT_INTEGERS = {f"int-{b}" + (f"g{group}" if group else ""): (b, group) for b in CT_BITS for group in CT_GROUPS}
BFLOAT16 = "bf16"  # a matrix as it is: every format holds it
ADAPTER = "bf16"  # the factors' quantizer that an adapter represents exactly, in two bytes a number


@dataclass(frozen=True)
class Target:
    """A format to compress for.

    Attributes:
        name: as `--target` and `--to` take it.
        backbones, factors: what is offered by default, as a recipe writes them.
        ties: groups of patterns of matrices that must share a backbone.
        fault: (spec, (out, in)) -> why the backbone cannot be represented exactly, or "".
        nbytes: (spec, (out, in)) -> bytes in this format, its adapter's included.
        vocabulary: what is offered by default for the embedding and the head, whose rows are read one by one.
        any_factors: whether factors of every quantizer are represented exactly; else those in bf16 alone, which become an adapter.

    Example:
        >>> TARGETS["gguf"].fault(Spec.parse("int-3g256"), (64, 96))
        'int-3g256 needs inputs in blocks of 256, and this matrix has 96'
        >>> TARGETS["gguf"].nbytes(Spec.parse("int-4g32"), (64, 96))
        3456
    """

    name: str
    backbones: tuple[str, ...]
    factors: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    fault: Callable[[Spec, Shape], str]
    nbytes: Callable[[Spec, Shape], int]
    vocabulary: tuple[str, ...] = ("bf16",)
    any_factors: bool = False

    def holds(self, spec: Spec, shape: Shape) -> bool:
        """Whether a matrix of `shape` (out, in) is represented exactly, factors included, in the bytes that `nbytes` returns."""
        exact = self.any_factors or not spec.rank or (spec.left == ADAPTER and spec.right == ADAPTER)
        return exact and not self.fault(spec, shape)

    def check(self, name: str, spec: Spec, shape: Shape) -> None:
        """Refuse a backbone that the format cannot represent.

        Args:
            name: of the matrix, for the error.
            spec: of the matrix.
            shape: (out, in).

        Raises:
            QLRError: naming the backbones that the format can represent.
        """
        if fault := self.fault(spec, shape):
            offered = ", ".join(self.backbones)
            raise QLRError(
                f"{name}: {self.name} cannot hold {spec}: {fault}; it holds the backbones {offered} (qlr compress --target)"
            )


def find_target(name: str) -> Target:
    """The target of this name; QLRError for another."""
    if name not in TARGETS:
        raise QLRError(f"target {name!r} is not known; pass one of {', '.join(TARGETS)}")
    return TARGETS[name]


def gguf_type(spec: Spec) -> str:
    """GGUF's name of the blocks that represent this backbone; "" where none does.

    Example:
        >>> gguf_type(Spec.parse("int-4g32+r8@bf16")), gguf_type(Spec.parse("int-4g64"))
        ('Q4_0', '')
    """
    if spec.rotated or spec.by_rows:
        return ""
    return {backbone: name for name, (backbone, _, _) in GGUF_BLOCKS.items()}.get(
        spec.backbone, "BF16" if spec.backbone == "bf16" else ""
    )


def _adapter_bytes(spec: Spec, shape: Shape) -> int:
    return 2 * spec.rank * sum(shape)


def _plain(spec: Spec) -> bool:
    return spec.backbone == "bf16" and not spec.rotated


def _gguf_fault(spec: Spec, shape: Shape) -> str:
    name = gguf_type(spec)
    if not name:
        return "a rotated backbone is no plain integer" if spec.rotated or spec.by_rows else f"no block is {spec.backbone}"
    block = GGUF_BLOCKS[name][1] if name in GGUF_BLOCKS else 1
    return f"{spec.backbone} needs inputs in blocks of {block}, and this matrix has {shape[1]}" if shape[1] % block else ""


def _gguf_bytes(spec: Spec, shape: Shape) -> int:
    name, weights = gguf_type(spec), shape[0] * shape[1]
    _, block, size = GGUF_BLOCKS.get(name, ("", 1, 2))
    return weights // block * size + _adapter_bytes(spec, shape)


def _ct_fault(spec: Spec, shape: Shape) -> str:
    if spec.rotated or spec.by_rows:
        return "a rotated backbone is no plain integer"
    if _plain(spec):
        return ""
    _, group = CT_INTEGERS.get(spec.backbone, (0, 0))
    if spec.backbone not in CT_INTEGERS:
        return f"{spec.backbone} is no symmetric integer of 2, 3, 4 or 8 bits with groups of 32, 64, 128 or a row"
    return f"{spec.backbone} needs inputs in whole groups, and this matrix has {shape[1]}" if group and shape[1] % group else ""


def _ct_bytes(spec: Spec, shape: Shape) -> int:
    rows, cols = shape
    if spec.backbone not in CT_INTEGERS:
        return 2 * rows * cols + _adapter_bytes(spec, shape)
    width, group = CT_INTEGERS[spec.backbone]
    codes, groups = 4 * rows * -(-cols * width // 32), cols // group if group else 1
    return codes + 2 * rows * groups + 16 + _adapter_bytes(spec, shape)  # int32 codes, 16-bit scales, and the shape as two int64


TARGETS = {
    target.name: target
    for target in (
        Target(
            "qlr",
            ("trellis-1..6w", "int-8g32", BFLOAT16),
            ("trellis-2", "trellis-3", "trellis-4"),
            (),
            lambda spec, shape: "",
            lambda spec, shape: spec.nbytes(shape),
            (BFLOAT16, "int-8g32", "int-4g32", "trellis-2..6/rows"),
            any_factors=True,
        ),
        Target(
            "compressed-tensors",
            (*CT_INTEGERS, BFLOAT16),
            (ADAPTER,),
            tuple(tuple(f"*{BY_KIND[kind].name}" for kind in group) for group in shared_inputs()),  # vLLM runs each as one matrix
            _ct_fault,
            _ct_bytes,
        ),
        Target(
            "gguf",
            (*(backbone for backbone, _, _ in GGUF_BLOCKS.values()), BFLOAT16),
            (ADAPTER,),
            (),
            _gguf_fault,
            _gguf_bytes,
            (BFLOAT16, *(backbone for backbone, _, _ in GGUF_BLOCKS.values())),
        ),
        Target(
            "adapter",
            (BFLOAT16,),
            (ADAPTER, "int-8", "int-4"),
            (),
            lambda spec, shape: "" if _plain(spec) else f"a given backbone is kept as it is, and {spec.backbone} is another",
            lambda spec, shape: spec.nbytes(shape) - 2 * shape[0] * shape[1],
            any_factors=True,
        ),
    )
}
