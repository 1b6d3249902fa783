"""Draw the README's picture from a job's report.json: what every matrix got, and what that cost beside uniform and rank 0.

python benchmarks/picture.py qlr-demo/report.json docs/allocation.png      (needs matplotlib)
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from allocators.strategies import BASELINE, CONTROL, DEFAULT, STRATEGIES
from qlr_jax.models.sites import KINDS

COLOURS = {BASELINE: "#b0b7c3", CONTROL: "#7d9cc0", DEFAULT: "#1f5fa8"}


def draw(report: dict, path: Path) -> None:
    """Heat map of bits (text: backbone bits, +rank) on the left; held-out KL of the three allocations on the right."""
    layers = 1 + max(m["layer"] for m in report["matrices"])
    bits = np.full((layers, len(KINDS)), np.nan)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 0.42 * layers + 1.5), width_ratios=(2.6, 1), layout="constrained")
    for m in report["matrices"]:
        bits[m["layer"], KINDS.index(m["kind"])] = m["bits"]
    shown = left.imshow(bits, cmap="Blues", aspect="auto", vmin=0.5)
    middle = 0.6 * np.nanmax(bits)
    for m in report["matrices"]:
        backbone, _, factors = m["spec"].removeprefix("trellis-").partition("+")
        text = f"{float(backbone.removesuffix('w')):.3g}" + (f" + {factors.split('@')[0]}" if factors else "")
        column = KINDS.index(m["kind"])
        left.text(column, m["layer"], text, ha="center", va="center", fontsize=8, color="white" if m["bits"] > middle else "black")
    left.set_xticks(range(len(KINDS)), KINDS)
    left.set_yticks(range(layers), [f"layer {i}" for i in range(layers)])
    left.set_title(f"what every matrix got at {report['budget']} (backbone bits + rank)", fontsize=10)
    figure.colorbar(shown, ax=left, label="bits per weight, all stored", pad=0.01)
    names = [n for n in COLOURS if n in report["kl"]]
    labels, heights = [STRATEGIES[n].label for n in names], [report["kl"][n] for n in names]
    bars = right.bar(labels, heights, color=[COLOURS[n] for n in names])
    right.bar_label(bars, fmt="%.4f", fontsize=8)
    right.set_title("KL from the original, held-out", fontsize=10)
    right.spines[["top", "right"]].set_visible(False)
    right.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of a finished job")
    parser.add_argument("out", type=Path, help="the picture to write")
    given = parser.parse_args()
    draw(json.loads(given.report.read_text(encoding="utf-8")), given.out)
