"""What rank and bits are worth on a real model, beside what people would pick instead.

    python benchmarks/real_model.py MODEL --calibration web.txt --held-out wiki.txt --out study            all of it: days
    python benchmarks/real_model.py MODEL ... --out study --quick                                         a night's part
    python benchmarks/real_model.py MODEL ... --out study --parts peers --llama-cpp node_modules/@node-llama-cpp/linux-x64
    python benchmarks/real_model.py --out study --show docs                                               tables and pictures alone

MODEL is anything that `qlr compress` takes (for llama.cpp's types a GGUF file). The last tenth of the calibration text is not
calibrated on: KL on it is that on text of the same kind. Windows of `--length` tokens, one BOS before the text where the tokenizer
has one, line ends normalised to LF. KL(original ‖ compressed) in nats a token; intervals of 95 % by resampling windows; ratios of
two models are of the same windows, resampled together. Sizes are bits a weight of the linear layers with everything stored counted.

    sizes      allocated, rank 0 and uniform at every budget and seed
    peers      llama.cpp's types, HQQ, round to nearest, CALDERA as published, one SVD of the residual, LQER; ours in no more bytes
    uniform    one spec for all matrices, one thing changed at a time: rates, state bits, text of H and of G, their shrinkage
    settings   one setting changed at a time, allocated at 2.5 bits: calibration tokens, state bits, damping, weighted Hessians
    adapted    the allocated models after `--steps` of adaptation on the calibration text

A part that was interrupted goes on where it was. HQQ needs `pip install hqq`; llama.cpp's types its library, as the npm package
@node-llama-cpp/linux-x64 has it (`npm pack`, unpacked).
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from allocators.strategies import DEFAULT, solved_strategies
from benchmarks.real import peers
from benchmarks.real.peers import Peer
from benchmarks.real.show import pictures, tables
from benchmarks.real.study import Record, Study, all_tokens, read_text, split
from qlr_jax import evaluation
from qlr_jax.adaptation import AdaptConfig, fine_tune
from qlr_jax.calibration import Corpus
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.formats.qlr.packed import load, save_packed
from qlr_jax.models import Llama
from qlr_jax.pipelines.run import Candidate, Run, with_weights
from qlr_jax.pipelines.stages.sequential import solve_blocks
from qlr_jax.sensitivity import Statistics
from qlr_jax.settings.host import prepare
from qlr_jax.settings.recipe import Recipe

BUDGETS, QUICK_BUDGETS = ("2bpw", "2.25bpw", "2.5bpw", "3bpw", "4bpw"), ("2bpw", "2.5bpw", "3bpw")
SETTINGS: dict[str, dict] = {
    "as it is": {},
    "one rate a matrix": {"backbones": ("trellis-1..6", "int-8g32", "bf16")},
    "8 state bits": {"state_bits": 8},
    "10 state bits": {"state_bits": 10},
    "14 state bits": {"state_bits": 14},
    "damping 0.03": {"damping": 0.03},
    "G as it is": {"output_shrinkage": 0.0},
    "a third of G the identity": {"output_shrinkage": 0.3},
    "KL of options on four times the tokens": {"measure_tokens": 4},
    "twice the text": {"sequences": 2, "output_tokens": 2},
    "four times the text": {"sequences": 4, "output_tokens": 4},
    "twice the text for H alone": {"sequences": 2},
}
"""Name -> what changes; numbers of tokens are multiples."""
UNIFORM: dict[str, dict] = {
    "as it is": {},
    "one rate a matrix": {"spec": "trellis-2.5"},
    "10 state bits": {"state_bits": 10},
    "12 state bits": {"state_bits": 12},
    "14 state bits": {"state_bits": 14},
    "16 state bits": {"state_bits": 16},
    "G as it is": {"share": 0.0},
    "twice the text for G": {"g": 2},
    "four times the text for G": {"g": 4},
    "four times the text for G as it is": {"g": 4, "share": 0.0},
    "four times the text for G, 0.03 of it the identity": {"g": 4, "share": 0.03},
    "four times the text for H": {"h": 4},
    "four times the text for H and G": {"h": 4, "g": 4},
    "damping 0.03": {"damping": 0.03},
    "in sequence": {"sequence": True},
    "2 bits": {"spec": "trellis-2w"},
    "2 bits, in sequence": {"spec": "trellis-2w", "sequence": True},
}
"""Name -> what changes of a model of `trellis-2.5w` with 8 state bits; text for H and G in multiples of the base's."""
MULTIPLES = ("sequences", "output_tokens", "measure_tokens")


def candidate_record(study: Study, run: Run, candidate: Candidate) -> Record:
    """What is kept of an allocation that was solved."""
    return {
        "bits": candidate.plan.bits_per_weight,
        "bytes": candidate.plan.bytes,
        "predicted": candidate.plan.damage,
        "specs": dict(candidate.plan.specs),
        "texts": study.figures(candidate.parts(run.original)),
    }


