"""What sets each supported family apart from Llama: one table that importer, tensor names, forward pass and saver read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qlr_jax.errors import QLRError


@dataclasses.dataclass(frozen=True)
class Norms:
    """Names of a block's RMSNorms by where they stand, "" where there is none; those of a Llama unless given.

    Attributes:
        before_attention, before_mlp: of what a sublayer reads.
        after_attention, after_mlp: of what it puts out, before that is added to the hidden state.
    """

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are, in the order of the forward pass."""
        places = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        return tuple(name for name in places if name)


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers, as its differences from a Llama without biases.

    Attributes:
        model_type, architecture: as config.json states them.
        switches: optional fields of `LlamaConfig` that this family's config.json sets: "attention_bias" (q, k, v and o get a
            bias), "mlp_bias" (gate, up and down get one), "sliding_window" (a token sees so many positions, its own included).
        biases: kinds of linear layers that have a bias whatever the config says.
        norms: the RMSNorms of a block.
        qk_norm: q and k pass through an RMSNorm of their own before they are rotated, "head": every head for itself, "width": all
            heads together; "" where there is none.
        norm_offset: an RMSNorm multiplies by (norm_offset + weight).
        wide_norm: it does so in float32, whatever the type of the activations.
        scaled_embedding: token embeddings are multiplied by sqrt(hidden_size) as they enter the first block.
        activation: of the gate, as `hidden_act` names it.
        defaults: what transformers takes where config.json leaves an attribute out, where that is not LlamaConfig's default.
        only: further attributes that could change the logits -> the values that are computed; the first is what is written.
        unread: further attributes that change no logit, given `only`.
    """

    model_type: str
    architecture: str
    switches: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()
    norms: Norms = Norms()
    qk_norm: str = ""
    norm_offset: float = 0.0
    wide_norm: bool = False
    scaled_embedding: bool = False
    activation: str = "silu"
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()


# Without use_sliding_window the other two are not looked at; with it, layers would differ from max_window_layers on.
_QWEN: Mapping[str, Any] = {
    "only": {"use_sliding_window": (False,)},
    "unread": ("sliding_window", "max_window_layers"),
}
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "bos_token_id": None, "eos_token_id": None}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", switches=("attention_bias", "mlp_bias")),
        Family(
            "mistral",
            "MistralForCausalLM",
            switches=("sliding_window",),
            defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        ),
        Family("qwen2", "Qwen2ForCausalLM", biases=("q", "k", "v"), defaults=_QWEN_DEFAULTS, **_QWEN),
        Family(
            "qwen3",
            "Qwen3ForCausalLM",
            switches=("attention_bias",),
            qk_norm="head",
            defaults={"head_dim": 128, **_QWEN_DEFAULTS},
            **_QWEN,
        ),
        Family(
            "gemma",
            "GemmaForCausalLM",
            switches=("attention_bias",),
            norm_offset=1.0,
            wide_norm=True,
            scaled_embedding=True,
            activation="gelu_pytorch_tanh",
            defaults={
                "num_key_value_heads": 16,
                "head_dim": 256,
                "max_position_embeddings": 8192,
                "tie_word_embeddings": True,
                "bos_token_id": 2,
                "eos_token_id": 1,
            },
            # Gemma's first files say "gelu" and mean the approximation by tanh, as transformers knows.
            only={
                "hidden_act": ("gelu_pytorch_tanh", "gelu"),
                "hidden_activation": ("gelu_pytorch_tanh", None),
                "use_bidirectional_attention": (None, False),
            },
        ),
        Family(
            "olmo2",
            "Olmo2ForCausalLM",
            switches=("attention_bias",),
            norms=Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
            qk_norm="width",
            wide_norm=True,
            defaults={"rms_norm_eps": 1e-5, "bos_token_id": None, "eos_token_id": 50279},
        ),
    )
}
"""By model_type."""

SWITCHES: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ("q", "k", "v", "o"),
    "mlp_bias": ("gate", "up", "down"),
    "sliding_window": (),
}
"""The optional fields of `LlamaConfig`, and the kinds of linear layers that each gives a bias."""

_EXPERTS = "its MLP is a mixture of experts, and one dense MLP a layer is what is compressed"
_FUSED = "it stores several projections as one matrix, and they are compressed one by one"
_NORMS = "its norms stand at other places in a layer than Llama's"
_PARALLEL = "its layers run attention and MLP side by side"
_PLAIN_MLP = "its layers are no gated MLP behind an RMSNorm"
_MULTIPLIERS = "it multiplies embeddings, residuals or logits by constants of its own"
_MIXED = "its layers differ from each other in how they attend"
_IMAGES = "it reads more than text"
_ENCODER = "it is no decoder alone"
_RECURRENT = "its layers carry a recurrent state"

UNSUPPORTED: Mapping[str, str] = {
    model_type: why
    for why, model_types in (
        (
            _EXPERTS,
            "mixtral qwen2_moe qwen3_moe deepseek_v2 deepseek_v3 olmoe phimoe dbrx gpt_oss granitemoe glm4_moe llama4 llama4_text "
            "ernie4_5_moe minimax hunyuan_v1_moe",
        ),
        (_FUSED, "phi3 internlm2 baichuan chatglm"),
        (_NORMS, "gemma2 gemma3 gemma3_text gemma3n glm4 exaone4"),
        (_PARALLEL, "phi falcon gptj gpt_neox cohere cohere2"),
        (_PLAIN_MLP, "gpt2 gpt_bigcode opt bloom mpt starcoder2 stablelm nemotron olmo arcee apertus"),
        (_MULTIPLIERS, "granite minicpm"),
        (_MIXED, "ministral smollm3"),
        (_IMAGES, "mllama llava qwen2_vl qwen2_5_vl qwen3_vl mistral3 pixtral paligemma qwen2_audio"),
        (_ENCODER, "t5 bart bert roberta"),
        (_RECURRENT, "mamba mamba2 jamba rwkv qwen3_next"),
    )
    for model_type in model_types.split()
}
"""model_type of what is often met -> why it is refused; anything else that is not in FAMILIES is refused without a reason."""


def find_family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json's content, by its model_type and architectures.

    Raises:
        QLRError: neither of them is known, or they disagree; names what was found, why it is refused, and what is supported.

    Example:
        >>> find_family({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}).biases
        ('q', 'k', 'v')
    """
    model_type, architectures = config.get("model_type"), config.get("architectures")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None and (not architectures or architectures == [family.architecture]):
        return family
    found = f"model_type {model_type!r}"
    if architectures:
        first = architectures[0] if isinstance(architectures, list) else architectures
        # An architecture that its own model_type contradicts would read as supported if it stood alone.
        found = f"{first} with {found}" if any(first == f.architecture for f in FAMILIES.values()) else str(first)
    why = UNSUPPORTED.get(model_type) if isinstance(model_type, str) else None
    known = ", ".join(f.architecture for f in FAMILIES.values())
    raise QLRError(f"architecture {found} is not supported{f': {why}' if why else ''}{_inside(config)}; give one of {known}")


def _inside(config: Mapping[str, Any]) -> str:
    """What a multimodal wrapper says of the language model in it."""
    inner = config.get("text_config") or config.get("llm_config") or config.get("language_config")
    if not isinstance(inner, Mapping):
        return ""
    family = FAMILIES.get(inner.get("model_type", ""))
    if family is None:
        return f" (its text_config is a model of type {inner.get('model_type')!r})"
    return f" (its text_config is a {family.architecture}, which could be compressed saved on its own)"
