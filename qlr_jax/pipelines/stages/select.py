"""Select: measure the candidates on calibration text, deliver the best, and measure all on held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from allocators.strategies import DEFAULT, STRATEGIES, delivered
from qlr_jax import calibration, evaluation
from qlr_jax.calibration import Corpus
from qlr_jax.evaluation import Comparison
from qlr_jax.models.forward import Parts
from qlr_jax.pipelines.run import Candidate, Run


def evaluate_on_calibration(run: Run, candidates: Mapping[str, Candidate]) -> dict[str, Candidate]:
    """The candidates with their KL on calibration text."""
    compare = lambda parts: evaluation.divergence(parts, run.reference, engine=run.engine)  # noqa: E731
    return _evaluated(run, candidates, "evaluating on calibration text", "calibration", "calibration_kl", compare)


def held_out_rows(run: Run, text: str | Corpus, say: Callable[[str], None] = lambda line: None) -> np.ndarray:
    """All windows of held-out text, (windows, length).

    Args:
        text: held out.
        say: is told where windows are shorter than sequences since the text is.
    """
    vocabulary = run.original.config.vocab_size
    return evaluation.cut_corpus(Corpus.of(text), run.source.tokenizer, run.settings.sequence_length, vocabulary, say).rows


def evaluate_held_out(run: Run, candidates: Mapping[str, Candidate], text: str | Corpus) -> dict[str, Candidate]:
    """The candidates with their perplexity and KL on held-out text."""
    rows = calibration.subsample(held_out_rows(run, text, run.progress.say), run.recipe.evaluation_tokens)
    original = evaluation.run_windows(run.original, rows, engine=run.engine)  # once for all candidates
    compare = lambda parts: evaluation.compare(original, parts, rows, engine=run.engine)  # noqa: E731
    return _evaluated(run, candidates, "evaluating on held-out text", "held_out", "kl", compare)


def _evaluated(
    run: Run, candidates: Mapping[str, Candidate], title: str, part: str, known_as: str, compare: Callable[[Parts], Comparison]
) -> dict[str, Candidate]:
    found: dict[str, Candidate] = {}
    measured: dict[int, Comparison] = {}  # by the solutions, which plans of the same specs share
    with run.progress.stage(title, total=len(candidates)) as stage:
        for name, candidate in candidates.items():
            which = id(candidate.solutions)
            if which not in measured:
                measured[which] = compare(candidate.parts(run.original))
            found[name] = candidate.replace(**{part: measured[which]})
            run.note(**{known_as: {other: getattr(done, part).kl for other, done in found.items()}})
            stage.advance(note=name)
    return found


def select(run: Run, candidates: Mapping[str, Candidate]) -> str:
    """The candidate to deliver: of the default strategy the one of least KL on calibration text, else what was asked for.

    Quick controls decide nothing.
    """
    asked, kl = run.recipe.strategy, {name: candidate.kl for name, candidate in candidates.items()}
    best = delivered(kl)
    if run.recipe.controls == "quick":
        if best != DEFAULT == asked:
            run.progress.say(
                f"the {STRATEGIES[best].label} model, a quick control, has the lower KL on the calibration text even so; quick "
                "controls decide nothing: --controls full would"
            )
        return DEFAULT
    chosen = delivered(kl, asked)
    if chosen != DEFAULT:
        run.progress.say(f"the {chosen} model has the lower KL on the calibration text, so it is what is delivered")
    elif best != chosen:
        label = STRATEGIES[best].label
        run.progress.say(f"the {label} model has the lower KL on the calibration text; {asked} was asked for, so that is delivered")
    return chosen
