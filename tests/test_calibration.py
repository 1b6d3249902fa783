"""Text, tokens, Hessians and end-loss coefficients, each against a float64 numpy or explicit oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.calibration import (
    WEIGHTINGS,
    calibration_tokens,
    hessians,
    matrix_hessians,
    output_hessians,
    read_text,
    split_of,
    squared_gradients,
    standard_library,
    token_weights,
)
from qlr_jax.errors import QLRError
from qlr_jax.models import Llama, LlamaConfig, input_names, input_of, linear_names

SMALL = LlamaConfig(
    vocab_size=48, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)


@pytest.fixture(scope="module")
def model():
    model = Llama(SMALL, jax.random.key(0))
    for name, param in model.tensors().items():  # layers that matter, norms that are not 1
        value = param.get_value()
        param.set_value(value * 10 if value.ndim > 1 else value * jax.random.uniform(jax.random.key(len(name)), value.shape) * 2)
    return model


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 48, (5, 9)).astype(np.int32)


# --- text ------------------------------------------------------------------------------------------------------------------


def test_standard_library_splits_are_disjoint_and_sized():
    sizes = {split: len(standard_library(split)) for split in ("train", "calibration", "heldout")}
    total = sum(sizes.values())
    assert total > 5e6
    assert 0.03 < sizes["heldout"] / total < 0.25 and 0.01 < sizes["calibration"] / total < 0.12
    assert split_of("json/decoder.py") == split_of("json/decoder.py")


def test_standard_library_leaves_out_tests_and_undecodable_files(tmp_path):
    files = ["a/b.py", "test/x.py", "lib2to3/tests/y.py", "idlelib/idle_test/z.py", "site-packages/p.py", "dist-packages/q.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}")
    (tmp_path / "a/bad.py").write_bytes(b"\xff\xfe\x00")
    found = []
    for split in ("train", "calibration", "heldout"):
        try:
            found.append(standard_library(split, tmp_path))
        except QLRError as error:
            assert "no Python module" in str(error)
    assert found == ["# a/b.py"]
    with pytest.raises(QLRError, match="'validation' is unknown"):
        standard_library("validation")


def test_read_text(tmp_path):
    one, two, empty, bad = (tmp_path / n for n in ("one", "two", "empty", "bad"))
    one.write_text("eins")
    two.write_text("zwölf", encoding="utf-8")
    empty.write_text(" \n")
    bad.write_bytes(b"\xff\xff")
    assert read_text(one) == "eins" and read_text([one, str(two)]) == "eins\nzwölf"
    for path, message in ((tmp_path / "none", "does not exist"), (empty, "is empty"), (bad, "not UTF-8")):
        with pytest.raises(QLRError, match=message):
            read_text(path)
    with pytest.raises(QLRError, match="no text file"):
        read_text([])


class Characters:
    """A tokenizer of one character a token."""

    bos_token_id: int | None = 0

    def __call__(self, text, add_special_tokens, verbose=True):
        assert add_special_tokens is False
        return {"input_ids": [ord(c) for c in text]}


def test_calibration_tokens():
    text = "".join(chr(i) for i in range(1, 41))
    out = calibration_tokens(text, Characters(), 4, 11)
    assert out.shape == (4, 11) and out.dtype == np.int32 and (out[:, 0] == 0).all()
    assert len(np.unique(out[:, 1:])) == 40  # exactly the text: nothing twice, nothing left
    longer = calibration_tokens(text * 3, Characters(), 4, 11)
    assert longer[0, 1] == 1 and longer[-1, -1] == 40  # from the first token to the last
    assert calibration_tokens(text, Characters(), 1, 5)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(QLRError, match=r"has 40 tokens, but 5 sequences of 11 need 50"):
        calibration_tokens(text, Characters(), 5, 11)


# --- Hessians --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(model, tokens):
    """H of an input under token weights w, in float64, from the inputs of one whole forward pass."""

    @jax.jit
    def inputs(model):
        seen = {}
        model(jnp.asarray(tokens), tap=lambda name, x: seen.setdefault(name, x))
        return seen

    seen = {name: np.asarray(x, np.float64) for name, x in inputs(model).items()}
    return lambda name, w: np.einsum("bt,bti,btj->ij", w, seen[name], seen[name]) / w.sum()


def assert_is(found, want):
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(found, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_hessians_equal_oracle(model, tokens, oracle, batch, weighted):
    w = np.random.default_rng(1).exponential(size=tokens.shape) if weighted else None
    steps = []
    found = hessians(model, tokens, batch=batch, weights=w, progress=lambda done, of: steps.append((done, of)))
    assert list(found) == input_names(SMALL) and steps == [(1, 2), (2, 2)]
    for name, h in found.items():
        assert_is(h, oracle(name, np.ones(tokens.shape) if w is None else w))


def test_hessians_of_named_weights_equal_oracle(model, tokens, oracle):
    """An input under weights of its own beside two of its layers under theirs, in any order; what is not named is not computed."""
    rng, prefix = np.random.default_rng(2), "model.layers.1."
    names = [prefix + n for n in ("self_attn.v_proj", "self_attn.qkv", "mlp.down_proj", "self_attn.q_proj")]
    w = {name: 10.0 ** rng.uniform(-3, 3, tokens.shape) for name in names}
    found = hessians(model, tokens, batch=2, weights=w)
    assert list(found) == names
    for name in names:
        assert_is(found[name], oracle(name if name in input_names(SMALL) else input_of(name), w[name]))


def test_one_compilation_serves_all_blocks_and_batches(model, tokens):
    from qlr_jax.calibration.hessians import _advance

    _advance.clear_cache()
    hessians(model, tokens, batch=2)
    assert _advance._cache_size() == 1


def test_hessian_refusals(model, tokens):
    with pytest.raises(QLRError, match="48 lies outside the vocabulary of 48"):
        hessians(model, tokens * 0 + 48)
    with pytest.raises(QLRError, match=r"shape \(9,\)"):
        hessians(model, tokens[0])
    with pytest.raises(QLRError, match="they must agree"):
        hessians(model, tokens, weights=np.ones((5, 8)))
    for bad in (np.zeros(tokens.shape), -np.ones(tokens.shape), np.full(tokens.shape, np.nan)):
        with pytest.raises(QLRError, match=r"weights of model.layers.0.mlp.gate_up must be finite, at least 0, and not all 0"):
            hessians(model, tokens, weights={"model.layers.0.mlp.gate_up": bad})
    with pytest.raises(QLRError, match=r"'model.layers.2.mlp.up_proj', which this model does not have"):
        hessians(model, tokens, weights={"model.layers.2.mlp.up_proj": np.ones(tokens.shape)})
    broken = jax.tree.map(lambda leaf: leaf, model)
    up = broken.linears()["model.layers.1.mlp.up_proj"].weight
    up.set_value(up.get_value().at[0, 0].set(jnp.inf))
    with pytest.raises(QLRError, match=r"enter model.layers.1.mlp.down_proj are not finite"):
        hessians(broken, tokens)


# --- squared gradients of the end loss -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perturbed(model, tokens):
    """∂loss/∂(a perturbation added to the output) of every linear layer, float64: one whole backward pass of plain jax.grad."""
    shapes = {}
    jax.eval_shape(lambda: model(jnp.asarray(tokens), adjust=lambda name, y: shapes.setdefault(name, y)))
    shapes = {name: jnp.zeros(y.shape) for name, y in shapes.items()}

    def loss(bumps):
        logp = jax.nn.log_softmax(model(jnp.asarray(tokens), adjust=lambda name, y: y + bumps[name]))
        return -jnp.sum(logp[:, :-1] * jax.nn.one_hot(tokens[:, 1:], 48))

    return {name: np.asarray(g, np.float64) for name, g in jax.jit(jax.grad(loss))(shapes).items()}


def test_squared_gradients_equal_explicit_perturbations(model, tokens, perturbed):
    steps = []
    found = squared_gradients(model, tokens, batch=2, progress=steps.append)  # the last batch is filled up
    assert list(found) == linear_names(SMALL) and steps == [1, 1]  # blocks
    for name, g in perturbed.items():
        want = np.square(g).sum(-1)
        np.testing.assert_allclose(found[name], want, rtol=1e-3, atol=1e-6 * want.max())
        assert (found[name][:, -1] == 0).all() and (found[name][:, 1:-1] > 0).all()  # of one token alone q and k do not matter


def test_output_hessians_equal_explicit_perturbations(model, tokens):
    """Labels drawn as the function draws them, then one whole backward pass of plain jax.grad in place of the streamed one."""
    names, steps = [n for n in linear_names(SMALL) if not n.endswith("o_proj")], []
    found = output_hessians(model, tokens, names, seed=3, batch=len(tokens), progress=steps.append)
    assert list(found) == names and steps == [1, 1]
    x = jnp.asarray(tokens)
    labels = jax.jit(lambda m: jax.random.categorical(jax.random.fold_in(jax.random.key(3), 0), m(x)))(model)
    shapes = {}
    jax.eval_shape(lambda: model(x, adjust=lambda name, y: shapes.setdefault(name, y)))

    def loss(bumps):
        logp = jax.nn.log_softmax(model(x, adjust=lambda name, y: y + bumps[name]))
        return -jnp.sum(logp * jax.nn.one_hot(labels, 48))

    whole = jax.jit(jax.grad(loss))({name: jnp.zeros(y.shape) for name, y in shapes.items()})
    for name in names:
        g = np.asarray(whole[name], np.float64).reshape(-1, whole[name].shape[-1])
        assert_is(found[name], g.T @ g / tokens.size)
    few = output_hessians(model, tokens, names[-1:], seed=3, batch=2)  # the last batch is filled up, with nothing
    assert list(few) == names[-1:] and np.isfinite(few[names[-1]]).all()


def test_output_hessians_predict_the_divergence_of_a_small_error(model, tokens):
    """KL ≈ ½ tr(G E H Eᵀ) for one matrix, errors random: right on the mean to the accuracy of a Kronecker factorisation."""
    name = "model.layers.1.mlp.down_proj"
    many = np.random.default_rng(0).integers(0, 48, (64, tokens.shape[1]))
    g, h = output_hessians(model, many, [name], seed=1)[name], hessians(model, many)[name]
    weight = model.linears()[name].weight.get_value()
    e = 1e-2 * np.asarray(weight).std() * np.random.default_rng(1).standard_normal(weight.shape).astype(np.float32)
    changed = jax.tree.map(lambda leaf: leaf, model)
    changed.linears()[name].weight.set_value(weight + e)
    p, q = (np.asarray(jax.nn.log_softmax(m(jnp.asarray(many))), np.float64) for m in (model, changed))
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    assert kl == pytest.approx(0.5 * np.sum((g @ e) * (e @ h)), rel=0.3)


def test_squared_gradients_compile_one_block_once(model, tokens):
    from qlr_jax.calibration.gradients import _pull_back

    _pull_back.clear_cache()
    squared_gradients(model, tokens, batch=2)
    assert _pull_back._cache_size() == 1


def test_squared_gradients_refuse(model, tokens):
    for of in (squared_gradients, output_hessians):
        with pytest.raises(QLRError, match=r"shape \(5, 1\)"):
            of(model, tokens[:, :1])
    broken = jax.tree.map(lambda leaf: leaf, model)
    down = broken.linears()["model.layers.1.mlp.down_proj"].weight
    down.set_value(down.get_value().at[0, 0].set(jnp.inf))
    with pytest.raises(QLRError, match=r"gradient at the output of model.layers.0.self_attn.q_proj is not finite"):
        squared_gradients(broken, tokens)


# --- weights of tokens -----------------------------------------------------------------------------------------------------


def test_token_weights_are_normalised_by_matrix_before_they_are_added(tokens):
    rng = np.random.default_rng(3)
    squares = {name: 10.0 ** rng.uniform(-9, 9) * rng.exponential(size=tokens.shape) for name in linear_names(SMALL)}
    dead = "model.layers.0.mlp.gate_proj"
    squares[dead] = np.zeros(tokens.shape)  # the loss does not feel it: all tokens alike
    alone = token_weights(squares, by_matrix=True)
    assert list(alone) == linear_names(SMALL)
    for name, s in squares.items():
        np.testing.assert_allclose(alone[name], np.ones(tokens.shape) if name == dead else s / s.mean(), rtol=1e-12)
    shared = token_weights(squares)
    assert list(shared) == input_names(SMALL)
    for x, w in shared.items():
        np.testing.assert_allclose(w, sum(alone[name] for name in squares if input_of(name) == x), rtol=1e-12)
        assert w.mean() == pytest.approx(sum(input_of(name) == x for name in squares))  # every matrix has one vote


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_matrix_hessians_equal_oracle(model, tokens, oracle, perturbed, weighting):
    s = {name: np.square(g).sum(-1) for name, g in perturbed.items()}
    names = [name for name in linear_names(SMALL) if not name.endswith("gate_proj")]  # up then has its input for itself
    found = matrix_hessians(model, tokens, names, weighting)
    assert list(found) == names
    for name in names:
        beside = [n for n in names if input_of(n) == input_of(name)]
        among = {"plain": [], "loss": beside, "loss-by-matrix": [name]}[weighting]
        assert_is(found[name], oracle(input_of(name), sum((s[n] / s[n].mean() for n in among), np.full(tokens.shape, 1e-12))))
        assert all((found[name] is found[n]) == (weighting != "loss-by-matrix" or n == name) for n in beside)


def test_an_unknown_weighting_is_refused(model, tokens):
    with pytest.raises(QLRError, match="'fisher' of Hessians is not known; give one of plain, loss, loss-by-matrix"):
        matrix_hessians(model, tokens, linear_names(SMALL), "fisher")
