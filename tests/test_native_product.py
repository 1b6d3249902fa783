"""Products with packed matrices in C++: every instruction set gives the same bits, and what the runtime's own path gives."""

import gc
import itertools
import weakref

import pytest
from rates import some_rates

torch = pytest.importorskip("torch")

from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402  after torch
from qlr_jax.formats.qlr import native_products  # noqa: E402
from qlr_jax.native import product  # noqa: E402

there = pytest.mark.skipif(product.library() is None, reason="the C++ library is not built")
SETS = ("avx2", "avx512", "neon")
TRELLIS = ["1", "1.5", "2", "2.0625", "3.25", "4", "6"]
SPECS = [
    *(f"trellis-{rate}" for rate in TRELLIS),
    *(f"trellis-{rate}w" for rate in ("1", "2.25", "4")),
    *(
        "trellis-2.5w+r4@trellis-4",
        "trellis-2+r4@trellis-4",
        "trellis-2+r16@trellis-2",
        "trellis-3+r6@trellis-3",
        "none+r8@trellis-4",
        "trellis-3+r1@trellis-1.5",
    ),
    *(f"int-{bits}" for bits in range(1, 9)),
    *("int-4g32", "int-2g16a", "int-5a", "int-4g64/rot+r8@int-8", "int-4g32+r16@bf16", "int-4+r3@nf-4,e8-3"),
    *("nf-2", "nf-3", "nf-4g64", "nvfp4", "e8-2", "e8-3", "e8-4", "e8-2+r8@e8-4", "bf16+r4@bf16"),
    *("trellis-4/rows", "int-4g32/rows"),  # the runtime reads forms that no spec of ours has
]
SHAPES = [(128, 96), (48, 72), (100, 50), (9, 32), (576, 320)]


def filled(spec, shape, **others):
    """A layer of random codes: any byte is a valid one."""
    linear = runtime.QLRLinear(spec, shape, seed=5, **others)
    for name, buffer in linear.named_buffers():
        if name.endswith("rates"):
            buffer.copy_(torch.from_numpy(some_rates(spec, shape)))
        elif buffer.dtype == torch.uint8:
            buffer.random_(0, 2 if "zeros" in name else 256)  # a zero point lies among the codes
        elif "signs" in name or buffer.dtype == torch.bfloat16:
            buffer.normal_()
        else:
            buffer.copy_(0.02 * (torch.rand(buffer.shape) + 0.5))
    return linear