def sizes(study: Study, seeds: list[int], budgets: tuple[str, ...]) -> None:
    """Every budget's three models."""
    for seed in seeds:
        for budget in budgets:
            key = partial(dict, part="sizes", seed=seed, budget=budget)
            names = [name for name in solved_strategies() if study.missing(**key(name=name))]
            if not names:
                continue
            run, table = study.prepared(study.base.updated(seed=seed))
            for name, candidate in study.solved(run, table, budget, names).items():
                if name == DEFAULT and not (folder := model_folder(study, seed, budget)).exists():
                    save_packed(folder, run.original, candidate.matrices, source=run.source.folder)
                study.keep(key(name=name) | candidate_record(study, run, candidate))


def model_folder(study: Study, seed: int, budget: str) -> Path:
    """Where the allocated model of a budget lies, packed."""
    return study.folder / f"model-{seed}-{budget}"


def adapted(study: Study, seeds: list[int], budgets: tuple[str, ...], config: AdaptConfig, length: int = 256) -> None:
    """The allocated models, adapted on the calibration text; a twentieth of it says when to stop."""
    source = study.source
    rows = evaluation.cut_corpus(Corpus.of(study.calibration), source.tokenizer, length, source.model.config.vocab_size).rows
    training = np.delete(rows, np.s_[::20], axis=0)[: config.steps * config.batch]
    for seed in seeds:
        for budget in budgets:
            key = {"part": "adapted", "seed": seed, "budget": budget, "name": f"{config.steps} steps of {config.batch}"}
            if not study.missing(**key):
                continue
            folder = model_folder(study, seed, budget)
            if not folder.exists():
                print(f"{folder.name} is not there, so nothing is adapted; run --parts sizes first", flush=True)
                continue
            found = fine_tune(
                load(folder), training, config, teacher=source.model, held_out=rows[::20],
                checkpoint=study.folder / f"adapting-{seed}-{budget}", progress=study.progress,
            )  # fmt: skip
            record = {name: found.stats[name] for name in ("steps", "seconds", "before", "after", "bits_per_weight")}
            study.keep(key | record | {"verdict": str(found.verdict), "texts": study.figures(found.value)})


def against_peers(study: Study, library: Path | None, wanted: list[str], ours: bool) -> None:
    """Every peer whose name has one of `wanted` in it, and, where asked for, what this library makes of no more bytes."""
    run, table = study.prepared(study.base)
    statistics, shapes = run.statistics, dict(run.settings.matrices)
    weights = sum(m * n for m, n in shapes.values())
    makers = {
        "round to nearest, int-3g64a": partial(peers.one_spec, "int-3g64a", statistics, "none"),
        "round to nearest, int-4g32": partial(peers.one_spec, "int-4g32", statistics, "none"),
    }
    if importlib.util.find_spec("hqq"):
        makers |= {f"HQQ, {b} bits g{g}": partial(peers.hqq, statistics, b, g) for b, g in ((2, 64), (3, 64), (4, 64))}
    else:
        print("HQQ is not installed, so it is left out", flush=True)
    if library is not None:
        out = study.folder / "peer.gguf"
        config = run.original.config
        for kind in peers.KINDS:
            make = partial(peers.llama_cpp, Path(study.model), kind, statistics, config, library, out)
            makers[f"llama.cpp {kind}"] = make
    for name, (spec, how) in peers.own_specs(shapes, 2.5).items():
        makers[f"{name}, {spec}"] = partial(peers.one_spec, spec, statistics, **how)
    for name, make in makers.items():
        if not study.missing(part="peers", name=name) or not any(text in name for text in wanted):
            continue
        peer = make()
        model = with_dense(run.original, peer)
        record = {"bits": 8 * peer.nbytes / weights, "bytes": peer.nbytes, "note": peer.note, "texts": study.figures(model)}
        study.keep({"part": "peers", "name": name} | record)
    for peer in [record for record in study.records if record["part"] == "peers" and ours]:
        key = {"part": "ours", "name": peer["name"]}
        budget = f"{np.floor(peer['bits'] * 1000) / 1000:g}bpw"
        if study.missing(**key):
            candidate = study.solved(run, table, budget, [DEFAULT])[DEFAULT]
            study.keep(key | {"budget": budget} | candidate_record(study, run, candidate))


def uniform(study: Study, seeds: list[int], names: list[str]) -> None:
    """One spec for all matrices, one thing changed at a time; seeds are of the rotations."""
    for name in names:
        changes = {"spec": "trellis-2.5w", "state_bits": 8} | UNIFORM[name]
        text = {key: changes.pop(key) for key in ("h", "g", "share") if key in changes}
        todo = [seed for seed in seeds if study.missing(part="uniform", seed=seed, name=name)]
        if not todo:
            continue
        statistics = study.metrics(**text)
        for seed in todo:
            before = time.process_time()
            peer = one_spec(study, statistics, seed, **changes)
            record = {"cpu": time.process_time() - before, "bytes": peer.nbytes}
            texts = study.figures(with_dense(study.source.model, peer))
            study.keep({"part": "uniform", "seed": seed, "name": name} | record | {"texts": texts})


