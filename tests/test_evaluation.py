"""Windows, perplexity and divergence against numpy."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.errors import QLRError
from qlr_jax.evaluation import (
    Positions,
    compare,
    cut,
    divergence,
    drift,
    intervals,
    perplexity,
    positions,
    reference,
    run_windows,
    summary,
    windows,
    worst_token,
)
from qlr_jax.evaluation.windows import fitting_batch
from qlr_jax.models import Llama, LlamaConfig
from qlr_jax.models.forward import through

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


@pytest.mark.parametrize("batch", [2, 8])
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


@pytest.mark.parametrize("stored", [False, True])
def test_parts_of_the_positions_make_no_difference(pair, rows, monkeypatch, stored):
    """Five at a time, of seven: the last part begins before the one before it ends."""
    from qlr_jax.models import forward

    def measured():
        for name in ("_differences", "_nll", "_log_probabilities"):
            getattr(sys.modules["qlr_jax.evaluation.compare"], name).clear_cache()
        if stored:
            return dataclasses.astuple(divergence(pair[1], reference(pair[0], rows)))
        return *dataclasses.astuple(positions(*pair, rows, 2)), perplexity(pair[1], rows)

    whole = measured()
    monkeypatch.setattr(forward, "AT_ONCE", 5)
    assert rows.shape[1] % 5 and rows.shape[1] > 5
    for a, b in zip(whole, measured(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_an_original_that_was_run_once_gives_the_same_figures(pair, rows):
    original = run_windows(pair[0], rows, 2)
    assert compare(original, pair[1], rows, 2) == compare(*pair, rows, 2)
    with pytest.raises(QLRError, match="run on other windows"):
        compare(original, pair[1], rows[:, ::-1])
    with pytest.raises(QLRError, match="40 and 41 tokens"):
        compare(original, Llama(dataclasses.replace(SMALL, vocab_size=41)), rows)


def test_candidates_share_one_compilation(pair, rows):
    from qlr_jax.evaluation.compare import _differences

    through.clear_cache()
    _differences.clear_cache()
    stored = reference(pair[0], rows, 2)
    for seed in range(3):
        divergence(built(seed), stored)
    assert through._cache_size() == _differences._cache_size() == 1  # of all blocks, too


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


def test_cut_tells_what_it_left_out():
    found = cut("".join(chr(i) for i in range(1, 12)), Characters(0), 5)
    assert found.rows.shape == (2, 5) and found.bos == 0 and found.dropped == 2
    assert cut("abcdefghij", Characters(None), 5).bos is None and cut("abcdefghij", Characters(None), 5).dropped == 0


def test_a_batch_is_as_large_as_its_logits_may_be():
    assert fitting_batch(2048, 256) == 8 and fitting_batch(128_256, 2048) == 1 and fitting_batch(32_000, 2048, most=2) == 2


# ------------------------------------------------------------------------------------- intervals, worst token, drift


def test_positions_are_what_the_comparison_is_made_of(pair, rows):
    found = positions(*pair, rows, 2)
    (p, _), (q, _) = oracle(pair[0], rows), oracle(pair[1], rows)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-6)
    assert (found.top_original == p.argmax(-1)).all() and (found.top == q.argmax(-1)).all()
    assert summary(found) == compare(*pair, rows, 2)


def test_intervals_equal_resampling_by_hand(pair):
    rows = np.random.default_rng(2).integers(0, 40, (9, 7)).astype(np.int32)
    found = positions(*pair, rows)
    given = intervals(found, resamples=50, seed=3)
    counts = np.random.default_rng(3).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=50)
    figures = {name: [] for name in given}
    for count in counts:
        drawn = Positions(*(np.repeat(getattr(found, f.name), count, axis=0) for f in dataclasses.fields(found)))
        one = summary(drawn)
        for name in figures:
            figures[name].append(getattr(one, name))
    for name, values in figures.items():
        np.testing.assert_allclose(given[name], np.quantile(values, [0.025, 0.975]), rtol=1e-5, err_msg=name)
        assert given[name][0] <= getattr(summary(found), name) <= given[name][1]


def test_intervals_are_seeded_and_narrow_with_more_windows(pair):
    many = positions(*pair, np.random.default_rng(1).integers(0, 40, (64, 7)).astype(np.int32))
    few = Positions(*(getattr(many, f.name)[:8] for f in dataclasses.fields(many)))
    assert intervals(many) == intervals(many) != intervals(many, seed=1)

    def width(found):
        low, high = intervals(found)["kl"]
        return high - low

    assert width(many) < 0.6 * width(few)
    assert intervals(Positions(*(getattr(many, f.name)[:7] for f in dataclasses.fields(many)))) == {}


def test_a_model_that_is_not_a_number_is_seen(pair, rows):
    broken = built(0)
    broken.model.norm.weight.set_value(broken.model.norm.weight.get_value() * jnp.nan)
    found = positions(pair[0], broken, np.tile(rows, (2, 1)))
    assert np.isnan(summary(found).kl) and np.isnan(intervals(found)["kl"][0])
    assert np.isnan(drift(pair[0], broken_layers(), rows).layers[-1])


def broken_layers():
    broken = built(0)
    weight = broken.model.layers[0].mlp.down_proj.weight
    weight.set_value(weight.get_value() * jnp.nan)
    return broken


class Words:
    def decode(self, ids):
        return " ".join(f"w{i}" for i in ids)


def test_the_worst_token_is_named(pair, rows):
    found = positions(*pair, rows)
    worst = worst_token(found, Words())
    window, at = np.unravel_index(found.kl.argmax(), found.kl.shape)
    assert (worst["window"], worst["position"]) == (window, at) and worst["kl"] == pytest.approx(found.kl.max())
    assert worst["before"].split()[-1] == f"w{rows[window, at]}"
    assert worst["original"] == f"w{found.top_original[window, at]}" and worst["compressed"] == f"w{found.top[window, at]}"
    assert worst["next"] == (f"w{rows[window, at + 1]}" if at + 1 < rows.shape[1] else None)


def test_drift_equals_the_hidden_states_of_two_whole_passes(rows):
    config = dataclasses.replace(SMALL, num_hidden_layers=3)
    one, two = Llama(config, jax.random.key(0)), Llama(config, jax.random.key(0))
    weight = two.model.layers[1].mlp.down_proj.weight
    weight.set_value(weight.get_value() + 0.1)

    def states(model):
        x, found = model.embed(rows), []
        for block in model.model.layers:
            x = through(block, x, model.rope(rows.shape[1]))
            found.append(np.asarray(x, np.float64))
        return found

    want = [
        np.mean(np.linalg.norm(b - a, axis=-1) / np.linalg.norm(a, axis=-1)) for a, b in zip(*map(states, (one, two)), strict=True)
    ]
    found = drift(one, two, rows, 2)
    np.testing.assert_allclose(found.layers, want, rtol=1e-4, atol=1e-7)
    assert found.layers[0] == found.embedding == 0 and found.worst in (1, 2) and found.tokens == rows.size
    with pytest.raises(QLRError, match="3 layers of width 16 and 1 of 16"):
        drift(one, built(0), rows)
