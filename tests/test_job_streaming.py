"""A model whose weights stay on disk: the same numbers, one block in memory at a time."""

import errno
import gc
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import qlr_jax as qlr
from qlr_jax import job
from qlr_jax.calibration import backward as backward_room
from qlr_jax.calibration import hessians, output_hessians, read_hessians, squared_gradients, standard_library
from qlr_jax.calibration.compensated import compensated_target, moments
from qlr_jax.core.lazy import Lazy, LazyMap
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import compare, divergence, reference
from qlr_jax.formats import read_matrices
from qlr_jax.models import Llama, LlamaConfig, input_of, linear_names, load_model, save_model
from qlr_jax.models.forward import through
from qlr_jax.pipelines.run import with_weights
from qlr_jax.pipelines.source import open_source
from qlr_jax.pipelines.stages.calibrate import calibrate, calibration_tokens
from qlr_jax.progress import silent
from qlr_jax.sensitivity import path_shares
from qlr_jax.settings.recipe import Recipe

CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64
)
TOKENS = np.random.default_rng(0).integers(0, 2048, (11, 32))  # as long as those of the jobs below; no whole batches


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
        want, got = found(resident, TOKENS), found(streamed, TOKENS)
        assert list(want) == list(got)
        for name in want:
            np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    monkeypatch.setattr(backward_room, "SPILLED", 0)  # hidden states in a file
    again = output_hessians(streamed, TOKENS)
    assert all(np.array_equal(again[name], value) for name, value in got.items())
    late = [name for name in got if ".2." in name]  # the blocks before them are not gone back to
    again = output_hessians(streamed, TOKENS, late)
    assert list(again) == late and all(np.array_equal(value, got[name]) for name, value in again.items())

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backward_room.os, "pwrite", full)
    with pytest.raises(QLRError, match=r"cannot be written to .*\(No space left on device\); free some of it, set TMPDIR"):
        output_hessians(streamed, TOKENS)


def test_a_sequence_that_is_not_finite_is_in_no_statistic(folder):
    """One word is infinite, and one of 128 sequences has it: H, G and the reference are those of the others."""
    text, told = standard_library("calibration")[:20000], []
    recipe = Recipe(sequences=128, sequence_length=32, measure_tokens=4096, force=True)
    source = open_source(folder, recipe)
    tokens = calibration_tokens(source, text)
    row, word = next((r, w) for r in range(60, 128) for w in tokens[r] if (tokens == w).any(axis=1).sum() == 1)
    embedding = source.model.model.embed_tokens.weight
    embedding.set_value(embedding.get_value().at[word].set(jnp.inf))
    talks = SimpleNamespace(stage=silent().stage, say=told.append)
    found, sample = calibrate(source, text, talks)
    rest = np.delete(tokens, row, axis=0)
    assert found.hessians.left_out == {row: "the activations that enter model.layers.0.self_attn.qkv"}
    assert len(told) == 1 and "1 of 128 sequences is left out: the activations that enter model.layers.0" in told[0]
    assert not found.outputs.left_out and np.array_equal(sample.windows, rest) and np.isfinite(sample.logp).all()
    want = hessians(source.model, rest), output_hessians(source.model, rest, seed=recipe.seed)
    for name in found.weights:
        np.testing.assert_allclose(found.hessians[name], want[0][input_of(name)], rtol=1e-4, atol=1e-6)
        g, share = want[1][name], recipe.output_shrinkage
        drawn = (1 - share) * g + share * np.trace(g) / len(g) * np.eye(len(g))  # towards a multiple of the identity
        assert share > 0
        np.testing.assert_allclose(found.outputs[name], drawn, rtol=1e-4, atol=1e-6 * np.abs(g).max())


def test_judgements_are_the_same(both):
    resident, streamed = both
    draw = np.random.default_rng(1)
    errors = {n: 1e-3 * draw.standard_normal(lin.weight.get_value().shape, np.float32) for n, lin in resident.linears().items()}
    want, got = reference(resident, TOKENS), reference(streamed, TOKENS)
    np.testing.assert_array_equal(got.logp, want.logp)
    assert got.perplexity == want.perplexity
    shares = path_shares(resident, errors, want), path_shares(streamed, LazyMap(errors, lambda n: errors[n]), want)
    assert shares[0] == shares[1]
    value = {
        n: qlr.solve(np.asarray(resident.linears()[n].weight.get_value()), None, "int-3g16").value for n in linear_names(CONFIG)[:7]
    }
    placed = [with_weights(model, value) for model in both]
    assert isinstance(placed[1].linears()[linear_names(CONFIG)[0]].weight.get_value(), Lazy)
    assert divergence(placed[0], want) == divergence(placed[1], want)
    assert compare(resident, placed[0], TOKENS) == compare(streamed, placed[1], TOKENS)


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
    hessians(streamed, TOKENS[:8])
    gc.collect()
    assert sum(a.nbytes for a in jax.live_arrays()) - before < 4 * jnp.zeros((32, 32)).nbytes


