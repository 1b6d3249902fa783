"""GGUF: every block holds the very numbers of dense(), and llama.cpp computes the same model from them."""

import dataclasses
import json
import sys
import urllib.request
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_formats import random_matrix

import qlr_jax
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.errors import QLRError
from qlr_jax.formats import check_files, load, read_matrices, save_packed
from qlr_jax.formats.gguf import export as exporter
from qlr_jax.formats.gguf.blocks import fold_scale, pack_blocks
from qlr_jax.formats.gguf.export import export_gguf, model_tensors
from qlr_jax.formats.targets import GGUF_BLOCKS
from qlr_jax.models import KINDS, Llama, LlamaConfig, load_model, parts_of, save_model, shape_of
from qlr_jax.models.folder import load_tokenizer
from qlr_jax.models.gguf.names import LINEARS, gguf_name
from qlr_jax.models.gguf.pre_tokenizers import LLAMA3, QWEN2, TEKKEN
from qlr_jax.progress import plain, silent

BUNDLED = Path(qlr_jax.__file__).parent / "bundled"
SHAPES = dict(vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2, max_position_embeddings=256)
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS = {
    "tied": dict(num_attention_heads=8, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
    "untied": dict(  # heads wider than hidden / heads
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0}
    ),
}
SPECS = [  # by layer, in the order of KINDS; layer 0's gate is solved
    ["int-4g32+r8@bf16", "int-3g256", "int-8g32", "int-2g256+r4@int-8", "int-3g256", "bf16", "int-2g256"],
    ["int-2g256+r3@bf16", "int-4g32+r16@nf-4g32", "bf16+r2@bf16", "int-8g32", "int-4g32", "int-3g256+r5@trellis-4", "int-8g32"],
]
SPLITS = {"llama-bpe": LLAMA3, "dbrx": LLAMA3, "deepseek-r1-qwen": QWEN2, "tekken": TEKKEN}
G = 2.0**-4
TOKENS = [0, 5, 7, 9, 100, 33, 1500, 200, 45, 2047, 0, 3]
SOURCES = sorted(Path(qlr_jax.__file__).parent.rglob("*.py"))
LINES = [
    'def f(x, *, y=10_000):\n    """Doc, 12345678 of them."""\n    return  x**2 + y  # naïve 東京 🙂\n\n\nclass A(B):\n\tpass\n',
    "for i in range(100): print(f'{i:>3} it\\'s', end=\"\")",
    "  W ≈ g · Uᵀ (Q + L diag(s) R) V\r\n\r\n ",
    "a<s>b <s> c",
]


def scaled(matrix, scale):
    """The matrix with another g; the grid's own scales stay."""
    if "scale" not in matrix.arrays:
        return matrix
    return QLRMatrix(dict(matrix.arrays) | {"scale": jax.device_put(np.float32([scale]))}, matrix.layout)


