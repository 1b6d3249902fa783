"""Adaptation of a compressed model by gradient: L, R, small vectors, embeddings and, where asked for, Q on its own grid."""

from qlr_jax.adaptation.config import LOSSES, TRAINABLE, AdaptConfig
from qlr_jax.adaptation.fine_tuning import fine_tune
from qlr_jax.adaptation.result import AdaptationVerdict, Adapted
from qlr_jax.adaptation.teacher import TeacherLogits, teacher_logits

Verdict, adapt = AdaptationVerdict, fine_tune  # as users of the package import them

__all__ = [
    "LOSSES",
    "TRAINABLE",
    "AdaptConfig",
    "AdaptationVerdict",
    "Adapted",
    "TeacherLogits",
    "Verdict",
    "adapt",
    "fine_tune",
    "teacher_logits",
]
