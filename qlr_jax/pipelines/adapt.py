"""The `adapt` command: a compressed folder trained on its receiver's text, and written as another folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax import adaptation, calibration, evaluation
from qlr_jax.adaptation import AdaptConfig
from qlr_jax.calibration import Corpus
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import Comparison, divergence, reference
from qlr_jax.formats.qlr.packed import JOB, load, read_config, save_packed
from qlr_jax.locks import locked, refuse_locked
from qlr_jax.models import Llama, load_tokenizer, vocabulary_names
from qlr_jax.models.bundled import BUNDLED_NAME
from qlr_jax.paths import local, output_folder
from qlr_jax.pipelines.original import find_original, load_original, recorded
from qlr_jax.progress import Progress, silent
from qlr_jax.settings.limits import REFERENCE_BYTES

LENGTH = 512  # tokens of a sequence, where the model takes so many
STOPPING = 20  # every so many sequences one is for early stopping
KEPT_FILES = ("recipe.yaml", "allocation.json")


# what the command does, one line a step; most of the lines say what the arguments are
def adapt(
    out: str | Path,
    dest: str | Path,
    text: Sequence[str | Path] | None = None,
    config: AdaptConfig | None = None,
    *,
    original: str | Path | None = None,
    held_out: Sequence[str | Path] | None = None,
    chat: bool = False,
    sequences: int = 4096,
    evaluation_tokens: int = 16384,
    resume: bool = False,
    progress: Progress | None = None,
    command: str = "",
    ignore_config: Sequence[str] = (),
) -> dict[str, Any]:
    """Adapt a compressed folder to a text, and write what comes of it as a folder of the same kind.

    Args:
        out: what `compress` wrote.
        dest: the folder to write; new or empty.
        text: file(s) to adapt to; for the bundled model its calibration text where none is given.
        config: what is trained and how.
        original: the uncompressed model, for the losses "kl" and "mix" and for the figures; what `out` names where not given.
        held_out: file(s) that the figures are measured on; for the bundled model its own where no text is given; else the
            sequences that early stopping looks at, which training does not see.
        chat: apply the tokenizer's chat template to the texts (`calibration.Corpus`).
        sequences: of the text, at most, spread over it.
        evaluation_tokens: for the figures, at most.
        resume: go on with an adaptation that was interrupted.
        command: what was typed, for the report.
        ignore_config: attributes of the original's config.json to go on without, beside those that the folder records.

    Returns:
        What report.json has under "adapted", with `out` and `dest`.

    Raises:
        QLRError: no text, too little of it, no original where one is needed; and what `adaptation.fine_tune` raises.
    """
    config, progress = config or AdaptConfig(), progress or silent()
    out, dest = local(out), output_folder(dest, (JOB,), [out, original])
    refuse_locked(dest)
    with locked(dest):
        counts = (sequences, evaluation_tokens)
        return _adapt(out, dest, text, config, original, held_out, chat, *counts, resume, progress, command, ignore_config)


# one line a step, as in a job
def _adapt(
    out: Path,
    dest: Path,
    text: Sequence[str | Path] | None,
    config: AdaptConfig,
    original: str | Path | None,
    held_out: Sequence[str | Path] | None,
    chat: bool,
    sequences: int,
    evaluation_tokens: int,
    resume: bool,
    progress: Progress,
    command: str,
    ignore_config: Sequence[str],
) -> dict[str, Any]:
    checkpoint = dest / JOB / "adapt"
    if checkpoint.exists() and not resume:
        raise QLRError(f"{dest} holds an adaptation that was interrupted; go on with it (--resume), or remove {dest / JOB}")
    with progress.stage("loading"):
        settings = read_config(out)[1].get("settings", {})
        model, tokenizer = load(out), load_tokenizer(out)
        teacher = _original(out, original, model, needed=config.loss != "text", ignore=ignore_config, note=progress.say)
    packed = [name for name in vocabulary_names(model.config) if hasattr(model.matrices()[name].weight.get_value(), "dense")]
    if packed and "embeddings" in config.train:
        if config.train == ("embeddings",):
            raise QLRError(f"{' and '.join(packed)} are packed, so nothing of embeddings can be trained; train norms and scales")
        progress.say(f"{' and '.join(packed)}: packed, and left as they are")
    bundled = settings.get("base_model") == BUNDLED_NAME and not text
    if not text and not bundled:
        raise QLRError("no text was given to adapt to; pass one or more files that resemble what the model will read (--text)")
    corpus = Corpus.of(calibration.standard_library("calibration")) if bundled else Corpus.read(text, chat)
    rows = _rows(corpus, tokenizer, model, sequences, progress.say)
    training, stopping = np.delete(rows, np.s_[::STOPPING], axis=0), rows[::STOPPING][:64]
    # no more than will be read: the teacher goes through all of it
    training = calibration.subsample(training, config.steps * config.batch * config.accumulate * rows.shape[1])
    windows, measured_on = stopping, "sequences of the text that training did not see"
    if held_out or bundled:
        other = Corpus.read(held_out, chat) if held_out else Corpus.of(calibration.standard_library("heldout"))
        windows = evaluation.cut_corpus(other, tokenizer, rows.shape[1], model.config.vocab_size, progress.say).rows
        measured_on = ", ".join(map(str, held_out)) if held_out else "held-out modules of Python's standard library"
    windows = calibration.subsample(windows, evaluation_tokens)

    with progress.stage("measuring before"):
        known = reference(teacher or model.densified(), windows, max_bytes=REFERENCE_BYTES)
        before = divergence(model, known)
    found = adaptation.fine_tune(
        model, training, config, teacher=teacher, held_out=stopping, checkpoint=checkpoint, progress=progress
    )
    with progress.stage("measuring after"):
        after = divergence(found.value, known)
    record = {
        "command": command,
        "text": "the calibration text" if bundled else ", ".join(map(str, text or ())),
        "judged_on": measured_on,
        "tokens": int(windows.size),
        "verdict": str(found.verdict),
        "trained": list(config.train),
        "loss": config.loss,
        **{key: found.stats[key] for key in ("steps", "seconds", "bits_per_weight_before", "bits_per_weight", "history")},
        "before": _figures(before, teacher is not None),
        "after": _figures(after, teacher is not None),
    }
    with progress.stage("saving"):
        _save(out, dest, found, record, settings)
    return {"out": str(out), "dest": str(dest), **record}


def _original(
    out: Path, given: str | Path | None, compressed: Llama, needed: bool, ignore: Sequence[str], note: Callable[[str], None]
) -> Llama | None:
    """The uncompressed model; None where it is not at hand and not needed."""
    if given is None and not recorded(out)["name"]:
        if needed:
            raise QLRError("the folder does not say what it was compressed from; pass it (--original), or adapt with --loss text")
        return None
    try:
        return load_original(out, find_original(out, given), compressed.config, ignore, note)
    except QLRError:
        if needed or given is not None:
            raise
        return None


def _rows(corpus: Corpus, tokenizer: Any, model: Llama, sequences: int, say: Callable[[str], None]) -> np.ndarray:
    for note in corpus.notes:
        say(note)
    length, wanted = min(LENGTH, model.config.max_position_embeddings), 2 * STOPPING
    corpus.text(tokenizer)  # refuses weights
    available = len(corpus.ids(tokenizer, model.config.vocab_size)[0])
    if available < wanted * length:
        shorter = available // wanted
        if shorter < calibration.SHORTEST:
            raise QLRError(
                f"the text gives {available // length} sequences of {length} tokens, too few to train and to stop early; "
                "give more text"
            )
        say(f"the text has {available:,} tokens, too few for {wanted} sequences of {length}: sequences of {shorter} are taken")
        length = shorter
    rows = evaluation.cut_corpus(corpus, tokenizer, length, model.config.vocab_size).rows
    return calibration.subsample(rows, sequences * length)


def _figures(found: Comparison, against_original: bool) -> dict[str, float]:
    if not against_original:
        return {"perplexity": found.perplexity}
    return {"kl": found.kl, "perplexity": found.perplexity, "agreement": found.agreement}


def _save(out: Path, dest: Path, found: adaptation.Adapted, record: dict[str, Any], settings: dict[str, Any]) -> None:
    """The packed folder, with the report of the compression, this adaptation added to it."""
    import shutil

    from qlr_jax.report.files import report_files

    files = {name: (out / name).read_text(encoding="utf-8") for name in KEPT_FILES if (out / name).is_file()}
    report: dict[str, Any] = {}
    if (out / "report.json").is_file():
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        _updated(report, found)
    earlier = (report.get("adapted") or {}).get("command")  # of a folder that was adapted before
    report["adapted"] = record | {"command": "\n".join(filter(None, (earlier, record["command"])))}
    files |= report_files(report, settings.get("base_model"))
    save_packed(dest, found.value, found.matrices, source=out, settings=settings, files=files)
    shutil.rmtree(dest / JOB, ignore_errors=True)


def _updated(report: dict[str, Any], found: adaptation.Adapted) -> None:
    """Specs and bytes as they are now; what was measured of the compression stays as it was measured."""
    matrices = found.matrices
    for row in report.get("matrices") or ():
        if row.get("name") in matrices:
            value = matrices[row["name"]]
            row |= {"spec": str(value.spec), "bytes": value.nbytes, "bits": value.bits}
    gained = found.stats["bytes"] - found.stats["bytes_before"]
    report["bits_per_weight"] = found.stats["bits_per_weight"]
    if isinstance(sizes := report.get("bytes"), dict):
        sizes |= {key: sizes[key] + gained for key in ("after", "compressed") if key in sizes}
        if sizes.get("before"):
            report["whole_model_bits_per_weight"] = 16 * sizes["after"] / sizes["before"]