def make_folder(parent, name, *, source=None, specs=SPECS, **shape):
    """A packed folder of random codes with the bundled tokenizer."""
    config = LlamaConfig.from_hf({"model_type": "llama"} | SHAPES | MODELS.get(name, MODELS["tied"]) | shape)
    source = save_model(Llama(config, jax.random.key(3)), parent / f"{name}-source", tokenizer_from=source or BUNDLED)
    model = load_model(source)
    for norm in [p for n, p in model.tensors().items() if "norm" in n]:
        value = np.asarray(norm.get_value())
        norm.set_value(jax.device_put(value + 0.25 * np.arange(value.size, dtype=np.float32) / value.size))
    matrices = {}
    for linear in model.linears():
        layer, kind = parts_of(linear)
        spec = specs[layer % len(specs)][KINDS.index(kind)]
        matrices[linear] = scaled(random_matrix(spec, shape_of(config, linear), seed=layer, size=1.5, state_bits=8), G)
    return save_packed(parent / name, model, matrices, source=source, settings={"base_model": "someone/small"}), model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Packed folder and GGUF folder by name; one matrix of the tied one is solved, not random."""
    parent, found = tmp_path_factory.mktemp("gguf"), {}
    for name in MODELS:
        out, model = make_folder(parent, name)
        if name == "tied":
            matrices = read_matrices(out)
            gate = "model.layers.0.mlp.gate_proj"
            weight = np.asarray(model.linears()[gate].weight.get_value())
            matrices[gate] = qlr_jax.solve(weight, None, "int-3g256", iterations=1).value
            out = save_packed(parent / "solved", model, matrices, source=parent / "tied-source")
        found[name] = out, export_gguf(out, parent / f"{name}-gguf")
    return found


def tensors_of(path):
    """Name -> (type, numbers in float32) as the gguf package reads them."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        found[tensor.name] = tensor.tensor_type.name, numbers.reshape(tensor.shape[::-1])
    return found


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def natural_rows(rows, kind, config):
    """Undo llama.cpp's order: its row 2 i + j of a head is Hugging Face's row i + j d/2."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(kind, 0)
    half = config.head_dim // 2
    order = [h * 2 * half + i + j * half for h in range(heads) for i in range(half) for j in range(2)]
    out = rows.copy()
    out[order or slice(None)] = rows
    return out


# ------------------------------------------------------------------------------------------------------ packing


@pytest.mark.parametrize("kind", GGUF_BLOCKS)
def test_blocks_hold_every_code_exactly(kind):
    backbone, block, size = GGUF_BLOCKS[kind]
    bits, rng = int(backbone.split("-")[1].split("g")[0]), np.random.default_rng(0)
    codes = (np.arange(block)[None, :] + np.arange(2**bits)[:, None]) % 2**bits  # every code in every place
    codes = np.concatenate([codes, rng.integers(0, 2**bits, codes.shape)], axis=1)
    scales = rng.uniform(1e-3, 2, (len(codes), 2)).astype(np.float16)
    scales[0], scales[1] = 0, [2.0**-24, 65504 / 2**bits]
    packed = pack_blocks(kind, codes, scales)
    assert packed.shape == (len(codes), 2 * size) and packed.dtype == np.uint8
    wanted = (codes - 2.0 ** (bits - 1)) * np.repeat(scales.astype(np.float64), block, axis=1)
    np.testing.assert_array_equal(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind]), wanted)


def test_scales_that_are_no_fp16_are_refused():
    scales = np.array([[1.5, 2.0**-10]], np.float16)
    np.testing.assert_array_equal(fold_scale("m", scales, 2.0**-14), scales.astype(np.float32) * 2.0**-14)
    for scale, value in ((2.0**-24, "8.9407e-08"), (2.0**16, "98304"), (0.1, "0.15")):
        with pytest.raises(QLRError, match=f"model.x: the scale g·s = {value}.* no fp16"):
            fold_scale("model.x", scales, scale)


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_equals_dense(exported, name):
    out, dest = exported[name]
    model, matrices = load(out), read_matrices(out)
    base, adapter = tensors_of(dest / "model.gguf"), tensors_of(dest / "adapter.gguf")
    types = set()
    for linear, matrix in matrices.items():
        layer, kind = parts_of(linear)
        key = f"blk.{layer}.{LINEARS[kind]}.weight"
        quantized, rows = base.pop(key)
        types.add(quantized)
        backbone = natural_rows(rows, kind, model.config)
        np.testing.assert_array_equal(backbone, matrix.backbone(), strict=True)
        if not matrix.spec.rank:
            np.testing.assert_array_equal(backbone, matrix.dense(), strict=True)
            continue
        left, right = matrix.unrotated_factors()
        (of_a, a), (of_b, b) = adapter.pop(f"{key}.lora_a"), adapter.pop(f"{key}.lora_b")
        b = natural_rows(b, kind, model.config)
        np.testing.assert_array_equal(a, right, strict=True)
        np.testing.assert_array_equal(b, left, strict=True)
        assert of_a == of_b == ("BF16" if matrix.spec.grids == "bf16" else "F32")
        np.testing.assert_allclose(backbone + b.astype(np.float64) @ a, matrix.dense(), atol=2e-6)
    assert types == {*GGUF_BLOCKS, "BF16"} and not adapter
    rest = {n: np.asarray(p.get_value()) for n, p in model.tensors().items() if n.removesuffix(".weight") not in matrices}
    for tensor, value in rest.items():
        quantized, numbers = base.pop(gguf_name(tensor))
        assert quantized == ("F32" if value.ndim == 1 else "BF16")
        np.testing.assert_array_equal(numbers, value, strict=True)
    assert set(base) == ({"rope_freqs.weight"} if name == "tied" else set())
    assert ("lm_head.weight" in rest) == (name == "untied")


@pytest.mark.parametrize("name", MODELS)
def test_metadata(exported, name):
    out, dest = exported[name]
    config, keys, adapter = load(out).config, fields_of(dest / "model.gguf"), fields_of(dest / "adapter.gguf")
    wanted = {
        "general.architecture": "llama", "general.type": "model", "general.quantization_version": 2,
        "llama.context_length": 256, "llama.embedding_length": 256, "llama.block_count": 2, "llama.feed_forward_length": 512,
        "llama.attention.head_count": config.num_attention_heads, "llama.attention.head_count_kv": 2, "llama.vocab_size": 2048,
        "llama.attention.key_length": config.head_dim, "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim, "llama.rope.freq_base": config.rope_theta,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
    }  # fmt: skip
    assert {key: keys[key] for key in wanted} == wanted
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(config.rms_norm_eps)
    scaling = {key: value for key, value in keys.items() if "rope.scaling" in key}
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    assert scaling == (linear if name == "untied" else {})
    if name == "untied":
        assert keys["general.base_model.0.name"] == adapter["general.base_model.0.name"] == keys["general.name"] == "small"
    assert (adapter["general.type"], adapter["adapter.type"], adapter["adapter.lora.alpha"]) == ("adapter", "lora", 0.0)
    assert {p.name for p in dest.iterdir()} == {"model.gguf", "adapter.gguf", "README.md", "checksums.json"}
    assert check_files(dest) == 3
    assert "lora_adapters" in (dest / "README.md").read_text() and "at scale 1" in (dest / "README.md").read_text()


def test_bytes_are_what_the_target_says(exported):
    out, dest = exported["tied"]
    stored = {t.name: int(t.n_bytes) for f in ("model", "adapter") for t in gguf.GGUFReader(dest / f"{f}.gguf").tensors}
    for linear, matrix in read_matrices(out).items():
        layer, kind = parts_of(linear)
        spec = matrix.spec
        if not spec.rank or spec.grids == "bf16":
            size = sum(n for key, n in stored.items() if key.startswith(f"blk.{layer}.{LINEARS[kind]}."))
            assert size == exporter.TARGETS["gguf"].nbytes(spec, matrix.shape), str(spec)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_types_of_embedding(exported, dtype, tmp_path):
    out, _ = exported["untied"]
    base = tensors_of(export_gguf(out, tmp_path / "x", dtype=dtype) / "model.gguf")
    assert {base["token_embd.weight"][0], base["output.weight"][0]} == {exporter.TYPES[dtype]}
    embedding = np.asarray(load(out).tensors()["model.embed_tokens.weight"].get_value())
    np.testing.assert_array_equal(base["token_embd.weight"][1], embedding.astype(dtype).astype(np.float32))


# -------------------------------------------------------------------------------------------------- in llama.cpp


def serve(model, adapter=None):
    """A llama.cpp server in this process, one thread, KV cache in float32."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="running GGUF needs xllamacpp: pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    params.warmup, params.verbosity = False, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    # its loop must run before it is told to end, or it never does, and the thread that waits for it neither
    ask(server, "/completion", {"prompt": [1], "n_predict": 1})
    return server


