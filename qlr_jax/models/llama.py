"""The forward pass of Llama and its relatives in flax.nnx: weights named as in Hugging Face, blocks callable one at a time."""

import math
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.products import knows as has_products
from qlr_jax.models.attention import attend, causal_attention
from qlr_jax.models.config import LlamaConfig
from qlr_jax.models.names import EMBEDDING, HEAD
from qlr_jax.models.products import Product, dense, exact_product, packed_product, product_of, unpacked
from qlr_jax.models.sites import SITES
from qlr_jax.models.vocabulary import check_tokens

Tap = Callable[[str, Array], None]
"""Called with (input name, x) for every distinct input of linear layers."""

Rope = tuple[Array, Array]
"""(cos, sin) of the rotary angles of positions, as `Llama.rope` gives them."""

Adjust = Callable[[str, Array], Array]
"""Called with (linear name, y) for every linear output; what it returns takes y's place."""

Cache = Callable[[Array, Array], tuple[Array, Array, Array]]
"""Called with one attention's new keys and values (batch, kv heads, time, d), keys rotated; returns all keys and all values
(batch, kv heads, keys, d), key s at position s, and the positions of the queries (batch, time)."""

Module = TypeVar("Module", bound=nnx.Module)


def shallow_copy(module: Module) -> Module:
    """The module with parameters of its own: what is set in the copy leaves the original as it is. Arrays are shared."""
    return jax.tree.map(lambda leaf: leaf, module)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
}
"""By the name that `hidden_act` has in config.json."""


class Linear(nnx.Module):
    """y = x Wᵀ + b with W = `weight`, (out, in), and b = `bias`, (out,), or None.

    `weight` is a Param of an array or of a packed matrix with `.dense()`.
    """

    def __init__(self, weight: Any, product: Product = exact_product, bias: Any = None):
        self.weight, self.product = nnx.Param(weight), product
        self.bias = None if bias is None else nnx.Param(bias)

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
        y = product_of(self.product, x, self.weight.get_value())
        if self.bias is not None:
            y = y + self.bias.get_value().astype(y.dtype)
        return y.astype(x.dtype)


class Embedding(nnx.Module):
    """Row lookup in `weight`, (vocab, hidden), times `scale` rounded to the weights' type.

    `weight` is a Param of an array, or of a packed matrix with `.rows(tokens)`, whose rows become `dtype`.
    """

    def __init__(self, weight: Any, scale: float = 1.0, dtype: Any = jnp.float32):
        self.weight, self.scale, self.dtype = nnx.Param(weight), scale, dtype

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch n"]:
        weight = self.weight.get_value()
        rows = weight.rows(tokens).astype(self.dtype) if hasattr(weight, "rows") else unpacked(weight)[tokens]
        return rows if self.scale == 1.0 else rows * jnp.asarray(self.scale, rows.dtype)


class RMSNorm(nnx.Module):
    """x · (offset + weight) / sqrt(mean(x²) + eps), the mean in float32; the product in x's type, or in float32 where `wide`."""

    def __init__(self, weight: Any, eps: float, offset: float = 0.0, wide: bool = False):
        self.weight, self.eps, self.offset, self.wide = nnx.Param(weight), eps, offset, wide

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        h, weight = x.astype(jnp.float32), self.weight.get_value()
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        if self.wide:
            # As where it was trained; with an offset, bfloat16 would round 1 + weight to steps of 2⁻⁷.
            return (h * (self.offset + weight.astype(jnp.float32))).astype(x.dtype)
        return weight.astype(x.dtype) * h.astype(x.dtype)


Make = Callable[[str], Linear]
"""Kind -> a new linear layer of a block's site of this kind."""

