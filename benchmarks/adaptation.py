"""What adaptation removes of the KL to the original, and for how many bytes: what is trained, on which grid, from which size.

    python benchmarks/adaptation.py                           all rows at 2.0 bits a weight in the end, on the bundled model
    python benchmarks/adaptation.py --only free fresh-0.2 --steps 400
    python benchmarks/adaptation.py --list

The bundled model is compressed once a budget (kept in --work and used again), adapted on the calibration text of Python's standard
library with KL to the original, and measured on held-out modules that neither training nor early stopping saw; every twentieth
sequence of the text is for early stopping. The rows `…-more-text` take the library's training modules, which the original model was
trained on; `…-packages` modules of flax, jax, numpy and optax, which it was not, and are measured on other modules of theirs and on
the library's; `headers…` the C headers of this Python, and are measured on other headers of it. `--window` is the length of the
sequences trained on; figures are of windows of 256 tokens. `bpw` counts everything stored of the compressed weights, as the
folders hold it. Minutes of the processor are of this process over two, what two free cores would take: on a shared machine the wall
clock says little.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import sysconfig
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np

import allocators
from allocators.strategies import DEFAULT
from qlr_jax import calibration, evaluation
from qlr_jax.adaptation import AdaptConfig, adapt
from qlr_jax.calibration.text import split_of
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.formats.qlr.packed import load, read_matrices, save_packed
from qlr_jax.models import load_model, load_tokenizer
from qlr_jax.models.bundled import BUNDLED
from qlr_jax.pipelines.run import Run
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages import allocate, calibrate, measure, solve_plans
from qlr_jax.progress import plain
from qlr_jax.settings.recipe import DEMO

WINDOW = 256


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    budget: str
    settings: dict[str, Any] = field(default_factory=dict)
    text: str = "calibration"


FREE = ("norms", "scales", "embeddings")  # stored already: no byte
STATES = {"states": 2.5}
ROWS = {
    "norms": Row("2.0bpw", {"train": ("norms",)}),
    "vectors": Row("2.0bpw", {"train": ("norms", "scales")}),
    "embeddings": Row("2.0bpw", {"train": ("embeddings",)}),
    "free": Row("2.0bpw", {"train": FREE}),
    "free-full-kl": Row("2.0bpw", {"train": FREE, "top": None}),
    "backbone": Row("2.0bpw", {"train": (*FREE, "backbone"), **STATES}),
    "backbone-no-states": Row("2.0bpw", {"train": (*FREE, "backbone"), "backbone_rate": 3e-3}),
    "all": Row("2.0bpw", {"train": (*FREE, "factors", "backbone"), **STATES}),
    "signs": Row("2.0bpw", {"train": (*FREE, "signs")}),
    "same": Row("2.0bpw", {"train": (*FREE, "factors")}),
    "same-phases": Row("2.0bpw", {"train": (*FREE, "factors"), "reround": None}),
    "fresh-0.1": Row("1.9bpw", {"fresh": "0.1bpw"}),
    "fresh-0.2": Row("1.8bpw", {"fresh": "0.2bpw"}),
    "fresh-0.2-own-grid": Row("1.8bpw", {"fresh": "0.2bpw", "fresh_grid": "same"}),
    "bf16": Row("2.0bpw", {"train": (*FREE, "factors"), "factors": "bf16"}),
    "free-more-text": Row("2.0bpw", {"train": FREE}, "train"),
    "free-states-more-text": Row("2.0bpw", {"train": FREE, **STATES}, "train"),
    "backbone-more-text": Row("2.0bpw", {"train": (*FREE, "backbone"), **STATES}, "train"),
    "all-more-text": Row("2.0bpw", {"train": (*FREE, "factors", "backbone"), **STATES}, "train"),
    "backbone-packages": Row("2.0bpw", {"train": (*FREE, "backbone"), **STATES}, "packages"),
    "free-packages": Row("2.0bpw", {"train": FREE}, "packages"),
    "fresh-0.2-more-text": Row("1.8bpw", {"fresh": "0.2bpw"}, "train"),
    "headers": Row("2.0bpw", {"train": FREE, "loss": "text"}, "headers"),
    "headers-mix": Row("2.0bpw", {"train": FREE, "loss": "mix"}, "headers"),
}


@one_blas_thread()
def compressed(work: Path, budgets: set[str]) -> None:
    """The bundled model at every budget, once."""
    missing = sorted(b for b in budgets if not (work / b).exists())
    if not missing:
        return
    recipe, progress = DEMO.updated(state_bits=8, search_state_bits=8), plain(every=60)
    source = open_source("bundled", recipe)
    statistics, sample = calibrate(source, calibration.standard_library("calibration"), progress)
    run, solved = Run(source, statistics, sample, progress), {}
    run = replace(run, solver=lambda kind: partial(solve_many, into=solved))
    table = measure(run).table
    for budget in missing:
        plan = allocate(run, allocators.Budget.parse(budget).on(table))[DEFAULT]
        found = solve_plans(run, {DEFAULT: plan})[DEFAULT]
        save_packed(work / budget, source.model, found.matrices, source=source.folder)


def headers(split: str) -> str:
    """C headers of this Python, in the splits of the standard library's modules."""
    folder = Path(sysconfig.get_paths()["include"])
    found = sorted(
        p for p in folder.rglob("*.h") if (split_of(p.relative_to(folder).as_posix()) == "heldout") == (split == "heldout")
    )
    if not found:
        raise SystemExit(f"no C header lies below {folder}: leave the rows headers… out with --only")
    return calibration.read_text(found)