def ask(server, path, body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def log_probabilities(server, tokens, size=2048):
    """Of the next token, after every prefix of 1, 4, 8 and all tokens."""
    rows = []
    for count in (1, 4, 8, len(tokens)):
        body = {"prompt": tokens[:count], "n_predict": 1, "n_probs": size, "temperature": 0.0, "cache_prompt": False}
        body |= {"logit_bias": [[65, 100.0]]}  # what is sampled is "a": of half a character, or an end, nothing is told
        top = ask(server, "/completion", body)["completion_probabilities"][0]["top_logprobs"]
        row = np.full(size, np.nan)
        for entry in top:
            row[entry["id"]] = entry["logprob"]
        rows.append(row)
    return np.stack(rows)


def in_float32(tensors):
    """The same tensors, dequantized: what llama.cpp computes from these has no rounding of activations in it."""

    def unpacked(tensor):
        rows = np.ascontiguousarray(tensor.make())
        return gguf.quants.dequantize(rows.view(np.uint8), gguf.GGMLQuantizationType[tensor.kind]) if tensor.kind != "F32" else rows

    return {
        name: dataclasses.replace(tensor, kind="F32", make=lambda tensor=tensor: unpacked(tensor))
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_the_same_model(exported, name, tmp_path):
    """Largest difference of log-probabilities: from blocks at most 0.15, from the same numbers in float32 at most 4e-3.

    llama.cpp rounds activations to 8 bits a block in products with quantized weights; dense() does not. Without the adapter, or
    with rows in another order, differences are of the size of the log-probabilities' own spread.
    """
    out, dest = exported[name]
    model = load(out).densified()
    whole = np.asarray(jax.nn.log_softmax(model(jnp.asarray([TOKENS]))[0]))
    wanted = whole[[0, 3, 7, len(TOKENS) - 1]]
    found = log_probabilities(serve(dest / "model.gguf", dest / "adapter.gguf"), TOKENS)
    alone = log_probabilities(serve(dest / "model.gguf"), TOKENS)
    packed = load(out)
    base, factors = in_float32(exporter.model_tensors(packed, "BF16")), in_float32(exporter.adapter_tensors(packed))
    keys = exporter.model_keys(packed.config, exporter.model_tensors(packed, "BF16"), vocabulary_of(out), "x", None)
    exporter.write_gguf(tmp_path / "base.gguf", keys, base, silent())
    exporter.write_gguf(tmp_path / "factors.gguf", exporter.adapter_keys("x", None), factors, silent())
    exact = log_probabilities(serve(tmp_path / "base.gguf", tmp_path / "factors.gguf"), TOKENS)
    differences = {key: float(np.abs(x - wanted).max()) for key, x in (("blocks", found), ("float32", exact), ("alone", alone))}
    print(name, {key: f"{value:.1e}" for key, value in differences.items()}, f"spread {wanted.std():.2f}")
    assert differences["blocks"] < 0.15 and differences["float32"] < 4e-3, differences
    assert differences["alone"] > 1.0 and wanted.std() > 0.3, differences
    assert np.array_equal(exact.argmax(1), wanted.argmax(1))


def vocabulary_of(out):
    return exporter.read_vocabulary(out, load(out).config)


def test_the_card_runs(exported, monkeypatch, capsys):
    pytest.importorskip("xllamacpp", reason="running GGUF needs xllamacpp: pip install xllamacpp")
    _, dest = exported["tied"]
    monkeypatch.chdir(dest)
    exec((dest / "README.md").read_text().split("```python")[1].split("```")[0], {})
    assert "choices" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- tokenizers


def trained(kind):
    """A small tokenizer of each kind, trained on this package's own source."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    texts = [path.read_text(encoding="utf-8") for path in SOURCES[:40]]
    specials = ["<unk>", "<s>", "</s>"]
    if kind in ("llama", "gemma"):
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        before, after = ([normalizers.Prepend("▁")], [decoders.Strip(" ", 1, 0)]) if kind == "llama" else ([], [])
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *after]
        tokenizer.decoder = decoders.Sequence(steps)
        alphabet = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=alphabet, max_token_length=8, show_progress=False)
        tokenizer.train_from_iterator([line for text in texts[:8] for line in text.split("\n")], trainer)
        tokenizer = Tokenizer.from_str(json.dumps(like_sentencepiece(json.loads(tokenizer.to_str()), specials)))
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind in ("llama-bpe", "tekken")))
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("smollm", "default"))
        first = {
            **{name: [pre_tokenizers.Split(Regex(way), "isolated")] for name, way in SPLITS.items()},
            "smollm": [pre_tokenizers.Digits(individual_digits=True)],
            "default": [pre_tokenizers.Whitespace()],
        }
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first[kind], byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    return tokenizer


def like_sentencepiece(description, specials):
    """Every way to make a token becomes a merge, those of one token side by side: how SentencePiece models are converted."""
    model = description["model"]
    pieces = list(dict.fromkeys("".join(pair) for pair in model["merges"]))
    cuts = lambda text: [(text[:i], text[i:]) for i in range(1, len(text))]  # noqa: E731
    model["merges"] = [pair for text in pieces for pair in cuts(text) if all(part in model["vocab"] for part in pair)]
    description["added_tokens"] = [entry for entry in description["added_tokens"] if entry["content"] in specials]
    return description


def tokenizer_folder(parent, tokenizer, **config):
    parent.mkdir()
    if tokenizer is not None:
        tokenizer.save(str(parent / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (parent / "tokenizer_config.json").write_text(json.dumps(settings | config))
    return parent


def small(parent, tokenizer_from):
    """A packed folder with another tokenizer, whose embedding has more rows than that has tokens."""
    specs = [["int-4g32"] * 7]
    out, _ = make_folder(
        parent, "small", source=tokenizer_from, specs=specs, num_hidden_layers=1, vocab_size=720, bos_token_id=1, eos_token_id=2,
        hidden_size=64, intermediate_size=64, num_attention_heads=2,
    )  # fmt: skip
    return out


def compare_tokens(out, dest):
    """The same ids from the folder, from llama.cpp, and from the file as we read it back."""
    tokenizer, again, server = load_tokenizer(out), load_tokenizer(dest / "model.gguf"), serve(dest / "model.gguf")
    names = ("bos_token", "eos_token", "unk_token", "chat_template")
    assert {name: getattr(again, name) for name in names} == {name: getattr(tokenizer, name) for name in names}
    for line in [*LINES, *(path.read_text(encoding="utf-8") for path in SOURCES[:8])]:
        for special in (False, True):
            body = {"content": line, "add_special": special, "parse_special": True}
            ids = tokenizer(line, add_special_tokens=special)["input_ids"]
            assert ask(server, "/tokenize", body)["tokens"] == ids, line[:99]
            assert again(line, add_special_tokens=special)["input_ids"] == ids, line[:99]
            assert again.decode(ids) == tokenizer.decode(ids), line[:99]


def test_bundled_tokenizer_in_llama_cpp(exported):
    compare_tokens(*exported["untied"])


@pytest.mark.parametrize("kind", ["llama-bpe", "dbrx", "deepseek-r1-qwen", "tekken", "smollm", "llama", "gemma"])
def test_tokenizers_in_llama_cpp(kind, tmp_path):
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    out = small(tmp_path, tokenizer_folder(tmp_path / "tokenizer", trained(kind), chat_template=template))
    dest = export_gguf(out, tmp_path / "gguf")
    keys = fields_of(dest / "model.gguf")
    sentencepiece = kind in ("llama", "gemma")
    assert keys["tokenizer.ggml.model"] == ("llama" if sentencepiece else "gpt2")
    assert keys.get("tokenizer.ggml.pre") == (None if sentencepiece else kind)
    assert len(keys["tokenizer.ggml.tokens"]) == 720 and keys["tokenizer.ggml.tokens"][719] == "[PAD719]"
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.chat_template"] == template
    assert "tokenizer" not in (dest / "README.md").read_text()  # nothing to warn of
    compare_tokens(out, dest)


def test_a_pre_tokenizer_that_has_no_name(tmp_path):
    out = small(tmp_path, tokenizer_folder(tmp_path / "tokenizer", trained("default")))
    dest = export_gguf(out, tmp_path / "gguf")
    assert fields_of(dest / "model.gguf")["tokenizer.ggml.pre"] == "default"
    assert "may cut some texts differently" in (dest / "README.md").read_text()
    ask(serve(dest / "model.gguf"), "/tokenize", {"content": "a"})


def test_transformers_own_llama_tokenizer(tmp_path):
    """It puts a space before a text only where there is none; llama.cpp always: the card says so."""
    out = small(tmp_path, tokenizer_folder(tmp_path / "tokenizer", trained("llama"), tokenizer_class="LlamaTokenizer"))
    dest = export_gguf(out, tmp_path / "gguf")
    assert "puts none after special tokens, or before what begins with a space" in (dest / "README.md").read_text()
    server = serve(dest / "model.gguf")
    for line in LINES[:2]:
        found = ask(server, "/tokenize", {"content": line, "add_special": True})["tokens"]
        assert found == load_tokenizer(out)(line)["input_ids"]


@pytest.mark.parametrize("kind", ["none", "words"])
def test_no_vocabulary_where_gguf_has_no_room_for_it(tmp_path, kind, monkeypatch, capsys):
    from tokenizers import Tokenizer, models

    words = None if kind == "none" else Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "a": 2}, "<unk>"))
    out = small(tmp_path, tokenizer_folder(tmp_path / "tokenizer", words))
    if kind == "none":
        (out / "tokenizer_config.json").unlink()
    dest = export_gguf(out, tmp_path / "gguf", progress=plain(sys.stdout))
    keys, card = fields_of(dest / "model.gguf"), (dest / "README.md").read_text()
    assert keys["tokenizer.ggml.model"] == "no_vocab" and keys["llama.vocab_size"] == 720
    assert ("holds no tokenizer" if kind == "none" else "WordLevel") in card and "There is no vocabulary" in capsys.readouterr().out
    monkeypatch.chdir(dest)
    exec(card.split("```python")[1].split("```")[0], {})
    assert "token_embd.weight" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("spec", ["trellis-2", "int-4g16", "int-4g32a", "int-3g256/rot", "nf-4g32", "bf16/rot", "none+r4@bf16"])
def test_what_gguf_cannot_hold_is_refused(spec, tmp_path):
    specs = [["int-4g32"] * 4 + [spec] + ["int-8g32"] * 2]
    out, _ = make_folder(tmp_path, "tied", specs=specs, num_hidden_layers=1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(QLRError, match=r"layers\.0\.mlp\.gate_proj: gguf cannot hold .*int-4g32, int-3g256") as error:
        export_gguf(out, tmp_path / "gguf")
    print(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_where_a_scale_is_refused(exported, tmp_path):
    out, _ = exported["untied"]
    matrices = read_matrices(out)
    last = list(matrices)[-1]
    model = load(out).densified()
    bad = save_packed(tmp_path / "bad", model, matrices | {last: scaled(matrices[last], 2.0**-20)}, source=original_of(out))
    with pytest.raises(QLRError, match=f"{last}: the scale g·s = .* no fp16 number"):
        export_gguf(bad, tmp_path / "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def original_of(out):
    return out.parent / f"{out.name}-source"


def test_other_refusals(exported, tmp_path, monkeypatch):
    out, dest = exported["untied"]
    with pytest.raises(QLRError, match="already holds"):
        export_gguf(out, dest)
    with pytest.raises(QLRError, match="int8"):
        export_gguf(out, tmp_path / "x", dtype="int8")
    with pytest.raises(QLRError, match="not a qlr folder"):
        export_gguf(original_of(out), tmp_path / "x")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(QLRError, match=r"pip install 'qlr-jax\[gguf\]'"):
        export_gguf(out, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [{"attention_bias": True}, {"family": "gemma"}, {"family": "mistral", "sliding_window": 8}])
def test_what_is_more_than_a_llama_is_refused(settings):
    sizes = dict(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = LlamaConfig(**sizes, **settings)
    with pytest.raises(QLRError, match="not written as GGUF; export it as dense"):
        model_tensors(Llama(config, jax.random.key(0)), "BF16")
