"""vLLM's quantization configuration of packed folders, and how it gets to know them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]  not here in tests
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.logger import init_logger  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.quantization import register_quantization_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

from qlr_jax.formats.qlr.vllm_plugin import rules

# The runtime is imported where it is needed: it takes seconds, and vLLM asks for this module whatever it loads.

logger = init_logger("vllm.qlr")


class QLRVLLMConfig(QuantizationConfig):
    """How the matrices of a folder are packed, and what they become.

    Args:
        stored: `quantization_config` of config.json.

    Raises:
        ValueError: for a folder of a newer format or another code, as the runtime says it.
    """

    def __init__(self, stored: dict[str, Any]):
        super().__init__()
        from qlr_jax.formats.qlr.modeling_qlr import QLRConfig

        found = QLRConfig(**stored)
        self.matrices: dict[str, dict] = found.matrices
        self.dequantize = rules.decodes_at_load(os.environ.get(rules.SWITCH), found.dequantize, current_platform.is_cpu())
        self.used: set[str] = set()

    def get_name(self) -> str:
        """As config.json has it in `quant_method`."""
        return "qlr"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types of activations."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU is too old."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QLRVLLMConfig:
        """From `quantization_config` of config.json."""
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """What vLLM calls once, before its processes start: the folder is checked.

        Args:
            model_name: the folder; a name on a hub is not checked, since its files are not here yet.
            hf_config: transformers' configuration of the model.
            revision: of a name on a hub.

        Raises:
            ValueError: what is wrong with the folder.
        """
        if hf_config is None:
            return
        if isinstance(getattr(hf_config, "quantization_config", None), dict):
            # vLLM's cache of compiled models goes by this configuration, and a decoded model is another program
            hf_config.quantization_config = hf_config.quantization_config | {"dequantize": self.dequantize}
        if Path(model_name).is_dir():
            from qlr_jax.formats.qlr.vllm_plugin.checks import check_folder

            check_folder(Path(model_name), hf_config, self.matrices)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer; vLLM's own where nothing of it is packed.

        Args:
            layer: of vLLM.
            prefix: its name.

        Raises:
            ValueError: for what packed layers cannot do.
        """
        from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
            LinearBase,
            UnquantizedLinearMethod,
        )
        from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from qlr_jax.formats.qlr.vllm_plugin import methods

        running = get_current_vllm_config()
        parallel = running.parallel_config
        rules.check_run(
            parallel.tensor_parallel_size, parallel.pipeline_parallel_size, running.lora_config is not None, self.dequantize
        )
        if isinstance(layer, LinearBase):
            names = rules.stored_names(prefix, self.packed_modules_mapping)
            return methods.PackedLinear(self, names) if self._use(names) else UnquantizedLinearMethod()
        if not isinstance(layer, VocabParallelEmbedding):
            return None
        head = isinstance(layer, ParallelLMHead)
        name = rules.embedding_name("" if head else prefix, self.matrices)
        if not head:
            return self.vocabulary(name, head=False)
        if getattr(running.model_config.hf_config, "tie_word_embeddings", False):
            return methods.TiedHead(self, name) if self.entry(name) else None
        return self.vocabulary(prefix, head=True)

    def vocabulary(self, name: str, head: bool) -> QuantizeMethodBase | None:
        """The method of an embedding or a head with a matrix of its own; None where that is a plain weight."""
        from qlr_jax.formats.qlr.vllm_plugin import methods

        return methods.PackedVocabulary(self, name, head) if self._use([name]) else None

    def entry(self, name: str) -> dict | None:
        """How a matrix is packed; None where it is a plain weight."""
        return rules.stored_entry(self.matrices, name)

    def _use(self, names: list[str]) -> bool:
        packed = [name for name in names if self.entry(name)]
        self.used.update(packed)
        return bool(packed)

    def loaded(self, shards: Any) -> None:
        """What each layer calls after it was loaded: by then all layers are there.

        Args:
            shards: the layer's.

        Raises:
            ValueError: names a packed matrix that no layer asked for.
        """
        from qlr_jax.formats.qlr.modeling_qlr import native_products

        rules.check_used(self.matrices, self.used, "model")
        library = native_products()
        by = f"native ({library.backend()})" if library and current_platform.is_cpu() else "torch"
        logger.info_once("qlr: matrices are %s", "decoded at load" if self.dequantize else f"kept packed, products by {by}")


def register_with_vllm() -> None:
    """Register the configuration, and each packed class under the architecture that vLLM has for the plain one."""
    register_quantization_config("qlr")(QLRVLLMConfig)
    for packed, plain in rules.ARCHITECTURES.items():
        if plain in ModelRegistry.models:
            ModelRegistry.models[packed] = ModelRegistry.models[plain]
