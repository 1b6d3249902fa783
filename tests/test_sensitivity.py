"""What an error in a matrix costs at the model's output: every attribution against float64 or plain JAX, on a small model."""

import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.interactions.gram import gram_matrix
from qlr_jax.calibration import matrix_hessians, output_hessians
from qlr_jax.core.config import SolverConfig
from qlr_jax.core.solver import solve
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import divergence, reference
from qlr_jax.formats.targets import TARGETS
from qlr_jax.models import Llama, LlamaConfig, linear_names
from qlr_jax.sensitivity import (
    ATTRIBUTIONS,
    Case,
    Correction,
    attribute,
    correction_key,
    options,
    path_shares,
    predict,
    profile,
    second_order,
)
from qlr_jax.sensitivity.anchors import anchors, probe
from qlr_jax.sensitivity.attribution import LEAST

CONFIG = LlamaConfig(
    vocab_size=48, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
)
NAMES = linear_names(CONFIG)


@pytest.fixture(scope="module")
def case():
    model, rng = Llama(CONFIG, jax.random.key(0)), np.random.default_rng(0)
    tokens = rng.integers(0, 48, (10, 24))
    errors = {}
    for name, linear in model.linears().items():
        w = 5 * np.asarray(linear.weight.get_value())  # attention that attends
        linear.weight.set_value(jnp.asarray(w))
        errors[name] = (0.02 * w.std() * rng.standard_normal(w.shape)).astype(np.float32)
    hessians, outputs = matrix_hessians(model, tokens, NAMES), output_hessians(model, tokens, seed=1)
    return Case(model, errors, reference(model, tokens[:6]), hessians, outputs)


def changed(model, errors, scale=1.0):
    copy = jax.tree.map(lambda leaf: leaf, model)
    for name, e in errors.items():
        weight = copy.linears()[name].weight
        weight.set_value(jnp.asarray(np.asarray(weight.get_value()) + np.float32(scale) * e))
    return copy


def kl(case, errors, scale=1.0):
    return divergence(changed(case.model, errors, scale), case.reference).kl


def test_second_order_is_the_divergence_of_small_errors(case):
    gram = gram_matrix(case.model, case.errors, case.reference.windows)
    np.testing.assert_allclose(gram, gram.T, rtol=1e-5)
    assert np.linalg.eigvalsh(gram).min() > -1e-6 * np.trace(gram)
    assert gram.sum() == pytest.approx(kl(case, case.errors), rel=0.1)
    for i in (2, 13):  # v and down: what q costs is below float32 here
        assert gram[i, i] == pytest.approx(kl(case, {NAMES[i]: case.errors[NAMES[i]]}), rel=0.1)
    pair = [1, 8]  # and what two do together
    both = kl(case, {NAMES[i]: case.errors[NAMES[i]] for i in pair}, scale=4) / 16  # else near what float32 resolves
    assert gram[np.ix_(pair, pair)].sum() == pytest.approx(both, rel=0.1)
    own = second_order(case.model, case.errors, case.reference.windows)
    assert list(own) == NAMES
    np.testing.assert_allclose(list(own.values()), np.diagonal(gram), rtol=1e-5)


def test_a_folded_vocabulary_gives_the_same_on_the_mean(case, monkeypatch):
    whole = second_order(case.model, case.errors, case.reference.windows)
    module = sys.modules["qlr_jax.sensitivity.second_order"]  # the package's name for it is the function
    monkeypatch.setattr(module, "SKETCH", 20)
    monkeypatch.setattr(module, "BATCH_BYTES", 1)  # a window at a time
    folded = second_order(case.model, case.errors, case.reference.windows)
    np.testing.assert_allclose(list(folded.values()), list(whole.values()), rtol=0.2)


def test_path_shares_add_up_and_equal_plain_derivatives(case):
    done = []
    shares = path_shares(case.model, case.errors, case.reference, batch=4, on_done=done.append)
    assert done == [4, 2]  # the last batch is filled up
    assert sum(shares.values()) == pytest.approx(kl(case, case.errors), rel=0.02)
    tokens, logp = jnp.asarray(case.reference.windows), jnp.asarray(case.reference.logp)

    def joint(steps):
        model = jax.tree.map(lambda leaf: leaf, case.model)
        for name, e in case.errors.items():
            weight = model.linears()[name].weight
            weight.set_value(weight.get_value() + steps[name] * e)
        return jnp.mean(jnp.sum(jnp.exp(logp) * (logp - jax.nn.log_softmax(model(tokens))), axis=-1))

    nodes = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)
    found = [jax.jit(jax.grad(joint))(dict.fromkeys(NAMES, jnp.float32(t))) for t in nodes]
    for name in NAMES:
        want = np.mean([float(g[name]) for g in found])
        assert shares[name] == pytest.approx(want, rel=2e-2, abs=1e-3 * sum(shares.values()))


