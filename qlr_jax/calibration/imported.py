"""Hessians that were made elsewhere: plain files, one array an input, by the names that checkpoints use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from qlr_jax.core.objective import checked_hessian
from qlr_jax.errors import QLRError
from qlr_jax.models.checkpoint import locate_tensor
from qlr_jax.models.names import input_of, kind_of, layer_of
from qlr_jax.models.sites import BY_KIND, siblings
from qlr_jax.paths import local

SUFFIXES = (".safetensors", ".npz", ".npy")


def read_hessians(
    source: str | Path,
    sizes: Mapping[str, int],
    keep: Callable[[str, np.ndarray], np.ndarray] = lambda name, value: value,
) -> dict[str, Float[np.ndarray, "n n"]]:
    """H = E[x xᵀ] of the input of every linear layer, from files; layers of one input share the array.

    One is read and checked at a time. What a .npy or .safetensors file holds just as it is used, in float32 and exactly symmetric,
    stays there and is read where it is needed: the files must not change until then. Anything else goes by way of `keep`.

    Args:
        source: a file of many arrays, or a folder of files (.safetensors, .npz, .npy). An array is named, or where its file holds
            one array the file is named, by an input (`model.layers.0.self_attn.qkv`, `model.layers.0.mlp.gate_up`) or by a linear
            layer that reads it (`model.layers.0.self_attn.q_proj`); `.weight` at the end of a name does not matter. Any positive
            scale does: only ratios count.
        sizes: linear layer -> its number of inputs n.
        keep: (name, H) -> what is returned in its place, e.g. the same on disk.

    Raises:
        QLRError: nothing there, a file that cannot be read, an input that no array is for, an array that is not a symmetric
            positive semi-definite (n, n).

    Example:
        >>> import tempfile
        >>> name = "model.layers.0.mlp.up_proj"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(Path(folder) / "all.npz", **{"model.layers.0.mlp.gate_up": np.eye(4)})
        ...     read_hessians(Path(folder) / "all.npz", {name: 4})[name].shape
        (4, 4)
    """
    path = local(source)
    if not path.exists():
        raise QLRError(f"{source} does not exist; pass a folder or a file of Hessians ({', '.join(SUFFIXES)})")
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES) if path.is_dir() else [path]
    where: dict[str, tuple[Path, str]] = {}
    for file in files:
        keys = _keys(file)
        for key in keys:
            name = key.removesuffix(".weight")
            by_file = len(keys) == 1 and not name.startswith("model.")
            where[file.name.removesuffix(file.suffix).removesuffix(".weight") if by_file else name] = (file, key)
    hessians: dict[str, np.ndarray] = {}
    read: dict[str, np.ndarray] = {}
    for name, size in sizes.items():
        given = next((n for n in _names(name) if n in where), None)
        if given is None:
            shown = ", ".join(list(where)[:3]) or "nothing"
            raise QLRError(f"{source} has no Hessian of {input_of(name)}, the input of {name}; it has {shown}")
        if given not in read:
            try:
                mapped = _mapped(*where[given])
                checked = checked_hessian(_read(*where[given]) if mapped is None else mapped, size)
                if mapped is not None and np.array_equal(mapped, checked):
                    read[given] = mapped
                else:
                    read[given] = keep(given, checked)
            except QLRError as error:
                raise QLRError(f"{where[given][0]}: {given}: {error}") from None
        hessians[name] = read[given]
    return hessians


def _names(linear: str) -> list[str]:
    """What the Hessian of a layer's input may be called: by the layer, by the input, by another layer that reads it."""
    prefix = f"model.layers.{layer_of(linear)}."
    return [linear, input_of(linear), *(prefix + BY_KIND[kind].path for kind in siblings(kind_of(linear)))]


def _keys(file: Path) -> list[str]:
    try:
        if file.suffix == ".npy":
            return [""]
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                return list(arrays.files)
        from safetensors import safe_open

        with safe_open(str(file), framework="np") as handle:
            return list(handle.keys())
    except Exception as error:  # zipfile, numpy and safetensors raise many kinds
        raise QLRError(f"{file} cannot be read as {file.suffix} ({error}); pass .safetensors, .npz or .npy") from None


def _mapped(file: Path, key: str) -> np.ndarray | None:
    """A float32 array as it lies in its file, of which only what is used is read; None where there is none.

    A plain array, not a np.memmap: that one's `filename` would pass for a file that holds nothing else.
    """
    try:
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r")
            return array.view(np.ndarray) if array.dtype == np.float32 else None
        if file.suffix == ".safetensors":
            kind, shape, offset = locate_tensor(file, key)
            return np.memmap(file, np.float32, "r", offset, shape).view(np.ndarray) if kind == "F32" else None
    except Exception:  # `_read` says what is wrong
        return None
    return None


def _read(file: Path, key: str) -> np.ndarray:
    try:
        if file.suffix == ".npy":
            return np.load(file)
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                return arrays[key]
        import ml_dtypes  # noqa: F401  numpy learns bfloat16
        from safetensors import safe_open

        with safe_open(str(file), framework="np") as handle:
            return handle.get_tensor(key)
    except Exception as error:
        raise QLRError(f"{file} cannot be read ({error}); get it again") from None
