"""Adaptation: what is trained and what is not, the losses, resuming, re-quantization, added components, devices."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run
from scipy import special
from test_formats import random_matrix

from qlr_jax import calibration
from qlr_jax.adaptation import AdaptationVerdict, AdaptConfig, TeacherLogits, checkpoint, fine_tune, loop, teacher_logits
from qlr_jax.adaptation.added_components import added_components
from qlr_jax.adaptation.assembly import pack_matrix
from qlr_jax.adaptation.config import TRAINABLE, added_bytes
from qlr_jax.adaptation.losses import hidden_state_loss, kl_loss, text_loss, top_kl_loss
from qlr_jax.adaptation.measure import mean_loss, mean_over, weight_gradients
from qlr_jax.adaptation.metrics import backbone_metric
from qlr_jax.adaptation.products import bf16_product
from qlr_jax.adaptation.rounding import factor_shifts, quantize_left, quantize_right
from qlr_jax.adaptation.sequences import Sequences, epoch_order
from qlr_jax.adaptation.student import EMBEDDINGS, backbone, factors, packed_matrices, split_matrix, take_apart
from qlr_jax.adaptation.student_forward import student_forward, teacher_forward
from qlr_jax.adaptation.trainer import learning_rates, make_trainer, row_trust
from qlr_jax.core import hadamard
from qlr_jax.core.hadamard import INPUT, OUTPUT
from qlr_jax.core.matrix import QLRMatrix
from qlr_jax.core.requantize import Requantizer
from qlr_jax.core.spec import Spec
from qlr_jax.errors import QLRError
from qlr_jax.models import Llama, LlamaConfig
from qlr_jax.models.forward import through
from qlr_jax.models.products import exact_product

LAYER = "model.layers.0."
SMALL = {
    "self_attn.q_proj": "trellis-2+r4@trellis-2",
    "self_attn.k_proj": "trellis-2+r8@trellis-4",
    "self_attn.v_proj": "trellis-2",
    "self_attn.o_proj": "int-2g16",
}
# every kind of matrix: bf16, integer and mixed factors, group scales, rotated groups, no backbone, one kept as it is
ZOO = SMALL | {
    "self_attn.k_proj": "none+r16@int-8",
    "self_attn.v_proj": "bf16",
    "mlp.gate_proj": "int-2g16/rot+r4@int-4",
    "mlp.up_proj": "nf-2g16+r4@bf16",
    "mlp.down_proj": "trellis-2+r4@int-8,trellis-2",
}
SMALL, ZOO = ({LAYER + name: spec for name, spec in specs.items()} for specs in (SMALL, ZOO))


@partial(jax.jit, static_argnums=0)
def dense(matrix, values, base):
    """W (m, n) as it is being trained: what a student's layer multiplies with."""
    total = backbone(matrix, values, base)
    if matrix.rank:
        total = total + jnp.matmul(*factors(matrix, values), precision="highest")
    total = values["gain"] * total
    return values["rows"][:, None] * total * values["columns"] if "rows" in values else total


def student_logits(*arguments):
    return student_forward(*arguments)[1]


def student_says(student, frame, values, tokens):
    """What a student says, of one program."""
    return student_logits(student, frame, values, jnp.asarray(tokens), exact_product)


@jax.jit
def forward(model, tokens):
    return model(tokens)


def says(model, tokens):
    """The logits of a model as it is stored; one program for all that are alike once decoded."""
    return np.asarray(forward(model.densified(), jnp.asarray(tokens)))


def near(got, want):
    return float(np.abs(np.asarray(got) - want).max()) < 1e-4 * float(np.abs(want).max())


def sizes(arrays):
    """With component scales as the solver's are."""
    return {k: jnp.asarray(np.abs(np.asarray(v))) if k == "component_scale" else v for k, v in arrays.items()}


def compressed(model, specs):
    """(`model` with matrices of random codes in place of its weights, a model whose weights they approximate)."""
    packed, original = (jax.tree.map(lambda leaf: leaf, model) for _ in range(2))
    for i, (name, spec) in enumerate(specs.items()):
        matrix = random_matrix(spec, model.linears()[name].weight.get_value().shape, seed=3, state_bits=6)
        matrix = QLRMatrix(sizes(matrix.arrays), matrix.layout)
        weight = np.asarray(matrix.dense())
        packed.linears()[name].weight.set_value(matrix)
        noise = 0.3 * weight.std() * np.asarray(jax.random.normal(jax.random.key(i), weight.shape))
        original.linears()[name].weight.set_value(jnp.asarray(weight + noise))
    return packed, original


@pytest.fixture(scope="module")
def base():
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2
    )
    model = Llama(config, jax.random.key(0))
    for param in model.tensors().values():
        value = np.asarray(param.get_value())
        param.set_value(jnp.asarray(value * 8 if value.ndim > 1 else value))
    return model


@pytest.fixture(scope="module")
def packed_and_original(base):
    return compressed(base, SMALL)


@pytest.fixture(scope="module")
def packed(packed_and_original):
    return packed_and_original[0]


@pytest.fixture(scope="module")
def original(packed_and_original):
    return packed_and_original[1]


