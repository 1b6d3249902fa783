"""One weight matrix, compressed in several ways: what each costs, how far off it is, and what it cannot exceed.

    python examples/solve_one_matrix.py

W is a random matrix with a few strong directions, as trained weights have, and H = E[x xᵀ] comes from activations of which some
channels are much larger than others. The error is √(tr(E H Eᵀ) / tr(W H Wᵀ)), E = W − Ŵ: how wrong the layer's outputs are.
"""

import numpy as np

import qlr_jax as qlr

SPECS = {  # how to store W: backbone, rotation, rank and format of the factors
    "int-4g32": "4-bit integers, a scale for every 32 weights",
    "int-2g32": "2-bit integers",
    "int-2g32+r8@int-8": "with a correction of rank 8",
    "int-2g32/rot": "2-bit integers of a rotated matrix",
    "trellis-2": "a 2-bit trellis code",
    "trellis-2+r8@trellis-4": "with a correction of rank 8",
}
SETTINGS = {"state_bits": 6, "iterations": 2}  # coarse and quick; the defaults take longer and are better


def layer(rows: int, cols: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A weight matrix (rows, cols) and the second moments (cols, cols) of its inputs."""
    draw = np.random.default_rng(seed)
    weight = draw.standard_normal((rows, cols)) + 0.5 * draw.standard_normal((rows, 6)) @ draw.standard_normal((6, cols))
    activations = draw.standard_normal((4 * cols, cols)) * np.geomspace(5, 0.2, cols)
    return weight, activations.T @ activations / len(activations)


def main() -> None:
    weight, hessian = layer(128, 96)
    print(f"{'spec':<24} {'bits':>6} {'error':>7} {'bound':>7}  ")
    for spec, text in SPECS.items():
        settings = SETTINGS if "trellis" in spec else {}
        solution = qlr.solve(weight, hessian, spec, **settings)
        bound = solution.stats["bound"]
        shown = "none" if bound is None else f"{bound:.4f}"
        print(f"{spec:<24} {solution.bits:6.3f} {solution.stats['relative_error']:7.4f} {shown:>7}  {text}")
        assert bound is None or solution.stats["relative_error"] <= bound
    # what the model computes with: the matrix as it is stored, decoded
    print(f"\n{solution.verdict.name.lower()}: {solution.verdict}")
    print(f"decoded: {solution.value.dense().shape}, from {solution.value.nbytes} bytes")


if __name__ == "__main__":
    main()
