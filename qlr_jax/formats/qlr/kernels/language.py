"""Triton's language as kernels import it, `tl`, with types that a checker can follow.

Triton's own describe its compiler: there a constexpr has no attributes, static_range no iterator, and a launch no options.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TypeAlias

    class _Anything(type):
        def __getattr__(cls, name: str) -> Any: ...

    class tl(metaclass=_Anything):
        constexpr: TypeAlias = Any
        static_range = range

    def constant(value: int) -> Any:
        """A number that kernels may use although it is global."""
        ...
else:
    import triton.language as tl

    constant = tl.constexpr

__all__ = ["constant", "tl"]


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int) -> None:
    """Run a kernel on a grid of programs.

    Args:
        kernel: a function under `triton.jit`.
        grid: programs along each axis.
        arguments: the kernel's own.
        num_warps: warps of 32 threads a program.
    """
    kernel[grid](*arguments, num_warps=num_warps)