Norm = Callable[[int], RMSNorm]
"""size -> a new norm that changes nothing but the length."""


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; several query heads may share a key-value head.

    Position t sees positions s with 0 <= t − s, and t − s < window where there is a window. Where the family has it, q and k are
    normalised (`q_norm`, `k_norm`) before they are rotated: each head for itself, or all heads together.
    """

    def __init__(self, config: LlamaConfig, make: Make, norm: Norm):
        self.head_dim, self.window = config.head_dim, config.sliding_window
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = make("q"), make("k"), make("v"), make("o")
        self.norm_heads = config.traits.qk_norm == "head"
        query, key = config.qk_norm_sizes
        self.q_norm = norm(query) if query else None
        self.k_norm = norm(key) if key else None

    def __call__(self, x: Array, rope: Rope, tap: Tap | None, adjust: Adjust, cache: Cache | None = None) -> Array:
        batch, time, _ = x.shape
        if tap is not None:
            tap("self_attn.qkv", x)
        heads = lambda y: y.reshape(batch, time, -1, self.head_dim).swapaxes(1, 2)  # noqa: E731
        q = self._normed_heads(self.q_norm, adjust("self_attn.q_proj", self.q_proj(x)), heads)
        k = self._normed_heads(self.k_norm, adjust("self_attn.k_proj", self.k_proj(x)), heads)
        q, k = rotate(q, rope), rotate(k, rope)
        v = heads(adjust("self_attn.v_proj", self.v_proj(x)))
        out = causal_attention(q, k, v, self.window) if cache is None else attend(q, *cache(k, v), self.window)
        out = out.astype(x.dtype).swapaxes(1, 2).reshape(batch, time, -1)
        if tap is not None:
            tap("self_attn.o_proj", out)
        return adjust("self_attn.o_proj", self.o_proj(out))

    def _normed_heads(self, norm: RMSNorm | None, y: Array, heads: Callable[[Array], Array]) -> Array:
        if norm is None:
            return heads(y)
        return norm(heads(y)) if self.norm_heads else heads(norm(y))


class MLP(nnx.Module):
    """down( act(gate(x)) · up(x) ), act the family's activation."""

    def __init__(self, config: LlamaConfig, make: Make):
        self.activation = config.traits.activation
        self.gate_proj, self.up_proj, self.down_proj = make("gate"), make("up"), make("down")

    def __call__(self, x: Array, tap: Tap | None, adjust: Adjust) -> Array:
        if tap is not None:
            tap("mlp.gate_up", x)
        gate, up = adjust("mlp.gate_proj", self.gate_proj(x)), adjust("mlp.up_proj", self.up_proj(x))
        h = ACTIVATIONS[self.activation](gate) * up
        if tap is not None:
            tap("mlp.down_proj", h)
        return adjust("mlp.down_proj", self.down_proj(h))


class Block(nnx.Module):
    """One layer. Holds no index, so every block has one structure and one compiled function serves them all."""

    def __init__(self, config: LlamaConfig, make: Make, norm: Norm):
        self.self_attn = Attention(config, make, norm)
        self.mlp = MLP(config, make)
        self.norms = config.traits.norms
        for name in self.norms.names:
            setattr(self, name, norm(config.hidden_size))

    def __call__(
        self,
        x: Float[Array, "batch time n"],
        rope: Rope,
        tap: Tap | None = None,
        adjust: Adjust | None = None,
        cache: Cache | None = None,
    ) -> Float[Array, "batch time n"]:
        """Names given to `tap` and `adjust` are local here ("mlp.down_proj"); `Llama` adds "model.layers.<i>."."""
        adjust = adjust or (lambda name, y: y)
        norm = lambda name, v: getattr(self, name)(v) if name else v  # noqa: E731
        y = self.self_attn(norm(self.norms.before_attention, x), rope, tap, adjust, cache)
        x = x + norm(self.norms.after_attention, y)
        return x + norm(self.norms.after_mlp, self.mlp(norm(self.norms.before_mlp, x), tap, adjust))

    def linears(self) -> dict[str, Linear]:
        """The linear layers by their local names, in the order q, k, v, o, gate, up, down."""
        return {site.path: attrgetter(site.path)(self) for site in SITES}

    def tensors(self) -> dict[str, nnx.Param]:
        """Every parameter by its local tensor name: linear layers, then norms."""
        out = {}
        for name, linear in self.linears().items():
            out[f"{name}.weight"] = linear.weight
            if linear.bias is not None:
                out[f"{name}.bias"] = linear.bias
        for norm in self.norms.names:
            out[f"{norm}.weight"] = getattr(self, norm).weight
        for norm in ("q_norm", "k_norm"):
            if getattr(self.self_attn, norm) is not None:
                out[f"self_attn.{norm}.weight"] = getattr(self.self_attn, norm).weight
        return out