@pytest.fixture(scope="module")
def few(packed, original):
    """`packed` with two packed matrices alone, a rotated one with factors and a grouped one: less to compile."""
    model = jax.tree.map(lambda leaf: leaf, packed)
    for name in ("self_attn.q_proj", "self_attn.v_proj"):
        model.linears()[LAYER + name].weight.set_value(original.linears()[LAYER + name].weight.get_value())
    return model


@pytest.fixture(scope="module")
def zoo_and_original(base):
    return compressed(base, ZOO)


@pytest.fixture(scope="module")
def zoo(zoo_and_original):
    return zoo_and_original[0]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(0, 64, (12, 10)).astype(np.int32)


@pytest.fixture(scope="module")
def held_out():
    return np.random.default_rng(1).integers(0, 64, (4, 10)).astype(np.int32)


def settings(**changes):
    given = {"steps": 6, "batch": 4, "evaluate_every": 2, "learning_rate": 0.02, "vector_rate": 0.005, "top": None}
    given |= {"reround": None} | changes
    return AdaptConfig(**given)


def losses(adapted):
    return [entry["loss"] for entry in adapted.stats["history"] if "loss" in entry]


@pytest.fixture(scope="module")
def adapted(zoo_and_original, tokens):
    zoo, original = zoo_and_original
    return fine_tune(zoo, tokens, settings(steps=10, batch=12, evaluate_every=5), teacher=original, held_out=tokens)


# --- the student -----------------------------------------------------------------------------------------------------------


def test_apart_and_together_is_the_same_model(zoo, few, tokens):
    for model, rank in ((zoo, None), (few, 4)):
        student, values, frame = take_apart(model, ("factors", "scales"), rank, {})
        assert near(student_says(student, frame, values, tokens), says(model, tokens))
        for name, matrix in packed_matrices(model).items():
            base = frame.linears()[name].weight.get_value()
            np.testing.assert_allclose(dense(student.matrices[name], values[name], base), matrix.dense(), atol=1e-5)


def test_factors_that_stay_are_multiplied_out_beside_a_trained_backbone(zoo, tokens):
    student, values, frame = take_apart(zoo, ("backbone", "scales"), None, {})
    bodies = [name for name in student.matrices if "body" in values[name]]
    assert any(packed_matrices(zoo)[name].spec.rank for name in bodies) and not any(student.matrices[name].rank for name in bodies)
    assert near(student_says(student, frame, values, tokens), says(zoo, tokens))


def test_hidden_states_are_those_that_leave_the_blocks(packed, original, tokens):
    batch = jnp.asarray(tokens)
    student, values, frame = take_apart(packed, ("factors",), None, {})
    first = jax.jit(lambda model: through(model.block(0), model.embed(batch), model.rope(batch.shape[1])))
    for model, (states, scores) in (
        (packed, jax.jit(lambda f, v: student_forward(student, f, v, batch, exact_product))(frame, values)),
        (original, jax.jit(lambda model: teacher_forward(model, batch, exact_product))(original)),
    ):
        assert len(states) == model.config.num_hidden_layers == 1
        assert near(states[0], np.asarray(first(model.densified()))) and near(scores, says(model, tokens))


def test_remat_and_the_fast_product_change_little(packed, tokens):
    student, values, frame = take_apart(packed, ("factors",), None, {})
    run = lambda *how: jax.jit(lambda v: student_logits(student, frame, v, jnp.asarray(tokens), *how))(values)  # noqa: E731
    exact = np.asarray(run(exact_product))
    np.testing.assert_allclose(run(exact_product, True), exact, atol=1e-5)
    assert np.abs(np.asarray(run(bf16_product)) - exact).mean() < 0.02 * np.abs(exact).mean()
    x, w = (np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate([(2, 3, 8), (5, 8)]))
    got, want = (
        jax.jit(jax.grad(lambda x, w, f=f: jnp.sum(jnp.sin(f(x, w))), (0, 1)))(x, w) for f in (bf16_product, exact_product)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), got, want)


def test_the_loss_falls_and_what_is_stored_is_evaluated(adapted, zoo_and_original, tokens):
    original = zoo_and_original[1]
    assert adapted.verdict is AdaptationVerdict.IMPROVED and adapted.stats["after"] < adapted.stats["before"]
    text = Sequences(tokens, original)
    assert adapted.stats["after"] == pytest.approx(mean_loss(adapted.value, text, settings()), rel=1e-5)
    p, q = (special.log_softmax(says(m, tokens).astype(np.float64), axis=-1) for m in (original, adapted.value))
    assert adapted.stats["after"] == pytest.approx(np.mean(np.sum(np.exp(p) * (p - q), -1)), rel=1e-3)
    assert [e["phase"] for e in adapted.stats["history"] if "loss" in e] == ["all"] * 7 + ["left"] * 2 + ["scales"]