def packages(split: str) -> str:
    """Modules of four packages that this library needs: Python that the original model was not trained on."""
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("flax", "jax", "numpy", "optax")]
    found = [path for root in roots for path in root.rglob("*.py") if "tests" not in path.parts and path.stat().st_size]
    of = {path: split_of(path.relative_to(root.parent).as_posix()) for root in roots for path in found if root in path.parents}
    return calibration.read_text(sorted(path for path in found if (of[path] == "heldout") == (split == "heldout")))


def sequences(text: str, split: str, window: int = WINDOW) -> np.ndarray:
    """Windows of what a row trains on, or of what it is measured on (`split` "heldout")."""
    library = calibration.standard_library
    made = {"headers": headers, "packages": packages}
    content = made[text](split) if text in made else library("heldout" if split == "heldout" else text)
    return evaluation.windows(content, load_tokenizer(BUNDLED), window)


def given(texts: list[str]) -> dict[str, Any]:
    """NAME=VALUE -> settings, numbers where they are such."""
    return {name: json.loads(value) for name, value in (text.split("=", 1) for text in texts)}


def run(name: str, row: Row, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Adapt once, save, read back, measure."""
    original, model, progress = load_model(BUNDLED), load(work / row.budget), plain(every=60)
    count = min(args.sequences, args.steps * args.batch)
    rows = calibration.subsample(sequences(row.text, "training", args.window), count * args.window)
    training, stopping = np.delete(rows, np.s_[::20], axis=0), rows[::20][: 48 * WINDOW // args.window]
    known = {
        text: evaluation.reference(original, calibration.subsample(sequences(text, "heldout"), args.tokens))
        for text in dict.fromkeys((row.text, *(("library",) if row.text == "packages" else ())))
    }
    looks = {"evaluate_every": max(25, args.steps // 15), "patience": 15}  # the best is kept, and a plateau ends nothing
    config = AdaptConfig(
        **{"steps": args.steps, "batch": args.batch, "compute": "bf16", **looks, **row.settings, **given(args.set)}
    )
    measured = lambda model: {text: evaluation.divergence(model.densified(), on) for text, on in known.items()}  # noqa: E731
    everywhere = measured(model)
    start, used = time.perf_counter(), time.process_time()
    found = adapt(model, training, config, teacher=original, held_out=stopping, progress=progress)
    seconds, used = time.perf_counter() - start, time.process_time() - used
    out = work / f"{name}-{time.time_ns()}"
    save_packed(out, found.value, found.matrices, source=work / row.budget)
    stored, everywhere_after = sum(m.nbytes for m in read_matrices(out).values()), measured(load(out))
    before, after = everywhere[row.text], everywhere_after[row.text]
    assert stored == found.stats["bytes"]
    return {
        "row": name,
        "budget": row.budget,
        "text": row.text,
        "settings": {k: v for k, v in config.__dict__.items()},
        "bits_per_weight_before": found.stats["bits_per_weight_before"],
        "bits_per_weight": found.stats["bits_per_weight"],
        "trained": found.stats["trained"],
        "kl_before": before.kl,
        "kl": after.kl,
        "kl_elsewhere": {text: (everywhere[text].kl, now.kl) for text, now in everywhere_after.items() if text != row.text},
        "perplexity_original": before.perplexity_original,
        "perplexity_before": before.perplexity,
        "perplexity": after.perplexity,
        "verdict": found.verdict.name,
        "minutes": seconds / 60,
        "cpu_minutes_of_two_cores": used / 120,
        "history": found.stats["history"],
    }


def line(record: dict[str, Any]) -> str:
    """One line of the table."""
    bits = f"{record['bits_per_weight_before']:.3f} -> {record['bits_per_weight']:.3f}"
    kl = f"{record['kl_before']:.4f} -> {record['kl']:.4f} ({1 - record['kl'] / record['kl_before']:+.0%})"
    perplexity = f"{record['perplexity_before']:.2f} -> {record['perplexity']:.2f} ({record['perplexity_original']:.2f})"
    minutes = f"{record['cpu_minutes_of_two_cores']:.1f} ({record['minutes']:.1f})"
    elsewhere = "".join(f"; {text} {a:.4f} -> {b:.4f} ({1 - b / a:+.0%})" for text, (a, b) in record["kl_elsewhere"].items())
    return f"{record['row']:<20} {record['trained']:>8} {bits:<16} {kl:<26} {perplexity:<24} {minutes}{elsewhere}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=8, help="sequences of a step")
    parser.add_argument("--sequences", type=int, default=4096, help="of the text, at most: the original runs over each once")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings of every row, e.g. backbone_rate=0.01")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens of a sequence that is trained on")
    parser.add_argument("--tokens", type=int, default=16384, help="of held-out text, for the figures")
    parser.add_argument("--work", type=Path, default=Path("adaptation-work"))
    parser.add_argument("--out", type=Path, default=Path("adaptation.json"))
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:<20} {row.text:<8} {row.budget} {row.settings}" for name, row in ROWS.items()))
        return
    args.work.mkdir(parents=True, exist_ok=True)
    compressed(args.work, {ROWS[name].budget for name in args.only})
    records = []
    header = f"{'row':<20} {'trained':>8} {'bpw stored':<16} {'KL held-out':<26} {'perplexity (original)':<24} minutes (wall)"
    print(header, flush=True)
    for name in args.only:
        records.append(run(name, ROWS[name], args.work, args))
        print(line(records[-1]), flush=True)
        args.out.write_text(json.dumps({"machine": platform.processor() or platform.machine(), "rows": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
