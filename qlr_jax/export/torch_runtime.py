"""The former address of `qlr_jax.formats.qlr.torch_runtime`: registers the runtime all the same, with a FutureWarning."""

import warnings

from qlr_jax.formats.qlr.torch_runtime import QLRConfig, QLRForCausalLM, QLRLinear, QLRQuantizer, register, use_kernels

__all__ = ["QLRConfig", "QLRForCausalLM", "QLRLinear", "QLRQuantizer", "register", "use_kernels"]

warnings.warn(
    "qlr_jax.export.torch_runtime is now qlr_jax.formats.qlr.torch_runtime: import it from there", FutureWarning, stacklevel=2
)
