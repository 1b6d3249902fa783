"""Perplexity on held-out windows, and divergence of a compressed model from its original."""

from qlr_jax.evaluation.compare import Comparison, Reference, compare, divergence, perplexity, reference
from qlr_jax.evaluation.windows import windows

__all__ = ["Comparison", "Reference", "compare", "divergence", "perplexity", "reference", "windows"]
