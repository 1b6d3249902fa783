"""What this machine makes of each kind of work, measured in a few seconds and kept for a day."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qlr_jax import native
from qlr_jax.core.matrix import Layout, QLRMatrix
from qlr_jax.cost.counted import Counted
from qlr_jax.cost.machine import Machine
from qlr_jax.cost.rates import RATES, SEARCHED, Rates, Search
from qlr_jax.formats.files import write_json
from qlr_jax.formats.qlr.packed import array_shapes
from qlr_jax.models import LlamaConfig
from qlr_jax.progress import Progress, silent
from qlr_jax.settings.compile_cache import cache_directory, kind
from qlr_jax.settings.recipe import Recipe

KEPT = 86_400.0  # seconds that measurements are used again
OPERATIONS, TOKENS = 8e9, (64, 2048)  # of the block whose pass is measured, about, and between how many tokens that is
WIDEST = 1024  # hidden state of that block, at most; larger products run at the same rate
ELEMENTS = 2**22  # of the elementwise pass
COMPILED = 0.55  # of the program below's compile time: that of one function of a job, on average
MEASURED = ("passed", "products", "factored", "checked", "compiled", "decoded")  # of `Work`
LEAST, TIMES = 0.4, 4  # seconds for which a measurement is repeated, and times at most; the best one counts


@dataclass(frozen=True)
class Took:
    """The least seconds of a measurement: of the processor, all threads together, and on the wall."""

    cpu: float
    wall: float

    def shared(self, cores: int) -> float:
        """The part of it that ran on all cores (Amdahl)."""
        if cores < 2:
            return 0.0
        return float(np.clip((1 - self.wall / max(self.cpu, 1e-9)) * cores / (cores - 1), 0.0, 1.0))


def measured_rates(config: LlamaConfig, recipe: Recipe, machine: Machine, progress: Progress | None = None) -> Rates:
    """Seconds of each kind of work on this machine's CPU, as this library does it now and at the model's shapes.

    A pass through one block of the model (made smaller where it is large), an elementwise pass, factorizations, trellis searches
    with the state bits of the recipe, and the compiling of a small program: some seconds, most of them compiling. They are kept in
    the user's cache folder for a day, for this processor, these versions and these shapes.

    Args:
        config, recipe: whose shapes and state bits are measured.
        machine: this one.
        progress: where it is said that it is measured.

    Returns:
        those that are known of such a machine, where JAX is kept from the CPU.
    """
    job = Counted(config, recipe, machine)
    what = _key(job)
    if (found := _kept(what)) is None:
        with (progress or silent()).stage("measuring this machine"):
            if (found := _measure(job)) is None:
                return RATES[machine.kind]
        _keep(what, found)
    return _rates(job, found)


def _measure(job: Counted) -> dict[str, Any] | None:
    """Plain values: the name of a measurement -> cpu and wall seconds of one unit; None where JAX has no CPU."""
    import jax

    from qlr_jax.core.blas import one_blas_thread
    from qlr_jax.settings.host import prepare

    prepare()
    try:
        here = jax.devices("cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names others
        return None
    with one_blas_thread(), jax.default_device(here):
        passed = _elementwise(job)
        found: dict[str, Any] = {"when": time.time(), "passed": passed}
        found |= {"products": _products(job, passed), "factored": _factored(job), "checked": _checked(job)}
        found |= {"compiled": _compiling(), "decoded": _decoded(job)}
        found["searches"] = {str(bits): _searches(job, bits) for bits in _state_bits(job)}
    return found


def _rates(job: Counted, found: Mapping[str, Any]) -> Rates:
    known, cores = RATES["cpu"], job.machine.cores
    took = {name: Took(*found[name]) for name in MEASURED}
    per = {name: value.cpu for name, value in took.items()} | {"spread": 1.0, "single": 1.0}
    per["compiled"] *= COMPILED
    per["placed"] = known.per["placed"] * per["passed"] / known.per["passed"]
    per |= {name: known.per[name] * per["passed"] / known.per["passed"] for name in SEARCHED}
    searches = {}
    for bits, points in found["searches"].items():
        each = [(int(count), Took(*seconds)) for count, seconds in points.items()]
        states = job.backbone.for_backbone(None, int(bits)).search_cost.states
        searches[states] = Search(tuple((count, took.cpu) for count, took in each), each[-1][1].shared(cores))
    shared = {**known.shared, "spread": 1.0, "products": took["products"].shared(cores), "passed": took["passed"].shared(cores)}
    says = f"measured on this machine on {time.strftime('%Y-%m-%d %H:%M', time.localtime(found['when']))}"
    return Rates(per, shared, True, known.error, says, searches)


# ---- what is measured


def _best(call: Callable[[], Any]) -> Took:
    """The least seconds of a call that was made once before."""
    import jax

    jax.block_until_ready(call())
    cpu, wall, until = float("inf"), float("inf"), time.perf_counter() + LEAST
    for _ in range(TIMES):
        before = time.process_time(), time.perf_counter()
        jax.block_until_ready(call())
        cpu, wall = min(cpu, time.process_time() - before[0]), min(wall, time.perf_counter() - before[1])
        if time.perf_counter() > until:
            break
    return Took(cpu, wall)


def _each(took: Took, amount: float, besides: float = 0.0) -> list[float]:
    """Of one unit, [cpu, wall], where so many seconds were of something else; a tenth is left at least."""
    part = max(0.1, 1 - besides / took.cpu) / amount
    return [took.cpu * part, took.wall * part]


def _elementwise(job: Counted) -> list[float]:
    """A softmax, which `work` counts as six passes."""
    import jax
    import jax.numpy as jnp

    time_ = min(job.length, 512)
    x = jnp.ones((max(1, ELEMENTS // time_**2), time_, time_), jnp.float32)
    run = jax.jit(partial(jax.nn.softmax, axis=-1))
    return _each(_best(lambda: run(x)), 6 * x.size)


def _products(job: Counted, passed: list[float]) -> list[float]:
    """A pass through a block, as calibration and evaluation make it, less its elementwise passes."""
    import jax
    import jax.numpy as jnp

    from qlr_jax.models.forward import through
    from qlr_jax.models.llama import Llama

    config = job.config
    size = min(1.0, WIDEST / config.hidden_size)
    group = config.num_attention_heads // config.num_key_value_heads
    kv_heads = max(1, int(config.num_key_value_heads * size))
    small = replace(
        config,
        vocab_size=64,
        hidden_size=int(config.hidden_size * size),
        intermediate_size=int(config.intermediate_size * size),
        num_hidden_layers=1,
        num_attention_heads=group * kv_heads,
        num_key_value_heads=kv_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Llama(small, jax.random.key(0))
    weights = sum(linear.weight.get_value().size for linear in model.linears().values())
    tokens = int(np.clip(OPERATIONS / (2 * weights), *TOKENS))
    length = min(job.length, tokens)
    rows = max(1, tokens // length)
    block, rope, x = model.block(0), model.rope(length), jnp.ones((rows, length, small.hidden_size), jnp.float32)
    took = _best(lambda: through(block, x, rope))
    heads = small.num_attention_heads
    products = 2 * weights + 4 * heads * small.head_dim * length
    elementwise = 6 * heads * length + 10 * (small.hidden_size + small.intermediate_size)
    return _each(took, products * rows * length, elementwise * rows * length * passed[0])


def _factored(job: Counted) -> list[float]:
    import jax
    import jax.numpy as jnp

    n = min(max(job.inputs), WIDEST)
    h = jnp.eye(n, dtype=jnp.float32) + 1e-3
    run = jax.jit(jnp.linalg.cholesky)
    return _each(_best(lambda: run(h)), n**3 / 3)


def _checked(job: Counted) -> list[float]:
    n = min(max(job.inputs), WIDEST)
    h = np.eye(n) + 1e-3
    return _each(_best(lambda: np.linalg.cholesky(h)), n**3 / 3)


def _searches(job: Counted, bits: int) -> dict[str, list[float]]:
    """Sequences of a call -> seconds of one weight, with few sequences and with many."""
    import jax
    import jax.numpy as jnp

    quantizer = job.backbone.for_backbone(None, bits)
    height, width = quantizer.tile
    static, traced = quantizer.static(), quantizer.traced()
    run, found = jax.jit(lambda x, qparams: static.round_block(x, qparams, traced, False)), {}
    for sequences in (4, 32):
        rows = np.random.default_rng(0).standard_normal((1, height * sequences, width), np.float32)
        x = jnp.asarray(rows)
        qparams = quantizer.fit_qparams(x, False, jnp.ones((1, 1, 1), jnp.float32))
        found[str(sequences)] = _each(_best(lambda x=x, qparams=qparams: run(x, qparams)), x.size)
    return found


def _decoded(job: Counted) -> list[float]:
    """A matrix as a candidate's is decoded, of the backbone that takes longest to search."""
    import jax.numpy as jnp

    m, n = sorted(job.shapes.values())[len(job.shapes) // 2]
    layout = Layout(job.backbone.name, (min(m, WIDEST), min(n, WIDEST)), state_bits=job.recipe.state_bits)
    anything = 16 * job.backbone.bits  # but of rates inside the matrix, whose mean this is
    value = QLRMatrix({name: jnp.full(shape, anything, kind) for name, (shape, kind) in array_shapes(layout).items()}, layout)
    return _each(_best(value.dense), math.prod(layout.shape))


def _state_bits(job: Counted) -> list[int]:
    """Of all searches of the job; none where its backbones have none."""
    if not job.backbone.search_cost.states:
        return []
    return sorted({job.recipe.search_state_bits, *job.plans.values()})


def _compiling() -> list[float]:
    """A program of a loop with products and many small passes, never compiled before: an added constant is its own."""
    import jax
    import jax.numpy as jnp

    own = float(np.random.default_rng(time.time_ns()).random())

    def step(x: Any, y: Any) -> tuple[Any, Any]:
        z = jnp.tanh(x @ y) + own
        z = jnp.where(z > 0.5, jnp.cumsum(z, axis=-1), z * z)
        return z / jnp.sqrt(1 + jnp.sum(z * z, axis=-1, keepdims=True)), jnp.argmin(z, axis=-1)

    lowered = jax.jit(lambda x, y: jax.lax.scan(step, x, y)).lower(jnp.ones((32, 32)), jnp.ones((4, 32, 32)))
    before = time.process_time(), time.perf_counter()
    lowered.compile()
    return [time.process_time() - before[0], time.perf_counter() - before[1]]


# ---- what is kept


def _path() -> Path:
    return cache_directory().parent / "rates.json"


def _key(job: Counted) -> str:
    """What measurements hold for: processor, versions and whether there is C++, shapes, state bits."""
    config = job.config
    shapes = (
        config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim,
        job.length, max(job.inputs), job.backbone.name, *_state_bits(job),
    )  # fmt: skip
    search = native.missing() or native.digest()
    return json.dumps([MEASURED, kind(), os.cpu_count(), version("qlr-jax"), search, *shapes])


def _kept(what: str) -> dict[str, Any] | None:
    try:
        found = json.loads(_path().read_text(encoding="utf-8")).get(what)
        return found if found and 0 <= time.time() - found["when"] < KEPT else None
    except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError):  # RuntimeError: a home that is not known
        return None


def _keep(what: str, found: Mapping[str, Any]) -> None:
    """Nothing is kept where the folder cannot be written."""
    try:
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        recent = {key: value for key, value in known.items() if 0 <= time.time() - value["when"] < KEPT}
        write_json(path, recent | {what: found}, indent=1)
    except (OSError, RuntimeError, ValueError, AttributeError, KeyError, TypeError):
        return