class Stack(nnx.Module):
    """What Hugging Face calls `model`: embedding, layers, final norm."""

    def __init__(self, config: LlamaConfig, rows: Any, make: Make, norm: Norm):
        scale = math.sqrt(config.hidden_size) if config.traits.scaled_embedding else 1.0
        self.embed_tokens = Embedding(rows, scale, rows.dtype)
        self.layers = nnx.List([Block(config, make, norm) for _ in range(config.num_hidden_layers)])
        self.norm = norm(config.hidden_size)


class Top(nnx.Module):
    """What lies above the blocks: the final norm, and the head or the tied embedding."""

    def __init__(self, norm: RMSNorm, rows: Linear | Embedding, product: Product):
        self.norm, self.weight, self.product = norm, rows.weight, product

    def __call__(self, x: Float[Array, "batch time n"]) -> Float[Array, "batch time vocab"]:
        x = self.norm(x)
        return product_of(self.product, x, self.weight.get_value())

    def unpacked(self) -> "Top":
        """With its weights in memory: those that are packed are decoded now, and not at every call."""
        if not hasattr(self.weight.get_value(), "dense"):
            return self
        copy = shallow_copy(self)
        copy.weight.set_value(jnp.asarray(dense(self.weight.get_value(), self.norm.weight.get_value().dtype)))
        return copy


