"""Arrays that are read when they are used: a model whose weights stay on disk, a solution that is decoded on demand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import numpy as np

Value = TypeVar("Value")


class Lazy:
    """An array that `read` makes anew at every use; nothing is kept.

    Example:
        >>> lazy = Lazy((2, 2), lambda: np.eye(2, dtype=np.float32))
        >>> lazy.shape, len(lazy), float(np.asarray(lazy).sum())
        ((2, 2), 2, 2.0)
    """

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Any], dtype: Any = np.float32):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def dense(self) -> Any:
        """The array."""
        return self._read()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype)


class LazyMap(Mapping[str, Value], Generic[Value]):
    """name -> value, made anew at every access; the names are known beforehand."""

    def __init__(self, names: Any, make: Callable[[str], Value]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