def test_moments_behind_compressed_blocks(both):
    """Against float64 numpy on inputs that are tapped from whole passes."""
    resident = both[0]
    value = {
        n: qlr.solve(np.asarray(resident.linears()[n].weight.get_value()), None, "int-3g16").value for n in linear_names(CONFIG)[:7]
    }
    changed = with_weights(resident, value)  # layer 0 is compressed

    @jax.jit
    def tapped(model):
        seen = {}
        model(TOKENS, tap=seen.__setitem__)
        return seen

    rope, taps = resident.rope(TOKENS.shape[1]), [tapped(model) for model in (resident, changed)]
    states = [np.asarray(through(model.block(0), model.embed(TOKENS), rope)) for model in (resident, changed)]
    out, found = moments(resident.block(1), [states[0]], [states[1]], rope)
    assert set(found) == {"self_attn.qkv", "self_attn.o_proj", "mlp.gate_up", "mlp.down_proj"}
    for name, (own, cross) in found.items():
        x, y = (np.asarray(tap[f"model.layers.1.{name}"], np.float64).reshape(-1, own.shape[0]) for tap in taps)
        np.testing.assert_allclose(own, y.T @ y / len(y), rtol=2e-4, atol=1e-6 * np.abs(own).max())
        np.testing.assert_allclose(cross, x.T @ y / len(y), rtol=2e-4, atol=1e-5 * np.abs(own).max())
    np.testing.assert_allclose(out[0], through(resident.block(1), states[0], rope), rtol=1e-5, atol=1e-6)


def test_moments_leave_out_sequences_that_are_not_finite(both):
    resident = both[0]
    rope, draw = resident.rope(8), np.random.default_rng(3)
    x, y = (draw.standard_normal((100, 8, 32)).astype(np.float32) for _ in range(2))
    y[7, 3] = np.nan
    left = np.arange(100) != 7
    halves = lambda a: [a[:50], a[50:]]  # noqa: E731
    _, found = moments(resident.block(0), halves(x), halves(y), rope)
    _, want = moments(resident.block(0), [x[left]], [y[left]], rope)
    for name, pair in found.items():
        for one, other in zip(pair, want[name], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())
    with pytest.raises(QLRError, match="not finite in 1 of 99 sequences, and at most 1 % can be left out"):
        moments(resident.block(0), [x[:99]], [y[:99]], rope)


@pytest.mark.parametrize("form", ["npy", "safetensors", "npz"])
def test_hessians_made_elsewhere_stay_in_their_files(tmp_path, form):
    """As far as they lie there as they are used; the others are put where the job keeps its own."""
    inputs = {"model.layers.0.mlp.gate_up": 6, "model.layers.0.self_attn.qkv": 6, "model.layers.1.self_attn.qkv": 6}
    arrays, kept = {}, []
    for i, (name, n) in enumerate(inputs.items()):
        x = np.random.default_rng(i).standard_normal((20, n))
        arrays[name] = (x.T @ x).astype(np.float64 if i == 0 else np.float32)
    arrays["model.layers.1.self_attn.qkv"][0, 1] *= 1 + 1e-6  # not quite symmetric
    if form == "npy":
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    elif form == "npz":
        np.savez(tmp_path / "all.npz", **arrays)
    else:
        save_file(arrays, tmp_path / "all.safetensors")

    def keep(name, array):
        kept.append(name)
        return array

    names = {"model.layers.0.mlp.up_proj": 6, "model.layers.0.self_attn.q_proj": 6, "model.layers.1.self_attn.q_proj": 6}
    found = read_hessians(tmp_path, names, keep)
    mapped = {input_of(name) for name, h in found.items() if isinstance(h.base, np.memmap)}
    assert mapped == (set() if form == "npz" else {"model.layers.0.self_attn.qkv"})
    assert set(kept) == set(inputs) - mapped
    for name, h in found.items():
        assert h.dtype == np.float32
        np.testing.assert_allclose(h, arrays[input_of(name)], rtol=2e-6)
        np.testing.assert_array_equal(h, h.T)


def test_the_aim_is_the_least_squares_answer():
    draw = np.random.default_rng(2)
    x = draw.standard_normal((200, 12))
    y, w = x + 0.3 * draw.standard_normal(x.shape), draw.standard_normal((5, 12)).astype(np.float32)
    want = np.linalg.lstsq(y, x @ w.T, rcond=None)[0].T
    got = compensated_target(w, (y.T @ y / 200).astype(np.float32), (x.T @ y / 200).astype(np.float32), 1e-9)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_a_sequential_job_is_kept_only_where_it_is_better(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(standard_library("calibration")[:20000], encoding="utf-8")
    recipe = Recipe(
        budget="4.8bpw:all", vocabulary=("int-4g16", "bf16"), backbones=("int-2g16", "int-3g16"), ranks=(0,), sequences=8,
        sequence_length=32, measure_tokens=256, refine=0,
    )  # fmt: skip
    plain = job.compress(folder, tmp_path / "plain", calibration=text, recipe=recipe).report
    told = job.compress(folder, tmp_path / "told", calibration=text, recipe=recipe.updated(sequential=True)).report
    assert told["calibration_kl"][told["delivered"]] <= plain["calibration_kl"][plain["delivered"]]
    assert told["bits_per_weight"] == plain["bits_per_weight"] and "solve in sequence" in told["seconds"]["stages"]

    assert {row["kind"]: row["spec"] for row in told["matrices"]}["embedding"] == "int-4g16"
    assert told["whole_model_bits_per_weight"] <= 4.8
    assert read_matrices(tmp_path / "told")["model.embed_tokens"].layout.spec == "int-4g16"
