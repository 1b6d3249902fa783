"""One adaptation, as a story: take the model apart, train, put the factors on their grids, evaluate what will be stored."""

from __future__ import annotations

import dataclasses
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax.adaptation.added_components import added_components
from qlr_jax.adaptation.assembly import assemble_model
from qlr_jax.adaptation.config import AdaptConfig, added_bytes
from qlr_jax.adaptation.loop import TrainingTask, train
from qlr_jax.adaptation.measure import mean_loss, weight_gradients
from qlr_jax.adaptation.metrics import measure_metrics
from qlr_jax.adaptation.result import AdaptationVerdict, Adapted
from qlr_jax.adaptation.sequences import prepare_sequences
from qlr_jax.adaptation.student import packed_matrices, take_apart
from qlr_jax.adaptation.teacher import TeacherLogits
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.typing import Array
from qlr_jax.models import Llama
from qlr_jax.paths import local
from qlr_jax.progress import Progress, silent

GRADIENT_TOKENS, EVALUATED_ROWS = 8192, 64


# as long as it is because it is the story, with what each step hands to the next
def fine_tune(
    model: Llama,
    tokens: Any,
    config: AdaptConfig | None = None,
    *,
    teacher: Llama | TeacherLogits | None = None,
    held_out: Any = None,
    held_out_teacher: TeacherLogits | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress | None = None,
) -> Adapted:
    """Train parts of a compressed model on text, and store them on their grids again.

        minimise over L, R, scales, signs, norms, embeddings, Q:
            w · KL(teacher ‖ student) + (1 − w) · next-token loss + states · mean over blocks of ½ E[δᵀ G δ]

    δ is the difference of the hidden state that leaves a block from the teacher's, G = E[g gᵀ] of the gradients there.

    Low-bit factors are trained quantized, with straight-through gradients, and re-quantized every `reround` steps; or, without it,
    in three phases: all parts; R quantized and fixed, the rest trained on; L quantized and fixed, all else trained on. A backbone
    keeps its codes unless it is asked for; then it is trained quantized as well, re-quantized in the metrics H and G that the text
    gives, its scales as they are. What is evaluated is the model as it will be stored.

    Args:
        model: a compressed model, packed (what `qlr.load` returns).
        tokens: (rows, length) of the text to adapt to.
        config: what is trained and how.
        teacher: the original model, or its kept logits over `tokens`; for losses "kl" and "mix".
        held_out: (rows, length) of other text: training stops when the loss on it no longer falls, and the best is kept.
        held_out_teacher: where `teacher` is kept logits, those over `held_out`.
        checkpoint: a folder; training goes on from what it holds, and ends as if it had not been interrupted.
        progress: where it is shown; nowhere if not given.

    Raises:
        QLRError: a model with nothing packed, tokens that do not fit it, a loss without its teacher, a checkpoint of other
            settings, a loss that is no number.

    Source: LoRA, arXiv 2106.09685; from a compressed backbone: CALDERA, arXiv 2405.18886, section 4; LQ-LoRA, arXiv 2311.12023;
        codes trained as well: PV-Tuning, arXiv 2405.14852 (how they change here differs); hidden states: BRECQ, arXiv 2102.05426.

    Example:
        adapted = fine_tune(qlr.load("out"), tokens, AdaptConfig(loss="kl"), teacher=load_model("original"), held_out=others)
        save_packed("adapted", adapted.value, adapted.matrices, source="out")
    """
    config, progress, started = config or AdaptConfig(), progress or silent(), time.perf_counter()
    matrices = packed_matrices(model)
    sequences, validation = prepare_sequences(model, tokens, held_out, teacher, held_out_teacher, config, progress)
    weights = sum(m.shape[0] * m.shape[1] for m in matrices.values())
    grid, added_grid = (None if g == "same" else g for g in (config.factors, config.fresh_grid))
    added: dict[str, Array] = {}
    if config.fresh is not None:
        with progress.stage("placing added components"):
            gradients = weight_gradients(model, sequences.part(GRADIENT_TOKENS // sequences.tokens.shape[1]), config)
            added = added_components(matrices, gradients, added_bytes(config.fresh, weights), added_grid, seed=config.seed)
    student, values, frame = take_apart(model, config.train, config.rank, added, grid, added_grid)
    metrics = measure_metrics(model, matrices, student, values, sequences.tokens, config, progress)
    folder = local(checkpoint) if checkpoint else None
    fingerprint = _fingerprint(matrices, sequences.tokens, config)
    task = TrainingTask(student, frame, config, sequences, validation, metrics, folder, fingerprint)
    trained = train(task, values, progress)

    with progress.stage("evaluating what is stored"):
        adapted = assemble_model(model, student, trained.values, trained.quantized, metrics.backbones, config.train)
        text = validation or sequences.part(EVALUATED_ROWS)
        before, after = mean_loss(model, text, config), mean_loss(adapted, text, config)
    verdict = AdaptationVerdict.STOPPED_EARLY if trained.stopped_early else AdaptationVerdict.IMPROVED
    if not after < before:
        verdict, adapted = AdaptationVerdict.NOT_IMPROVED, model
    bytes_before, bytes_after = (sum(m.nbytes for m in packed.values()) for packed in (matrices, packed_matrices(adapted)))
    stats = {
        "before": before,
        "after": after,
        "bits_per_weight_before": 8 * bytes_before / weights,
        "bits_per_weight": 8 * bytes_after / weights,
        "bytes_before": bytes_before,
        "bytes": bytes_after,
        "trained": trained.trained,
        "steps": sum("loss" in entry for entry in trained.history),
        "seconds": time.perf_counter() - started,
        "history": trained.history,
    }
    return Adapted(adapted, verdict, stats)


def _fingerprint(matrices: Mapping[str, QLRMatrix], tokens: np.ndarray, config: AdaptConfig) -> str:
    """Differs where a checkpoint cannot be gone on with."""
    checksum = zlib.crc32(np.ascontiguousarray(tokens).tobytes())
    for name, matrix in matrices.items():
        checksum = zlib.crc32(f"{name} {matrix.layout}".encode(), checksum)
        checksum = zlib.crc32(np.ascontiguousarray(matrix.arrays["scale"]).tobytes(), checksum)
    return f"{checksum:08x} {dataclasses.asdict(config)}"
