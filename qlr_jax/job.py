"""One compression job, as a story: load, calibrate, measure, allocate, solve, judge, save."""

from __future__ import annotations

import dataclasses
import fnmatch
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import allocators
from qlr_jax import calibration as calibrating
from qlr_jax import evaluation as evaluating
from qlr_jax import sensitivity as sensing
from qlr_jax.core.batch import solve_many
from qlr_jax.core.blas import one_blas_thread
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.objective import checked_weight
from qlr_jax.core.solver import Solution
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Comparison, compare, divergence, reference
from qlr_jax.export.files import refuse_occupied
from qlr_jax.export.packed import load, read_config, read_matrices, save_packed
from qlr_jax.models import Llama, find_folder, load_model, load_tokenizer
from qlr_jax.progress import Progress, silent
from qlr_jax.recipe import Recipe
from qlr_jax.report.record import Record

BUNDLED, BUNDLED_NAME = Path(__file__).parent / "bundled", "bundled"
PROVED_GAP = 1e-4  # of the predicted damage; the predictions are good to a few parts in a hundred
CANDIDATES = ("allocated", "uniform", "rank0")


@dataclass(frozen=True)
class JobResult:
    """Where the compressed model lies, and its report (what report.json holds)."""

    out: Path
    report: dict[str, Any]


@dataclass
class Clock:
    """Seconds of every stage of a job."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def stage(self, name: str) -> Any:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def compress(
    model: str | Path,
    out: str | Path,
    budget: str | None = None,
    calibration: Sequence[str | Path] | str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    evaluate_on: Sequence[str | Path] | str | Path | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> JobResult:
    """Compress a Llama folder (or hub name) under a memory budget and write a folder that JAX and PyTorch load.

    Args:
        model: a Hugging Face LlamaForCausalLM folder or hub name.
        out: the folder to write; it must not exist or be empty.
        budget: e.g. `2.25bpw`, `900MB`, `device:8GiB,context=8192`; the recipe's where not given.
        calibration: text file(s).
        recipe: a Recipe or a YAML file; the defaults where not given.
        evaluate_on: held-out text file(s) for the report's figures; none: calibration figures only.

    Raises:
        QLRError, allocators.AllocationError: one sentence on what cannot be used; nothing is written then.
    """
    if not calibration:
        raise QLRError("no calibration text was given; pass one or more text files that resemble what the model will read")
    texts = calibrating.read_text(calibration), calibrating.read_text(evaluate_on) if evaluate_on else ""
    files = [evaluate_on] if isinstance(evaluate_on, str | Path) else evaluate_on or ()
    return _run(
        model, Path(out).expanduser(), _recipe(recipe, budget), texts, progress or silent(), command, ", ".join(map(str, files))
    )


def demo(
    out: str | Path,
    *,
    budget: str | None = None,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    command: str = "qlr demo",
) -> JobResult:
    """Compress the bundled model, calibrated and evaluated on the standard library's text of this machine."""
    chosen = _recipe(recipe or Recipe(sequences=128, ranks=(0, 4, 8, 16, 32), state_bits=10, search_state_bits=10), budget)
    texts = calibrating.standard_library("calibration"), calibrating.standard_library("heldout")
    return _run(
        BUNDLED,
        Path(out).expanduser(),
        chosen,
        texts,
        progress or silent(),
        command,
        "held-out modules of Python's standard library",
    )


