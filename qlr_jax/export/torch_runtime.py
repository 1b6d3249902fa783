"""Moved to `qlr_jax.formats.qlr.torch_runtime`; this import keeps working and registers the runtime as before."""

from qlr_jax.formats.qlr.torch_runtime import QLRConfig, QLRForCausalLM, QLRLinear, QLRQuantizer, register, use_kernels

__all__ = ["QLRConfig", "QLRForCausalLM", "QLRLinear", "QLRQuantizer", "register", "use_kernels"]
