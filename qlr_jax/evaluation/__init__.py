"""How good a compressed model is: perplexity, divergence from its original, drift, generated text, zero-shot tasks."""

from qlr_jax.evaluation.compare import (
    Comparison,
    LastStates,
    Positions,
    Reference,
    compare,
    divergence,
    perplexity,
    positions,
    reference,
    run_windows,
    summary,
)
from qlr_jax.evaluation.details import intervals, worst_token
from qlr_jax.evaluation.drift import Drift, drift
from qlr_jax.evaluation.generation import generate, stream
from qlr_jax.evaluation.sampling import GenerationSettings
from qlr_jax.evaluation.text import stream_text
from qlr_jax.evaluation.windows import Windows, cut, cut_corpus, windows
from qlr_jax.evaluation.zero_shot import PAPER_TASKS, compare_zero_shot, zero_shot

__all__ = [
    "PAPER_TASKS",
    "Comparison",
    "Drift",
    "GenerationSettings",
    "LastStates",
    "Positions",
    "Reference",
    "Windows",
    "compare",
    "compare_zero_shot",
    "cut",
    "cut_corpus",
    "divergence",
    "drift",
    "generate",
    "intervals",
    "perplexity",
    "positions",
    "reference",
    "run_windows",
    "stream",
    "stream_text",
    "summary",
    "windows",
    "worst_token",
    "zero_shot",
]
