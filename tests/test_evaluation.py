"""Windows, perplexity and divergence against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.errors import QLRError
from qlr_jax.evaluation import compare, divergence, perplexity, reference, windows
from qlr_jax.models import Llama, LlamaConfig

SMALL = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=4)


run = jax.jit(lambda model, tokens: model(tokens))


def built(seed, scale=10.0):
    model = Llama(SMALL, jax.random.key(seed))
    for param in model.tensors().values():
        param.set_value(param.get_value() * (scale if param.get_value().ndim > 1 else 1))
    return model


@pytest.fixture(scope="module")
def pair():
    original, compressed = built(0), built(0)
    for i, linear in enumerate(compressed.linears().values()):
        w = linear.weight.get_value()
        linear.weight.set_value(w + 0.05 * jax.random.normal(jax.random.key(i), w.shape))
    return original, compressed


@pytest.fixture(scope="module")
def rows():
    return np.random.default_rng(0).integers(0, 40, (5, 7)).astype(np.int32)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def oracle(model, rows):
    """(log-probabilities, perplexity) in float64 by the protocol: the mean of the windows' means."""
    logp = log_softmax(run(model, jnp.asarray(rows)))
    means = [-np.mean([logp[b, t, rows[b, t + 1]] for t in range(rows.shape[1] - 1)]) for b in range(len(rows))]
    return logp, np.exp(np.mean(means))


@pytest.mark.parametrize("batch", [2, 5, 8])
def test_perplexity_and_divergence_equal_numpy(pair, rows, batch):
    original, compressed = pair
    (p, pp), (q, pq) = oracle(original, rows), oracle(compressed, rows)
    kl = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(perplexity(compressed, rows, batch), pq, rtol=1e-5)
    found = compare(original, compressed, rows, batch)
    assert found.tokens == rows.size and found.kl > 0 and 0 < found.agreement < 1
    np.testing.assert_allclose([found.perplexity_original, found.perplexity], [pp, pq], rtol=1e-5)
    np.testing.assert_allclose(found.perplexity_ratio, pq / pp, rtol=1e-5)
    np.testing.assert_allclose([found.kl, found.kl_p99], [kl.mean(), np.quantile(kl, 0.99)], rtol=1e-4)
    assert found.agreement == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))


def test_reference_gives_the_same_numbers(pair, rows):
    original, compressed = pair
    direct = compare(original, compressed, rows, 2)
    stored = reference(original, rows, 2)
    assert stored.logp.dtype == np.float32
    for a, b in zip(dataclasses.astuple(direct), dataclasses.astuple(divergence(compressed, stored)), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    half = reference(original, rows, 2, max_bytes=2 * rows.size * 40)
    assert half.logp.dtype == np.float16
    assert divergence(compressed, half).kl == pytest.approx(direct.kl, abs=1e-3)
    assert divergence(compressed, half).perplexity == pytest.approx(direct.perplexity, rel=1e-6)
    with pytest.raises(QLRError, match="give at most 4 windows"):
        reference(original, rows, max_bytes=2 * rows.size * 40 - 1)


def test_a_model_does_not_diverge_from_itself(pair, rows):
    same = compare(pair[0], pair[0], rows)
    assert same.kl == 0 and same.agreement == 1 and same.perplexity_ratio == 1


def test_candidates_share_one_compilation(pair, rows):
    from qlr_jax.evaluation.compare import _logp

    _logp.clear_cache()
    stored = reference(pair[0], rows, 2)
    for seed in range(3):
        divergence(built(seed), stored)
    assert _logp._cache_size() == 1


def test_other_vocabulary_is_refused(pair, rows):
    other = Llama(dataclasses.replace(SMALL, vocab_size=41))
    with pytest.raises(QLRError, match=r"40 and 41 tokens"):
        compare(pair[0], other, rows)


class Characters:
    """A tokenizer of one character a token."""

    def __init__(self, bos):
        self.bos_token_id = bos

    def __call__(self, text, add_special_tokens, verbose=True):
        return {"input_ids": [ord(c) for c in text]}


def test_windows_follow_the_protocol():
    text = "".join(chr(i) for i in range(1, 12))
    assert windows(text, Characters(0), 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert windows(text, Characters(None), 5).tolist() == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]
    with pytest.raises(QLRError, match="has 12 tokens, fewer than one window of 13"):
        windows(text, Characters(0), 13)