def test_codes_stay_byte_for_byte_and_bytes_are_those_of_the_spec(adapted, zoo):
    for name, matrix in adapted.matrices.items():
        old = zoo.linears()[name].weight.get_value()
        assert str(matrix.spec) == ZOO[name] and matrix.nbytes == Spec.parse(ZOO[name]).nbytes(matrix.shape)
        assert {k: (a.dtype, a.shape) for k, a in matrix.arrays.items()} == {k: (a.dtype, a.shape) for k, a in old.arrays.items()}
        for key in matrix.arrays.keys() & {"backbone.codes", "backbone.zeros"}:
            assert np.asarray(matrix.arrays[key]).tobytes() == np.asarray(old.arrays[key]).tobytes()
    assert adapted.stats["bytes"] == adapted.stats["bytes_before"]
    for norm in map(np.asarray, adapted.norms.values()):
        np.testing.assert_array_equal(norm, norm.astype(jnp.bfloat16).astype(norm.dtype))


MOVES = {
    "factors": {"left", "right"},
    "norms": set(),
    "scales": {"scale", "component_scale", "backbone.scales"},
    "signs": {"output_signs", "input_signs"},
    "embeddings": set(),
    "backbone": {"backbone"},
}


@pytest.mark.parametrize("train", list(MOVES))
def test_only_what_is_named_moves(few, original, tokens, train):
    # every norm moves by more than half of what bf16 resolves at 1
    more = {"reround": 2, "backbone_rate": 0.02} if train == "backbone" else {}
    found = fine_tune(few, tokens, settings(train=(train,), steps=5, batch=12, vector_rate=0.02, **more), teacher=original)
    assert found.verdict is not AdaptationVerdict.NOT_IMPROVED
    moved = set()
    for name, matrix in packed_matrices(few).items():
        for key, array in found.matrices[name].arrays.items():
            if key not in matrix.arrays or np.asarray(array).tobytes() != np.asarray(matrix.arrays[key]).tobytes():
                moved.add(key if key == "backbone.scales" else key.split(".")[0])
    assert moved == MOVES[train]
    same = [np.array_equal(a, few.tensors()[n].get_value()) for n, a in found.norms.items()]
    assert not any(same) if train == "norms" else all(same)
    kept = few.tensors()[f"{LAYER}mlp.down_proj.weight"].get_value()
    np.testing.assert_array_equal(found.value.tensors()[f"{LAYER}mlp.down_proj.weight"].get_value(), kept)
    same = [np.array_equal(a, few.tensors()[n].get_value()) for n, a in found.embeddings.items()]
    assert len(same) == 2 and (not any(same) if train == "embeddings" else all(same))


