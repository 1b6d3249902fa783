"""One model, its texts, and what was measured of it so far: every figure is kept as soon as it is there, and measured once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

import allocators
from qlr_jax import calibration, evaluation
from qlr_jax.calibration import Corpus
from qlr_jax.core.batch import solve_many
from qlr_jax.evaluation.compare import LastStates
from qlr_jax.evaluation.details import intervals
from qlr_jax.pipelines.run import Candidate, Run
from qlr_jax.pipelines.source import Source, open_source
from qlr_jax.pipelines.stages import allocate, calibrate, measure, solve_plans
from qlr_jax.pipelines.stages.calibrate import calibration_tokens as all_tokens
from qlr_jax.pipelines.stages.calibrate import output_metric
from qlr_jax.progress import Progress, plain
from qlr_jax.sensitivity import Statistics
from qlr_jax.settings.limits import REFERENCE_BYTES
from qlr_jax.settings.recipe import Recipe

Record = dict[str, Any]


def read_text(path: Path) -> str:
    """A text with line ends of LF."""
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


def split(text: str, share: float) -> tuple[str, str]:
    """A text in two at the end of a line, so that one part can be kept from calibration."""
    at = text.index("\n", int(len(text) * share)) + 1
    return text[:at], text[at:]


@dataclass
class Study:
    """What is measured, and where it is kept.

    Attributes:
        model: anything that `qlr compress` takes.
        calibration: text that is calibrated on.
        held_out: name -> text that is not.
        folder: of records.json, and of statistics and option tables by what they were made with.
        length: tokens of a held-out window.
        tokens: of each held-out text, at most.
        base: the recipe that settings change.
    """

    model: str
    calibration: str
    held_out: Mapping[str, str]
    folder: Path
    length: int
    tokens: int
    base: Recipe
    progress: Progress = field(default_factory=lambda: plain(every=60))

    # ---- what is kept

    @cached_property
    def records(self) -> list[Record]:
        path = self.folder / "records.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def missing(self, **key: Any) -> bool:
        """Whether nothing is recorded under this key."""
        return not any(all(record.get(name) == value for name, value in key.items()) for record in self.records)

    def keep(self, record: Record) -> None:
        """Kept at once, whole or not at all."""
        self.records.append(record)
        path = self.folder / "records.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(self.records, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
        shown = {name: round(own["kl"], 4) for name, own in record.get("texts", {}).items()}
        print(f"{record['part']} {record['name']}: {shown or 'done'}", flush=True)

    # ---- what is measured with

    @cached_property
    def source(self) -> Source:
        """The original, as the base recipe opens it."""
        return open_source(self.model, self.base, whole=False)

    @cached_property
    def original(self) -> dict[str, LastStates]:
        """The original's run over every held-out text."""
        vocabulary, found = self.source.model.config.vocab_size, {}
        for name, text in self.held_out.items():
            rows = evaluation.cut_corpus(Corpus.of(text), self.source.tokenizer, self.length, vocabulary).rows
            found[name] = evaluation.run_windows(self.source.model, calibration.subsample(rows, self.tokens))
        return found

    def figures(self, model: Any) -> dict[str, Record]:
        """A model beside the original on every held-out text; `windows`: mean KL of each, for paired comparisons."""
        found = {}
        for name, states in self.original.items():
            own = evaluation.positions(states, model, states.windows)
            whole = evaluation.summary(own)
            found[name] = {
                "kl": whole.kl,
                "perplexity": whole.perplexity,
                "perplexity_original": whole.perplexity_original,
                "agreement": whole.agreement,
                "intervals": intervals(own),
                "windows": own.kl.astype(np.float64).mean(axis=1).tolist(),
            }
        return found

    def prepared(self, recipe: Recipe) -> tuple[Run, allocators.OptionTable]:
        """The run of a recipe and its option table, both made once and then read."""
        run = self.run(recipe, self.statistics(recipe))
        settings = f"{recipe.output_shrinkage:g}-{recipe.damping:g}-{recipe.measure_tokens}-{'+'.join(recipe.backbones)}"
        path = self.folder / f"table-{text_of(recipe)}-{settings}.json"
        if path.exists():
            return run, allocators.OptionTable.from_json(path.read_text(encoding="utf-8"))
        table = measure(run).table
        path.write_text(table.to_json(), encoding="utf-8")
        return run, table

    def run(self, recipe: Recipe, statistics: Statistics) -> Run:
        """The run of a recipe, with these statistics."""
        source = open_source(self.model, recipe, whole=False)
        tokens = calibration_tokens(source, self.calibration)
        sample = evaluation.reference(source.model, tokens, max_bytes=REFERENCE_BYTES)
        cache: dict = {}
        return Run(source, statistics, sample, self.progress, lambda kind: partial(solve_many, into=cache))

    def metrics(self, h: int = 1, g: int = 1, share: float | None = None) -> Statistics:
        """Weights, H of so many times the base recipe's text, and G of so many times, drawn so far to the identity."""

        def of(times: int) -> Statistics:
            sequences, length = times * self.base.sequences, self.base.sequence_length
            drawn = self.base.output_shrinkage if share is None else share
            return self.statistics(self.base.updated(sequences=sequences, output_tokens=sequences * length, output_shrinkage=drawn))

        outputs = of(g)
        return replace(outputs, hessians=of(h).hessians) if h != g else outputs

    def statistics(self, recipe: Recipe) -> Statistics:
        """Weights, H and G of a recipe's text: measured once and then read, and G drawn to the identity as the recipe has it."""
        folder = self.folder / f"statistics-{text_of(recipe)}"
        if not (folder / "done").exists():
            folder.mkdir(parents=True, exist_ok=True)
            as_it_is = open_source(self.model, recipe.updated(output_shrinkage=0.0), whole=False)
            statistics, _ = calibrate(as_it_is, Corpus.of(self.calibration), self.progress)
            for kind in ("hessians", "outputs"):
                owners: dict[int, str] = {}  # matrices of one input share the array
                own = getattr(statistics, kind)
                names = {matrix: owners.setdefault(id(array), matrix) for matrix, array in own.items()}
                np.savez(folder / f"{kind}.npz", **{owner: np.asarray(own[owner]) for owner in owners.values()})
                (folder / f"{kind}.json").write_text(json.dumps(names), encoding="utf-8")
            (folder / "done").touch()
        read = {}
        for kind in ("hessians", "outputs"):
            with np.load(folder / f"{kind}.npz") as arrays:
                own = dict(arrays)
            if kind == "outputs":
                own = {owner: output_metric(g, recipe.output_shrinkage) for owner, g in own.items()}
            read[kind] = {m: own[o] for m, o in json.loads((folder / f"{kind}.json").read_text(encoding="utf-8")).items()}
        return Statistics(self.source.weights, **read)

    def solved(self, run: Run, table: allocators.OptionTable, budget: str, names: Sequence[str]) -> dict[str, Candidate]:
        """The plans of these names under a budget, solved."""
        plans = allocate(run, allocators.Budget.parse(budget).on(table))
        return solve_plans(run, {name: plans[name] for name in names})


def text_of(recipe: Recipe) -> str:
    """What of a recipe decides H and G as they are, as a part of a file's name."""
    return f"{recipe.seed}-{recipe.sequences}x{recipe.sequence_length}-{recipe.output_tokens}"


def calibration_tokens(source: Source, text: str) -> np.ndarray:
    """The part of the calibration text that candidates are compared on."""
    return calibration.subsample(all_tokens(source, text), source.recipe.measure_tokens)


__all__ = ["Record", "Study", "all_tokens", "read_text", "split"]
