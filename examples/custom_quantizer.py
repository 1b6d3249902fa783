"""A quantizer of your own, defined outside the library, beside two of the library's with as many bits.

    python examples/custom_quantizer.py
    python examples/custom_quantizer.py --quick         that quantizer alone

Its eight levels are 0, ± ¼, ± ½, ± 1 and ¾: powers of two, and one sum of two, so that a product with a level is a shift of bits or
two. Once it is in QUANTIZERS its name works in every spec, for Q and for L and R. docs/add-a-quantizer.md says how such a grid
becomes a part of the library, so that PyTorch reads it too.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

import qlr_jax as qlr
from qlr_jax.core.quantizers import QUANTIZERS, ScalarGrid
from qlr_jax.core.quantizers.scalar import check_group, divided, grid_name, nearest_level, parse_grid_name
from qlr_jax.core.typing import Array
from qlr_jax.errors import QLRError

SPECS = ("int-3g32", "nf-3g32", "apot-3g32", "int-3g32+r8@int-3", "apot-3g32+r8@apot-3")
LEVELS = np.array([-1, -0.5, -0.25, 0, 0.25, 0.5, 0.75, 1], np.float32)  # ascending, for `nearest_level`


@dataclass(frozen=True)
class AdditivePowers(ScalarGrid):
    """`apot-3[g<group>]`: value = scale · level, codes of 3 bits; float16 scales searched for the least squared error.

    Source: the idea of additive powers of two is that of APoT, arXiv 1909.13144; these levels are ours.
    """

    width: int
    group: int = 0

    examples = ("apot-3", "apot-3g32")
    usage = "apot-3[g<group>]"

    def __post_init__(self) -> None:
        if self.width != 3:
            raise QLRError(f"apot-{self.width} is not offered; pass apot-3, e.g. apot-3g32")
        check_group(self.group)

    @classmethod
    def parse(cls, text: str) -> AdditivePowers | None:
        width, group, asymmetric = parse_grid_name(text) or (0, 0, True)
        return None if asymmetric else cls(width, group)

    @property
    def name(self) -> str:
        return grid_name("apot", self.width, self.group)

    def to_codes(self, x: Array, scale: Array) -> Array:
        return nearest_level(divided(x, scale), LEVELS)

    def from_codes(self, codes: Array, scale: Array) -> Array:
        return jnp.asarray(LEVELS)[codes] * scale


def layer(rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight matrix (rows, cols) with a few strong directions, and the second moments (cols, cols) of correlated inputs."""
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((rows, cols)) + 0.5 * draw.standard_normal((rows, 6)) @ draw.standard_normal((6, cols))
    mixing = np.eye(cols) + draw.standard_normal((cols, cols)) / np.sqrt(cols)
    activations = draw.standard_normal((4 * cols, cols)) * np.geomspace(5, 0.2, cols) @ mixing
    return weight, activations.T @ activations / len(activations)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="that quantizer alone")
    quick = parser.parse_args().quick
    QUANTIZERS["apot"] = AdditivePowers
    weight, hessian = layer(128, 96)
    print(f"{'spec':<20} {'bits':>6} {'error':>7}")
    for spec in SPECS[-1:] if quick else SPECS:
        solution = qlr.solve(weight, hessian, spec, iterations=2)
        print(f"{spec:<20} {solution.bits:6.3f} {solution.stats['relative_error']:7.4f}")


if __name__ == "__main__":
    main()