@pytest.fixture(scope="module", params=["tied", "untied"])
def with_table(request):
    """A model whose embedding bf16 holds, tied or not; its compressed form."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=request.param == "tied",
    )
    model = Llama(config, jax.random.key(1))
    for name, param in model.tensors().items():
        value = np.asarray(param.get_value()) * (8 if param.get_value().ndim > 1 else 1)
        param.set_value(jnp.asarray(value.astype(jnp.bfloat16).astype(np.float32) if name in EMBEDDINGS else value))
    packed, original = compressed(model, {f"{LAYER}mlp.gate_proj": "int-2g16", f"{LAYER}mlp.up_proj": "int-2g16"})
    return original, packed


def test_embeddings_are_learned_and_those_of_unseen_tokens_stay(with_table):
    model, packed = with_table
    tokens = np.random.default_rng(2).integers(0, 40, (12, 10))
    config = settings(train=("embeddings",), top=4, steps=8, batch=12, embedding_rate=0.02)
    teacher = teacher_logits(model, tokens, 4)
    found = fine_tune(packed, tokens, config, teacher=teacher)
    assert found.verdict is AdaptationVerdict.IMPROVED and found.stats["after"] < 0.95 * found.stats["before"]
    assert found.stats["bytes"] == found.stats["bytes_before"]
    assert set(found.embeddings) == set(EMBEDDINGS if model.lm_head is not None else EMBEDDINGS[:1])
    assert found.stats["trained"] == sum(a.size for a in found.embeddings.values())
    read, told = set(tokens.ravel()), set(teacher.ids.ravel().tolist())
    for name, array in found.embeddings.items():
        array = np.asarray(array)
        np.testing.assert_array_equal(array, array.astype(jnp.bfloat16).astype(array.dtype))
        moved = set(np.flatnonzero(np.any(array != np.asarray(packed.tensors()[name].get_value()), axis=1)).tolist())
        # an untied embedding has no gradient where a token is not read; the head has one wherever the teacher names it
        assert moved and moved <= (read if name == EMBEDDINGS[0] and model.lm_head is not None else read | told)
    assert len(read | told) < 64


def test_gradients_of_a_tied_embedding_are_those_of_both_uses(with_table):
    _, packed = with_table
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 64, (3, 8)))
    student, values, frame = take_apart(packed, ("embeddings",), None, {})

    @jax.jit
    def loss(values):
        return jnp.mean(jnp.square(student_logits(student, frame, values, tokens, exact_product)))

    gradient, step = jax.jit(jax.grad(loss))(values), 1e-3
    for name in student.embeddings:
        table = np.asarray(values[name]["table"])
        along = np.random.default_rng(4).standard_normal(table.shape).astype(np.float32)
        ends = [float(loss(values | {name: values[name] | {"table": table + np.float32(s * step) * along}})) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert np.sum(np.asarray(gradient[name]["table"]) * along) == pytest.approx(slope, rel=1e-2, abs=1e-3)


def test_a_rare_token_moves_less_than_a_common_one():
    second = jnp.asarray([[1.0, 1.0], [1e-4, 1e-4], [0.0, 0.0]])
    trust = np.asarray(row_trust(second))[:, 0]
    assert trust[0] > 0.8 and trust[1] < 0.05 and trust[2] == 0


def test_trained_signs_are_stored_counted_and_trained_again(packed, original, tokens):
    first = fine_tune(packed, tokens, settings(train=("signs",), steps=5, batch=12), teacher=original)
    matrices = packed_matrices(first.value)
    extra = {n: 2 * sum(m.shape) if m.spec.rotated else 0 for n, m in matrices.items()}
    assert sum(m.layout.signs for m in matrices.values()) == 3 and all(m.layout.signs == m.spec.rotated for m in matrices.values())
    assert all(m.nbytes == m.spec.nbytes(m.shape) + extra[n] for n, m in matrices.items())
    assert first.stats["bytes"] - first.stats["bytes_before"] == sum(extra.values())
    for matrix in matrices.values():  # diag(a) Kᵀ (Q + L diag(s) R) K diag(b), by its own formula
        if matrix.layout.signs:
            (u, _), (v, _) = hadamard.rotations(matrix.shape, matrix.layout.seed, matrix.layout.rotation_block)
            seeded = QLRMatrix(matrix.arrays, dataclasses.replace(matrix.layout, signs=False)).dense()
            a, b = (np.asarray(matrix.arrays[f"{side}_signs"], np.float64) for side in ("output", "input"))
            np.testing.assert_allclose(matrix.dense(), (a * u)[:, None] * np.asarray(seeded) * (b * v), atol=1e-5)
            assert 0 < np.abs(a * u - 1).max() < 0.2
    # what stays as it is keeps its signs; fresh factors begin at no change in their basis too
    student, values, frame = take_apart(first.value, ("factors",), None, fresh := added_components(matrices, {
        n: np.asarray(m.dense()) for n, m in matrices.items()}, 400, None))  # fmt: skip
    assert near(student_says(student, frame, values, tokens), says(first.value, tokens))
    for name, right in fresh.items():
        turned = hadamard.unrotate(right, *matrices[name].rotations[1]) if matrices[name].spec.rotated else right
        basis = np.linalg.svd(np.asarray(matrices[name].dense(), np.float64))[2][: len(right)]
        assert np.linalg.norm(np.asarray(turned) @ basis.T) == pytest.approx(np.linalg.norm(turned), rel=1e-2)
    second = fine_tune(first.value, tokens, settings(train=("factors", "scales"), steps=5, batch=12), teacher=original)
    assert second.stats["after"] < second.stats["before"] == pytest.approx(first.stats["after"], rel=1e-5)
    for name, matrix in packed_matrices(second.value).items():
        for side in ("output_signs", "input_signs") if matrix.layout.signs else ():
            np.testing.assert_array_equal(matrix.arrays[side], matrices[name].arrays[side])


def test_first_components_alone(few, original, tokens):
    found = fine_tune(few, tokens, settings(train=("factors",), rank=4, steps=5, batch=12), teacher=original)
    name = f"{LAYER}self_attn.k_proj"
    old, new = packed_matrices(few)[name], found.matrices[name]
    assert found.verdict is not AdaptationVerdict.NOT_IMPROVED and old.spec == new.spec
    for side in ("left", "right"):
        a, b = old.arrays[f"{side}.codes"], new.arrays[f"{side}.codes"]
        np.testing.assert_array_equal(a[1:], b[1:])
        assert not np.array_equal(a[:1], b[:1])
    np.testing.assert_array_equal(old.arrays["component_scale"][4:], new.arrays["component_scale"][4:])
    with pytest.raises(QLRError, match=r"rank 3 cuts the components .* multiple of 4"):
        fine_tune(few, tokens, settings(rank=3), teacher=original)


@pytest.mark.parametrize("grid", ["bf16", "int-8"])
def test_another_grid_for_all_factors(few, original, tokens, grid):
    found = fine_tune(few, tokens, settings(factors=grid, steps=5, batch=12), teacher=original)
    assert found.stats["after"] < found.stats["before"]
    for name, matrix in found.matrices.items():
        spec = Spec.parse(SMALL[name])
        wanted = dataclasses.replace(spec, left=grid, right=grid) if spec.rank else spec
        assert matrix.spec == wanted and matrix.nbytes == wanted.nbytes(matrix.shape)
    assert found.stats["bytes"] == sum(m.nbytes for m in found.matrices.values())


def test_shifted_factors_are_the_quantized_ones(zoo, tokens):
    student, values, frame = take_apart(zoo, ("factors",), None, {})
    rng = np.random.default_rng(0)
    for name, site in student.matrices.items():
        if not site.rank:
            continue
        noise = {k: values[name][k] * (1 + 0.1 * rng.normal(size=values[name][k].shape)) for k in ("left", "right", "component")}
        own = {k: jnp.asarray(v, jnp.float32) for k, v in (values[name] | noise).items()}
        hessian = np.eye(site.layout.shape[1], dtype=np.float32)
        got = own | factor_shifts(site, own, hessian, {})
        right, _ = quantize_right(site, own, hessian)
        both, codes = quantize_left(site, right, hessian)
        want = dense(site, both, frame.linears()[name].weight.get_value())
        np.testing.assert_allclose(dense(site, got, frame.linears()[name].weight.get_value()), want, atol=1e-4)
        again = right | factor_shifts(site, right | {"right.shift": 1.0}, hessian, {"right.codes": 0})
        np.testing.assert_allclose(dense(site, again, frame.linears()[name].weight.get_value()), want, atol=1e-4)
        assert not factor_shifts(site, both, hessian, {"right.codes": 0, **codes})["left.shift"].any()
        fresh = factor_shifts(site, own | {"left": 0 * own["left"]}, hessian, {})
        assert not fresh["left.shift"].any()


def requantized(matrix, h, g):
    """(its description, its parameters, the matrix packed again) with factors and backbone re-quantized as they are."""
    student, values, _ = split_matrix("", matrix, ("factors", "backbone"))
    grid = Requantizer.of(matrix, backbone_metric(h, None, matrix.layout, INPUT), backbone_metric(g, None, matrix.layout, OUTPUT))
    rounded, right = quantize_right(student, values, h)
    rounded, left = quantize_left(student, rounded, h)
    return student, values, pack_matrix(matrix, student, rounded, {**right, **left}, grid)


@pytest.mark.parametrize(
    "spec", ["trellis-1.5+r8@trellis-2", "e8-2+r4@e8-3", "int-3g16a+r8@bf16", "nf-2/rot+r4@trellis-2", "trellis-2w+r4@trellis-2"]
)
def test_what_does_not_move_is_requantized_to_itself(spec):
    rng = np.random.default_rng(0)
    h, g = (np.cov(rng.standard_normal((size, 4 * size))).astype(np.float32) for size in (64, 32))
    matrix = requantized(random_matrix(spec, (32, 64), seed=3, state_bits=6), h, g)[2]  # codes that its quantizers find
    student, values, again = requantized(matrix, h, g)
    kept = ("backbone", "left", "right", "component_scale") if all(student.on_grid) else ("backbone",)
    for key in (key for key in matrix.arrays if key.startswith(kept)):
        np.testing.assert_array_equal(again.arrays[key], matrix.arrays[key], strict=True)
    np.testing.assert_allclose(dense(student, values | {"body.shift": 0.0}, jnp.zeros(())), matrix.dense(), atol=1e-5)


@pytest.mark.parametrize("kind", ["self_attn.v_proj", "self_attn.q_proj", "self_attn.o_proj"])
def test_a_backbone_that_moved_takes_other_codes_of_its_grid(packed, kind):
    """Against float64: what is found lies on the grid, and its weighted error is less than that of plain rounding."""
    matrix, rng = packed_matrices(packed)[LAYER + kind], np.random.default_rng(0)
    m, n = matrix.shape
    h, g = (np.cov(rng.standard_normal((size, 4 * size))) + 0.1 * np.eye(size) for size in (n, m))

    def made(*metrics):
        rotated = (backbone_metric(a, None, matrix.layout, side) for side, a in enumerate(metrics))
        return Requantizer.of(matrix, *rotated)

    grid = made(h, g)
    body = np.asarray(matrix.without_factors().dense(), np.float64) / float(grid.scale)
    wanted = body + 0.3 * body.std() * rng.standard_normal((m, n))
    found, codes = grid.round(jnp.asarray(wanted, jnp.float32))
    arrays = {k: v for k, v in matrix.arrays.items() if k == "scale"} | grid.pack(codes)
    again = QLRMatrix(arrays, matrix.without_factors().layout)
    np.testing.assert_allclose(again.dense(), found * grid.scale, atol=1e-5)
    assert not np.array_equal(arrays["backbone.codes"], matrix.arrays["backbone.codes"])
    weighted = lambda e: np.trace(g @ e @ h @ e.T)  # noqa: E731
    plain = made(np.eye(n), np.eye(m)).round(jnp.asarray(wanted, jnp.float32))[0]
    ours, others, still = (weighted(wanted - np.asarray(x, np.float64)) for x in (found, plain, body))
    assert ours < 0.99 * others and ours < still  # the integers' gain is small, as many are clipped
    again, _ = grid.round(jnp.asarray(wanted, jnp.float32), grid.warm_start(codes))  # of a trellis: its tail-biting states are kept
    np.testing.assert_allclose(again, found, atol=1e-5)
    if (warm := grid.warm_start(grid.round(jnp.asarray(body, jnp.float32))[1])) is not None:  # those before it moved
        near, codes = grid.round(jnp.asarray(wanted, jnp.float32), warm)
        np.testing.assert_array_equal(grid.warm_start(codes), warm)
        assert weighted(wanted - np.asarray(near, np.float64)) < 1.2 * ours


def test_factors_are_trained_quantized_and_resumed(few, original, tokens, held_out, tmp_path, monkeypatch):
    config = settings(train=("factors", "backbone"), reround=2, reround_backbone=1, steps=6, evaluate_every=2, backbone_rate=0.02)
    run = lambda folder: fine_tune(few, tokens, config, teacher=original, held_out=held_out, checkpoint=folder)  # noqa: E731
    whole, save = run(tmp_path / "whole"), checkpoint.save

    def saved(*given):
        save(*given)
        raise Interrupted

    monkeypatch.setattr(checkpoint, "save", saved)
    with pytest.raises(Interrupted):
        run(tmp_path / "begun")
    monkeypatch.setattr(checkpoint, "save", save)
    again = run(tmp_path / "begun")
    assert again.stats["history"] == whole.stats["history"]
    assert whole.stats["bytes"] == whole.stats["bytes_before"]
    # what the validation steps measured is what is stored
    validated = [e["held_out"] for e in whole.stats["history"] if "held_out" in e]
    assert {e["phase"] for e in whole.stats["history"]} == {"all"} and len(validated) == 4
    if whole.verdict is not AdaptationVerdict.NOT_IMPROVED:
        assert whole.stats["after"] == pytest.approx(min(validated), rel=1e-2)  # component scales are stored in float16


# --- losses and teachers ---------------------------------------------------------------------------------------------------


def test_losses_against_numpy(tokens):
    rng = np.random.default_rng(0)
    p, q = (np.log(a / a.sum(-1, keepdims=True)) for a in rng.uniform(0.1, 1, (2, 3, 10, 64)))
    full, found = float(jax.jit(kl_loss)(q, p)), []
    assert full == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-5)
    want = -np.mean([q[i, t, tokens[i, t + 1]] for i in range(3) for t in range(9)])
    assert float(jax.jit(text_loss)(q, tokens[:3])) == pytest.approx(want, rel=1e-5)
    for k in (1, 8, 32, 64):
        ids = np.argsort(-p, axis=-1)[..., :k]
        found.append(float(jax.jit(top_kl_loss)(q, ids, np.take_along_axis(p, ids, -1))))
    assert found == sorted(found) and found[-1] == pytest.approx(full, rel=1e-4)


def test_a_teachers_likeliest_tokens_stand_for_it(few, original, tokens, held_out):
    whole = mean_loss(few, Sequences(tokens, original), settings())
    assert mean_loss(few, Sequences(tokens, teacher_logits(original, tokens, 64)), settings()) == pytest.approx(whole, rel=2e-2)
    kept = teacher_logits(original, tokens, 8, batch=5)
    assert kept.ids.shape == (12, 10, 8) and kept.ids.dtype == np.uint16 and kept.logp.dtype == np.float16
    others, config = teacher_logits(original, held_out, 8), settings(top=8, train=("norms",), steps=2)
    given = fine_tune(few, tokens, config, teacher=kept, held_out=held_out, held_out_teacher=others)
    own = fine_tune(few, tokens, config, teacher=original, held_out=held_out)
    assert losses(given) == losses(own)


def test_rows_left_over_count_as_the_others(tokens):
    taken = []

    def loss(part):
        taken.append(len(part[0]))
        return np.mean(part[0])

    assert mean_over(Sequences(tokens[:6], None), 4, loss) == pytest.approx(tokens[:6].mean(), rel=1e-6) and taken == [4, 1, 1]


def test_mix_is_the_weighted_sum(few, original, tokens):
    kl, text, mix = (mean_loss(few, Sequences(tokens, original), settings(loss=n, weight=0.25)) for n in ("kl", "text", "mix"))
    assert mix == pytest.approx(0.25 * kl + 0.75 * text, rel=1e-5)


def test_states_against_numpy():
    rng = np.random.default_rng(0)
    found, original = rng.standard_normal((2, 3, 2, 5, 8))
    metrics = [np.cov(rng.standard_normal((8, 20))) for _ in range(3)]
    apart = found - original
    want = np.mean([0.5 * np.einsum("bti,ij,btj->bt", d, g, d).mean() for d, g in zip(apart, metrics, strict=True)])
    given = ([a.astype(np.float32) for a in arrays] for arrays in (found, original, metrics))
    assert float(jax.jit(partial(hidden_state_loss, product=exact_product))(*given)) == pytest.approx(want, rel=1e-5)


def test_hidden_states_are_distilled_and_left_out_of_the_loss_that_is_shown(packed, original, tokens):
    """Their weight draws the hidden states to the original's; the loss that is shown stays KL."""
    plain, drawn = (
        fine_tune(packed, tokens, settings(train=("scales",), steps=24, batch=12, states=w), teacher=original, held_out=tokens)
        for w in (0.0, 1000.0)
    )
    assert losses(plain)[0] == pytest.approx(losses(drawn)[0], rel=1e-5) and losses(plain)[-1] != losses(drawn)[-1]
    states = jax.jit(lambda model: teacher_forward(model, jnp.asarray(tokens), exact_product)[0][0])
    name = f"{LAYER}mlp.down_proj"
    metric = np.asarray(calibration.output_hessians(packed.densified(), tokens, [name])[name])

    def apart(model):
        difference = np.asarray(states(model.densified())) - np.asarray(states(original))
        return np.sum(difference * (difference @ metric))

    assert apart(drawn.value) < apart(plain.value) < apart(packed)


