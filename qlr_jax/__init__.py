"""Compress the linear layers of Llama-family models as W ≈ Q + L R, rank and bits chosen together under a memory budget.

Importing this package is light: no JAX backend starts until a name is used.

Example:
    >>> import qlr_jax as qlr
    >>> str(qlr.Spec.parse("trellis-2+r32@trellis-4"))
    'trellis-2+r32@trellis-4'
"""

from qlr_jax.on_demand import resolver

__version__ = "0.1.0"

# name -> the module that holds it; resolved on first use (PEP 562)
_HOMES = {
    "Spec": "qlr_jax.core.spec",
    "QLRMatrix": "qlr_jax.core.matrix",
    "Solution": "qlr_jax.core.solution",
    "Verdict": "qlr_jax.core.solution",
    "correct": "qlr_jax.core.reconstruction",
    "solve": "qlr_jax.core.solver",
    "Recipe": "qlr_jax.settings.recipe",
    "JobResult": "qlr_jax.job",
    "compress": "qlr_jax.job",
    "load": "qlr_jax.formats.qlr.packed",
    "load_model": "qlr_jax.models",
}

__all__ = sorted(_HOMES)


__getattr__ = resolver(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
