"""Text, tokens, Hessians and end-loss coefficients, each against a float64 numpy or explicit oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.calibration import calibration_tokens, hessians, output_gradients, read_text, split_of, standard_library
from qlr_jax.errors import QLRError
from qlr_jax.models import Llama, LlamaConfig, input_names, linear_names

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


def oracle(model, tokens, w):
    """H in float64 from the inputs of one whole forward pass."""

    @jax.jit
    def inputs(model):
        seen = {}
        model(jnp.asarray(tokens), tap=lambda name, x: seen.setdefault(name, x))
        return seen

    seen = {name: np.asarray(x, np.float64) for name, x in inputs(model).items()}
    return {name: np.einsum("bt,bti,btj->ij", w, x, x) / w.sum() for name, x in seen.items()}


@pytest.mark.parametrize("batch", [2, 8])
@pytest.mark.parametrize("weighted", [False, True])
def test_hessians_equal_oracle(model, tokens, batch, weighted):
    w = np.random.default_rng(1).exponential(size=tokens.shape) if weighted else None
    steps = []
    found = hessians(model, tokens, batch=batch, weights=w, progress=lambda done, of: steps.append((done, of)))
    assert list(found) == input_names(SMALL) and steps == [(1, 2), (2, 2)]
    for name, h in oracle(model, tokens, np.ones(tokens.shape) if w is None else w).items():
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], found[name].T)
        np.testing.assert_allclose(found[name], h, rtol=1e-4, atol=1e-5 * np.abs(h).max())


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
    with pytest.raises(QLRError, match="not all 0"):
        hessians(model, tokens, weights=np.zeros(tokens.shape))
    broken = jax.tree.map(lambda leaf: leaf, model)
    up = broken.linears()["model.layers.1.mlp.up_proj"].weight
    up.set_value(up.get_value().at[0, 0].set(jnp.inf))
    with pytest.raises(QLRError, match=r"enter model.layers.1.mlp.down_proj are not finite"):
        hessians(broken, tokens)


# --- end-loss coefficients -------------------------------------------------------------------------------------------------


def test_output_gradients_equal_explicit_perturbations(model, tokens):
    shapes = {}
    jax.eval_shape(lambda: model(jnp.asarray(tokens), adjust=lambda name, y: shapes.setdefault(name, y)))
    shapes = {name: jnp.zeros(y.shape) for name, y in shapes.items()}

    def loss(bumps):
        logp = jax.nn.log_softmax(model(jnp.asarray(tokens), adjust=lambda name, y: y + bumps[name]))
        return -jnp.sum(logp[:, :-1] * jax.nn.one_hot(tokens[:, 1:], 48))

    grads = jax.jit(jax.grad(loss))(shapes)
    found = output_gradients(model, tokens, batch=2)  # the last batch is filled up
    assert list(found) == linear_names(SMALL)
    for name, g in grads.items():
        np.testing.assert_allclose(found[name], np.mean(np.asarray(g, np.float64) ** 2), rtol=1e-4)


def test_output_gradients_refuse(model, tokens):
    with pytest.raises(QLRError, match=r"shape \(5, 1\)"):
        output_gradients(model, tokens[:, :1])
