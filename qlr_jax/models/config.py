"""The configuration of a Llama-like model, read from Hugging Face's config.json; refuses what it does not know."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from qlr_jax.errors import QLRError
from qlr_jax.models.attributes import changes_no_logit
from qlr_jax.models.checkpoint import NAMED, is_pointer
from qlr_jax.models.families import FAMILIES, SWITCHES, Family, find_family
from qlr_jax.models.float8 import is_understood
from qlr_jax.models.gguf.config import config_json
from qlr_jax.models.gguf.file import find_gguf, read_gguf
from qlr_jax.models.rope import KEYS, ORIGINAL, RopeScaling, resolve_rope
from qlr_jax.models.sites import BY_KIND
from qlr_jax.paths import local

# Attributes that would change the logits: only these values are computed here, unless the family says otherwise.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "sliding_window": (None,),
    "use_sliding_window": (False,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0, None),
    "is_encoder_decoder": (False,),
    "is_decoder": (False, True),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
    "auto_map": (None,),
}

_QUANTIZED = ("quantization_config", "compression_config", "quantization")

# Read by `resolve_rope` and `_check_layers`.
_RESOLVED = ("layer_types", "rope_scaling", "rope_parameters", ORIGINAL)

_HINTS = {
    "gptq": "give the model that it was made of; GPTQ's weights count as --backbone-from once they are saved dense",
    "awq": "give the model that it was made of; AWQ also scales norms and weights, so its dense weights are another model",
    "qlr": "give the original, or `qlr evaluate`, `qlr generate` and `qlr adapt` this folder",
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shapes and constants of a Llama, or of a model of a related family; names as in Hugging Face's config.json.

    `family` is a key of `families.FAMILIES`. Of the fields after it, those that the family's config.json has may be set.

    Example:
        >>> LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4).head_dim
        4
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int = 0  # 0: as many as attention heads
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    family: str = "llama"
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None  # positions that a token sees, its own included; None: all before it

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise QLRError(f"config: family {self.family!r} is unknown; pass one of {', '.join(FAMILIES)}")
        for name in SWITCHES:
            if getattr(self, name) and name not in self.traits.switches:
                raise QLRError(f"config: {name} is {getattr(self, name)!r}, which a model of family {self.family!r} does not have")
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise QLRError(f"config: {name} is {getattr(self, name)!r}; true or false is needed")
        if self.sliding_window is not None and (type(self.sliding_window) is not int or self.sliding_window < 1):
            raise QLRError(f"config: sliding_window is {self.sliding_window!r}; null or a whole number of at least 1 is needed")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise QLRError(f"config: {name} is {getattr(self, name)!r}; a whole number of at least 1 is needed")
        if not self.num_key_value_heads:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise QLRError(
                    f"config: hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}, and no head_dim is given; give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        for name in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise QLRError(f"config: {name} is {getattr(self, name)!r}; a whole number of at least 1 is needed")
        if self.num_attention_heads % self.num_key_value_heads:
            raise QLRError(
                f"config: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if isinstance(self.rms_norm_eps, bool) or not isinstance(self.rms_norm_eps, int | float) or self.rms_norm_eps < 0:
            raise QLRError(f"config: rms_norm_eps is {self.rms_norm_eps!r}; a number such as 1e-6 is needed")
        if self.head_dim % 2:
            raise QLRError(f"config: head_dim {self.head_dim} is odd; rotary embeddings need an even one")

    @property
    def traits(self) -> Family:
        """What this model's family does differently from Llama."""
        return FAMILIES[self.family]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a text; empty where the config names none."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def query_size(self) -> int:
        """Width of q of all heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        """Width of k, and of v, of all key-value heads together."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """How many numbers the norms of q and of k have; 0 where the family has none."""
        sizes = {"": (0, 0), "head": (self.head_dim, self.head_dim), "width": (self.query_size, self.key_size)}
        return sizes[self.traits.qk_norm]

    def shape_of(self, kind: str) -> tuple[int, int]:
        """(out, in) of the linear layers of a kind.

        Example:
            >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
            >>> LlamaConfig(**sizes, num_key_value_heads=2).shape_of("k")
            (8, 16)
        """
        site = BY_KIND[kind]
        return getattr(self, site.rows), getattr(self, site.columns)

    @property
    def biases(self) -> frozenset[str]:
        """The kinds of linear layers that have a bias.

        Example:
            >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
            >>> sorted(LlamaConfig(**sizes, family="qwen2").biases), sorted(LlamaConfig(**sizes, mlp_bias=True).biases)
            (['k', 'q', 'v'], ['down', 'gate', 'up'])
        """
        switched = (kind for name, kinds in SWITCHES.items() if getattr(self, name) for kind in kinds)
        return frozenset((*self.traits.biases, *switched))

    @classmethod
    def from_hf(cls, source: dict[str, Any] | str | Path, ignore: Collection[str] = ()) -> "LlamaConfig":
        """Read a config.json in the spelling of transformers 4 or 5, or a GGUF file's metadata.

        Args:
            source: the file, its folder, or the dictionary in it.
            ignore: names of attributes that are not known here, or whose values are not supported, to go on without.

        Raises:
            QLRError: an unknown architecture, an unknown attribute, or a value that is not supported; names it.

        Example:
            >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
            >>> raw = sizes | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "sharpness": 2.0}
            >>> LlamaConfig.from_hf(raw, ignore=["sharpness"]).hidden_size
            16
        """
        raw = dict(source) if isinstance(source, dict) else read_config_json(local(source))
        family = find_family(raw)
        _refuse(raw, family, ignore)
        raw = {**family.defaults, **raw}
        theta, scaling = resolve_rope(raw, raw.get("max_position_embeddings", cls.max_position_embeddings), ignore)
        values: dict[str, Any] = {"family": family.model_type, "rope_theta": theta, "rope_scaling": scaling}
        for name in _used(family):
            if name in values or name not in raw:
                continue
            value = raw[name]
            if value is None and (name == "num_key_value_heads" or (name == "head_dim" and name not in family.defaults)):
                continue  # as the number of heads says
            if name in ("num_key_value_heads", "head_dim") and not value:  # of which 0 has a meaning of its own here
                raise QLRError(f"config: {name} is {value!r}; a whole number of at least 1 is needed")
            values[name] = tuple(value) if isinstance(value, list) else value
        missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.name not in values]
        if missing:
            raise QLRError(f"config.json has no {missing[0]}; that of a {family.architecture} must state it")
        config = cls(**values)
        _check_layers(raw.get("layer_types"), config)
        return config

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The config.json of this model, in a spelling that transformers 4 and 5 both read."""
        traits = self.traits
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.rope_scaling is not None:
            rope["rope_type"] = self.rope_scaling.kind
            rope |= {key: getattr(self.rope_scaling, key) for key in KEYS[self.rope_scaling.kind]}
        scaled = None if self.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"}
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        head = {"architectures": [traits.architecture], "model_type": traits.model_type, "hidden_act": traits.activation}
        out = {name: getattr(self, name) for name in _used(traits)}
        fixed = {name: values[0] for name, values in traits.only.items()}
        types = {"dtype": dtype, "torch_dtype": dtype}
        return head | out | {"eos_token_id": eos, "rope_scaling": scaled, "rope_parameters": rope} | fixed | types


