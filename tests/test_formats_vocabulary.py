"""Packed embeddings and heads on disk: in JAX, in PyTorch, tied and not, saved again, decoded, and exported."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlr_jax.core.config import SolverConfig
from qlr_jax.core.rows import solve_rows
from qlr_jax.errors import QLRError
from qlr_jax.formats import export_dense, export_gguf, load, read_matrices
from qlr_jax.formats.qlr.packed import read_config, save_packed
from qlr_jax.models import EMBEDDING, HEAD, Llama, LlamaConfig, load_model, save_model

torch = pytest.importorskip("torch")
from transformers import AutoModelForCausalLM  # noqa: E402

from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402

TOKENS = np.array([[3, 250, 77, 0, 3], [8, 8, 131, 200, 1]])
CASES = {
    "untied": ("llama", False, {EMBEDDING: "int-4g32", HEAD: "trellis-3/rows"}),
    "head": ("llama", False, {HEAD: "int-8g32"}),
    "tied": ("llama", True, {EMBEDDING: "trellis-3.5/rows"}),
    "gemma": ("gemma", True, {EMBEDDING: "nf-4g32"}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, packed folder, the original, its logits with the matrices decoded)."""
    family, tied, specs = CASES[request.param]
    parent = tmp_path_factory.mktemp(request.param)
    config = LlamaConfig(251, 64, 64, 1, 2, tie_word_embeddings=tied, family=family)
    save_model(Llama(config, jax.random.key(3)), parent / "source")
    model = load_model(parent / "source")
    eye, quick = np.eye(64, dtype=np.float32), SolverConfig(state_bits=8)
    matrices = {
        n: solve_rows(np.asarray(model.matrices()[n].weight.get_value()), eye, s, config=quick).value for n, s in specs.items()
    }
    out = save_packed(parent / "out", model, matrices, source=parent / "source")
    dense = load_model(parent / "source")
    for name, matrix in matrices.items():
        dense.matrices()[name].weight.set_value(matrix.dense())
    return request.param, out, matrices, np.asarray(dense(jnp.asarray(TOKENS)))


@pytest.fixture(autouse=True)
def registered():
    runtime.register()


def get(path, **options):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


def run(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def test_jax_and_pytorch_read_it(case):
    _name, out, matrices, wanted = case
    packed = load(out)
    near = lambda logits: np.testing.assert_allclose(np.asarray(logits), wanted, atol=2e-5 * np.abs(wanted).max())  # noqa: E731
    near(packed(jnp.asarray(TOKENS)))
    near(jax.jit(lambda model, tokens: model(tokens))(packed, jnp.asarray(TOKENS)))
    near(packed.densified()(jnp.asarray(TOKENS)))
    assert set(read_matrices(out)) == set(matrices) and read_config(out)[1]["runtime_version"] == 7
    model = get(out)
    near(run(model))
    assert isinstance(model.get_input_embeddings(), runtime.QLREmbedding) == (EMBEDDING in matrices)
    again = model.generate(torch.tensor(TOKENS[:1]), max_new_tokens=3, do_sample=False, use_cache=True)
    assert again.shape == (1, 8)
    half = run(model.to(torch.bfloat16))
    assert model.get_input_embeddings()(torch.tensor([[1]])).dtype == torch.bfloat16
    assert np.abs(half - wanted).max() < 0.05 * np.abs(wanted).max()


def test_saved_again_and_decoded_it_stays(case, tmp_path):
    _name, out, _matrices, wanted = case
    model = get(out)
    model.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(run(get(tmp_path / "again")), run(model))
    np.testing.assert_allclose(np.asarray(load(tmp_path / "again")(jnp.asarray(TOKENS))), wanted, atol=2e-5 * np.abs(wanted).max())
    plain = model.dequantize()
    assert "QLR" not in type(plain).__name__
    np.testing.assert_allclose(run(plain), wanted, atol=2e-5 * np.abs(wanted).max())
    plain.save_pretrained(tmp_path / "plain")
    np.testing.assert_array_equal(run(get(tmp_path / "plain")), run(plain))
    tied = plain.config.tie_word_embeddings
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied


def test_what_is_stored_is_what_the_spec_says(case):
    _, out, matrices, _ = case
    from safetensors.numpy import load_file

    arrays = load_file(out / "model.safetensors")
    for name, matrix in matrices.items():
        own = {key: array for key, array in arrays.items() if key.startswith(f"{name}.")}
        assert f"{name}.weight" not in own and sum(array.nbytes for array in own.values()) == matrix.spec.nbytes(matrix.shape)
    assert HEAD in matrices or not any(key.startswith("lm_head") for key in arrays)


def test_exports(case, tmp_path):
    name, out, matrices, wanted = case
    export_dense(out, tmp_path / "dense", dtype="float32")
    np.testing.assert_allclose(run(get(tmp_path / "dense")), wanted, atol=2e-5 * np.abs(wanted).max())
    if name == "gemma":
        return
    gguf = pytest.importorskip("gguf")
    export_gguf(out, tmp_path / "gguf")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors}
    assert kinds["token_embd.weight"] == {"untied": "Q4_0"}.get(name, "BF16")
    assert kinds.get("output.weight") == {"untied": "BF16", "head": "Q8_0", "tied": None}[name]
    reader = next(t for t in gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").tensors if t.name == "token_embd.weight")
    rows = gguf.quants.dequantize(reader.data, reader.tensor_type)
    dense = matrices[EMBEDDING].dense() if EMBEDDING in matrices else load(out).model.embed_tokens.weight.get_value()
    np.testing.assert_allclose(rows, np.asarray(dense), atol=5e-3 * np.abs(np.asarray(dense)).max())


def test_what_cannot_be_is_refused(case, tmp_path):
    name, out, _matrices, _ = case
    if name != "untied":
        return
    import qlr_jax as qlr

    model = load_model(out.parent / "source")
    rotated = qlr.solve(np.asarray(model.matrices()[EMBEDDING].weight.get_value()), None, "int-4/rot").value
    with pytest.raises(QLRError, match="single rows cannot be read"):
        save_packed(tmp_path / "rotated", model, {EMBEDDING: rotated}, source=out.parent / "source")
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["matrices"][EMBEDDING]["shape"] = [250, 64]
    (out / "checksums.json").unlink()
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"gives model\.embed_tokens the shape"):
        get(out)
    (out / "config.json").write_text(text)


def test_there_is_no_triton_kernel_for_rows_with_scales():
    pytest.importorskip("triton")
    from qlr_jax.formats.qlr.kernels.launch import Kernel

    with pytest.raises(NotImplementedError, match="trellis-3/rows"):
        Kernel(runtime.QLRLinear("trellis-3/rows", (64, 64)))