@pytest.fixture
def one_thread():
    """Of PyTorch: on small arrays the others do no more than wait, which takes the processor's time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def alone(monkeypatch):
    """alone(layer, x): by the runtime itself, as where qlr-jax is not installed."""

    def forward(linear, x):
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "native_products", lambda: None)
            return linear(x)

    return forward


def by_set(linear, x, name, threads=1, team=None, exact=True):
    """W x by one instruction set; None where this machine has none of it."""
    known = native_products.Known(linear, native_products._layer)
    y = torch.empty(len(x), linear.out_features)
    wrong = product.multiply(known.structure, x.data_ptr(), y.data_ptr(), len(x), product.Type.FLOAT32, threads, team, name, exact)
    return None if wrong else y


@there
@pytest.mark.parametrize("spec", SPECS)
def test_every_instruction_set_gives_the_same_bits_and_what_the_runtime_gives(spec, alone, one_thread):
    torch.manual_seed(0)
    # states of other sizes are read alike in every shape: in some of them they are enough
    others = itertools.product(SHAPES[:3], (16, 6) if "trellis" in spec else ())
    for shape, state_bits in (*((shape, 12) for shape in SHAPES), *others):
        signs = state_bits == 6 and "rows" not in spec and "none" not in spec
        linear = filled(spec, shape, state_bits=state_bits, signs=signs, rotation_block=32 if state_bits == 16 else 0)
        for tokens in (2, 17):  # from the codes, and from rows decoded once
            x = torch.randn(tokens, shape[1])
            plain, want = by_set(linear, x, "portable"), alone(linear, x)
            assert plain is not None
            torch.testing.assert_close(plain, want, rtol=0, atol=1e-5 * float(want.abs().max()))
            for name in SETS:
                found = by_set(linear, x, name)
                assert found is None or torch.equal(found, plain), (name, shape, state_bits, tokens)


ROUNDED = [*(f"trellis-{rate}" for rate in TRELLIS), "trellis-2+r16@trellis-4", "int-1", "int-2a", "int-8", "int-4g32", "int-4g64a"]
ROUNDED += ["int-8g16", "int-8g48a", "int-8g64", "int-2g64", "int-1g128a", "int-4g32/rot+r8@int-8", "int-4g128/rows"]


@there
@pytest.mark.parametrize("spec", ROUNDED)
def test_rounded_activations_give_the_same_bits_everywhere_and_the_product_to_16_bits(spec):
    torch.manual_seed(0)
    for shape in (*SHAPES, (70, 2600)):
        linear, x = filled(spec, shape), torch.randn(3, shape[1]) * torch.tensor([[1.0], [1e-6], [3e4]])
        exact, plain = by_set(linear, x, "portable"), by_set(linear, x, "portable", exact=False)
        error = (plain - exact).norm(dim=1) / exact.norm(dim=1)
        assert error.max() < 1e-4 and not torch.equal(plain, exact), (shape, error)
        for name in SETS:
            found = by_set(linear, x, name, exact=False)
            assert found is None or torch.equal(found, plain), (name, shape)


@there
@pytest.mark.parametrize("spec", ["trellis-2", "int-4g32"])
def test_what_cannot_be_rounded_is_not(spec):
    linear, x = filled(spec, (64, 96), rotation_block=32), torch.randn(3, 96)
    x[0, 5], x[1, 5], x[2] = float("nan"), float("inf"), 0
    torch.testing.assert_close(by_set(linear, x, None, exact=False), by_set(linear, x, None), equal_nan=True, rtol=0, atol=0)
    x = torch.full((1, 96), 1e-38)
    assert by_set(linear, x, None, exact=False).abs().max() < 1e-30


@there
@pytest.mark.parametrize("spec", [spec for spec in SPECS if "+" not in spec])
def test_rows_are_decoded_to_the_bit(spec, one_thread):
    for shape in SHAPES:
        part = filled(spec, shape).backbone
        step = part.height
        for start, stop in ((0, part.rows), (step, part.rows), (step * (part.rows // step // 2), part.rows - 1)):
            if start < stop:
                found = native_products.decoded(part, start, stop, torch.float32)
                torch.testing.assert_close(found, part.decode(start, stop, torch.float32), rtol=1e-6, atol=0)


@there
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_a_layer_uses_it_for_few_and_for_many_tokens(dtype, tokens, alone):
    torch.manual_seed(0)
    linear = filled("trellis-2+r8@trellis-4", (128, 96))
    linear.bias = torch.nn.Parameter(torch.randn(128))
    x = torch.randn(2, tokens, 96).to(dtype)
    with torch.no_grad():
        found, want = linear(x), alone(linear, x)
    assert found.dtype == dtype and found.shape == (2, tokens, 128)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found, want, rtol=0, atol=tolerance * float(want.abs().max()))


@there
@pytest.mark.parametrize("tokens", [2, 30])
def test_threads_change_no_bit(tokens):
    linear, x = filled("trellis-2+r16@trellis-4", (512, 640)), torch.randn(tokens, 640)
    one = by_set(linear, x, None)
    assert torch.equal(by_set(linear, x, None, 2), one) and torch.equal(by_set(linear, x, None, 5), one)
    if native_products.team() is not None:
        assert torch.equal(by_set(linear, x, None, 2, native_products.team()), one)


@there
def test_arrays_that_are_replaced_are_seen(alone):
    linear, x = filled("int-4g32+r4@bf16", (64, 96)), torch.randn(1, 96)
    linear(x)
    linear.backbone.codes = torch.randint(0, 256, linear.backbone.codes.shape, dtype=torch.uint8)
    linear.left.codes.normal_()
    torch.testing.assert_close(linear(x), alone(linear, x), rtol=1e-4, atol=1e-5)


@there
def test_a_layer_that_is_let_go_is_gone():
    linear = filled("trellis-2+r4@trellis-4", (64, 96))
    linear(torch.randn(1, 96)), linear(torch.randn(70, 96))
    gone = weakref.ref(linear)
    del linear
    if gone() is not None:  # going through all objects takes a second
        gc.collect()
    assert gone() is None


@there
def test_what_it_has_no_product_for_goes_the_runtimes_own_way(alone):
    linear, x = filled("int-4g24", (64, 96)), torch.randn(1, 96)
    assert native_products.multiplied(linear, x) is None
    torch.testing.assert_close(linear(x), alone(linear, x))
    linear = filled("trellis-2", (64, 96))
    leaf = torch.randn(1, 96, requires_grad=True)
    linear(leaf).sum().backward()
    assert leaf.grad is not None and float(leaf.grad.abs().max()) > 0
    assert native_products.multiplied(linear, torch.randn(1, 96, dtype=torch.float64)) is None


@there
@pytest.mark.parametrize("tokens", [2, 70])
def test_derivatives_and_transforms_see_all_of_it(tokens, alone):
    linear, x, way = filled("trellis-2+r4@trellis-4", (64, 96)), torch.randn(tokens, 96), torch.randn(tokens, 96)
    want = alone(linear, way)
    with torch.autograd.forward_ad.dual_level():
        _, found = torch.autograd.forward_ad.unpack_dual(linear(torch.autograd.forward_ad.make_dual(x, way)))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.jvp(linear, (x,), (way,))[1], want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.func.vmap(linear)(way), want, rtol=1e-4, atol=1e-5)


def test_the_library_says_what_it_lacks():
    if product.library() is None:
        assert product.instruction_set() == ""
        return
    layer = product.Layer()
    layer.backbone.kind, layer.backbone.bits, layer.backbone.height, layer.backbone.group = product.Kind.INTEGER, 9, 1, 0
    layer.left.height = layer.right.height = 1
    assert product.multiply(layer, 0, 0, 1, product.Type.FLOAT32) == "codes of 1 to 8 bits, of levels 4"
    assert product.multiply(layer, 0, 0, 1, product.Type.FLOAT32, by="mmx") == "an instruction set that this machine has"


@there
@pytest.mark.parametrize("spec", ["trellis-2+r8@trellis-4", "int-4g32a", "e8-2"])
def test_a_compiled_layer_uses_it(spec):
    torch._dynamo.reset()
    linear, other, calls = filled(spec, (64, 96)), filled(spec, (64, 96)), []
    other.backbone.codes.random_(0, 256)

    def count(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        compiled = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=count)
        for tokens, layer in itertools.product((1, 5), (linear, other)):
            x = torch.randn(tokens, 96)
            assert torch.equal(compiled(layer, x), layer(x))
    assert any("product" in name for name in calls)
    x = torch.randn(2, 96, requires_grad=True)
    torch.compile(linear, backend="aot_eager")(x).sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0


@there
def test_a_compiled_layer_whose_arrays_lie_in_pieces_goes_the_runtimes_own_way(alone):
    torch._dynamo.reset()
    linear, x = filled("int-4g32", (64, 96)), torch.randn(2, 96)
    linear.backbone.scales = linear.backbone.scales.t().contiguous().t()
    with torch.no_grad():
        found = torch.compile(linear, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, alone(linear, x))
