"""Text, tokens, Hessians and end-loss coefficients, each against a float64 numpy or explicit oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.calibration import (
    WEIGHTINGS,
    EndSums,
    backward,
    calibration_tokens,
    descent,
    forward_states,
    hessians,
    matrix_hessians,
    output_hessians,
    read_text,
    row_metrics,
    split_of,
    squared_gradients,
    standard_library,
    token_weights,
    vocabulary_metrics,
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


# --- what is not finite ----------------------------------------------------------------------------------------------------

BAD = 47  # a word that only sequence 2 of `many` holds
LEFT = np.arange(128) != 2


@pytest.fixture(scope="module")
def many():
    rows = np.random.default_rng(4).integers(0, BAD, (128, 6)).astype(np.int32)
    rows[2, 4] = BAD
    return rows


def broken_at(model, place):
    """The model with one word that is infinite, or on which the second block overflows on the way up or on the way down."""
    changed = jax.tree.map(lambda leaf: leaf, model)
    tensors = changed.tensors()

    def put(name, change):
        tensors[name].set_value(change(tensors[name].get_value().at))

    if place == "embedding":
        put("model.embed_tokens.weight", lambda at: at[BAD, 3].set(jnp.inf))
        return changed
    # before the second block's MLP only that word has anything in the first channel, and all have something in the second
    rows = jnp.stack([jnp.where(jnp.arange(48) == BAD, 1.0, 0.0), jnp.ones(48)], axis=1)
    put("model.embed_tokens.weight", lambda at: at[:, :2].set(rows))
    for name in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.self_attn.o_proj"):
        put(f"model.layers.{name}.weight", lambda at: at[:2].set(0.0))
    put("model.layers.1.mlp.up_proj.weight", lambda at: at[0, 0].set(1e28))
    if place == "up":  # the word opens a gate that is shut to all others
        put("model.layers.1.mlp.gate_proj.weight", lambda at: at[0, :2].set(jnp.array([1e28, -1e6])))
    else:  # half open it lets nothing through; but its gradient is of up's size
        put("model.layers.1.mlp.gate_proj.weight", lambda at: at[0].set(0.0))
    return changed


@pytest.mark.parametrize("place, where", [("embedding", "0.self_attn.qkv"), ("up", "1.mlp.down_proj")])
@pytest.mark.parametrize("batch", [8, 48])
def test_a_sequence_that_is_not_finite_is_in_no_hessian_from_there_on(model, many, place, where, batch):
    broken = broken_at(model, place)
    w = np.random.default_rng(5).exponential(size=many.shape).astype(np.float32)
    found, without = hessians(broken, many, batch=batch, weights=w), hessians(broken, many[LEFT], batch=batch, weights=w[LEFT])
    assert found.left_out == {2: f"the activations that enter model.layers.{where}"} and not without.left_out
    assert found.summary().startswith("1 of 128 sequences is left out") and without.summary() == ""
    for name, h in found.items():
        if place == "embedding" or ".1." in name:
            assert_is(h, without[name])
        else:  # before that it counts like any other
            assert np.isfinite(h).all() and not np.allclose(h, without[name], rtol=1e-3)


def test_more_than_a_hundredth_of_the_sequences_ends_it(model, many):
    broken = broken_at(model, "embedding")
    says = (
        r"enter model.layers.0.self_attn.qkv are not finite in 1 of 99 sequences \(in all 1.01 % of them are not, and at most 1 %"
    )
    with pytest.raises(QLRError, match=says):
        hessians(broken, many[:99])
    assert hessians(broken, many[:100]).left_out.keys() == {2}
    for of in (squared_gradients, output_hessians):
        with pytest.raises(QLRError, match=r"leave block model.layers.0 are not finite in 1 of 99 sequences"):
            of(broken, many[:99])
    alone = np.zeros(many.shape, np.float32)
    alone[2] = 1
    with pytest.raises(QLRError, match=r"no token with a weight is left for model.layers.0"):
        hessians(broken, many, weights=alone)


PLACES = {
    "embedding": "the hidden states that leave block model.layers.0",
    "up": "the hidden states that leave block model.layers.1",
    "down": "the gradients at the output of model.layers.1.mlp.gate_proj",
}


@pytest.mark.parametrize("place", PLACES)
def test_gradients_leave_out_what_is_not_finite(model, many, place):
    broken, rest = broken_at(model, place), many[LEFT]
    squares, without = squared_gradients(broken, many, batch=16), squared_gradients(broken, rest, batch=16)
    assert squares.left_out == {2: PLACES[place]} and not without.left_out
    for name, s in squares.items():
        assert (s[2] == 0).all()
        np.testing.assert_allclose(s[LEFT], without[name], rtol=1e-4, atol=1e-6 * without[name].max())
    ordered = np.concatenate([rest, many[2:3]])  # each sequence's labels hang on its place: the rest first
    g, without = (output_hessians(broken, rows, seed=1, batch=16) for rows in (ordered, rest))
    assert g.left_out == {127: PLACES[place]} and not without.left_out
    for name in g:
        assert_is(g[name], without[name])


def test_matrix_hessians_name_what_all_passes_left_out(model, many, oracle):
    broken = broken_at(model, "up")
    told = []

    class Told:
        def stage(self, title, total=None):
            from qlr_jax.progress import silent

            return silent().stage(title, total)

        def say(self, line):
            told.append(line)

    names = linear_names(SMALL)
    found, without = (matrix_hessians(broken, rows, names, "loss", Told()) for rows in (many, many[LEFT]))
    assert found.left_out == {2: "the hidden states that leave block model.layers.1"} and found.sequences == 128
    assert told == [
        "calibrating: 1 of 128 sequences is left out: the hidden states that leave block model.layers.1 are not finite there"
    ]
    for name in names:
        assert_is(found[name], without[name])


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
    keys = [jax.random.fold_in(jax.random.key(3), row) for row in range(len(tokens))]  # every sequence its own
    draws = np.stack([jax.random.uniform(key, tokens.shape[1:]) for key in keys])
    logits = np.asarray(jax.jit(lambda m: m(x))(model), np.float64)
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    below = np.cumsum(chances / chances.sum(-1, keepdims=True), axis=-1)
    labels = (below <= draws[..., None]).sum(-1)
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
    assert list(few) == names[-1:]
    assert_is(few[names[-1]], found[names[-1]])


def test_parts_of_the_positions_make_no_difference_to_gradients(model, tokens, monkeypatch):
    """At the head a few positions at a time, the last part beginning before the one before it ends."""
    from qlr_jax.calibration import descent
    from qlr_jax.models import forward

    name, counts, found = "model.layers.1.mlp.down_proj", np.ones(48), []
    for at_once in (forward.AT_ONCE, 2 * 5):
        monkeypatch.setattr(forward, "AT_ONCE", at_once)
        descent._head_gradient.clear_cache()
        sums = EndSums()
        found.append([output_hessians(model, tokens, [name], batch=2, ends=sums)[name]])
        found[-1] += [a for m in row_metrics(model, sums, counts, tokens.shape[1]).values() for a in (m.hessian, m.row_weights)]
    assert tokens.shape[1] > 5 and tokens.shape[1] % 5
    alone = vocabulary_metrics(model, tokens, counts=counts, batch=2)
    found.append([found[0][0], *(a for m in alone.values() for a in (m.hessian, m.row_weights))])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("size", [300, 512])
def test_labels_are_drawn_by_the_distribution_function(size):
    """Of one group and a part, and of two: where the sum of probabilities passes the draw, and never a token of no probability."""
    from qlr_jax.calibration.descent import drawn

    draw = np.random.default_rng(0)
    p = draw.exponential(size=(5, 64, size)) ** 3 * (draw.random(size) < 0.7)
    p /= p.sum(-1, keepdims=True)
    u = draw.random((5, 64))
    u[0, :3] = 0.0, 1 - 2**-24, 0.5
    got = np.asarray(jax.jit(drawn)(jnp.asarray(p, jnp.float32), jnp.asarray(u, jnp.float32)))
    below = np.cumsum(p, axis=-1)
    assert (np.take_along_axis(p, got[..., None], axis=-1) > 0).all()
    assert (np.take_along_axis(below, got[..., None], axis=-1)[..., 0] > u - 1e-6).all()
    before = np.where(got > 0, np.take_along_axis(below, np.maximum(got - 1, 0)[..., None], axis=-1)[..., 0], 0)
    assert (before < u + 1e-6).all()


@pytest.mark.parametrize("size", [3, 255, 300, 700])
def test_a_second_moment_in_blocks_is_that_of_one_product(size):
    from qlr_jax.calibration.second_moment import second_moment

    x = np.random.default_rng(0).standard_normal((2, 5, size)).astype(np.float32)
    rows = x.reshape(-1, size).astype(np.float64)
    assert_is(np.asarray(jax.jit(second_moment)(x)), rows.T @ rows)


@pytest.mark.parametrize("in_file", [False, True])
def test_a_pass_for_both_hessians_is_that_for_each(model, tokens, monkeypatch, in_file):
    """What the pass for H leaves at every block is what the backward pass would have computed on its way up."""
    monkeypatch.setattr(backward, "SPILLED", 0 if in_file else backward.SPILLED)
    some = [name for name in linear_names(SMALL) if ".1." in name]
    ups = []
    for names in (None, some):  # the lowest block that is watched need not be the first
        alone, ends = output_hessians(model, tokens, names, seed=3), EndSums()
        with forward_states(model, len(tokens)) as states:
            inputs = matrix_hessians(model, tokens, linear_names(SMALL), entering=states)
            with monkeypatch.context() as patch:
                patch.setattr(descent.Descent, "forward", lambda *args: ups.append(args))
                found = output_hessians(model, tokens, names, seed=3, ends=ends, states=states)
        assert not inputs.left_out and not ups and list(found) == list(alone)
        for name, g in alone.items():
            np.testing.assert_allclose(found[name], g, rtol=1e-5, atol=1e-6 * np.abs(g).max())
        assert ends.embedding.shape == (16, 16)


def test_output_hessians_predict_the_divergence_of_a_small_error(model, tokens):
    """KL ≈ ½ tr(G E H Eᵀ) for one matrix, errors random: right on the mean to the accuracy of a Kronecker factorisation."""
    name = "model.layers.1.mlp.down_proj"
    many = np.random.default_rng(0).integers(0, 48, (64, tokens.shape[1]))
    g, h = output_hessians(model, many, [name], seed=1)[name], hessians(model, many)[name]
    weight = model.linears()[name].weight.get_value()
    e = 1e-2 * np.asarray(weight).std() * np.random.default_rng(1).standard_normal(weight.shape).astype(np.float32)
    changed = jax.tree.map(lambda leaf: leaf, model)
    changed.linears()[name].weight.set_value(weight + e)
    logp = jax.jit(lambda m: jax.nn.log_softmax(m(jnp.asarray(many))))
    p, q = (np.asarray(logp(m), np.float64) for m in (model, changed))
    kl = (np.exp(p) * (p - q)).sum(-1).mean()
    assert kl == pytest.approx(0.5 * np.sum((g @ e) * (e @ h)), rel=0.3)


def test_squared_gradients_compile_one_block_once(model, tokens):
    from qlr_jax.calibration.descent import _pull_back

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
    with pytest.raises(QLRError, match=r"leave block model.layers.1 are not finite in 5 of 5 sequences \(in all 100 % of them"):
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
