"""Shared by all tests: the CPU, and quick compilation, since shapes are small; for the core, strict dtype promotion."""

import gc
import os
import tempfile
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # two test processes share the cores: spinning threads would stop both
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Most of the suite's time is compiling. XLA's older way of emitting code takes half of it; one piece of machine code a program
# takes a sixth off the rest, and fewer areas of memory (`MOST_MAPS`).
if "xla_cpu_parallel_codegen_split_count" not in os.environ.get("XLA_FLAGS", ""):
    more = "--xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):  # a flag that XLA does not know ends the process
        more += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {more}".strip()
if "PYTEST_XDIST_WORKER" not in os.environ and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="qlr-tests-")  # until this process ends, for all that it starts
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    # to keep a program takes a tenth of the time that compiling the smallest takes, to read it again an eighth
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

jax.config.update("jax_cpu_enable_async_dispatch", False)  # as jobs do: loops that overlap can wait for each other for ever

# Begun first, the slowest before the others: two processes then end at about the same time. All others follow by name.
SLOW = """
    adaptation core_sharding cluster formats formats_torch_runtime formats_kernels demo core_ahead run_workspace pipelines_nvfp4
    examples job job_streaming core_bounds core_solver formats_gguf evaluation_zero_shot house sensitivity
    pipelines_adapt calibration_devices formats_compressed_tensors
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": at for at, name in enumerate(SLOW.split())}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_collection_finish() -> None:
    """What has been imported stays; the collector need not go through it again and again, nor begin so often while JAX traces."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_unconfigure() -> None:
    gc.unfreeze()


MOST_MAPS = 30_000  # areas of memory; Linux gives a process 65,530, and XLA's compiler crashes where there are no more


@pytest.fixture(autouse=True, scope="module")
def _few_programs() -> Iterator[None]:
    """Compiled programs are let go between modules where they take many areas of memory: one process runs half of all tests."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True, scope="module")
def _strict(request: pytest.FixtureRequest) -> Iterator[None]:
    """Core modules promote no dtypes by accident."""
    if not request.module.__name__.split(".")[-1].startswith(("test_core_", "test_doctests")):
        yield
        return
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def activations():
    """make(n, seed=0, samples=4 n) -> H = E[x xᵀ] of correlated activations, float64."""

    def make(n: int, seed: int = 0, samples: int | None = None) -> np.ndarray:
        rng = np.random.default_rng(seed)
        mix = rng.standard_normal((n, n)) / np.sqrt(n) * np.geomspace(3, 0.1, n)
        x = rng.standard_normal((samples or 4 * n, n)) @ mix.T
        return x.T @ x / len(x)

    return make


@pytest.fixture(scope="session")
def block_ldl():
    """block_ldl(h, block) -> F and D of H = (I + F) D (I + F)ᵀ, float64."""

    def factor(h, block):
        """F and D of H = (I + F) D (I + F)ᵀ by elimination of blocks, float64."""
        n, rest, f, d = len(h), h.copy(), np.zeros_like(h), np.zeros_like(h)
        for s in range(0, n, block):
            e = s + block
            d[s:e, s:e] = rest[s:e, s:e]
            f[e:, s:e] = rest[e:, s:e] @ np.linalg.inv(rest[s:e, s:e])
            rest[e:, e:] -= f[e:, s:e] @ rest[s:e, e:]
        return f, d

    return factor


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a Llama of one block with random weights and the bundled model's tokenizer."""
    from qlr_jax.models import Llama, LlamaConfig, save_model
    from qlr_jax.models.bundled import BUNDLED

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    save_model(Llama(config, jax.random.key(0)), folder, tokenizer_from=BUNDLED)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A file of calibration text."""
    from qlr_jax.calibration import standard_library

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(standard_library("calibration")[:20000], encoding="utf-8")
    return path
