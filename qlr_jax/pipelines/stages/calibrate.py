"""Calibrate: Hessians of inputs and outputs, and the original's log-probabilities, from text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np

from qlr_jax import calibration
from qlr_jax.calibration import Corpus, RowMetric
from qlr_jax.calibration.tokens import WANTED
from qlr_jax.core.objective import checked_hessian
from qlr_jax.engine import HERE, Engine, Here
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Reference, reference
from qlr_jax.pipelines.source import Source
from qlr_jax.progress import Progress
from qlr_jax.sensitivity import Statistics
from qlr_jax.settings.limits import OUTPUTS_SHARE, REFERENCE_BYTES, machine_memory
from qlr_jax.settings.resolved import vocabulary_tokens

Spill = Callable[[str], Callable[[str, np.ndarray], np.ndarray]]
"""kind -> (name, array) -> the same array, on disk."""


def calibrate(
    source: Source, text: str | Corpus, progress: Progress, spill: Spill | None = None, engine: Engine = HERE
) -> tuple[Statistics, Reference]:
    """Hessians of inputs and outputs, and the original's log-probabilities on a part of the text.

    Sequences on which the original is not finite are left out of all of them, and named: `left_out` of both kinds of Hessians
    has each with its place.

    Args:
        text: of calibration.
        spill: puts Hessians on disk; used where the model streams.
        engine: where the text goes through the model. Elsewhere than here, what stands for Hessians is returned.

    Raises:
        QLRError: too little text, more than 1 % of the sequences not finite, or logits that are not.
    """
    recipe, model, here = source.recipe, source.model, isinstance(engine, Here)
    keep = spill if spill is not None and source.settings.streaming and here else lambda kind: lambda name, array: array
    sums = calibration.EndSums() if source.settings.vocabulary else None
    elsewhere = (source.settings.streaming and spill is not None) or not here
    with_outputs = recipe.outputs == "fisher" and _outputs_fit(source, elsewhere, progress)
    tokens, hessians, outputs = _hessians(
        source, calibration_tokens(source, text, progress.say), with_outputs, progress, keep, sums, engine
    )
    if sums is not None:
        counts = np.bincount(tokens.reshape(-1), minlength=model.config.vocab_size)
        # the pass of the output Hessians, where there was one, has them too
        length = tokens.shape[1]
        found = (
            calibration.row_metrics(model, sums, counts, length, engine)
            if outputs
            else _vocabulary_metrics(source, tokens, counts, progress, engine)
        )
        metrics = {name: found[name] for name in source.settings.vocabulary}
        hessians |= {name: checked_hessian(m.hessian, len(m.hessian)) for name, m in metrics.items()}
        outputs |= {name: m.row_weights for name, m in metrics.items()}
    sample = reference(model, calibration.subsample(tokens, recipe.measure_tokens), max_bytes=REFERENCE_BYTES, engine=engine)
    if np.isnan(sample.perplexity):
        raise QLRError(
            "the original's logits on the calibration text are not finite, so that nothing can be compared with it; load it in "
            "float32, check its weights, or give other text"
        )
    return Statistics(source.weights, hessians, outputs, source.backbones), sample


def check_texts(source: Source, *texts: Corpus | None) -> None:
    """Refuse, before any work, texts with tokens that the model has no row for; what is said of their reading is in their notes."""
    for text in texts:
        if text is not None:
            text.ids(source.tokenizer, source.model.config.vocab_size)


def _outputs_fit(source: Source, elsewhere: bool, progress: Progress) -> bool:
    """Whether there is room for output Hessians, in memory or `elsewhere`; if not, that is said."""
    if source.settings.outputs_fit or elsewhere:
        return True
    needed, room = source.settings.output_bytes, OUTPUTS_SHARE * machine_memory()
    progress.say(
        f"the output Hessians would take {needed / 1e9:.1f} GB, more than {room / 1e9:.1f} GB ({OUTPUTS_SHARE:g} of this "
        "machine's memory): all outputs count alike"
    )
    return False


def _hessians(
    source: Source,
    tokens: np.ndarray,
    with_outputs: bool,
    progress: Progress,
    keep: Spill,
    sums: calibration.EndSums | None,
    engine: Engine,
) -> tuple[np.ndarray, Any, Any]:
    """The tokens that are left, H of all inputs, and G of all outputs or nothing."""
    recipe, model = source.recipe, source.model
    # the pass for H leaves to that for G what enters each block, where both are of the same text
    one = with_outputs and not recipe.hessians_from and recipe.output_tokens >= tokens.size
    with calibration.forward_states(model, len(tokens), engine=engine) if one else nullcontext() as states:
        if recipe.hessians_from:
            sizes = {name: shape[1] for name, shape in source.settings.matrices.items()}
            hessians = calibration.read_hessians(recipe.hessians_from, sizes, keep("hessians"))
        else:
            names = list(source.settings.matrices)
            hessians = calibration.matrix_hessians(
                model, tokens, names, recipe.hessians, progress, keep("hessians"), states, engine
            )
            if hessians.left_out:
                tokens, states = np.delete(tokens, list(hessians.left_out), axis=0), None
        outputs = _output_hessians(source, tokens, progress, keep("outputs"), sums, states, engine) if with_outputs else {}
    return tokens, hessians, outputs


def _output_hessians(
    source: Source,
    tokens: np.ndarray,
    progress: Progress,
    keep: Callable[[str, Any], Any],
    ends: calibration.EndSums | None,
    states: calibration.States | None,
    engine: Engine,
) -> Any:
    recipe = source.recipe
    with progress.stage("calibrating: outputs", total=source.model.config.num_hidden_layers) as stage:
        outputs = calibration.output_hessians(
            source.model,
            calibration.subsample(tokens, recipe.output_tokens),
            list(source.settings.matrices),
            seed=recipe.seed,
            progress=stage.advance,
            keep=lambda name, g: keep(name, engine.submit(output_metric, g, recipe.output_shrinkage)),
            ends=ends,
            states=states,
            engine=engine,
        )
    if outputs.left_out:
        progress.say(f"calibrating: outputs: {outputs.summary()}")
    return outputs


def output_metric(g: np.ndarray, share: float) -> np.ndarray:
    """(1 − share) G + share · tr(G) / m · I, checked: G of some ten thousand tokens is too sure of what does not matter."""
    checked = checked_hessian(g, len(g), "outputs")
    drawn = np.float32(1 - share) * checked
    np.fill_diagonal(drawn, drawn.diagonal() + np.float32(share * np.trace(checked, dtype=np.float64) / len(g)))
    return drawn


def _vocabulary_metrics(
    source: Source, tokens: np.ndarray, counts: np.ndarray, progress: Progress, engine: Engine
) -> dict[str, RowMetric]:
    """The metrics of embedding and head in a pass of their own, on as much text as they need."""
    recipe, config = source.recipe, source.model.config
    sample = calibration.subsample(tokens, vocabulary_tokens(config, recipe))
    with progress.stage("calibrating: vocabulary", total=config.num_hidden_layers) as stage:
        how = {"counts": counts, "seed": recipe.seed, "progress": stage.advance, "engine": engine}
        return calibration.vocabulary_metrics(source.model, sample, **how)


def calibration_tokens(source: Source, text: str | Corpus, say: Callable[[str], None] = lambda line: None) -> np.ndarray:
    """Sequences of calibration text, (sequences, length): as many as the recipe wants or the text gives, mixed by its weights.

    Args:
        text: of calibration.
        say: is told where sequences are shorter than the recipe's since the text is, and how texts are mixed.

    Raises:
        QLRError: an empty text, or one of fewer tokens than a matrix has inputs, so that its Hessian would be singular.
    """
    recipe, bos, corpus = source.recipe, source.tokenizer.bos_token_id, Corpus.of(text)
    ids = corpus.ids(source.tokenizer, source.model.config.vocab_size)
    counts, begins = [len(own) for own in ids], int(bos is not None)
    if not min(counts):
        raise QLRError("the calibration text is empty; give text that resembles what the model will read")
    wanted = min(WANTED if len(ids) == 1 else 1, recipe.sequences)
    body = calibration.fitting_length(min(counts), source.settings.sequence_length - begins, wanted)
    shares, length = calibration.shares(counts, corpus.weights, recipe.sequences, body), body + begins
    sequences, inputs = sum(shares), max(shape[1] for shape in source.settings.matrices.values())
    if sequences * length < inputs and not recipe.force:
        raise QLRError(
            f"the calibration text gives {sequences} sequences of {length} tokens, fewer tokens than the {inputs} inputs of the "
            "widest matrix; give more text, or force it (--force)"
        )
    if length < source.settings.sequence_length:
        say(
            f"the calibration text has {min(counts):,} tokens, too few for a sequence of {source.settings.sequence_length:,}: "
            f"{sequences} sequences of {length} are taken"
        )
    if corpus.weighted:
        say("calibrating on " + ", ".join(f"{n} sequences of {name}" for n, name in zip(shares, corpus.names, strict=True)))
    return np.concatenate([calibration.spread(own, share, length, bos) for own, share in zip(ids, shares, strict=True)])