@one_blas_thread()
def _run(
    source: str | Path,
    out: str | Path,
    recipe: Recipe,
    texts: tuple[str, str],
    progress: Progress | None,
    command: str,
    held_out_name: str,
) -> JobResult:
    clock, progress, out = Clock(), progress or silent(), Path(out).expanduser()
    refuse_occupied(out)

    with clock.stage("load"), progress.stage("loading"):
        folder = find_folder(source)
        original, tokenizer = load_model(folder), load_tokenizer(folder)
        weights = selected_weights(original, recipe)
        prices = sensing.price(
            original.config,
            {name: w.shape for name, w in weights.items()},
            lambda shape: sensing.options(recipe.backbones, recipe.ranks, recipe.factors, shape),
        )
        allocators.Budget.parse(recipe.budget).on(prices)  # a budget that cannot be met is refused before the work begins

    with clock.stage("calibrate"):
        tokens = calibration_tokens(texts[0], tokenizer, original, recipe, weights)
        hessians = calibrating.matrix_hessians(original, tokens, list(weights), recipe.hessians, progress)
        sample = reference(original, spread(tokens, recipe.measure_tokens))

    with clock.stage("measure"):
        sensitivity = sensing.measure(
            original,
            weights,
            hessians,
            sample,
            prices,
            config=solver_config(recipe),
            search=solver_config(recipe, recipe.search_state_bits),
            seed=recipe.seed,
            progress=progress,
        )

    with clock.stage("allocate"):
        plans = allocate(sensitivity.table, recipe.budget, progress)

    with clock.stage("solve"):
        solutions = solve(plans, weights, hessians, recipe, progress)

    with clock.stage("judge"), progress.stage("judging on calibration text", total=len(plans)) as stage:
        judged: dict[str, Comparison] = {}
        for name, plan in plans.items():
            judged[name] = divergence(with_weights(original, chosen(plan, solutions)), sample)
            stage.advance(note=name)
        delivered = min(judged, key=lambda name: (judged[name].kl, CANDIDATES.index(name)))
        if delivered != "allocated":
            progress.say(f"the {delivered} model has the lower KL on the calibration text, so it is what is delivered")

    held_out: dict[str, Comparison] = {}
    if texts[1]:
        with clock.stage("evaluate"), progress.stage("evaluating on held-out text", total=len(plans)) as stage:
            rows = evaluating.windows(texts[1], tokenizer, sequence_length(original, recipe))
            rows = spread(rows, recipe.evaluation_tokens)
            for name, plan in plans.items():
                held_out[name] = compare(original, with_weights(original, chosen(plan, solutions)), rows)
                stage.advance(note=name)

    record = Record(
        model=BUNDLED_NAME if folder == BUNDLED else str(source),
        command=command,
        recipe=recipe,
        config=original.config,
        plans=plans,
        delivered=delivered,
        solutions=solutions,
        sensitivity=sensitivity,
        judged=judged,
        held_out=held_out,
        held_out_name=held_out_name,
        seconds=clock.seconds,
        started=clock.started,
        peak_rss=peak_rss(),
    )
    with progress.stage("saving"):
        report, matrices = record.report(), chosen(plans[delivered], solutions)
        base = BUNDLED_NAME if folder == BUNDLED else str(source)
        save_packed(out, original, matrices, source=folder, settings={"base_model": base}, files=record.files(report))
    return JobResult(out, report)


def _recipe(recipe: Recipe | str | Path | None, budget: str | None) -> Recipe:
    found = recipe if isinstance(recipe, Recipe) else Recipe.from_yaml(Path(recipe)) if recipe else Recipe()
    return found.updated(budget=budget) if budget else found


def selected_weights(model: Llama, recipe: Recipe) -> dict[str, np.ndarray]:
    """The linear layers that the recipe compresses, checked: name -> W (out, in)."""

    def wanted(name: str) -> bool:
        inside = not recipe.include or any(fnmatch.fnmatch(name, p) for p in recipe.include)
        return inside and not any(fnmatch.fnmatch(name, p) for p in recipe.exclude)

    linears = model.linears()
    found = {name: checked_weight(linear.weight.get_value()) for name, linear in linears.items() if wanted(name)}
    if not found:
        patterns = f"include {list(recipe.include)}, exclude {list(recipe.exclude)}"
        raise QLRError(f"no linear layer is left by {patterns}; names look like {next(iter(linears))}")
    return found


def sequence_length(model: Llama, recipe: Recipe) -> int:
    """Tokens of one sequence: the recipe's, or as many as the model takes, 2048 at most."""
    return recipe.sequence_length or min(2048, model.config.max_position_embeddings)


