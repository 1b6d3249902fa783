"""What an error in a row of the embedding or of the head costs: the metric against KL measured, and shares along the path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.calibration import vocabulary_metrics
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.rows import row_energies, solve_rows
from qlr_jax.core.spec import Spec
from qlr_jax.evaluation import divergence, reference
from qlr_jax.models import EMBEDDING, HEAD, Llama, LlamaConfig, vocabulary_names
from qlr_jax.sensitivity import ATTRIBUTIONS, Case, attribute, path_shares
from qlr_jax.sensitivity.vocabulary import row_errors, vocabulary_probe

VOCABULARY, QUICK = 48, SolverConfig(state_bits=6)


def make(tied, family="llama"):
    config = LlamaConfig(VOCABULARY, 16, 24, 2, 2, tie_word_embeddings=tied, family=family)
    model = Llama(config, jax.random.key(0))
    for name, param in model.tensors().items():  # of a size at which the output says something
        if not name.endswith("norm.weight"):
            param.set_value((2.0 if family == "gemma" else 8.0) * param.get_value())
    return model


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).zipf(1.5, (64, 32)) % VOCABULARY


@pytest.fixture(scope="module", params=["untied", "tied", "gemma"])
def case(request, tokens):
    """A model, its metrics, an error of every row, and the original's log-probabilities."""
    model = make(request.param != "untied", "gemma" if request.param == "gemma" else "llama")
    rng = np.random.default_rng(1)
    sizes = {name: float(jnp.std(model.matrices()[name].weight.get_value())) for name in vocabulary_names(model.config)}
    errors = {name: (0.05 * size * rng.standard_normal((VOCABULARY, 16))).astype(np.float32) for name, size in sizes.items()}
    return model, vocabulary_metrics(model, tokens), errors, reference(model, tokens)


def test_the_metric_predicts_the_kl_that_is_measured(case):
    model, metrics, errors, sample = case
    assert list(metrics) == vocabulary_names(model.config)
    measured = attribute("alone", Case(model, errors, sample, {}, {})).kl
    for name, error in errors.items():
        predicted = 0.5 * float((row_energies(error, metrics[name].hessian) * metrics[name].row_weights).sum())
        assert predicted == pytest.approx(measured[name], rel=0.25)


def test_the_embeddings_metric_is_that_of_gradients_one_by_one(tokens):
    """E[g gᵀ] over labels of the model's own distribution, from all labels instead of drawn ones, in float64."""
    model, part = make(False), jnp.asarray(tokens[:1, :3])
    drawn = vocabulary_metrics(model, np.repeat(np.asarray(part), 1500, axis=0), batch=500)[EMBEDDING].hessian

    @jax.jit
    def logp_and_slopes(x):
        logp = lambda x: jax.nn.log_softmax(model.head(_through(model, x)), axis=-1)[0]  # noqa: E731
        return logp(x), jax.jacrev(logp)(x)[:, :, 0]

    logp, slopes = (np.asarray(a, np.float64) for a in logp_and_slopes(model.embed(part)))  # slopes: (t, v, at, n)
    chances = np.exp(logp)
    exact = np.einsum("tv,tvan,tvam->nm", chances, slopes, slopes) / 3
    assert np.abs(drawn - exact).max() < 0.15 * np.abs(exact).max()


def _through(model, x):
    for i in range(model.config.num_hidden_layers):
        x = model.block(i)(x, model.rope(x.shape[1]))
    return x


def test_tokens_that_come_often_weigh_more_and_counts_may_be_given(tokens):
    metric = vocabulary_metrics(make(False), tokens)[EMBEDDING]
    counts = np.bincount(tokens.reshape(-1), minlength=VOCABULARY)
    np.testing.assert_allclose(metric.row_weights, counts / counts.sum())
    other = vocabulary_metrics(make(False), tokens, counts=np.ones(VOCABULARY))[EMBEDDING]
    np.testing.assert_allclose(other.row_weights, 1 / VOCABULARY)


def test_path_shares_add_up_with_embedding_and_head(case):
    model, _, errors, sample = case
    name = "model.layers.1.mlp.up_proj"
    weight = np.asarray(model.linears()[name].weight.get_value())
    errors = {**errors, name: (0.05 * np.std(weight) * np.random.default_rng(2).standard_normal(weight.shape)).astype(np.float32)}
    shares = path_shares(model, errors, sample)
    kept = {n: model.matrices()[n].weight.get_value() for n in errors}
    for n, error in errors.items():
        model.matrices()[n].weight.set_value(kept[n] + error)
    together = divergence(model, sample).kl
    for n, value in kept.items():
        model.matrices()[n].weight.set_value(value)
    assert sum(shares.values()) == pytest.approx(together, rel=0.02)
    assert all(share > 0 for share in shares.values())


@pytest.mark.parametrize("method", sorted(set(ATTRIBUTIONS) - {"path"}))
def test_every_attribution_takes_them(method, tokens):
    model = make(False)
    sample, metrics = reference(model, tokens[:8]), vocabulary_metrics(model, tokens[:8])
    name = "model.layers.0.self_attn.q_proj"
    draw = np.random.default_rng(0)
    shapes = {n: model.matrices()[n].weight.get_value().shape for n in (EMBEDDING, HEAD, name)}
    errors = {n: 1e-2 * draw.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
    hessians = {n: m.hessian for n, m in metrics.items()} | {name: np.eye(16, dtype=np.float32)}
    found = attribute(method, Case(model, errors, sample, hessians, {name: np.eye(16, dtype=np.float32)})).kl
    assert list(found) == list(errors) and all(value > 0 for value in found.values())


def test_options_follow_from_a_sample_of_rows():
    rng = np.random.default_rng(0)
    weight = (np.exp(rng.standard_normal((600, 1))) * rng.standard_normal((600, 32))).astype(np.float32)
    half = rng.standard_normal((32, 32)) * np.geomspace(1, 0.1, 32)
    hessian, counts = (half @ half.T).astype(np.float32), rng.zipf(1.5, 600).clip(max=1000).astype(float)
    specs = [Spec.parse(text) for text in ("bf16", "int-4g32", "trellis-3/rows", "trellis-2.5/rows")]
    found = row_errors(weight, hessian, counts, specs, config=QUICK, search=QUICK, seed=0)
    for spec in specs:
        solved = solve_rows(weight, hessian, spec, row_weights=counts, config=QUICK).stats["weighted_error"]
        assert found[str(spec)] == pytest.approx(solved, rel=0.15)
    assert vocabulary_probe(specs) == "int-4g32" and vocabulary_probe(specs[2:]) == "trellis-3/rows"
    assert not any(row_errors(0 * weight, hessian, counts, specs, config=QUICK, search=QUICK, seed=0).values())
