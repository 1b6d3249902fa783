"""One BLAS thread for small factorizations: OpenBLAS's own threads spin, and on busy cores they cost a thousand times the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run numpy's and scipy's BLAS, which JAX's factorizations on a CPU use too, on the calling thread; also a decorator.

    Does nothing where threadpoolctl is not installed.

    Example:
        >>> with one_blas_thread():
        ...     pass
    """
    try:
        import scipy.linalg  # noqa: F401  loads the BLAS that JAX uses: only what is loaded can be limited
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield
        return
    with threadpool_limits(limits=1, user_api="blas"):
        yield
