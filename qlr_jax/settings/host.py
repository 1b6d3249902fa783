"""What a job asks of the JAX that it runs in; nothing is changed by an import."""

from __future__ import annotations

import os
from importlib.metadata import version

# The newer way in which jaxlib 0.10 emits a CPU's code, and eight parts of each program side by side, take twice the time of these
# for code that is no faster. Flags that XLA does not know end the process, so other versions are left as they are.
QUICK_COMPILING = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "2"}


def quick_compiling() -> None:
    """Let XLA compile for a CPU in half of the time, where no backend has started yet; flags that are set (XLA_FLAGS) stay.

    Example:
        >>> quick_compiling()
    """
    if version("jaxlib").startswith("0.10."):
        given = os.environ.get("XLA_FLAGS", "")
        more = [f"--{flag}={value}" for flag, value in QUICK_COMPILING.items() if flag not in given]
        os.environ["XLA_FLAGS"] = " ".join([given, *more]).strip()


def one_loop_at_a_time() -> None:
    """Let a CPU run compiled loops one after another, for the rest of this process.

    Two loops that overlap can wait for each other for ever in XLA's thread pool (seen with jaxlib 0.10.2). It takes effect only
    where no backend has started yet; the commands and `compress` call it first of all.

    Example:
        >>> one_loop_at_a_time()
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)


def prepare(compile_cache: str | None = None) -> str:
    """What commands and jobs begin with: `quick_compiling`, `one_loop_at_a_time`, and `compile_cache.keep_compiled`.

    Args:
        compile_cache: where compiled programs are kept; None: the default, where nothing else was set before.

    Returns:
        What `keep_compiled` has to say.

    Example:
        >>> prepare()
        ''
    """
    from qlr_jax.settings.compile_cache import keep_compiled

    quick_compiling()
    one_loop_at_a_time()
    return keep_compiled(compile_cache)


def slow_search() -> str:
    """What to say where a job searches trellises on a CPU without the C++ library; empty where it does not.

    Example:
        >>> slow_search() == "" or "install" in slow_search() or "QLR_NATIVE" in slow_search()
        True
    """
    what = "trellises are searched in XLA, about ten times slower than in C++ (fewer --state-bits take less)"
    return _without_library(what, "qlr_search")


def slow_products() -> str:
    """What to say where a packed model generates on a CPU without the C++ library; empty where it does not.

    Example:
        >>> slow_products() == "" or "decoded" in slow_products()
        True
    """
    what = "packed weights are decoded once, to the size of dense ones, not multiplied by from their codes"
    return _without_library(what, "qlr_product", "qlr_decode")


def _without_library(what: str, *names: str) -> str:
    import jax

    from qlr_jax import native

    native.registered(*names)  # JAX may refuse the library
    return f"{what}: {native.missing()}" if jax.default_backend() == "cpu" and native.missing() else ""
