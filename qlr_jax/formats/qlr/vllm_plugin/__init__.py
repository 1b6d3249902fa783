"""Plugin by which vLLM loads packed folders: `vllm.LLM(folder)`, `vllm serve folder`.

    rules        names, shards, and what is refused: pure Python
    shards       the stored matrices of one vLLM layer, their loading and their product: torch
    operators    products as operators that torch.compile takes whole
    checks       a folder against its configuration, before vLLM loads it
    methods      vLLM's methods for linear layers, embeddings and heads
    config       vLLM's quantization configuration

vLLM finds `register` by the entry point group `vllm.general_plugins`; there is nothing to import or to set. Neither this package
nor `register` needs JAX, and only `methods` and `config` import vLLM. QLR_VLLM=dequantize in the environment decodes every matrix
once, while the folder loads; QLR_VLLM=packed keeps codes and multiplies by them, which on a processor is the default.
"""

import logging


def register() -> None:
    """Make vLLM know `quant_method: "qlr"` and the architectures of packed folders; vLLM calls it in each of its processes."""
    try:
        from qlr_jax.formats.qlr.vllm_plugin.config import register_with_vllm
    except ImportError as error:  # an exception here would end vLLM for every model, whether or not it is a qlr folder
        logging.getLogger("vllm.qlr").warning("qlr folders cannot be loaded by this vLLM, which lacks a name: %s", error)
        return
    register_with_vllm()
