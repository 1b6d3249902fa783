"""Registers qlr folders with transformers, without JAX: after this import a plain `from_pretrained` loads them packed.

    import qlr_jax.export.torch_runtime
    model = AutoModelForCausalLM.from_pretrained(folder)

The folder's own copy does the same through `trust_remote_code=True`, with nothing of qlr-jax installed.
"""

from qlr_jax.export.modeling_qlr import QLRConfig, QLRForCausalLM, QLRLinear, QLRQuantizer, register

register()

__all__ = ["QLRConfig", "QLRForCausalLM", "QLRLinear", "QLRQuantizer", "register"]
