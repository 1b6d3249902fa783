"""Arrays that are read when they are used: a model whose weights stay on disk, a solution that is decoded on demand."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any, TypeVar

import numpy as np

from qlr_jax.engine import Call

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Lazy:
    """An array that `read` makes again at every use; nothing is kept.

    Example:
        >>> lazy = Lazy((2, 2), lambda: np.eye(2, dtype=np.float32))
        >>> lazy.shape, len(lazy), float(np.asarray(lazy).sum())
        ((2, 2), 2, 2.0)
    """

    def __init__(self, shape: tuple[int, ...], read: Callable[[], Any], dtype: Any = np.float32):
        self.shape, self.dtype, self._read = tuple(shape), np.dtype(dtype), read

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return self.shape[0]

    def dense(self) -> Any:
        """The array."""
        return self._read()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._read(), dtype)


def handle(mapping: Mapping[Any, Any], key: Any) -> Any:
    """What stands for a mapping's value in a piece: of a `LazyMap` it is made where the piece runs.

    Example:
        >>> handle({"a": 1}, "a"), handle(LazyMap(["a"], len), "a")
        (1, Call(function=<built-in function len>, arguments=('a',), kept=False))
    """
    return mapping.handle(key) if isinstance(mapping, LazyMap) else mapping[key]


class LazyMap(MutableMapping[Key, Value]):
    """key -> value, made again at every access; the keys are known beforehand, and those of another such map can be added.

    Example:
        >>> squares = LazyMap([1, 2], lambda i: i * i)
        >>> squares.update(LazyMap([3], lambda i: 100 * i))
        >>> dict(squares)
        {1: 1, 2: 4, 3: 300}
    """

    def __init__(self, keys: Iterable[Key] = (), make: Callable[[Key], Value] | None = None):
        assert make is not None or not keys
        self._makes: dict[Key, Callable[[Key], Value]] = dict.fromkeys(keys, make)  # pyright: ignore[reportAttributeAccessIssue]

    def __getitem__(self, key: Key) -> Value:
        return self._makes[key](key)

    def handle(self, key: Key) -> Any:
        """What stands for the value in a piece (`qlr_jax.engine`): what `make` says, where it says so, else a `Call` of it."""
        make = self._makes[key]
        stands_for = getattr(make, "stands_for", None)
        return Call(make, (key,)) if stands_for is None else stands_for(key)

    def __setitem__(self, key: Key, value: Value) -> None:
        self._makes[key] = lambda _: value

    def __delitem__(self, key: Key) -> None:
        del self._makes[key]

    def __contains__(self, key: object) -> bool:
        return key in self._makes

    def __iter__(self) -> Iterator[Key]:
        return iter(self._makes)

    def __len__(self) -> int:
        return len(self._makes)

    def update(self, other: Any = (), /, **named: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Add what another mapping holds; nothing of another `LazyMap` is made for that."""
        if isinstance(other, LazyMap):
            self._makes |= other._makes
        else:
            super().update(other, **named)
