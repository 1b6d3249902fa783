"""A model whose weights stay on disk: the same numbers, one block in memory at a time."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlr_jax as qlr
from qlr_jax import job
from qlr_jax.calibration import backward as backward_room
from qlr_jax.calibration import hessians, output_hessians, squared_gradients, standard_library
from qlr_jax.calibration.sequential import aimed, moments
from qlr_jax.core.lazy import Lazy, LazyMap
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import compare, divergence, reference
from qlr_jax.models import Llama, LlamaConfig, linear_names, load_model, save_model
from qlr_jax.recipe import Recipe
from qlr_jax.sensitivity import path_shares

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64
)
TOKENS = np.random.default_rng(0).integers(0, 2048, (5, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_model(Llama(CONFIG, jax.random.key(0)), path, tokenizer_from=job.BUNDLED)
    return path


@pytest.fixture(scope="module")
def both(folder):
    return load_model(folder), load_model(folder, on_disk=True)


def test_weights_are_read_where_they_are_used(both, folder):
    resident, streamed = both
    for name, param in streamed.tensors().items():
        held = param.get_value()
        assert isinstance(held, Lazy) == name.startswith("model.layers.")
        np.testing.assert_array_equal(np.asarray(held), resident.tensors()[name].get_value())
        assert held.shape == resident.tensors()[name].get_value().shape
    block = streamed.block(1)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(block))
    assert isinstance(streamed.model.layers[1].mlp.up_proj.weight.get_value(), Lazy)  # nothing was kept
    structure = [jax.tree.structure(streamed.block(i)) for i in range(3)]
    assert structure[0] == structure[1] == structure[2] == jax.tree.structure(resident.block(0))  # one compilation serves all
    assert resident.block(0) is resident.model.layers[0]


def test_statistics_are_the_same(both, monkeypatch):
    resident, streamed = both
    for found in (hessians, squared_gradients, output_hessians):
        want, got = found(resident, TOKENS, batch=2), found(streamed, TOKENS, batch=2)
        assert list(want) == list(got)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    monkeypatch.setattr(backward_room, "SPILLED", 0)  # hidden states in a file
    again = output_hessians(streamed, TOKENS, batch=2)
    assert all(np.array_equal(again[name], value) for name, value in got.items())


def test_judgements_are_the_same(both):
    resident, streamed = both
    draw = np.random.default_rng(1)
    errors = {n: 1e-3 * draw.standard_normal(lin.weight.get_value().shape, np.float32) for n, lin in resident.linears().items()}
    want, got = reference(resident, TOKENS, batch=2), reference(streamed, TOKENS, batch=2)
    np.testing.assert_array_equal(got.logp, want.logp)
    assert got.perplexity == want.perplexity
    shares = path_shares(resident, errors, want), path_shares(streamed, LazyMap(errors, lambda n: errors[n]), want)
    assert shares[0] == shares[1]
    value = {
        n: qlr.solve(np.asarray(resident.linears()[n].weight.get_value()), None, "int-4g16").value for n in linear_names(CONFIG)[:7]
    }
    placed = [job.with_weights(model, value) for model in both]
    assert isinstance(placed[1].linears()[linear_names(CONFIG)[0]].weight.get_value(), Lazy)
    assert divergence(placed[0], want) == divergence(placed[1], want)
    assert compare(resident, placed[0], TOKENS, batch=2) == compare(streamed, placed[1], TOKENS, batch=2)


def test_a_streaming_job_is_the_same_job(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(standard_library("calibration")[:20000], encoding="utf-8")
    recipe = Recipe(
        budget="3.5bpw", backbones=("int-2g16", "int-3g16"), factors=("int-4",), ranks=(0, 4), iterations=1, sequences=8,
        sequence_length=32, measure_tokens=256, evaluation_tokens=512, refine=1, streaming=False,
    )  # fmt: skip
    runs = {}
    for streaming in (False, True):
        out = tmp_path / str(streaming)
        job.compress(folder, out, calibration=text, recipe=recipe.updated(streaming=streaming), evaluate_on=text)
        runs[streaming] = out
    for file in ("model.safetensors", "config.json"):
        assert (runs[True] / file).read_bytes() == (runs[False] / file).read_bytes()
    reports = [json.loads((out / "report.json").read_text()) for out in runs.values()]
    assert reports[0]["kl"] == reports[1]["kl"] and reports[0]["calibration_kl"] == reports[1]["calibration_kl"]
    assert [p.name for p in (runs[True] / "job").iterdir()] == ["log.txt"]


def test_what_needs_the_whole_model_says_so(both):
    from qlr_jax.sensitivity import second_order

    errors = {linear_names(CONFIG)[0]: np.ones((32, 32), np.float32)}
    with pytest.raises(QLRError, match="whole model in memory"):
        second_order(both[1], errors, TOKENS)


def test_a_batch_of_one_block_is_held(both):
    """As many blocks' weights are alive at once as are asked for: none after the pass."""
    streamed = both[1]
    gc.collect()
    before = sum(a.nbytes for a in jax.live_arrays())
    hessians(streamed, TOKENS[:1])
    gc.collect()
    assert sum(a.nbytes for a in jax.live_arrays()) - before < 4 * jnp.zeros((32, 32)).nbytes


