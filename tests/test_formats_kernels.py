"""Triton kernels against `QLRLinear`: what they compute, in Triton's interpreter, and that they compile for a GPU.

The interpreter is chosen when Triton is imported, so this file runs itself in a process of its own, which imports Triton again
for each of both.
"""

import doctest
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rates import some_rates  # noqa: E402

from qlr_jax.errors import QLRError  # noqa: E402
from qlr_jax.formats.qlr import modeling_qlr as runtime  # noqa: E402
from qlr_jax.formats.qlr import torch_runtime  # noqa: E402

CASES = [  # spec, shape, tokens, rotation block, state bits
    ("trellis-2", (64, 40), 1, 0, 12),  # sequences of 64 rows; the last ones half empty
    ("trellis-2", (41, 64), 2, 0, 16),
    ("trellis-1", (32, 96), 1, 32, 6),
    ("trellis-1.5", (40, 44), 2, 0, 12),
    ("trellis-2.0625", (40, 44), 1, 0, 12),  # windows begin at any bit
    ("trellis-3", (40, 44), 1, 0, 16),
    ("trellis-3.3125", (16, 44), 8, 0, 16),  # eight weights a window, with shifts that differ from place to place
    ("trellis-4", (16, 96), 1, 32, 16),
    ("trellis-5.9375", (16, 44), 1, 0, 16),  # four weights a window
    ("trellis-2w", (24, 300), 1, 0, 12),  # segments of two columns of tiles and of three
    ("trellis-3.5w+r4@trellis-2", (40, 44), 4, 32, 16),  # fewer columns of tiles than segments may be
    ("int-2g16", (70, 64), 1, 0, 12),
    ("int-2", (9, 50), 5, 0, 12),  # rows end within a word
    ("int-3g24a", (40, 96), 1, 0, 12),
    ("int-4g32a/rot", (40, 96), 4, 64, 12),
    ("int-4", (40, 45), 8, 0, 12),
    ("int-8g16a", (40, 96), 1, 0, 12),
    ("bf16/rot", (24, 96), 1, 0, 12),
    ("none+r12@int-8", (24, 96), 2, 0, 12),
    ("int-4g32+r16@bf16", (40, 96), 1, 0, 12),
    ("trellis-2+r4@trellis-2", (24, 64), 4, 0, 12),
    ("trellis-2.25+r5@trellis-3,int-4g16a", (40, 96), 1, 0, 12),
    ("int-4g32+r17@int-3,trellis-2.5", (40, 32), 1, 0, 8),
    ("int-4/rot", (5, 137), 1, 0, 12),  # a factor of a rotation that is wider than the registers
    ("int-4/rot", (512, 32), 1, 0, 12),  # two factors that differ
]
IDS = [f"{spec}-{shape[0]}x{shape[1]}-{tokens}" for spec, shape, tokens, _, _ in CASES]


def make_linear(spec, shape, block=0, state_bits=12):
    """With random codes: any are valid."""
    linear = runtime.QLRLinear(spec, shape, seed=3, rotation_block=block, state_bits=state_bits)
    for name, buffer in linear.named_buffers():
        if name.endswith("rates"):
            buffer.copy_(torch.from_numpy(some_rates(spec, shape)))
        elif buffer.dtype == torch.uint8:
            buffer.random_(0, 4 if name.endswith("zeros") else 256)
        elif buffer.dtype == torch.bfloat16:
            buffer.normal_(0, 0.2)
        else:
            buffer.uniform_(0.5, 1.0)
    return linear


