"""The `evaluate` command: how good a compressed folder is beside its original."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax import calibration, evaluation
from qlr_jax.calibration import Corpus
from qlr_jax.engine import Call, Engine, Pinned, place_of
from qlr_jax.errors import QLRError
from qlr_jax.evaluation.windows import Windows, fitting_batch
from qlr_jax.formats.qlr.packed import load
from qlr_jax.models import Llama, load_tokenizer
from qlr_jax.models.bundled import BUNDLED
from qlr_jax.models.forward import TOGETHER
from qlr_jax.paths import local
from qlr_jax.pipelines.original import find_original, load_original
from qlr_jax.progress import Progress, silent
from qlr_jax.run.session import on_cluster
from qlr_jax.settings.resolved import sequence_length

DRIFT_TOKENS = 32_768  # the mean over tokens has settled long before


# most of the lines say what the arguments are and what comes back
def evaluate(
    out: str | Path,
    *,
    text: Sequence[str | Path] | None = None,
    original: str | Path | None = None,
    progress: Progress | None = None,
    windows: int | None = None,
    window: int | None = None,
    drift: bool = True,
    tasks: Sequence[str] = (),
    task_path: str | Path | None = None,
    limit: int | None = None,
    batch: int = TOGETHER,
    ignore_config: Sequence[str] = (),
    chat: bool = False,
    cluster: Any = None,
) -> dict[str, Any]:
    """How good a compressed folder is beside its original: on a text, on zero-shot tasks, or on both.

    Args:
        out: what `compress` wrote.
        text: file(s); the held-out part of this machine's standard library where none is given and the model is the bundled one.
            Without any, tasks alone are measured.
        original: folder or name of the original; the recorded one where not given. Another model is refused.
        windows: how many windows at most, spread over the text.
        window: tokens of a window; 2048 where not given, or as many as the model takes, or the text gives.
            Published figures are for 2048 or 4096.
        drift: whether hidden states are compared after every block too, on 32,768 tokens at most.
        tasks, task_path, limit: as `evaluation.zero_shot` has them.
        batch: windows or requests at a time, at most; fewer where logits would take more than 1 GB.
        ignore_config: attributes of the original's config.json to go on without, beside those that the folder records.
        chat: apply the tokenizer's chat template to the text (`calibration.Corpus`).
        cluster: where windows and requests go through both models, as for `compress`; texts that are generated stay here.

    Returns:
        The fields of `evaluation.Comparison` and perplexity_ratio; intervals (95 %, windows resampled) by the same names; worst
        (the token with the largest KL); drift; zero_shot; and the protocol: in a sentence, and as tokenizer, bos, window,
        windows, windows_in_text, dropped_tokens; notes: what was changed on reading the text, a sentence each.

    Raises:
        QLRError: nothing to evaluate on, an unknown original, or what the folder, the text or a task lacks.
    """
    progress = progress or silent()
    with progress.stage("loading"):
        base = find_original(out, original)
        compressed, tokenizer = load(out).densified(), load_tokenizer(out)
        uncompressed = load_original(out, base, compressed.config, ignore_config, progress.say)
    if not text and not tasks and base != BUNDLED:
        raise QLRError("no text was given to evaluate on; pass --text FILE, or --tasks")
    notes: list[str] = []

    def say(note: str) -> None:
        notes.append(note)
        progress.say(note)

    result: dict[str, Any] = {}
    rows = whole = None
    if text or not tasks:
        corpus = Corpus.read(text, chat) if text else Corpus.of(calibration.standard_library("heldout"))
        for note in corpus.notes:
            say(note)
        most = compressed.config.max_position_embeddings
        if window is not None and window > most:
            raise QLRError(f"windows of {window} tokens are asked for, and the model takes {most}; give at most {most}")
        length, vocabulary = sequence_length(compressed.config, window), compressed.config.vocab_size
        whole = evaluation.cut_corpus(corpus, tokenizer, length, vocabulary, say if window is None else None)
        rows = whole.rows if windows is None else calibration.subsample(whole.rows, windows * whole.rows.shape[1])
    with on_cluster(cluster, progress) as engine:
        folders = [(str(place), engine.offer(place)) for place in (local(out).absolute(), base)]
        engine.share(compressed, Pinned("compressed", Call(_compressed, folders[0])))
        engine.share(uncompressed, Pinned("original", Call(_original, (*folders, tuple(ignore_config)))))
        if rows is not None and whole is not None:
            result = _on_text(uncompressed, compressed, tokenizer, rows, drift, batch, progress, engine)
            result |= _protocol(out, tokenizer, whole, rows, chat) | {"notes": notes}
        if tasks:
            settings = {"include_path": task_path, "limit": limit, "batch": batch, "progress": progress, "engine": engine}
            result["zero_shot"] = evaluation.compare_zero_shot(uncompressed, compressed, tokenizer, tasks, **settings)
    return result


def _compressed(out: str, files: Any) -> Llama:
    return load(place_of(out, files)).densified()


def _original(out: tuple[str, Any], base: tuple[str, Any], ignored: tuple[str, ...]) -> Llama:
    folder = place_of(*out)
    return load_original(folder, place_of(*base), load(folder).config, ignored)


def _on_text(
    original: Llama,
    compressed: Llama,
    tokenizer: Any,
    rows: np.ndarray,
    drift: bool,
    batch: int,
    progress: Progress,
    engine: Engine,
) -> dict[str, Any]:
    size = fitting_batch(compressed.config.vocab_size, rows.shape[1], batch)
    with progress.stage(f"evaluating {rows.size} tokens"):
        found = evaluation.positions(original, compressed, rows, size, engine=engine)
    figures = evaluation.summary(found)
    result = dataclasses.asdict(figures) | {"perplexity_ratio": figures.perplexity_ratio}
    result |= {"intervals": evaluation.intervals(found), "worst": evaluation.worst_token(found, tokenizer)}
    if drift:
        some = calibration.subsample(rows, DRIFT_TOKENS)
        with progress.stage("comparing hidden states", total=original.config.num_hidden_layers) as stage:
            drifted = evaluation.drift(original, compressed, some, size, stage, engine=engine)
        result["drift"] = dataclasses.asdict(drifted) | {"worst_layer": drifted.worst, "worst": drifted.layers[drifted.worst]}
    return result


def _protocol(out: str | Path, tokenizer: Any, whole: Windows, rows: np.ndarray, chat: bool) -> dict[str, Any]:
    """Every choice that perplexity depends on, as data and in a sentence."""
    file, bos = local(out) / "tokenizer.json", None if whole.bos is None else tokenizer.decode([whole.bos])
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else None
    named = f"{len(tokenizer)} tokens" + (f", sha256 {digest} of tokenizer.json" if digest else "")
    templated = " in the chat template" if chat else ""
    used = f"{len(rows)} of {len(whole.rows)} windows" if len(rows) < len(whole.rows) else f"{len(rows)} windows"
    return {
        "tokenizer": named,
        "bos": bos,
        "window": int(rows.shape[1]),
        "windows": len(rows),
        "windows_in_text": len(whole.rows),
        "dropped_tokens": whole.dropped,
        "protocol": (
            f"the whole text{templated} tokenized once by the model's tokenizer ({named}), "
            f"{f'one BOS ({bos}) before' if bos else 'no BOS'}; "
            f"{used} of {rows.shape[1]} tokens that do not overlap, {whole.dropped} tokens at the end dropped; "
            "exp of the mean over windows of each window's mean negative log-likelihood of its tokens after the first"
        ),
    }
