"""The Llama forward pass in flax.nnx: weights named as in Hugging Face, blocks that can be called one at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qlr_jax.models.config import LlamaConfig

Tap = Callable[[str, Array], None]
"""Called with (input name, x) for every distinct input of linear layers."""

Adjust = Callable[[str, Array], Array]
"""Called with (linear name, y) for every linear output; what it returns takes y's place."""

Product = Callable[[Array, Array], Array]
"""(x (..., n), w (m, n)) -> x wᵀ (..., m) in float32."""

HIGHEST = jax.lax.Precision.HIGHEST


def exact_product(x: Float[Array, "*batch n"], w: Float[Array, "m n"]) -> Float[Array, "*batch m"]:
    """x wᵀ at the highest precision, accumulated in float32; what every linear layer uses unless told otherwise."""
    return jnp.einsum("...n,mn->...m", x, w, precision=HIGHEST, preferred_element_type=jnp.float32)


def dense(weight: Any, dtype: Any) -> Array:
    """A weight as an array: packed matrices (anything with `.dense()`) are decoded, then cast to `dtype`."""
    return (weight.dense() if hasattr(weight, "dense") else weight).astype(dtype)


class Linear(nnx.Module):
    """y = x Wᵀ with W = `weight`, (out, in); `weight` is a Param of an array or of a packed matrix with `.dense()`."""

    def __init__(self, weight: Any, product: Product = exact_product):
        self.weight, self.product = nnx.Param(weight), product

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch m"]:
        return self.product(x, dense(self.weight.get_value(), x.dtype)).astype(x.dtype)


class Embedding(nnx.Module):
    """Row lookup in `weight`, (vocab, hidden)."""

    def __init__(self, weight: Any):
        self.weight = nnx.Param(weight)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch n"]:
        weight = self.weight.get_value()
        return (weight.dense() if hasattr(weight, "dense") else weight)[tokens]


class RMSNorm(nnx.Module):
    """x · weight / sqrt(mean(x²) + eps), the mean in float32."""

    def __init__(self, weight: Any, eps: float):
        self.weight, self.eps = nnx.Param(weight), eps

    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        h = x.astype(jnp.float32)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.eps)
        return self.weight.get_value().astype(x.dtype) * h.astype(x.dtype)


