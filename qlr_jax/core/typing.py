"""Shapes in signatures: jaxtyping where it is installed, plain annotations where it is not."""

from typing import Any

from jax import Array

try:
    from jaxtyping import Bool, Float, Int, UInt8
except ImportError:  # a machine with jax and numpy alone

    class _Shape:
        def __getitem__(self, item: Any) -> Any:
            return item[0] if isinstance(item, tuple) else item

    Bool = Float = Int = UInt8 = _Shape()  # type: ignore[assignment]

__all__ = ["Array", "Bool", "Float", "Int", "UInt8"]