def calibration_tokens(text: str, tokenizer: Any, model: Llama, recipe: Recipe, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Sequences of calibration text: as many as the recipe wants or the text gives, refused where a Hessian would be singular."""
    length = sequence_length(model, recipe)
    if not text.strip():
        raise QLRError("the calibration text is empty; give text that resembles what the model will read")
    available = len(calibrating.encode(text, tokenizer)) // (length - 1 if tokenizer.bos_token_id is not None else length)
    sequences, inputs = min(recipe.sequences, available), max(w.shape[1] for w in weights.values())
    if sequences < 1 or (sequences * length < inputs and not recipe.force):
        raise QLRError(
            f"the calibration text gives {sequences} sequences of {length} tokens, fewer tokens than the {inputs} inputs of the "
            "widest matrix; give more text" + ("" if sequences < 1 else ", or force it (--force)")
        )
    return calibrating.calibration_tokens(text, tokenizer, sequences, length)


def spread(rows: np.ndarray, tokens: int) -> np.ndarray:
    """Rows (count, length) thinned evenly to at most `tokens` tokens, at least one row."""
    count = max(1, min(len(rows), tokens // rows.shape[1]))
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]


def solver_config(recipe: Recipe, state_bits: int | None = None) -> SolverConfig:
    """The solver's part of a recipe."""
    options = {"damping": recipe.damping, "state_bits": state_bits or recipe.state_bits, "rotation_block": recipe.rotation_block}
    return SolverConfig.make(options | ({"iterations": recipe.iterations} if recipe.iterations else {}), recipe.preset)


def allocate(table: allocators.OptionTable, budget: str, progress: Progress) -> dict[str, allocators.Allocation]:
    """The allocation under the budget, and what it is compared with: the best uniform spec, and rank 0 at the same bytes."""
    problem = allocators.Budget.parse(budget).on(table)
    if problem.keeps_original:
        progress.say(f"the original fits {budget} as it is; every matrix is kept in bf16")
        kept = allocators.OptionTable(
            tuple(
                allocators.Row(r.name, r.weights, (allocators.Option("bf16", 2 * r.weights, 0.0),), r.counted) for r in table.rows
            )
        )
        same = allocators.allocate(kept, kept.most_bytes)
        return dict.fromkeys(CANDIDATES, same)
    with progress.stage("allocating"):
        return {
            "allocated": allocators.allocate(problem.table, problem.limit, gap=PROVED_GAP),
            "uniform": allocators.uniform(problem.table, problem.limit),
            "rank0": allocators.rank0(problem.table, problem.limit, gap=PROVED_GAP),
        }


Solutions = dict[tuple[str, str], Solution]


def solve(
    plans: Mapping[str, allocators.Allocation],
    weights: Mapping[str, np.ndarray],
    hessians: Mapping[str, np.ndarray],
    recipe: Recipe,
    progress: Progress,
) -> Solutions:
    """Every (matrix, spec) that any plan wants, solved once."""
    wanted = dict.fromkeys((name, spec) for plan in plans.values() for name, spec in plan.specs.items())
    problems = {key: (weights[key[0]], hessians[key[0]], key[1]) for key in wanted}
    with progress.stage("compressing", total=len(problems)) as stage:

        def on_done(key: tuple[str, str], solution: Solution) -> None:
            stage.advance(note=f"{key[0]} {key[1]} error {solution.stats['relative_error']:.4f}")

        return solve_many(problems, seed=recipe.seed, config=solver_config(recipe), on_done=on_done)


def chosen(plan: allocators.Allocation, solutions: Solutions) -> dict[str, QLRMatrix]:
    """The compressed matrices of one plan."""
    return {name: solutions[name, spec].value for name, spec in plan.specs.items()}


def with_weights(model: Llama, matrices: Mapping[str, QLRMatrix]) -> Llama:
    """A copy of the model with these matrices decoded in place of its own; everything else is shared."""
    copy: Llama = jax.tree.map(lambda leaf: leaf, model)
    linears = copy.linears()
    for name, matrix in matrices.items():
        weight = linears[name].weight
        weight.set_value(matrix.dense().astype(weight.get_value().dtype))
    return copy


def peak_rss() -> int:
    """The largest resident size of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def evaluate(
    out: str | Path,
    *,
    text: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    progress: Progress | None = None,
    windows: int | None = None,
) -> dict[str, Any]:
    """Perplexity of a compressed folder and its divergence from the original, on a text.

    Args:
        out: what `compress` wrote.
        text: file(s); the held-out part of this machine's standard library where none is given and the model is the bundled one.
        original: folder or name of the original; what the folder's config names where not given.
        windows: how many windows at most, spread over the text.
    """
    progress = progress or silent()
    with progress.stage("loading"):
        base = original or read_config(out)[1].get("settings", {}).get("base_model")
        if not base:
            raise QLRError(f"{out} does not say what it was compressed from; pass the original model's folder (--original)")
        base = BUNDLED if base == BUNDLED_NAME else base
        compressed, tokenizer, first = load(out).densified(), load_tokenizer(out), load_model(base)
    if not text and find_folder(base) != BUNDLED:
        raise QLRError("no text was given to evaluate on; pass --text FILE")
    content = calibrating.read_text(text) if text else calibrating.standard_library("heldout")
    rows = evaluating.windows(content, tokenizer, min(2048, compressed.config.max_position_embeddings))
    rows = rows if windows is None else spread(rows, windows * rows.shape[1])
    with progress.stage(f"evaluating {rows.size} tokens"):
        found = compare(first, compressed, rows)
    protocol = (
        f"one BOS, {len(rows)} windows of {rows.shape[1]} tokens that do not overlap, mean over windows; tokenizer of the model"
    )
    return dataclasses.asdict(found) | {
        "perplexity_ratio": found.perplexity_ratio,
        "window": int(rows.shape[1]),
        "protocol": protocol,
    }


def inspect(out: str | Path) -> dict[str, Any]:
    """What is inside a compressed folder: every matrix with its spec and bytes, and the totals."""
    matrices = read_matrices(Path(out))
    rows = [
        {
            "name": n,
            "spec": str(m.spec),
            "shape": list(m.shape),
            "bytes": m.nbytes,
            "bits": 8 * m.nbytes / (m.shape[0] * m.shape[1]),
        }
        for n, m in matrices.items()
    ]
    total, count = sum(r["bytes"] for r in rows), sum(r["shape"][0] * r["shape"][1] for r in rows)
    settings = {k: v for k, v in read_config(out)[1].items() if k != "matrices"}
    size = sum(f.stat().st_size for f in Path(out).glob("*.safetensors"))
    return {
        "settings": settings, "matrices": rows, "compressed_bytes": total, "compressed_weights": count,
        "bits_per_weight": 8 * total / count if count else None, "safetensors_bytes": size,
    }  # fmt: skip


__all__ = ["BUNDLED", "JobResult", "compress", "demo", "evaluate", "inspect"]