# --- the training ----------------------------------------------------------------------------------------------------------


def first_steps(packed, original, tokens, **changes):
    config = settings(**changes)
    student, values, frame = take_apart(packed, config.train, None, {})
    names = {(n, k) for n, own in values.items() for k in own if k in ("left", "right", "norm", "gain")}
    trainer = make_trainer(student, frame, names, Sequences(tokens, original), config)
    trained, fixed, state = trainer.init(values)
    for step in range(2):
        trained, state, loss = trainer.step(trained, fixed, state, learning_rates(config, trained, names, step, 10), np.arange(12))
    return trained, loss


def test_accumulated_passes_equal_one_batch(few, original, tokens):
    (a, one), (b, two) = (first_steps(few, original, tokens, batch=n, accumulate=12 // n) for n in (12, 4))
    assert one == pytest.approx(two, rel=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4), a, b)


def test_every_epoch_takes_every_sequence_once():
    taken = np.concatenate([epoch_order(5, step, 4, 6) for step in range(6)])
    assert all(sorted(taken[e * 6 : e * 6 + 6].tolist()) == list(range(6)) for e in range(4))
    assert not np.array_equal(taken[:6], taken[6:12])


class Interrupted(Exception):
    pass


def test_a_resumed_training_ends_as_an_uninterrupted_one(few, original, tokens, held_out, tmp_path, monkeypatch):
    config = settings(steps=8, evaluate_every=2, train=TRAINABLE[:-1])
    run = lambda folder: fine_tune(few, tokens, config, teacher=original, held_out=held_out, checkpoint=folder)  # noqa: E731
    whole = run(tmp_path / "whole")
    save = checkpoint.save
    for stop in (2, 3):  # in the first phase, and then in the last one
        count = [0]

        def saved(*given, count=count, stop=stop):
            save(*given)
            count[0] += 1
            if count[0] == stop:
                raise Interrupted

        monkeypatch.setattr(checkpoint, "save", saved)
        with pytest.raises(Interrupted):
            run(tmp_path / "begun")
    monkeypatch.setattr(checkpoint, "save", save)
    again = run(tmp_path / "begun")
    assert again.stats["history"] == whole.stats["history"]
    for a, b in zip(jax.tree.leaves(again.matrices), jax.tree.leaves(whole.matrices), strict=True):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(QLRError, match="of another model, text or setting"):
        fine_tune(few, tokens, settings(steps=11), teacher=original, held_out=held_out, checkpoint=tmp_path / "begun")


def test_training_stops_early_and_keeps_the_best(few, original, tokens, held_out, monkeypatch):
    seen = iter([1.0, 0.5, 0.9, 0.8, 0.7, 0.6])
    kept = []

    def scripted(*given):
        def evaluate(trained, fixed, text):
            kept.append(trained)
            return next(seen)

        return dataclasses.replace(make_trainer(*given), evaluate=evaluate)

    monkeypatch.setattr(loop, "make_trainer", scripted)
    config = settings(train=("norms",), steps=100, evaluate_every=1, patience=3)
    found = fine_tune(few, tokens, config, teacher=original, held_out=held_out)
    assert len(losses(found)) == 4 and found.verdict in (AdaptationVerdict.STOPPED_EARLY, AdaptationVerdict.NOT_IMPROVED)
    if found.verdict is AdaptationVerdict.STOPPED_EARLY:
        best = kept[1]["model.norm.weight"]["norm"].astype(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_array_equal(found.norms["model.norm.weight"], best)


def test_a_worse_model_is_not_handed_out(few, original, tokens):
    found = fine_tune(few, tokens, settings(train=("norms",), vector_rate=5.0, steps=3), teacher=original)
    assert found.verdict is AdaptationVerdict.NOT_IMPROVED and found.value is few and "unchanged" in str(found.verdict)


TWO = """
import json, sys
sys.path.insert(0, "tests")
import jax
import numpy as np
from test_formats import random_matrix
from qlr_jax.adaptation import AdaptConfig, adapt
from qlr_jax.models import Llama, LlamaConfig
config = LlamaConfig(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
original = Llama(config, jax.random.key(0))
model = jax.tree.map(lambda leaf: leaf, original)
model.linears()["model.layers.0.mlp.up_proj"].weight.set_value(random_matrix("int-2g16+r4@bf16", (16, 16)))
tokens = np.random.default_rng(0).integers(0, 16, (8, 6))
out = {}
for n in (1, 2):
    found = adapt(model, tokens, AdaptConfig(steps=3, batch=4, top=None, devices=n), teacher=original)
    out[n] = [e["loss"] for e in found.stats["history"]]
print(json.dumps([len(jax.devices()), out[1], out[2]]))
"""


def test_two_devices_equal_one():
    count, one, two = json.loads(run(TWO, devices=2).splitlines()[-1])
    assert count == 2 and len(one) == 3
    np.testing.assert_allclose(one, two, rtol=1e-5)


# --- added components ------------------------------------------------------------------------------------------------------


def test_added_components_change_nothing_at_first_and_keep_to_their_bytes(packed, original, tokens):
    matrices, config, budget = packed_matrices(packed), settings(), 400
    gradients = weight_gradients(packed, Sequences(tokens, original), config)
    fresh = added_components(matrices, gradients, budget, None)
    student, values, frame = take_apart(packed, config.train, None, fresh)
    assert near(student_says(student, frame, values, tokens), says(packed, tokens))
    found = fine_tune(packed, tokens, settings(fresh=f"{budget}B", fresh_grid="same", steps=8, batch=12), teacher=original)
    assert found.stats["after"] < found.stats["before"]
    added = found.stats["bytes"] - found.stats["bytes_before"]
    assert budget - 150 < added <= budget
    assert {n: m.spec.rank for n, m in found.matrices.items() if n in matrices} == {
        n: m.spec.rank + len(fresh.get(n, ())) for n, m in matrices.items()
    }
    assert all(m.nbytes == m.spec.nbytes(m.shape) for m in found.matrices.values())


def test_gradients_of_weights_are_those_of_the_loss(packed, original, tokens):
    config, name = settings(), f"{LAYER}self_attn.v_proj"
    found = weight_gradients(packed, Sequences(tokens[:2], original), config)[name]
    model = packed.densified()
    weight, step = model.linears()[name].weight.get_value(), 1e-2 * found / np.linalg.norm(found)
    ends = []
    for sign in (1, -1):
        model.linears()[name].weight.set_value(weight + sign * step)
        ends.append(mean_loss(model, Sequences(tokens[:2], original), config))
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(np.linalg.norm(found), rel=0.02)


# --- bad values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": "mse"}, "loss 'mse' is not known; pass text, kl or mix"),
        ({"train": ("codes",)}, "'codes' cannot be trained; pass factors, norms, scales, signs, embeddings or backbone"),
        ({"train": ()}, "nothing is to be trained"),
        ({"steps": 0}, "steps 0 is out of range; pass 1 to"),
        ({"weight": 2.0}, "weight 2.0 is out of range"),
        ({"rank": 0}, "rank 0 is too small"),
        ({"reround": 0}, "reround 0 is too small"),
        ({"embedding_rate": 0.0}, "embedding_rate 0.0 is out of range"),
        ({"rank": 4, "factors": "bf16"}, "rank 4 keeps the other components"),
        ({"rank": 4, "fresh": "1kB"}, "fresh '1kB' adds components"),
        ({"factors": "none"}, "cannot be stored as none"),
        ({"factors": "fp4"}, "'fp4' is not a quantizer"),
        ({"fresh": "5 apples"}, "fresh '5 apples' is no size"),
        ({"fresh": "1kB", "train": ("norms",)}, "adds factors that are not trained"),
        ({"compute": "fp8"}, "compute 'fp8' is not known"),
        ({"states": -1.0}, "states -1.0 is out of range; pass 0 to"),
        ({"states": 5.0, "loss": "text"}, "states 5 compares with the original model; choose loss 'kl' or 'mix', or pass 0"),
        ({"reround_backbone": 0}, "reround_backbone 0 is out of range"),
    ],
)
def test_settings_that_cannot_be_used_are_named(changes, says):
    with pytest.raises(QLRError, match=says) as error:
        AdaptConfig(**changes)
    assert "\n" not in str(error.value)


