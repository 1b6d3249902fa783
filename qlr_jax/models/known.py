"""Configurations of well-known models, so that a job can be planned before anything is downloaded; numbers only."""

from collections.abc import Mapping

from qlr_jax.errors import QLRError
from qlr_jax.models.config import LlamaConfig, RopeScaling


def _llama2(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(32000, hidden, inner, layers, heads, kv_heads, rms_norm_eps=1e-5, max_position_embeddings=4096)


def _llama3(
    hidden: int, inner: int, layers: int, heads: int, positions: int = 8192, scaling: RopeScaling | None = None
) -> LlamaConfig:
    return LlamaConfig(
        128256, hidden, inner, layers, heads, 8, rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling=scaling,
        max_position_embeddings=positions, bos_token_id=128000, eos_token_id=128001,
    )  # fmt: skip


KNOWN: Mapping[str, LlamaConfig] = {
    "Llama-2-7B": _llama2(4096, 11008, 32, 32, 32),
    "Llama-2-13B": _llama2(5120, 13824, 40, 40, 40),
    "Llama-2-70B": _llama2(8192, 28672, 80, 64, 8),
    "Llama-3-8B": _llama3(4096, 14336, 32, 32),
    "Llama-3-70B": _llama3(8192, 28672, 80, 64),
    "Llama-3.1-405B": _llama3(16384, 53248, 126, 128, 131072, RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)),
}
"""Name -> config; the head is untied in all of them."""


def known_config(name: str) -> LlamaConfig:
    """The configuration of a well-known model; upper and lower case are one.

    Raises:
        QLRError: an unknown name, with all that are known.

    Example:
        >>> known_config("llama-3-8b").intermediate_size
        14336
    """
    for known, config in KNOWN.items():
        if known.lower() == name.lower():
            return config
    raise QLRError(f"model {name!r} is not among the known ones; give one of {', '.join(KNOWN)}, or a model folder")