def test_a_path_asks_for_a_block_once_on_either_way(case, monkeypatch):
    """Of a node, whatever the number of batches: one that lies on disk is read twice."""
    asked, of_model = [], Llama.block
    monkeypatch.setattr(Llama, "block", lambda model, i: (asked.append(i), of_model(model, i))[1])
    path_shares(case.model, case.errors, case.reference, batch=2)
    assert {i: asked.count(i) for i in asked} == {0: 4, 1: 2}  # the last block stays, from the way up to the way down


@pytest.mark.parametrize("outputs", ["fisher", "alike"])
def test_an_error_that_undoes_another_is_not_for_nothing(case, outputs):
    """Less of o takes back a part of what too much of v does: of o there is more to lose than nothing even so."""
    v, o = (next(n for n in NAMES if n.endswith(kind)) for kind in ("v_proj", "o_proj"))
    weights = {n: np.asarray(case.model.linears()[n].weight.get_value()) for n in NAMES}
    errors = {**case.errors, v: 0.5 * weights[v], o: -0.1 * weights[o], NAMES[0]: 0 * weights[NAMES[0]]}
    case = replace(case, errors=errors, outputs=case.outputs if outputs == "fisher" else {})
    shares, found = path_shares(case.model, errors, case.reference), attribute("path", case).kl
    assert shares[o] < 0 == shares[NAMES[0]] == found[NAMES[0]]

    def own(name):
        e, h = np.asarray(errors[name], np.float64), np.asarray(case.hessians[name], np.float64)
        if outputs == "alike":
            return np.sum(e**2) / np.sum(np.square(weights[name], dtype=np.float64))
        return 0.5 * np.trace(np.asarray(case.outputs[name], np.float64) @ e @ h @ e.T)

    unit = LEAST * np.median([abs(shares[n]) / own(n) for n in NAMES[1:]])
    for name in NAMES:
        least = unit * own(name) if outputs == "fisher" or shares[name] <= 0 else 0.0
        assert found[name] == pytest.approx(max(shares[name], least), rel=1e-3)


def test_a_kl_below_what_float32_resolves_is_not_nothing(case, monkeypatch):
    measured = {name: 1e-6 * (i + 1) for i, name in enumerate(NAMES)} | {NAMES[3]: 0.0}
    monkeypatch.setattr("qlr_jax.sensitivity.attribution.knockout", lambda *_, **__: measured)
    own = attribute("kronecker", case).kl
    unit = LEAST * np.median([measured[n] / own[n] for n in NAMES])
    assert attribute("alone", case).kl == pytest.approx({**measured, NAMES[3]: unit * own[NAMES[3]]})


def test_kronecker_and_error_are_their_formulas(case):
    found, plain = attribute("kronecker", case).kl, attribute("error", case).kl
    for name, e in case.errors.items():
        e, h, g = (np.asarray(a, np.float64) for a in (e, case.hessians[name], case.outputs[name]))
        w = np.asarray(case.model.linears()[name].weight.get_value(), np.float64)
        assert found[name] == pytest.approx(0.5 * np.trace(g @ e @ h @ e.T), rel=1e-3)
        assert plain[name] == pytest.approx(np.trace(e @ h @ e.T) / np.trace(w @ h @ w.T), rel=1e-3)


def test_alone_and_noise_measure_and_leave_the_model_as_it_was(case):
    before = {name: np.asarray(linear.weight.get_value()) for name, linear in case.model.linears().items()}
    done = []
    alone = attribute("alone", case, on_done=done.append).kl
    assert done == NAMES
    for name in (NAMES[2], NAMES[-1]):
        assert alone[name] == pytest.approx(kl(case, {name: case.errors[name]}), rel=1e-4)
    noise = attribute("noise", case, seed=1).kl
    assert noise == attribute("noise", case, seed=1).kl
    # these errors are noise themselves; KL of a float32 model is not measured below 1e-7, so a difference not below 2e-7
    assert all(noise[name] == pytest.approx(alone[name], rel=0.9, abs=2e-7) for name in NAMES)
    assert sum(noise.values()) == pytest.approx(sum(alone.values()), rel=0.3)
    for name, linear in case.model.linears().items():
        assert np.array_equal(before[name], linear.weight.get_value())


def test_every_attribution_is_known_by_name_and_others_are_refused(case):
    few = Case(case.model, {n: case.errors[n] for n in NAMES[:2]}, case.reference, case.hessians, case.outputs)
    for method in ATTRIBUTIONS:
        assert list(attribute(method, few).kl) == NAMES[:2]
    with pytest.raises(QLRError, match="attribution 'shap' is not known; give one of error, kronecker"):
        attribute("shap", few)
    with pytest.raises(QLRError, match=r"'kronecker' needs an output Hessian of model\.layers\.0\.self_attn\.q_proj"):
        attribute("kronecker", Case(case.model, few.errors, case.reference, case.hessians, {}))