class Llama(nnx.Module):
    """A causal language model of the Llama family, or of a related one that `config` names.

    Args:
        config: shapes, constants, family.
        key: a PRNG key or nnx.Rngs for normal(0, 0.02) weights and zero biases; None: zeros (weights are set later).
        dtype: of weights and activations.
        product: another x wᵀ (training trades precision for speed with it).

    Example:
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> Llama(config, jax.random.key(0))(jnp.zeros((2, 5), jnp.int32)).shape
        (2, 5, 64)
    """

    def __init__(self, config: LlamaConfig, key: Any = None, dtype: Any = jnp.float32, product: Product = exact_product):
        keys = [key.params() if isinstance(key, nnx.Rngs) else key]

        offset, wide = config.traits.norm_offset, config.traits.wide_norm

        def weight(m: int, n: int) -> Array:
            if keys[0] is None:
                return jnp.zeros((m, n), dtype)
            keys[0], now = jax.random.split(keys[0])
            return (0.02 * jax.random.normal(now, (m, n))).astype(dtype)

        def make(kind: str) -> Linear:
            m, n = config.shape_of(kind)
            return Linear(weight(m, n), product, jnp.zeros(m, dtype) if kind in config.biases else None)

        def norm(n: int) -> RMSNorm:
            return RMSNorm(jnp.full(n, 1.0 - offset, dtype), config.rms_norm_eps, offset, wide)

        self.config, self.product = config, product
        self.model = Stack(config, weight(config.vocab_size, config.hidden_size), make, norm)
        self.lm_head = None if config.tie_word_embeddings else Linear(weight(config.vocab_size, config.hidden_size), product)

    def __call__(
        self, tokens: Int[Array, "batch time"], tap: Tap | None = None, adjust: Adjust | None = None
    ) -> Float[Array, "batch time vocab"]:
        """Logits in float32. `tap(input name, x)` sees every linear input, `adjust(linear name, y) -> y` every output."""
        x, rope = self.embed(tokens), self.rope(tokens.shape[1])
        for i, block in enumerate(self.model.layers):
            prefix = f"model.layers.{i}."
            inner_tap = None if tap is None else (lambda name, v, prefix=prefix: tap(prefix + name, v))
            inner_adjust = None if adjust is None else (lambda name, v, prefix=prefix: adjust(prefix + name, v))
            x = block(x, rope, inner_tap, inner_adjust)
        return self.head(x)

    def block(self, i: int) -> Block:
        """Layer i with all of its weights in memory: those that are packed or lie on disk are decoded or read now, and not kept."""
        block = self.model.layers[i]
        if not any(hasattr(param.get_value(), "dense") for param in block.tensors().values()):
            return block
        dtype, copy = self.model.norm.weight.get_value().dtype, shallow_copy(block)
        for param in copy.tensors().values():
            param.set_value(jnp.asarray(dense(param.get_value(), dtype)))
        return copy

    def top(self) -> "Top":
        """Final norm and head alone: what turns the last block's hidden state into logits, without the blocks."""
        return Top(self.model.norm, self.model.embed_tokens if self.lm_head is None else self.lm_head, self.product)

    def embed(self, tokens: Int[Array, "batch time"] | Int[np.ndarray, "batch time"]) -> Float[Array, "batch time n"]:
        """The hidden state that enters the first block; QLRError for tokens that the vocabulary lacks, where they are known."""
        check_tokens(tokens, self.config.vocab_size)
        return embedded(self.model.embed_tokens, tokens)

    def head(self, x: Float[Array, "batch time n"]) -> Float[Array, "batch time vocab"]:
        """Final norm and output projection of the last block's hidden state; float32."""
        return self.top()(x)

    def rope(self, time: int) -> tuple[Float[Array, "time half"], Float[Array, "time half"]]:
        """(cos, sin) of the rotary angles of positions 0 … time − 1."""
        return _rope(self.config, time)

    def linears(self) -> dict[str, Linear]:
        """Every linear layer of the blocks by its Hugging Face name, in the order q, k, v, o, gate, up, down per layer."""
        return {
            f"model.layers.{i}.{name}": lin for i, block in enumerate(self.model.layers) for name, lin in block.linears().items()
        }

    def matrices(self) -> dict[str, "Linear | Embedding"]:
        """Everything that may be compressed: the linear layers, the embedding and, where it is not tied to it, the head."""
        vocabulary: dict[str, Linear | Embedding] = {EMBEDDING: self.model.embed_tokens}
        return {**self.linears(), **vocabulary, **({} if self.lm_head is None else {HEAD: self.lm_head})}

    def densified(self) -> "Llama":
        """A copy whose packed weights are decoded: the same logits, faster to call again and again, more memory."""
        dtype, copy = self.model.norm.weight.get_value().dtype, shallow_copy(self)
        for param in copy.tensors().values():
            if hasattr(param.get_value(), "dense"):
                param.set_value(dense(param.get_value(), dtype))
        return copy

    def for_generation(self) -> "Llama":
        """A copy to generate with: packed weights that C++ multiplies by stay packed, all others are decoded once."""
        if jax.default_backend() != "cpu":
            return self.densified()
        copy, dtype = shallow_copy(self), self.model.norm.weight.get_value().dtype
        for param in copy.tensors().values():
            value = param.get_value()
            if hasattr(value, "dense") and not (isinstance(value, QLRMatrix) and has_products(value)):
                param.set_value(dense(value, dtype))
        copy.product = packed_product
        for linear in copy.linears().values():
            linear.product = packed_product
        if copy.lm_head is not None:
            copy.lm_head.product = packed_product
        return copy

    def tensors(self) -> dict[str, nnx.Param]:
        """Every parameter by its Hugging Face tensor name; set one with `.set_value(...)`."""
        out = {"model.embed_tokens.weight": self.model.embed_tokens.weight}
        for i, block in enumerate(self.model.layers):
            out |= {f"model.layers.{i}.{name}": param for name, param in block.tensors().items()}
        out["model.norm.weight"] = self.model.norm.weight
        return out if self.lm_head is None else out | {"lm_head.weight": self.lm_head.weight}


@jax.jit
def embedded(embedding: Embedding, tokens: Any) -> Float[Array, "*batch n"]:
    """The rows of an embedding that tokens have."""
    return embedding(tokens)


@partial(jax.jit, static_argnums=(0, 1))
def _rope(config: LlamaConfig, time: int) -> tuple[Array, Array]:
    angles = jnp.arange(time, dtype=jnp.float32)[:, None] * frequencies(config)[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Float[Array, "batch heads time d"], rope: Rope) -> Float[Array, "batch heads time d"]:
    """Rotate each pair (x[i], x[i + d/2]) by its angle; in float32, returned in x's type."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def frequencies(config: LlamaConfig) -> Float[Array, "half"]:
    """Rotary frequencies theta^(−2i/d), scaled as `config.rope_scaling` says.

    llama3: wavelengths up to original/high_freq_factor are kept, those beyond original/low_freq_factor are multiplied by
    `factor`, and frequencies between are blended linearly in original/wavelength.
    """
    freq = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    periods = scaling.original_max_position_embeddings * freq / (2 * math.pi)
    keep = (periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * freq + (1 - keep) * freq / scaling.factor