Make = Callable[[int, int], Linear]
"""(out, in) -> a new linear layer."""


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; several query heads may share a key-value head."""

    def __init__(self, config: LlamaConfig, make: Make):
        self.kv_heads, self.head_dim = config.num_key_value_heads, config.head_dim
        q, kv = config.num_attention_heads * config.head_dim, self.kv_heads * config.head_dim
        self.q_proj = make(q, config.hidden_size)
        self.k_proj = make(kv, config.hidden_size)
        self.v_proj = make(kv, config.hidden_size)
        self.o_proj = make(config.hidden_size, q)

    def __call__(self, x: Array, rope: tuple[Array, Array], tap: Tap | None, adjust: Adjust) -> Array:
        batch, time, _ = x.shape
        if tap is not None:
            tap("self_attn.qkv", x)
        heads = lambda y: y.reshape(batch, time, -1, self.head_dim).swapaxes(1, 2)  # noqa: E731
        q = rotate(heads(adjust("self_attn.q_proj", self.q_proj(x))), rope)
        k = rotate(heads(adjust("self_attn.k_proj", self.k_proj(x))), rope)
        v = heads(adjust("self_attn.v_proj", self.v_proj(x)))
        # The query heads of one key-value head are stacked along time: one plain batched product serves the group.
        group = q.shape[1] // self.kv_heads
        q = q.reshape(batch, self.kv_heads, group * time, self.head_dim)
        scores = jnp.einsum("bktd,bksd->bkts", q, k, precision=HIGHEST, preferred_element_type=jnp.float32)
        causal = jnp.tile(jnp.arange(time)[:, None] >= jnp.arange(time)[None, :], (group, 1))
        weights = jax.nn.softmax(jnp.where(causal, scores / math.sqrt(self.head_dim), -jnp.inf), axis=-1).astype(x.dtype)
        out = jnp.einsum("bkts,bksd->bktd", weights, v, precision=HIGHEST, preferred_element_type=jnp.float32)
        out = out.astype(x.dtype).reshape(batch, -1, time, self.head_dim).swapaxes(1, 2).reshape(batch, time, -1)
        if tap is not None:
            tap("self_attn.o_proj", out)
        return adjust("self_attn.o_proj", self.o_proj(out))


class MLP(nnx.Module):
    """down( silu(gate(x)) · up(x) )."""

    def __init__(self, config: LlamaConfig, make: Make):
        self.gate_proj = make(config.intermediate_size, config.hidden_size)
        self.up_proj = make(config.intermediate_size, config.hidden_size)
        self.down_proj = make(config.hidden_size, config.intermediate_size)

    def __call__(self, x: Array, tap: Tap | None, adjust: Adjust) -> Array:
        if tap is not None:
            tap("mlp.gate_up", x)
        gate, up = adjust("mlp.gate_proj", self.gate_proj(x)), adjust("mlp.up_proj", self.up_proj(x))
        h = jax.nn.silu(gate) * up
        if tap is not None:
            tap("mlp.down_proj", h)
        return adjust("mlp.down_proj", self.down_proj(h))


class Block(nnx.Module):
    """One layer. Holds no index, so every block has one structure and one compiled function serves them all."""

    def __init__(self, config: LlamaConfig, make: Make, ones: Callable[[int], Array]):
        self.input_layernorm = RMSNorm(ones(config.hidden_size), config.rms_norm_eps)
        self.self_attn = Attention(config, make)
        self.post_attention_layernorm = RMSNorm(ones(config.hidden_size), config.rms_norm_eps)
        self.mlp = MLP(config, make)

    def __call__(
        self,
        x: Float[Array, "batch time n"],
        rope: tuple[Array, Array],
        tap: Tap | None = None,
        adjust: Adjust | None = None,
    ) -> Float[Array, "batch time n"]:
        """Names given to `tap` and `adjust` are local here ("mlp.down_proj"); `Llama` adds "model.layers.<i>."."""
        adjust = adjust or (lambda name, y: y)
        x = x + self.self_attn(self.input_layernorm(x), rope, tap, adjust)
        return x + self.mlp(self.post_attention_layernorm(x), tap, adjust)


class Backbone(nnx.Module):
    """What Hugging Face calls `model`: embedding, layers, final norm."""

    def __init__(self, config: LlamaConfig, make: Make, ones: Callable[[int], Array]):
        self.embed_tokens = Embedding(make(config.vocab_size, config.hidden_size).weight.get_value())
        self.layers = nnx.List([Block(config, make, ones) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(ones(config.hidden_size), config.rms_norm_eps)


class Llama(nnx.Module):
    """A Llama causal language model.

    Arguments: `config`; `key`, a PRNG key or nnx.Rngs for normal(0, 0.02) weights, or None for zeros (weights set later);
    `dtype`, the type of weights and activations; `product`, another x wᵀ (training trades precision for speed with it).

    >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    >>> Llama(config, jax.random.key(0))(jnp.zeros((2, 5), jnp.int32)).shape
    (2, 5, 64)
    """

    def __init__(self, config: LlamaConfig, key: Any = None, dtype: Any = jnp.float32, product: Product = exact_product):
        keys = [key.params() if isinstance(key, nnx.Rngs) else key]

        def make(m: int, n: int) -> Linear:
            if keys[0] is None:
                return Linear(jnp.zeros((m, n), dtype), product)
            keys[0], now = jax.random.split(keys[0])
            return Linear((0.02 * jax.random.normal(now, (m, n))).astype(dtype), product)

        self.config, self.product = config, product
        self.model = Backbone(config, make, lambda n: jnp.ones(n, dtype))
        self.lm_head = None if config.tie_word_embeddings else make(config.vocab_size, config.hidden_size)

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

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time n"]:
        """The hidden state that enters the first block."""
        return self.model.embed_tokens(tokens)

    def head(self, x: Float[Array, "batch time n"]) -> Float[Array, "batch time vocab"]:
        """Final norm and output projection of the last block's hidden state; float32."""
        x = self.model.norm(x)
        weight = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight.get_value()
        return self.product(x, dense(weight, x.dtype))

    def rope(self, time: int) -> tuple[Float[Array, "time half"], Float[Array, "time half"]]:
        """(cos, sin) of the rotary angles of positions 0 … time − 1."""
        angles = jnp.arange(time, dtype=jnp.float32)[:, None] * frequencies(self.config)[None, :]
        return jnp.cos(angles), jnp.sin(angles)

    def linears(self) -> dict[str, Linear]:
        """Every linear layer of the blocks by its Hugging Face name, in the order q, k, v, o, gate, up, down per layer."""
        out: dict[str, Linear] = {}
        for i, block in enumerate(self.model.layers):
            for room, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
                part = getattr(block, room)
                out |= {f"model.layers.{i}.{room}.{name}_proj": getattr(part, f"{name}_proj") for name in names}
        return out

    def densified(self) -> "Llama":
        """A copy whose packed weights are decoded: the same logits, faster to call again and again, more memory."""
        copy: Llama = jax.tree.map(lambda leaf: leaf, self)
        for param in copy.tensors().values():
            if hasattr(param.get_value(), "dense"):
                param.set_value(param.get_value().dense().astype(self.model.norm.weight.get_value().dtype))
        return copy

    def tensors(self) -> dict[str, nnx.Param]:
        """Every parameter by its Hugging Face tensor name; set one with `.set_value(...)`."""
        out = {"model.embed_tokens.weight": self.model.embed_tokens.weight}
        out |= {f"{name}.weight": linear.weight for name, linear in self.linears().items()}
        for i, block in enumerate(self.model.layers):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                out[f"model.layers.{i}.{norm}.weight"] = getattr(block, norm).weight
        out["model.norm.weight"] = self.model.norm.weight
        return out if self.lm_head is None else out | {"lm_head.weight": self.lm_head.weight}


def rotate(x: Float[Array, "batch heads time d"], rope: tuple[Array, Array]) -> Float[Array, "batch heads time d"]:
    """Turn each pair (x[i], x[i + d/2]) by its angle; in float32, returned in x's type."""
    cos, sin = rope
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def frequencies(config: LlamaConfig) -> Float[Array, "half"]:
    """Rotary frequencies theta^(−2i/d), stretched as `config.rope_scaling` says.

    llama3: wavelengths up to original/high_freq_factor are kept, those beyond original/low_freq_factor are multiplied by
    `factor`, and frequencies between are blended linearly in original/wavelength.
    """
    freq = config.rope_theta ** (-jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return freq / scaling.factor
    turns = scaling.original_max_position_embeddings * freq / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    return keep * freq + (1 - keep) * freq / scaling.factor