def test_options_offer_none_with_factors_only_and_nothing_that_saves_nothing():
    found = options(["none", "trellis-2"], [0, 4, 8, 64], ["trellis-2", "trellis-4"], (32, 48))
    assert "none" not in found and {"trellis-2", "none+r4@trellis-2", "trellis-2+r8@trellis-4"} <= set(found)
    assert not any("r64" in spec for spec in found)
    assert options(["none"], [0], ["trellis-2"], (32, 48)) == []
    assert options(["int-8", "none"], [0, 31], ["bf16"], (32, 48)) == ["int-8"]


@pytest.mark.parametrize("spec", ["trellis-2", "trellis-3+r8@trellis-2", "none+r16@trellis-4", "trellis-5", "int-8g32"])
def test_predictions_come_near_what_a_solve_reaches(activations, spec):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 96)))[0] for n in (128, 96))
    weight = (u * np.arange(1, 97) ** -0.7) @ v.T
    root = rng.standard_normal((128, 128)) * np.arange(1, 129) ** -0.8
    h, g = activations(96) + 0.01 * np.eye(96), root @ root.T + 1e-3 * np.eye(128)
    for output in (None, g):
        found = profile(weight.astype(np.float32), h, 32, output=output)
        solved = solve(weight, h, spec, output_hessian=output, state_bits=6).stats
        reached = solved["relative_error"] if output is None else solved["weighted_error"]
        assert predict(found, spec, 6) == pytest.approx(reached, rel=0.35)


def test_near_lossless_options_are_predicted_not_solved():
    """The default offers reach to the matrix as it is, and take no solve that rates up to 4 bits did not take."""
    shape = (256, 256)

    def offered(backbones):
        return {
            name: [Spec.parse(text) for text in options(backbones, [0, 8, 16], ["trellis-2", "trellis-4"], shape)] for name in NAMES
        }

    widest, narrow = offered(TARGETS["qlr"].backbones), offered(["trellis-1..4w"])
    assert {"trellis-4.0625w", "trellis-6w", "int-8g32", "bf16"} <= {str(spec) for spec in widest[NAMES[0]]}
    assert all(spec.nbytes(shape) < 2 * 256 * 256 for spec in widest[NAMES[0]] if str(spec) != "bf16")
    solved = [anchors(specs, {name: probe(listed) for name, listed in specs.items()}) for specs in (widest, narrow)]
    assert solved[0] == solved[1]
    found = profile(np.random.default_rng(0).standard_normal(shape).astype(np.float32), np.eye(256), 1)
    errors = [predict(found, spec) for spec in ("trellis-4w", "trellis-5w", "trellis-6w", "int-8g32", "bf16")]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.002
    plain = offered(TARGETS["gguf"].backbones)
    assert not {spec for _, spec in anchors(plain, {name: "int-3g256" for name in NAMES})} & {"int-8g32", "bf16"}


def test_correction_takes_the_nearest_that_was_solved():
    kinds = {"a": "q", "b": "q", "c": "v"}
    measured = {
        ("a", (0, "", "")): 1.1, ("a", (8, "x", "")): 0.9, ("a", (32, "x", "")): 0.6, ("a", (8, "y", "")): 1.2,
        ("b", (0, "", "")): 0.8, ("b", (8, "x", "")): 0.5,
    }  # fmt: skip
    correction = Correction(measured, kinds)
    assert correction.factor("a", (0, "", "")) == 1.1 and correction.factor("a", (8, "y", "")) == 1.2
    assert correction.factor("a", (24, "x", "")) == 0.6  # the nearest rank in ratio
    assert correction.factor("b", (32, "x", "")) == pytest.approx(0.5 * 0.6 / 0.9)  # as a's went on from there
    assert correction.factor("b", (8, "y", "")) == pytest.approx(0.5 * 1.2 / 0.9)
    assert correction.factor("c", (8, "x", "")) == 1.0  # nothing is known of v


def test_correction_of_backbones_that_are_not_rotated():
    kinds = {"a": "q", "b": "q"}
    measured = {
        ("a", (0, "", "int-2g32")): 2.0, ("a", (0, "", "int-2g64")): 3.0, ("a", (0, "", "int-4g64")): 1.5,
        ("a", (8, "bf16", "int-2g64")): 2.4, ("b", (0, "", "int-2g64")): 5.0,
    }  # fmt: skip
    correction = Correction(measured, kinds)
    assert correction.factor("a", (0, "", "int-3g128")) == 3.0  # as few bits away as int-4g64, whose group is as near: the first
    assert correction.factor("a", (0, "", "int-4g32")) == 1.5
    assert correction.factor("b", (0, "", "int-2g32")) == pytest.approx(5.0 * 2.0 / 3.0)  # by its kind
    assert correction.factor("a", (8, "bf16", "int-4g64")) == pytest.approx(1.5 * 2.4 / 3.0)  # what rank did elsewhere
    assert correction_key(Spec.parse("int-3g64/rot+r4@bf16")) == (4, "bf16", "int-3g64/rot")
    assert correction_key(Spec.parse("trellis-3+r4@trellis-2")) == (4, "trellis-2", "")
    assert correction_key(Spec.parse("e8-2")).backbone == ""


def test_solves_race():
    assert SolverConfig().start == "race"