def test_moments_behind_compressed_blocks(both):
    """Against float64 numpy on inputs that are tapped from whole passes."""
    resident = both[0]
    value = {
        n: qlr.solve(np.asarray(resident.linears()[n].weight.get_value()), None, "int-3g16").value for n in linear_names(CONFIG)[:7]
    }
    changed = job.with_weights(resident, value)  # layer 0 is compressed
    taps = [{}, {}]
    for model, seen in zip((resident, changed), taps, strict=True):
        model(jnp.asarray(TOKENS), tap=lambda name, x, seen=seen: seen.__setitem__(name, np.asarray(x, np.float64)))
    states, rope = [], resident.rope(TOKENS.shape[1])
    for model in (resident, changed):
        states.append(np.asarray(model.block(0)(model.embed(jnp.asarray(TOKENS)), rope)))
    out, found = moments(resident.block(1), [states[0]], [states[1]], rope)
    assert set(found) == {"self_attn.qkv", "self_attn.o_proj", "mlp.gate_up", "mlp.down_proj"}
    for name, (own, cross) in found.items():
        x, y = (tap[f"model.layers.1.{name}"].reshape(-1, own.shape[0]) for tap in taps)
        np.testing.assert_allclose(own, y.T @ y / len(y), rtol=2e-4, atol=1e-6 * np.abs(own).max())
        np.testing.assert_allclose(cross, x.T @ y / len(y), rtol=2e-4, atol=1e-5 * np.abs(own).max())
    np.testing.assert_allclose(out[0], resident.block(1)(jnp.asarray(states[0]), rope), rtol=1e-5, atol=1e-6)


def test_the_aim_is_the_least_squares_answer():
    draw = np.random.default_rng(2)
    x = draw.standard_normal((200, 12))
    y, w = x + 0.3 * draw.standard_normal(x.shape), draw.standard_normal((5, 12)).astype(np.float32)
    want = np.linalg.lstsq(y, x @ w.T, rcond=None)[0].T
    got = aimed(w, (y.T @ y / 200).astype(np.float32), (x.T @ y / 200).astype(np.float32), 1e-9)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_sequential_job_is_kept_only_where_it_is_better(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(standard_library("calibration")[:20000], encoding="utf-8")
    recipe = Recipe(
        budget="3.5bpw", backbones=("int-2g16", "int-3g16"), ranks=(0,), sequences=8, sequence_length=32,
        measure_tokens=256, refine=0,
    )  # fmt: skip
    plain = job.compress(folder, tmp_path / "plain", calibration=text, recipe=recipe).report
    told = job.compress(folder, tmp_path / "told", calibration=text, recipe=recipe.updated(sequential=True)).report
    assert told["calibration_kl"][told["delivered"]] <= plain["calibration_kl"][plain["delivered"]]
    assert told["bits_per_weight"] == plain["bits_per_weight"] and "solve in sequence" in told["seconds"]["stages"]
