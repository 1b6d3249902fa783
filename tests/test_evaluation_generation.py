"""Generation with a cache against recomputing everything; sampling against numpy; text in pieces; scores of continuations."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.errors import QLRError
from qlr_jax.evaluation import generate, stream
from qlr_jax.evaluation.cache import empty, extend, prefill, step
from qlr_jax.evaluation.generation import _steps, bucket
from qlr_jax.evaluation.sampling import GenerationSettings, choose, truncated
from qlr_jax.evaluation.scoring import _scored, scores
from qlr_jax.evaluation.text import Piece, pieces
from qlr_jax.models import Llama, LlamaConfig, RopeScaling, load_model, load_tokenizer
from qlr_jax.models.bundled import BUNDLED

GQA = LlamaConfig(
    vocab_size=40,
    hidden_size=24,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    eos_token_id=2,
)
ONE = dataclasses.replace(GQA, num_hidden_layers=1)  # less to compile where not the layers of a cache are what is tested
STRETCHED = dataclasses.replace(
    ONE, num_key_value_heads=3, head_dim=8, tie_word_embeddings=True, rope_theta=100.0,
    rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 16),
)  # fmt: skip
PROMPTS = [[1, 5, 9, 30, 7], [1, 8], [1, 4, 4, 39]]
run = jax.jit(lambda model, tokens: model(tokens))


def built(config, scale=15.0):
    model = Llama(config, jax.random.key(0))
    for param in model.tensors().values():
        param.set_value(jnp.asarray(np.asarray(param.get_value()) * np.float32(scale if param.get_value().ndim > 1 else 1)))
    return model


@pytest.fixture(scope="module")
def model():
    return built(ONE)


def recomputed(model, prompt, new, stop=()):
    """Greedy tokens, each from a pass over everything before it, at one padded length."""
    ids = list(prompt)
    for _ in range(new):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.asarray(run(model, jnp.asarray(row)))[0, len(ids) - 1].argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


# ------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize(
    "config",
    [
        GQA,
        STRETCHED,
        dataclasses.replace(ONE, num_key_value_heads=6),
        dataclasses.replace(ONE, family="mistral", sliding_window=4),
        dataclasses.replace(ONE, family="qwen3"),
    ],
    ids=["grouped", "stretched", "one to one", "window", "norms"],
)
def test_logits_through_the_cache_equal_full_recomputation(config):
    """Rows of different lengths, padded; grouped heads; rotary positions that go on where the prompt ended."""
    model, rng = built(config), np.random.default_rng(0)
    lengths, new = np.asarray([6, 3, 8]), 5
    rows = rng.integers(0, 40, (3, 8 + new)).astype(np.int32)
    padded = np.where(np.arange(8) < lengths[:, None], rows[:, :8], 39)
    logits, cache = prefill(model, jnp.asarray(padded), jnp.asarray(lengths), size=16)
    one, whole = jax.jit(step), np.asarray(run(model, jnp.asarray(rows)))
    for t in range(new + 1):
        for i, length in enumerate(lengths):
            # Causal, so that what comes after does not matter, and one length serves all.
            want = whole[i, length + t - 1]
            np.testing.assert_allclose(np.asarray(logits)[i], want, atol=1e-5 * np.abs(want).max())
        if t < new:
            at = lengths + t
            logits, cache = one(model, cache, jnp.asarray(rows[np.arange(3), at]), jnp.asarray(at))


def test_a_prompt_may_come_in_parts(model):
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 9)), jnp.int32)
    more = jax.jit(extend)
    first, cache = more(model, empty(model, 2, 12), tokens[:, :4], jnp.zeros(2, jnp.int32))
    second, _ = more(model, cache, tokens[:, 4:], jnp.full(2, 4, jnp.int32))
    want = np.asarray(run(model, tokens))
    found = jax.jit(lambda model, hidden: model.head(hidden))(model, np.concatenate([first, second], axis=1))
    np.testing.assert_allclose(found, want, atol=1e-5 * np.abs(want).max())


# ------------------------------------------------------------------------------------------------- tokens


def test_greedy_equals_recomputation_in_a_batch_of_different_lengths(model):
    found = generate(model, PROMPTS, max_new_tokens=12, stop=())
    assert found.shape == (3, 12)
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert row.tolist() == recomputed(model, prompt, 12)


def test_a_row_stops_at_its_token_and_the_batch_when_all_have(model):
    free = generate(model, PROMPTS, max_new_tokens=12, stop=())
    stop = [int(free[0, 3])]
    found = generate(model, PROMPTS, max_new_tokens=12, stop=stop)
    for row, other in zip(found, free, strict=True):
        end = other.tolist().index(stop[0]) if stop[0] in other else 12
        assert row[:end].tolist() == other[: min(end, len(row))].tolist() and set(row[end:].tolist()) <= set(stop)
    other = built(dataclasses.replace(ONE, eos_token_id=(38, stop[0])))
    alone = generate(other, PROMPTS[:1], max_new_tokens=12)[0].tolist()  # the model's own, where none is given
    assert alone == recomputed(model, PROMPTS[0], 12, stop)  # ends with its stop token, once


@pytest.mark.parametrize(("new", "chunk"), [(1, 8), (2, 8), (9, 8), (12, 8), (5, 1)])
def test_pieces_put_together_are_the_whole(model, new, chunk):
    parts = list(stream(model, PROMPTS, max_new_tokens=new, chunk=chunk, stop=()))
    assert [part.shape[1] for part in parts] == [1] + [min(chunk, new - 1 - at) for at in range(0, new - 1, chunk)]
    assert (np.concatenate(parts, axis=1) == generate(model, PROMPTS, max_new_tokens=new, stop=())).all()


def test_one_compilation_serves_all_prompts_and_settings(model):
    prefill.clear_cache()
    _steps.clear_cache()
    for prompt, settings in (([1], {}), ([1] * 9, {"temperature": 0.5}), ([3, 4], {"temperature": 1.0, "top_k": 3, "top_p": 0.5})):
        generate(model, [prompt], max_new_tokens=5, stop=(2,), **settings)
    assert prefill._cache_size() == _steps._cache_size() == 1
    assert [bucket(n) for n in (1, 32, 33, 64, 65)] == [32, 32, 64, 64, 128] and bucket(33, most=40) == 40


def test_packed_weights_generate_as_their_dense_ones(model):
    from test_formats import random_matrix

    packed, dense = (built(ONE) for _ in range(2))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"):
        weight = packed.linears()[name].weight
        matrix = random_matrix("int-4", weight.get_value().shape, size=1.0)
        weight.set_value(matrix)
        dense.linears()[name].weight.set_value(matrix.dense())
    assert isinstance(packed.linears()["model.layers.0.self_attn.q_proj"].weight.get_value(), QLRMatrix)
    assert (generate(packed, PROMPTS, max_new_tokens=6) == generate(dense, PROMPTS, max_new_tokens=6)).all()


@pytest.mark.parametrize(
    ("tokens", "settings", "says"),
    [
        ([[]], {}, "a prompt is empty"),
        ([], {}, "a prompt is empty"),
        ([[1, 40]], {}, "token 40 is not in the model's vocabulary of 40"),
        ([[1] * 2000], {"max_new_tokens": 100}, "max_new_tokens of at most 48"),
        ([[1]], {"max_new_tokens": 0}, "give at least 1"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": -1}, "top_k is -1"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_what_cannot_be_generated_is_said_at_once(model, tokens, settings, says):
    with pytest.raises(QLRError, match=says):
        stream(model, tokens, **settings)  # before the first piece is asked for


# ------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.5, 0, 0.6), (1.0, 8, 0.5), (1.0, 1, 0.01)]
)
def test_truncation_equals_numpy(temperature, top_k, top_p):
    logits = np.random.default_rng(0).standard_normal((3, 20)).astype(np.float32) * 2
    found = np.asarray(jax.jit(truncated)(logits, *GenerationSettings(temperature, top_k, top_p).traced()))
    for row, out in zip(logits / temperature, found, strict=True):
        order = np.argsort(-row)
        kept = order[: top_k or 20]
        p = np.exp(row[kept] - row[kept].max())
        p /= p.sum()
        kept = kept[: max(1, int(np.searchsorted(np.cumsum(p), top_p - 1e-7) + 1))]
        want = np.full(20, -np.inf)
        want[kept] = row[kept]
        np.testing.assert_allclose(out, want, rtol=1e-6)


def test_draws_follow_the_distribution():
    logits = np.log(np.asarray([[0.5, 0.3, 0.15, 0.05]], np.float32))
    draw = jax.jit(lambda key: choose(jnp.tile(logits, (4000, 1)), key, *GenerationSettings(1.0, top_k=3).traced()))
    shares = np.bincount(np.asarray(draw(jax.random.key(0))), minlength=4) / 4000
    np.testing.assert_allclose(shares, np.asarray([0.5, 0.3, 0.15, 0]) / 0.95, atol=0.03)


def test_sampling_is_seeded(model):
    one, same, other = (generate(model, PROMPTS, max_new_tokens=12, temperature=3.0, seed=s, stop=()).tolist() for s in (0, 0, 1))
    assert one == same != other
    cold = generate(model, PROMPTS, max_new_tokens=12, temperature=3.0, top_k=1, stop=())
    assert (cold == generate(model, PROMPTS, max_new_tokens=12, stop=())).all()


# ------------------------------------------------------------------------------------------------- text


class Bytes:
    """One byte a token."""

    def decode(self, ids, skip_special_tokens=False):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stop", "want"),
    [
        ("naïve café", (), ["n", "a", "ï", "v", "e", " ", "c", "a", "f", "é"]),
        ("one.\n\ntwo", ("\n\n",), ["o", "n", "e", "."]),
        ("a\nb", ("\n\n",), ["a", "\nb"]),
        ("abc", ("bcd",), ["a", "bc"]),
        ("xSTOP", ("STOP", ""), ["x"]),
    ],
)
def test_text_comes_in_whole_characters_and_never_shows_a_stop_string(text, stop, want):
    found = list(pieces(([b] for b in text.encode()), Bytes(), list(b"prompt: "), stop))
    assert [piece.text for piece in found if piece.text] == want
    assert [piece.finish for piece in found] == [None] * (len(found) - 1) + ["length" if "".join(want) == text else "stop"]
    assert "".join(piece.text for piece in pieces([text.encode()], Bytes(), [], stop)) == "".join(want)  # all in one part


def test_a_stop_string_stays_hidden_where_it_ends_in_half_a_character():
    found = list(pieces(([b] for b in "abé".encode()), Bytes(), [], ("bé",)))
    assert "".join(piece.text for piece in found) == "a" and found[-1].finish == "stop"


def test_tokens_are_counted_up_to_the_one_that_ended_the_text():
    part = list(b"one.two")
    assert list(pieces([part], Bytes(), [], (".t",))) == [Piece("one", 5, "stop")]
    assert list(pieces([part], Bytes(), [], (), ends=[ord(".")])) == [Piece("one", 4, "stop")]
    assert list(pieces([part[:2], part[2:]], Bytes(), [], ())) == [Piece("on", 2), Piece("e.two", 7), Piece("", 7, "length")]
    assert list(pieces([b"caf\xc3"], Bytes(), [], ())) == [Piece("caf", 4), Piece("\ufffd", 4, "length")]
    assert "".join(piece.text for piece in pieces([b"\xa9."], Bytes(), b"caf\xc3", ())) == "é."  # the prompt's last character


@pytest.mark.parametrize("kind", ["metaspace", "byte level"])
def test_tokens_one_by_one_give_the_text_that_they_give_together(kind):
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    text = " the naïve café — 漢字かな交じり文 🙂🙂 ok\n  end"
    if kind == "metaspace":
        names = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁na", "ve", "▁", "▁ok", "end"]
        whole = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
        whole.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        tokenizer, ids, rest = PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>"), [], text
        while rest:  # the longest name that fits, else bytes
            name = max((n for n in names[257:] if rest.startswith(n.replace("▁", " "))), key=len, default="")
            ids += [names.index(name)] if name else [1 + b for b in rest[0].encode()]
            rest = rest[len(name) or 1 :]
    else:
        tokenizer = load_tokenizer(BUNDLED)
        ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 20
    cuts = [cut for cut in range(len(ids)) if not tokenizer.decode(ids[:cut]).endswith("\ufffd")]
    assert len(cuts) > 12
    for cut in cuts:
        prompt, new = ids[:cut], ids[cut:]
        found = list(pieces([[i] for i in new], tokenizer, prompt, ()))
        wanted = tokenizer.decode(ids)[len(tokenizer.decode(prompt)) :]
        assert "".join(piece.text for piece in found) == wanted, cut
        assert all("\ufffd" not in piece.text for piece in found), cut


def test_the_bundled_model_streams_what_it_generates():
    from qlr_jax.evaluation import stream_text

    model, tokenizer = load_model(BUNDLED), load_tokenizer(BUNDLED)
    prompt = "import os\n\ndef "
    parts = list(stream_text(model, tokenizer, prompt, max_new_tokens=12))
    ids = generate(model, [tokenizer.encode(prompt)], max_new_tokens=12)[0]
    assert len(parts) > 1 and "".join(parts) == tokenizer.decode(ids, skip_special_tokens=True)
    whole = "".join(parts)
    assert "".join(stream_text(model, tokenizer, prompt, max_new_tokens=12, stop=[whole[5:7]])) == whole[: whole.index(whole[5:7])]


def test_a_text_ends_where_any_file_of_the_folder_says(tiny, tmp_path):
    """Of chat models config.json may name the end of a text alone, and generation_config.json that of a turn."""
    from qlr_jax.pipelines.generate import generate as written
    from qlr_jax.pipelines.generate import open_generator

    folder = shutil.copytree(tiny, tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9, 4096]}')
    ends = open_generator(folder).ends
    assert set(ends) == {load_tokenizer(tiny).eos_token_id, *load_model(tiny).config.eos_ids, 7, 9}
    tokenizer = load_tokenizer(tiny)
    free = generate(load_model(tiny), [tokenizer.encode("import os")], max_new_tokens=6, stop=())[0].tolist()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": free[2]}))
    before = free[: free.index(free[2])]
    assert "".join(written(folder, "import os", max_new_tokens=6)) == "".join(p.text for p in pieces([before], tokenizer, [], ()))


# ------------------------------------------------------------------------------------------------- scores


def scored(model, context, continuation, most):
    """In float64: (log-likelihood, greedy) of one request alone."""
    whole = [*context, *continuation][-(most + 1) :]
    row = np.zeros((1, most), np.int32)
    row[0, : len(whole) - 1] = whole[:-1]
    logits = np.asarray(run(model, jnp.asarray(row)), np.float64)[0]
    logp = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    places = range(len(whole) - 1 - len(continuation), len(whole) - 1)
    values = [(logp[t, whole[t + 1]], logp[t].argmax() == whole[t + 1]) for t in places]
    return sum(v for v, _ in values), all(same for _, same in values)


def test_scores_equal_each_request_alone(model):
    rng = np.random.default_rng(0)
    lengths = [(3, 1), (40, 5), (1, 1), (1, 40), (60, 9), (7, 3), (30, 2)]
    requests = [(rng.integers(0, 40, c).tolist(), rng.integers(0, 40, k).tolist()) for c, k in lengths]
    requests.append((PROMPTS[0], recomputed(model, PROMPTS[0], 3)))  # what greedy decoding gives
    requests.append(requests[1])
    told = []
    found = scores(model, requests, max_length=48, batch=2, on_done=told.append)
    assert sum(told) == len(requests) and found[-2].greedy and found[-1] == found[1]
    for request, score in zip(requests, found, strict=True):
        logp, greedy = scored(model, *request, most=48)
        assert score.logp == pytest.approx(logp, rel=1e-4) and score.greedy == greedy
    with pytest.raises(QLRError, match="a continuation of at most 48"):
        scores(model, [([1], [2] * 49)], max_length=48)
    with pytest.raises(QLRError, match="0 tokens of context"):
        scores(model, [([], [2])])


def test_scores_compile_once_a_bucket(model):
    _scored.clear_cache()
    scores(model, [([1] * n, [2, 3]) for n in range(1, 60)], batch=2)
    assert _scored._cache_size() == 2  # 32 and 64