def test_inputs_that_cannot_be_used_are_named(packed, original, tokens):
    for call, says in [
        (lambda: fine_tune(original, tokens, teacher=original), "holds no compressed matrix"),
        (lambda: fine_tune(packed, tokens), "loss 'kl' compares with the original model; pass it as teacher"),
        (lambda: fine_tune(packed, tokens[0], teacher=original), r"tokens has shape \(10,\)"),
        (lambda: fine_tune(packed, tokens + 60, teacher=original), "ids outside the vocabulary of 64"),
        (lambda: fine_tune(packed, tokens, teacher=original, held_out=tokens[:, :1]), "held_out has shape"),
        (lambda: fine_tune(packed, tokens, teacher=teacher_logits(original, tokens[:2], 4)), "kept logits are not those of tokens"),
        (
            lambda: fine_tune(packed, tokens, settings(states=1.0), teacher=teacher_logits(original, tokens, 4)),
            "states 1 needs the original",
        ),
        (lambda: fine_tune(packed, tokens, settings(devices=64), teacher=original), "devices 64 cannot share a batch of 4"),
        (lambda: fine_tune(packed, tokens, settings(fresh="10B"), teacher=original), "within 10 bytes fit no matrix"),
        (lambda: AdaptConfig.make({"learning": 1}), "'learning' is no setting"),
    ]:
        with pytest.raises(QLRError, match=says):
            call()
    assert added_bytes("0.5bpw", 16) == 1
    assert isinstance(teacher_logits(original, tokens[:1], 4), TeacherLogits)