def relative(y, wanted):
    return float((y.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@torch.no_grad()
def interpret():
    """The results of everything that needs the interpreter."""
    from qlr_jax.formats.qlr.kernels import Kernel, plan

    # several steps a program, several programs a row
    plan.SEQUENCES, plan.ROWS, plan.UNITS, plan.COLUMNS, plan.PROGRAMS = 8, 64, 4, 64, 3
    torch.manual_seed(0)
    found = {}
    for name, (spec, shape, tokens, block, state_bits) in zip(IDS, CASES, strict=True):
        linear, x = make_linear(spec, shape, block, state_bits), torch.randn(tokens, shape[1])
        found[name] = relative(Kernel(linear)(x), linear(x)), relative(linear(x), x @ linear.dense().T)

    linear = make_linear("int-4/rot+r4@int-4", (16, 64))
    linear.bias = torch.nn.Parameter(torch.randn(16))
    one, x = torch.randn(1, 64), torch.randn(2, 4, 64)
    wanted = linear(one)
    ordinary = linear(torch.ones(9, 64))
    found["half"] = {str(t): relative(Kernel(linear)(x.to(t)), linear(x.to(t).float())) for t in (torch.bfloat16, torch.float16)}
    model = torch.nn.Sequential(make_linear("nf-4g16", (64, 64)), linear, torch.nn.Linear(16, 2))
    found["layers"] = torch_runtime.use_kernels(model)
    launched = linear.forward.args[0]
    calls = []
    linear.forward = type(linear.forward)(linear.forward.func, lambda x: calls.append(x.shape) or launched(x), type(linear).forward)
    linear.forward.args[0].linear, linear.forward.args[0].device = linear, launched.device
    found["served"] = relative(linear(one), wanted)
    found["shape"] = list(linear(x).shape), len(calls)
    found["more"] = bool(torch.equal(linear(torch.ones(9, 64)), ordinary)), list(linear(torch.ones(0, 64)).shape), len(calls)
    with torch.enable_grad():
        x.requires_grad_()
        linear(x).sum().backward()
    found["gradient"] = relative(x.grad, linear.dense().sum(0).expand_as(x)), len(calls)
    return found


def with_triton(which, **environment):
    """What a function of this file returns, and the kernels in it, with a Triton that was imported in this environment."""
    for name in [n for n in sys.modules if re.match(r"triton(?!\._C)\b|qlr_jax\.formats\.qlr\.kernels\b", n)]:
        del sys.modules[name]
    os.environ |= environment
    return which()


def compile_for_gpu():
    """Names of all kernels that a call launches, each compiled to machine code for compute capability 9.0, but not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(Driver())
    sizes = {}

    def launch(function, grid):
        def compile(*arguments, **options):
            code = function.run(*arguments, grid=grid, warmup=True, **options)
            sizes[function.__name__] = len(code.asm["cubin"])

        return compile

    JITFunction.__getitem__ = launch
    from qlr_jax.formats.qlr.kernels import Kernel

    for spec, tokens in (("trellis-2+r4@int-4", 1), ("int-3g16a+r4@bf16", 3)):
        kernel = Kernel(make_linear(spec, (96, 688)))
        kernel.dp4a = True
        kernel(torch.zeros(tokens, 688, dtype=torch.bfloat16))
    return sizes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of both, by name; None of the compiler where there is none."""
    from triton import knobs

    wanted = ["interpret"] + ["compile_for_gpu"] * Path(knobs.nvidia.ptxas.path).is_file()
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, __file__, *wanted], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"compile_for_gpu": None} | json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def interpreted(found):
    return found["interpret"]


@pytest.mark.parametrize("name", IDS)
def test_a_kernel_does_what_the_layer_does(interpreted, name):
    error, of_the_layer = interpreted[name]
    assert error < 5e-6 and of_the_layer < 2e-6


def test_half_precision(interpreted):
    assert interpreted["half"]["torch.bfloat16"] < 6e-3 and interpreted["half"]["torch.float16"] < 1e-3  # as y is rounded


def test_use_kernels_serves_few_tokens_only(interpreted):
    assert interpreted["layers"] == 1  # of two: nf has none
    assert interpreted["served"] < 2e-6
    assert interpreted["shape"] == [[2, 4, 16], 2]
    assert interpreted["more"] == [True, [0, 16], 2]  # as before, to the bit
    assert interpreted["gradient"][0] < 1e-4 and interpreted["gradient"][1] == 2


def test_kernels_compile_for_a_gpu(found):
    """The interpreter takes what the compiler does not. Nothing is run: no GPU is needed."""
    sizes = found["compile_for_gpu"]
    if sizes is None:
        pytest.skip("this Triton has no ptxas")
    assert set(sizes) == {"apply_factor", "products", "finish"} and min(sizes.values()) > 1000


def test_refusals(monkeypatch):
    model = torch.nn.Sequential(make_linear("int-4", (8, 32)))
    with pytest.raises(QLRError, match="lies on cpu, but kernels need a GPU"):
        torch_runtime.use_kernels(model)
    with pytest.raises(QLRError, match="no packed layers"):
        torch_runtime.use_kernels(torch.nn.Linear(2, 2))
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(QLRError, match="needs Triton, which is not installed") as why:
        torch_runtime.use_kernels(model)
    assert "\n" not in str(why.value) and str(why.value).count(". ") == 0
    assert "forward" not in model[0].__dict__


def test_examples():
    assert doctest.testmod(torch_runtime, optionflags=doctest.IGNORE_EXCEPTION_DETAIL).failed == 0


if __name__ == "__main__":
    interpreted = {"interpret": "1", "compile_for_gpu": "0"}
    print(json.dumps({name: with_triton(globals()[name], TRITON_INTERPRET=interpreted[name]) for name in sys.argv[1:]}))