def read_config_json(path: Path) -> dict[str, Any]:
    """The content of config.json: that file or the one in a folder, or what a GGUF file's metadata say in its place.

    Args:
        path: of the file, or of its folder.

    Raises:
        QLRError: it is missing or holds no JSON object; says what else the folder holds.
    """
    if (gguf := find_gguf(path)) is not None:
        return config_json(read_gguf(gguf))
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise QLRError(
                f"{path} is a LoRA adapter, not a model; merge it into its base with peft (merge_and_unload, then save_pretrained) "
                "and give that folder"
            )
        raise QLRError(f"{file} does not exist; give the folder of a Hugging Face Llama model, which holds a config.json")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        if is_pointer(file):
            raise QLRError(f"{file} is a pointer of Git LFS, not the file; get it with `git lfs pull`, or from the hub") from None
        raise QLRError(f"{file} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise QLRError(f"{file} does not hold a JSON object")
    return raw


def carried(raw: dict[str, Any], config: LlamaConfig) -> dict[str, Any]:
    """The config.json of a folder that holds a model read from another's: as it was, without what no longer is true of it.

    That is: what was ignored, how and in which file the weights were stored, code of its own, and a second spelling.

    Args:
        raw: the other folder's.
        config: what was read from it.
    """
    gone = (*_QUANTIZED, NAMED, "auto_map")
    out = {name: value for name, value in raw.items() if name not in gone and not _problem(name, value, config.traits)}
    try:
        found = resolve_rope({**out, "rope_parameters": out.get("rope_parameters") or {}}, config.max_position_embeddings)
        plain = found == (config.rope_theta, config.rope_scaling) and not (out.get("rope_scaling") and out.get("rope_parameters"))
    except QLRError:
        plain = False
    if plain:
        return out
    out.pop(ORIGINAL, None)
    return out | {name: value for name, value in config.to_hf().items() if name.startswith("rope_")}


def _used(family: Family) -> list[str]:
    """The attributes of config.json that become fields of a LlamaConfig under the same name."""
    apart = {"family", "rope_scaling", *SWITCHES} - set(family.switches)
    return [field.name for field in dataclasses.fields(LlamaConfig) if field.name not in apart]


def ignored(raw: dict[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """Those of the named attributes that a config.json has, with their values; parameters of its rotary embedding among them."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    found = {**(rope if isinstance(rope, dict) else {}), **raw}
    return {name: found[name] for name in ignore if name in found}


def _refuse(raw: dict[str, Any], family: Family, ignore: Collection[str]) -> None:
    """Fail closed: everything in the file is either used, known to change nothing, or has the one value we compute."""
    for name in _QUANTIZED:
        if raw.get(name) is not None and not is_understood(raw[name]):
            method = raw[name].get("quant_method", "unknown method") if isinstance(raw[name], dict) else raw[name]
            instead = _HINTS.get(method, "give the original model, with weights in float32, float16 or bfloat16")
            raise QLRError(f"config attribute {name!r} says that the weights are quantized already ({method}); {instead}")
    counts = {*_RESOLVED, "model_type", "architectures", "hidden_act", *_used(family), *family.only, *_QUANTIZED}
    if refused := sorted(counts & set(ignore)):
        raise QLRError(f"config attribute {refused[0]!r} counts, so it cannot be ignored; leave out --ignore-config {refused[0]}")
    for name, value in raw.items():
        if name not in ignore and (problem := _problem(name, value, family)):
            hint = "" if name in counts else f"; to go on without it, where it changes nothing: --ignore-config {name}"
            raise QLRError(f"config attribute {name!r} {problem}{hint}")


def _problem(name: str, value: Any, family: Family) -> str:
    """Why an attribute of config.json is refused; empty for one that is used, changes nothing, or has the value we compute."""
    if name in _RESOLVED or name in _QUANTIZED or name in family.unread or name in _used(family):
        return ""
    supported = {**SUPPORTED, "hidden_act": _spellings(family.activation), **family.only}
    if name in supported:
        return "" if value in supported[name] else f"is {value!r}; only {supported[name][0]!r} is supported"
    if changes_no_logit(name, value):
        return ""
    return f"(value {value!r}) is unknown in a {family.architecture}, so the model cannot be imported faithfully"


def _spellings(activation: str) -> tuple[str, ...]:
    """The names that transformers has for one function."""
    return (activation, "swish") if activation == "silu" else (activation,)


def _check_layers(kinds: Any, config: LlamaConfig) -> None:
    """Version 5 also lists how each layer attends; all of them must do as `sliding_window` says."""
    wanted = "full_attention" if config.sliding_window is None else "sliding_attention"
    if kinds is not None and kinds != [wanted] * config.num_hidden_layers:
        raise QLRError(f"config attribute 'layer_types' is {kinds!r}; only {wanted!r} for each of the layers is supported")