def one_spec(study: Study, statistics: Statistics, seed: int, *, spec: str, sequence: bool = False, **options: Any) -> Peer:
    """Every matrix by one spec; in sequence each behind the compressed blocks before it (`--sequential`)."""
    if not sequence:
        return peers.one_spec(spec, statistics, seed=seed, **options)
    recipe = study.base.updated(seed=seed, **options)
    run = study.run(recipe, statistics)
    solver = partial(solve_many, seed=seed, config=run.settings.solver)
    specs = dict.fromkeys(statistics.weights, spec)
    found = solve_blocks(run, specs, all_tokens(run.source, study.calibration), solver, run.original.embed)
    return peers.as_peer({name: solution for (name, _), solution in found.items()})


def with_dense(original: Llama, peer: peers.Peer) -> object:
    """The original with a peer's weights."""
    return with_weights(original, {name: _Dense(weight) for name, weight in peer.weights.items()})  # type: ignore[arg-type]


class _Dense:
    """A matrix that is decoded already."""

    def __init__(self, weight: np.ndarray):
        self.weight = weight

    def dense(self) -> np.ndarray:
        return self.weight


def settings(study: Study, seeds: list[int], names: list[str], budget: str = "2.5bpw") -> None:
    """One setting changed at a time, everything else as it is."""
    for seed in seeds:
        for name in names:
            key = {"part": "settings", "seed": seed, "budget": budget, "name": name}
            if not study.missing(**key):
                continue
            changes = {k: v * getattr(study.base, k) if k in MULTIPLES else v for k, v in SETTINGS[name].items()}
            run, table = study.prepared(study.base.updated(seed=seed, **changes))
            candidate = study.solved(run, table, budget, [DEFAULT])[DEFAULT]
            study.keep(key | candidate_record(study, run, candidate))


@one_blas_thread()
def main() -> None:
    """Parse, run, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--parts", default="sizes,uniform,peers,settings,adapted")
    parser.add_argument("--budgets", nargs="+")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--peers", nargs="+", default=[""], metavar="TEXT", help="of the peers those with one of these in their names"
    )
    parser.add_argument("--peers-alone", action="store_true", help="without ours in no more bytes")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--uniform", nargs="+", default=list(UNIFORM), choices=list(UNIFORM))
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence and of a held-out window")
    parser.add_argument("--tokens", type=int, default=32768, help="of each held-out text, at most")
    parser.add_argument("--state-bits", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600, help="of adaptation")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's library")
    parser.add_argument("--quick", action="store_true", help="one seed, three sizes, 8192 tokens of each held-out text")
    parser.add_argument("--show", type=Path, metavar="FOLDER", help="print tables and draw pictures of what is kept, no more")
    given = parser.parse_args()
    if not given.show:
        for name in ("model", "calibration", "held_out"):
            if not (path := getattr(given, name)) or (name != "model" and not path.exists()):
                sys.exit(f"{path or '--' + name.replace('_', '-')} is not there, so nothing is measured")
        prepare()
        given.out.mkdir(parents=True, exist_ok=True)
        calibrated, same_kind = split(read_text(given.calibration), 0.9)
        held_out = {given.held_out.stem: read_text(given.held_out), f"{given.calibration.stem} (end)": same_kind}
        base = Recipe(
            sequences=given.sequences, sequence_length=given.length, state_bits=given.state_bits, refine=0,
            output_tokens=given.sequences * given.length,
        )  # fmt: skip
        tokens = 8192 if given.quick else given.tokens
        study = Study(given.model, calibrated, held_out, given.out, given.length, tokens, base)
        seeds = given.seeds[:1] if given.quick else given.seeds
        budgets = tuple(given.budgets or (QUICK_BUDGETS if given.quick else BUDGETS))
        parts = {
            "sizes": partial(sizes, study, seeds, budgets),
            "peers": partial(against_peers, study, given.llama_cpp, given.peers, not given.peers_alone),
            "uniform": partial(uniform, study, given.seeds, given.uniform),
            "settings": partial(settings, study, seeds, given.settings),
            "adapted": partial(adapted, study, seeds, budgets, AdaptConfig(steps=given.steps, evaluate_every=min(50, given.steps))),
        }
        for name in given.parts.split(","):
            if name not in parts:
                sys.exit(f"--parts has {name!r}; there are {', '.join(parts)}")
            parts[name]()
    print(tables(given.out))
    if given.show:
        pictures(given.out, given.show)


if __name__ == "__main__":
    main()
