"""Adaptation of a compressed model by gradient: L, R, small vectors, embeddings and, where asked for, Q on its own grid."""

from qlr_jax.adaptation.adapting import Adapted, Verdict, adapt
from qlr_jax.adaptation.config import LOSSES, TRAINABLE, AdaptConfig
from qlr_jax.adaptation.losses import TeacherLogits, teacher_logits

__all__ = ["LOSSES", "TRAINABLE", "AdaptConfig", "Adapted", "TeacherLogits", "Verdict", "adapt", "teacher_logits"]
